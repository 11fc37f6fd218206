"""install.py: what a WebUI runs at every launch."""

import importlib.util
import runpy
import sys
import types
from pathlib import Path

import pytest

INSTALL = str(Path(__file__).parents[1] / "install.py")


@pytest.fixture
def launch(monkeypatch):
    """The WebUI's module of this name; `.commands` are those given to pip."""
    module = types.ModuleType("launch")
    module.commands = []
    module.args = types.SimpleNamespace(skip_install=False)
    module.run_pip = lambda command, what: module.commands.append(command)
    monkeypatch.setitem(sys.modules, "launch", module)
    return module


def without(monkeypatch, *missing):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else original(name, *rest))


def test_a_webui_with_open_clip_gets_nothing(launch):
    runpy.run_path(INSTALL)
    assert launch.commands == []


def test_a_webui_without_it_gets_it_without_dependencies(launch, monkeypatch):
    without(monkeypatch, "open_clip", "ftfy")
    runpy.run_path(INSTALL)
    assert launch.commands == ["install --no-deps open_clip_torch==2.20.0 ftfy"]


def test_a_user_who_wants_no_installing_gets_none(launch, monkeypatch):
    without(monkeypatch, "open_clip")
    launch.args.skip_install = True
    runpy.run_path(INSTALL)
    assert launch.commands == []
