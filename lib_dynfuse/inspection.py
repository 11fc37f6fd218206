"""`python -m lib_dynfuse inspect FILE [FILE]`: what LoRA files hold, and whether two go together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from .lora import LoraError, compatible, read_lora
from .lora.report import describe, describe_pair


def inspect_files(paths: Sequence[str], out: TextIO, err: TextIO | None = None) -> int:
    """Print the report of each file and, for two, whether they go together. Returns the exit code.

    0: read, and two files go together. 2: a file cannot be used, of which nothing is printed to `out`, or two do not go together;
    one sentence goes to `err` (standard error by default).
    """
    err = err if err is not None else sys.stderr
    try:
        files = [read_lora(path) for path in paths]
    except LoraError as error:
        print(error, file=err)
        return 2
    for index, file in enumerate(files):
        print(*([""] if index else []), *describe(file), sep="\n", file=out)
    if len(files) != 2:
        return 0
    print(file=out)
    if reason := compatible(*files):
        print(reason, file=err)
        return 2
    print(describe_pair(*files), file=out)
    return 0


__all__ = ["inspect_files"]
