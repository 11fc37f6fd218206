"""Plans that come along, to be copied and filled: TOML files in this folder."""

from __future__ import annotations

import re
from pathlib import Path

from ..atomic import write_whole
from ..folder import EvaluationError

_FOLDER = Path(__file__).parent
_BASE = re.compile(r'^base = "([^"]+)"', re.M)
_PARTS = ("pairs",)
"""Files that plans stand on, and that are no plans."""


def shipped_plans() -> tuple[str, ...]:
    """Their names."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml") if path.stem not in _PARTS))


def copy_plan(name: str, target: Path) -> list[Path]:
    """Write the plan to `target`, or into the folder `target`; and beside it what it stands on, unless that is there.

    Returns what was written. Raises EvaluationError where the plan is there already; OSError.
    """
    path = target if target.suffix == ".toml" else target / f"{name}.toml"
    if path.exists():
        raise EvaluationError(f"{path} is there already, and is not overwritten.")
    text = (_FOLDER / f"{name}.toml").read_text("utf-8")
    written = []
    for part in _BASE.findall(text):
        beside = path.with_name(part)
        if not beside.exists():
            write_whole(beside, (_FOLDER / part).read_bytes())
            written.append(beside)
    write_whole(path, text.encode())
    return [path, *written]


__all__ = ["copy_plan", "shipped_plans"]
