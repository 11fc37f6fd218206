"""The demo: a page that shows what it says, from the shipped weights, without a network."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import base64
import io
import re
import shutil
import socket
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the demo's model is a diffusers pipeline")

from dynfuse_world import demo
from dynfuse_world.benchmark.protocol import REPORTED
from dynfuse_world.demo.page import METHODS
from dynfuse_world.demo.sheet import ENLARGED
from dynfuse_world.judges import load_judges
from dynfuse_world.model import WEIGHTS
from lib_dynfuse import cli
from lib_dynfuse.fusion.selection_map import STYLE, SUBJECT

PAIR = demo.PAIRS[0]
SEEDS = (0, 5)
VOID = ("meta", "img", "br", "hr", "link", "input")


class Page(HTMLParser):
    """Reads a page: its open elements, its pictures, its links, and the judges' words below each picture of both LoRAs."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.ids, self.lines = [], [], [], set(), []
        self.verdicts, self.means, self._numbers = {}, {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        self.addresses += [given[name] for name in ("href", "src") if name in given]
        self.ids.update([given["id"]] if "id" in given else [])
        if tag == "td" and "data-seed" in given:
            self._numbers = self.verdicts.setdefault((given["data-method"], int(given["data-seed"])), [])
        elif tag == "tr" and "data-method" in given:
            self._numbers = self.means.setdefault(given["data-method"], [])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"line {self.getpos()[0]}"
        if tag in ("tr", "table"):
            self._numbers = None

    def handle_data(self, data):
        self.lines.append(data)
        if self._numbers is not None:
            self._numbers += [int(number) for number in re.findall(r"(\d+) %", data)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small demo, made where no connection can be opened."""

    def refuse(*args, **kwargs):
        raise AssertionError("the demo opened a connection")

    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        for name, value in (("PAIRS", (PAIR,)), ("SEEDS", SEEDS), ("STEPS", 3)):
            patch.setattr(demo, name, value)
        assert cli.main(["demo", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(made):
    return Page((made / "index.html").read_text("utf-8"))


def picture(path):
    """The picture behind an enlarged one: (64, 64, 3) uint8."""
    return np.asarray(Image.open(path))[::ENLARGED, ::ENLARGED]


def test_every_element_is_closed_and_every_link_leads_somewhere(page):
    assert page.open == []
    inside = [address for address in page.addresses if address.startswith("#")]
    assert {address[1:] for address in inside} <= page.ids
    assert len(inside) == 2


def test_nothing_is_fetched_from_anywhere(made, page):
    text = (made / "index.html").read_text("utf-8")
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<iframe|srcset", re.sub(r'src="data:[^"]*"', "", text))
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)


def test_every_picture_can_be_decoded_and_is_described(page):
    assert len(page.images) == 2 * 5 + 2 + len(METHODS) * len(SEEDS) + 2
    for image in page.images:
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        decoded.load()
        assert decoded.size == (int(image["width"]), int(image["height"]))
        assert len(image["alt"]) > 10
    assert len({image["alt"] for image in page.images}) == len(page.images)


def test_every_method_is_shown_with_every_seed_and_they_differ(made, page):
    assert set(page.verdicts) == {(method, seed) for method in METHODS for seed in SEEDS}
    files = [made / PAIR.name / f"{method}-{seed}.png" for method, seed in page.verdicts]
    embedded = {image["src"] for image in page.images}
    assert len({picture(file).tobytes() for file in files}) == len(files)
    for file in files:
        assert base64_png(picture(file)) in embedded


def base64_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_the_numbers_are_the_judges_words_on_the_same_pictures(made, page):
    judges = load_judges()
    for method in METHODS:
        pixels = np.stack([picture(made / PAIR.name / f"{method}-{seed}.png") for seed in SEEDS])
        scores = judges.scores(torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2))
        subject, style = (100 * column.double() for column in (scores.subject(PAIR.subject), scores.style(PAIR.style)))
        both = 2 / (1 / subject.clamp(min=1e-30) + 1 / style.clamp(min=1e-30))
        for place, seed in enumerate(SEEDS):
            assert page.verdicts[method, seed] == pytest.approx([float(part[place]) for part in (subject, style)], abs=0.51)
        assert page.means[method] == pytest.approx([float(part.mean()) for part in (subject, style, both)], abs=0.51)


def test_it_says_what_it_is_not(page):
    text = " ".join(" ".join(page.lines).split())
    assert "no evidence about SDXL" in text
    assert "docs/quality.md" in text
    assert PAIR.prompt in text


def holds(whole, part):
    """Whether a picture lies somewhere in another."""
    height, width = part.shape[:2]
    corners = np.argwhere((whole[: 1 - height or None, : 1 - width or None] == part[0, 0]).all(-1))
    return any(np.array_equal(whole[y : y + height, x : x + width], part) for y, x in corners)


def test_the_pairs_are_of_those_on_which_nothing_was_chosen():
    assert len(demo.PAIRS) == 2
    assert set(demo.PAIRS) <= set(REPORTED)


def test_the_map_the_curves_and_the_sheet_lie_beside_the_page(made):
    selection_map = Image.open(made / PAIR.name / "selection-map.png")
    counts = {colour: count for count, colour in selection_map.getcolors(selection_map.width * selection_map.height)}
    assert min(counts[SUBJECT], counts[STYLE]) > 0
    assert Image.open(made / PAIR.name / "similarities.png").width > 500
    strip = np.asarray(Image.open(made / "strip.png"))
    for name in ("subject-alone", "style-alone", f"direct-{SEEDS[0]}", f"default-{SEEDS[0]}"):
        assert holds(strip, np.asarray(Image.open(made / PAIR.name / f"{name}.png")))
    sheet = Image.open(made / "demo.png")
    assert sheet.height > (1 + len(METHODS)) * 64 * ENLARGED


def test_damaged_weights_are_told_in_one_sentence(monkeypatch, tmp_path, capsys):
    weights = shutil.copytree(WEIGHTS, tmp_path / "weights")
    damaged = weights / "loras" / f"{PAIR.subject}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(demo, "run", partial(demo.run, weights=weights))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert damaged.name in said
    assert said.count("\n") == 0
    assert not (tmp_path / "out").exists()
