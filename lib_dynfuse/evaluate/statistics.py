"""What scores say: means with bootstrap intervals over pairs, and paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 4000
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def harmonic_mean(first: Floats, second: Floats) -> Floats:
    """2 a b / (a + b), element by element; 0 where either is 0, also where both are."""
    total = first + second
    return np.divide(2 * first * second, total, out=np.zeros_like(total), where=total > 0)


@dataclass(frozen=True)
class Resamples:
    """Draws of pairs with replacement, and of seeds within each drawn pair (R draws of P pairs and S seeds).

    Both levels vary: which pairs there are, and which noise a picture began with. Everything that is compared uses the same draws.
    pairs: (R, P), seeds: (R, P, S), indices.
    """

    pairs: NDArray[np.int64]
    seeds: NDArray[np.int64]

    @classmethod
    def draw(cls, pairs: int, seeds: int, count: int = RESAMPLES, seed: int = _SEED) -> Resamples:
        return cls.draw_together(np.arange(pairs)[:, None], seeds, count, seed)

    @classmethod
    def draw_together(cls, groups: NDArray[np.int64], seeds: int, count: int = RESAMPLES, seed: int = _SEED) -> Resamples:
        """groups: (G, P / G) indices of pairs that are not independent, and so are drawn all or none."""
        rng = np.random.default_rng(seed)
        drawn = groups[rng.integers(len(groups), size=(count, len(groups)))].reshape(count, groups.size)
        return cls(drawn, rng.integers(seeds, size=(count, groups.size, seeds)))

    def pair_means(self, scores: Floats) -> Floats:
        """scores: (P, S). Returns (R, P), the mean over the drawn seeds of each drawn pair."""
        return scores[self.pairs[:, :, None], self.seeds].mean(2)

    def of_mean(self, scores: Floats) -> Interval:
        """The mean over pairs and seeds of (P, S) scores; for a paired difference, of the differences."""
        return _interval(float(scores.mean()), self.pair_means(scores).mean(1))

    def of_harmonic_mean_of_means(self, first: Floats, second: Floats) -> Interval:
        """The mean over pairs of the harmonic mean of each pair's mean scores, (P, S) both."""
        mean = float(harmonic_mean(first.mean(1), second.mean(1)).mean())
        return _interval(mean, harmonic_mean(self.pair_means(first), self.pair_means(second)).mean(1))


def _interval(mean: float, draws: Floats) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


__all__ = ["RESAMPLES", "Interval", "Resamples", "harmonic_mean"]
