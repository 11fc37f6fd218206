"""What is to be done, and what has been done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .colour import Colour
from .diagnosis import Diagnosis
from .methods import Row
from .protocol import CFG_SCALE, PICTURED, PICTURED_SEEDS, PROMPT, SEEDS, STEPS, TUNING, Pair

SCORES = ("subject", "style", "second_subject", "second_style", *Colour._fields)
"""An outcome's, of each picture."""


class Scores(Protocol):
    """What a judge says of B pictures: (B,) probabilities each."""

    def subject(self, name: str) -> Tensor: ...

    def style(self, name: str) -> Tensor: ...


class Judge(Protocol):
    """See dynfuse_world.judges.Judges."""

    def scores(self, pictures: Tensor) -> Scores:
        """pictures: (B, 3, 64, 64) in [-1, 1]."""


@dataclass(frozen=True)
class Setup:
    """weights: folder of the world's networks and LoRAs. references: folder for the guidance's.

    load_judges: makes the first and the second judges of the weights; a function that other processes can import. seeds, steps,
    cfg_scale: the protocol's, but for trials. loudness: factors on the strength of the subject's and the style's file, on top of the set's.
    prompt: a template, see Pair.asked.
    """

    weights: Path
    references: Path
    load_judges: Callable[[Path], tuple[Judge, Judge]]
    seeds: tuple[int, ...] = SEEDS
    steps: int = STEPS
    cfg_scale: float = CFG_SCALE
    loudness: tuple[float, float] = (1.0, 1.0)
    prompt: str = PROMPT


@dataclass(frozen=True)
class Task:
    """shown: how many of the pictures to hand back."""

    pair: Pair
    row: Row
    shown: int = 0


@dataclass(frozen=True)
class Outcome:
    """subject, style, second_subject, second_style: (seeds,) probabilities of the right answers, by the first judges and by the second.
    saturation, contrast, clipped: (seeds,), see colour.py. seconds: of one processor for one picture,
    without making the references.

    pictures: (shown, H, W, 3) uint8.
    """

    pair: Pair
    row: str
    subject: NDArray[np.float64]
    style: NDArray[np.float64]
    second_subject: NDArray[np.float64]
    second_style: NDArray[np.float64]
    saturation: NDArray[np.float64]
    contrast: NDArray[np.float64]
    clipped: NDArray[np.float64]
    seconds: float
    pictures: NDArray[np.uint8]
    diagnosis: Diagnosis | None


def tasks(pairs: Sequence[Pair], rows: Sequence[Row]) -> list[Task]:
    """Every row on every pair, the sweep's on the tuning pairs alone.

    Guided rows first, each on all pairs before the next: they take longest, so that no process is left alone with one at the end; and
    when a pair's second one comes to be made, its references are there.
    """
    return [
        Task(pair, row, PICTURED_SEEDS if pair.plain in PICTURED else 0)
        for row in sorted(rows, key=lambda row: not row.guided)
        for pair in pairs
        if row.group != "sweep" or pair.plain in TUNING
    ]


__all__ = ["SCORES", "Judge", "Outcome", "Scores", "Setup", "Task", "tasks"]
