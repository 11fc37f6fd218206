"""`pip install .`: the program, its version and all that it needs of this repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lib_dynfuse.cli import main
from lib_dynfuse.version import VERSION

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_program_tells_its_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"DynFuse {VERSION}\n"


@pytest.mark.parametrize(
    ("started", "called"), [("/home/me/venv/bin/dynfuse", "dynfuse"), ("/copy/lib_dynfuse/__main__.py", "python -m lib_dynfuse")]
)
@pytest.mark.parametrize("command", [[], ["merge"], ["bench"], ["toy"]])
def test_the_program_is_called_as_it_was_started(started, called, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started, *command, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith(f"usage: {' '.join([called, *command])} ")


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert 'dynamic = ["version"]' in PROJECT
    assert 'attr = "lib_dynfuse.version.VERSION"' in PROJECT
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == VERSION


def test_every_folder_with_code_is_a_package_that_is_installed():
    setuptools = pytest.importorskip("setuptools", reason="Python 3.13 brings none")
    include = re.search(r"include = \[(.*)\]", PROJECT)[1].replace('"', "").split(", ")
    found = set(setuptools.find_packages(str(ROOT), include=include))
    folders = {path.parent for name in ("lib_dynfuse", "dynfuse_world") for path in (ROOT / name).rglob("*.py")}
    assert found == {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}


@pytest.mark.parametrize("name", ["lib_dynfuse", "dynfuse_world"])
def test_every_file_that_is_no_code_is_installed(name):
    patterns = re.findall(r'"([^"]+)"', re.search(rf"^{name} = \[(.*)\]", PROJECT, re.M)[1])
    package = ROOT / name
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    # gradio writes a .pyi beside each component, when a WebUI runs this copy.
    wanted = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".pyi", ".md")}
    assert wanted
    assert wanted <= packed


def test_the_programs_entry_can_be_called():
    module, function = re.search(r'^dynfuse = "([\w.]+):(\w+)"', PROJECT, re.M).groups()
    assert getattr(__import__(module, fromlist=[function]), function) is main
