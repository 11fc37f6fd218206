"""Which fusion is better, measured: `python -m lib_dynfuse toy bench`.

protocol.py says what is fixed, methods.py what is compared, run.py makes and judges the pictures, summary.py tells what the scores
say, table.py and pictures.py show it, diagnosis.py looks for reasons.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; argv: without the program's name. Returns the exit code."""
    from .command import main

    return main(argv)


__all__ = ["main"]
