"""What the documents say of the program, held against the program."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lib_dynfuse.cli import main
from lib_dynfuse.settings import FuseSettings, field_metadata, field_types, format_value

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("dynfuse_world/*.md")])

# The index's tags.json and the fields that its validator asks for (AUTOMATIC1111/stable-diffusion-webui-extensions, 2026-05).
INDEX_TAGS = {
    "script", "localization", "tab", "dropdown", "ads", "installed", "training", "models", "UI related", "prompting", "editing",
    "manipulations", "online", "animation", "query", "science", "extras",
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ +(.*?) *$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^    .*$", "", page.read_text(encoding="utf-8"), flags=re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link} in {page.name} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{link} in {page.name} has no such heading"


def settings_table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/settings.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == len({key for key, _ in rows}), "a setting stands there twice"
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows}


def test_the_table_has_every_setting_in_order() -> None:
    assert list(settings_table()) == list(field_types())


@pytest.mark.parametrize("name", field_types())
def test_the_table_says_default_and_choices(name: str) -> None:
    default, values, meaning = settings_table()[name]
    assert default == format_value(getattr(FuseSettings(), name))
    metadata = field_metadata(name)
    if metadata["choices"]:
        assert {choice.strip() for choice in values.split(",")} == set(metadata["choices"])
    if metadata["minimum"] is not None:
        least, most = (None if bound is None else format_value(float(bound)) for bound in (metadata["minimum"], metadata["maximum"]))
        assert values == (f"from {least}" if most is None else f"{least} to {most}")
    assert meaning


def test_every_method_is_explained() -> None:
    explained = re.findall(r"^\| `([a-z][\w-]*)`(?:, the default)? \|", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.M)
    explained.remove("method")  # the head of the table
    assert sorted(explained) == sorted(field_metadata("method")["choices"])


def test_the_readme_is_short() -> None:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(text.split()) <= 600


def test_every_page_is_reached_from_the_readme() -> None:
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        queue += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= reached


def test_the_entry_for_the_extension_index() -> None:
    (path,) = (ROOT / "docs/extension-index").iterdir()
    assert path.suffix == ".json"
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert list(entry) == ["name", "url", "description", "tags"]  # the date is added by the index itself
    assert entry["name"] == "DynFuse"
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+\.git", entry["url"])
    assert entry["description"].strip()
    assert entry["description"].isascii()
    assert entry["tags"]
    assert len(entry["tags"]) == len(set(entry["tags"]))
    # For translations; set by the WebUI; for advertisements; for what connects in regular use beyond a download of assets.
    assert set(entry["tags"]) <= INDEX_TAGS - {"localization", "installed", "ads", "online"}


def test_the_readmes_command_has_all_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """But for the files, which are the reader's."""
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^    dynfuse (generate .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert main(shlex.split(line)) != 0
    assert "dog.safetensors cannot be read: there is no such file" in capsys.readouterr().err
