"""What the command line calls itself in its sentences: as the user called it."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """`dynfuse` where pip's script was started, else `python -m lib_dynfuse`."""
    return "dynfuse" if sys.argv and Path(sys.argv[0]).stem == "dynfuse" else "python -m lib_dynfuse"
