"""Where the standalone program keeps what it downloads and makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "DYNFUSE_HOME"


def home() -> Path:
    """The folder that DYNFUSE_HOME names, else "dynfuse" in the user's folder for caches. It need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    return _caches() / "dynfuse"


def encoders_folder() -> Path:
    """For the encoders' weights."""
    return home() / "encoders"


def references_folder() -> Path:
    """For the reference pictures."""
    return home() / "references"


def _caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


__all__ = ["VARIABLE", "encoders_folder", "home", "references_folder"]
