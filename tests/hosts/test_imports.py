"""Arrows never point back: webui -> hosts -> tuning -> guidance, fusion -> lora -> settings; in hosts nothing goes round in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lib_dynfuse

ROOT = Path(lib_dynfuse.__file__).parent
ORDER = ("settings", "lora", "fusion", "guidance", "tuning", "hosts", "webui")


def modules():
    """Dotted name below lib_dynfuse -> file."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imports(name, path):
    """The modules of the package that a module imports while it is loaded."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in MODULES else ".".join(base)


MODULES = modules()
GRAPH = {name: set(imports(name, path)) & MODULES.keys() for name, path in MODULES.items()}


@pytest.mark.parametrize("folder", ORDER)
def test_no_module_imports_what_stands_above_it(folder):
    above = ORDER[ORDER.index(folder) + 1 :]
    mine = [name for name in GRAPH if name.split(".")[0] == folder]
    assert mine
    assert [(name, other) for name in mine for other in GRAPH[name] if other.split(".")[0] in above] == []


@pytest.mark.parametrize("start", [name for name in GRAPH if name.startswith("hosts")])
def test_no_import_of_hosts_comes_back_to_itself(start):
    reached, ahead = set(), [start]
    while ahead:
        for name in GRAPH[ahead.pop()] - reached:
            reached.add(name)
            ahead.append(name)
    assert start not in reached
