"""Where in the denoising a call of the denoiser is, and how a session is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One call of the denoiser.

    index: of the sampler's step that it belongs to, from 0. count: the steps of the pass. sigma: the noise level of the call (sigma in
    VE units, or the flow time), NaN where nobody knows it. progress: 0 at the first step, 1 at the last.
    """

    index: int
    count: int
    sigma: float = math.nan
    progress: float = 0.0

    @classmethod
    def of(cls, index: int, count: int, sigma: float = math.nan) -> Step:
        """The step of this index among `count`; an index beyond the last counts as the last."""
        count = max(1, count)
        index = min(max(0, index), count - 1)
        return cls(index, count, sigma, index / max(1, count - 1))


# A session that decides step by step has methods for each of these; one that only knows of calls is told of new ones.


def begin_step(session: Any, step: Step) -> None:
    """A denoiser step begins."""
    begin = getattr(session, "begin", None)
    if begin is not None:
        begin(step)
    else:
        session.new_step()


def repeat_step(session: Any) -> None:
    """The step's calls are about to be made once more."""
    repeat = getattr(session, "repeat", None)
    if repeat is not None:
        repeat()
    else:
        session.new_step()


def end_step(session: Any) -> None:
    """The step's calls are over."""
    end = getattr(session, "end_step", None)
    if end is not None:
        end()


def is_undecided(session: Any) -> bool:
    """Whether rows ran in this step before their image's choice was known: the negative prompt alone, and first."""
    return bool(getattr(session, "undecided", False))


__all__ = ["Step", "begin_step", "end_step", "is_undecided", "repeat_step"]
