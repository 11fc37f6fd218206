"""`python -m lib_dynfuse merge`: a subject LoRA and a style LoRA as one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .bars import Bars
from .fusion.merging import describe_merged, merge_files
from .given_files import read_sides
from .lora import check_target
from .settings import FuseSettings


@dataclass(frozen=True)
class Request:
    """What to merge. subjects, styles: paths of LoRA files. rank: see write_merged. steps: see merge_files."""

    subjects: Sequence[Path]
    styles: Sequence[Path]
    out: Path
    settings: FuseSettings
    rank: int | None = None
    dtype: torch.dtype = torch.float16
    steps: int = 30


def run(request: Request) -> int:
    """Write the file and say what is in it. Returns the exit code.

    Raises LoraError, FusionError or SettingsError with a sentence for the user.
    """
    check_target(request.out)
    subjects, styles, settings = read_sides(request.subjects, request.styles, request.settings)
    with Bars(delay=1.0) as bars:
        merged = merge_files(
            *(request.out, subjects, styles, settings),
            steps=request.steps,
            rank=request.rank,
            dtype=request.dtype,
            progress=lambda done, total: bars.show("Merging", done, total, "layer"),
        )
    print(*describe_merged(merged), sep="\n")
    return 0


__all__ = ["Request", "run"]
