"""`python -m lib_dynfuse inspect FILE [FILE]`: what LoRA files hold, and whether two go together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from .lora import LoraError, compatible, read_lora
from .lora.report import describe, describe_pair
from .printable import encodable, printable


def inspect_files(paths: Sequence[str], out: TextIO, err: TextIO | None = None) -> int:
    """Print the report of each file and, for two, whether they go together. Returns the exit code.

    0: read, and two files go together. 2: a file cannot be used, of which nothing is printed to `out`, or two do not go together;
    one sentence goes to `err` (standard error by default). What a stream's encoding lacks is printed as "?".
    """
    err = err if err is not None else sys.stderr
    try:
        files = [read_lora(path) for path in paths]
    except LoraError as error:
        _print(str(error), err)
        return 2
    for index, file in enumerate(files):
        _print("\n".join([*([""] if index else []), *describe(file)]), out)
    if len(files) != 2:
        return 0
    _print("", out)
    if reason := compatible(*files):
        _print(printable(reason, 800), err)
        return 2
    _print("\n".join(describe_pair(*files)), out)
    return 0


def _print(text: str, stream: TextIO) -> None:
    print(encodable(text, stream), file=stream)


__all__ = ["inspect_files"]
