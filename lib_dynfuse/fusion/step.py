"""Where in the denoising a call of the denoiser is: known to every rule and to every schedule of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


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


__all__ = ["Step"]
