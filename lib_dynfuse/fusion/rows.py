"""Rows: which image each row of a denoiser batch belongs to, and whether it is conditional."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BITS = 24
_GOLDEN = round((5**0.5 - 1) / 2 * (1 << _BITS))


@dataclass(frozen=True)
class Rows:
    """One model call's batch, row by row.

    images: image index of each row, 0 <= index < count. conditional: True for a row that sees the prompt, False for one that
    sees the negative prompt. count: images of the whole job's batch; a split call may hold only some of them.
    """

    images: tuple[int, ...]
    conditional: tuple[bool, ...]
    count: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.conditional):
            raise ValueError(f"{len(self.images)} image indices but {len(self.conditional)} conditional flags")
        if self.images and not 0 <= min(self.images) <= max(self.images) < self.count:
            raise ValueError(f"image indices {self.images} do not fit {self.count} images")

    @classmethod
    def separate(cls, rows: int) -> Rows:
        """Every row an image of its own: what is assumed when no host says otherwise."""
        return cls(tuple(range(rows)), (True,) * rows, rows)

    def of_batch(self, batch: int) -> Rows:
        """The rows of a layer's input of this batch size.

        A host may fold space into the batch (HyperTile: each row becomes consecutive tiles), which leaves the rows as they are. An input
        that does not divide into the rows is shared by all images; it is then decided on as it is.
        """
        return self if batch % len(self.images) == 0 else Rows((0,) * batch, (True,) * batch, self.count)

    @property
    def voting(self) -> tuple[int, ...]:
        """Positions of the conditional rows."""
        return tuple(position for position, conditional in enumerate(self.conditional) if conditional)

    def deciding(self, known: frozenset[int]) -> tuple[tuple[int, ...], bool]:
        """(position of the row that decides for each image that is not known yet, whether each of them is conditional).

        It is the image's first conditional row: whether further parts of its prompt (AND), tiles or images run in the same call or
        in later ones then makes no difference. An image that has none in this call is decided by its first row.
        """
        first: dict[int, int] = {}
        for position in sorted(range(len(self.images)), key=lambda at: not self.conditional[at]):
            if self.images[position] not in known:
                first.setdefault(self.images[position], position)
        positions = tuple(first[image] for image in sorted(first))
        return positions, all(self.conditional[position] for position in positions)


@dataclass
class RowIndices:
    """Numbers of rows, sites and sampled tokens as tensors on a device. They are made there, of the arguments of kernels, once for each
    pattern: nothing is copied to the device, whenever a host changes its ways.
    """

    device: torch.device
    _numbers: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _samples: dict[tuple[tuple[int, ...], int, int], Tensor] = field(default_factory=dict)

    def numbers(self, values: Sequence[int]) -> Tensor:
        """(n,) int64."""
        key = tuple(values)
        known = self._numbers.get(key)
        if known is None:
            with torch.inference_mode(False):
                known = self._numbers[key] = torch.cat([self._run(*run) for run in _runs(key)] or [self._run(0, 0, 0)])
        return known

    def _run(self, start: int, step: int, length: int) -> Tensor:
        if not step:
            return torch.full((length,), start, dtype=torch.long, device=self.device)
        return torch.arange(start, start + step * length, step, device=self.device)

    def samples(self, positions: Sequence[int], tokens: int, wanted: int) -> Tensor:
        """Where the samples of these rows lie in a batch of rows of `tokens` tokens, flattened: (rows * samples,) int64."""
        key = (tuple(positions), tokens, wanted)
        known = self._samples.get(key)
        if known is None:
            with torch.inference_mode(False):
                chosen = sampled_tokens(tokens, wanted, self.device)
                known = self._samples[key] = (self.numbers(positions)[:, None] * tokens + chosen).flatten()
        return known

    def reciprocals(self, values: Sequence[int]) -> Tensor:
        """1 / n for each number, 1 for 0: (n,) float32."""
        return 1.0 / self.numbers(values).clamp_min(1)


def _runs(values: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(start, step, length) of the arithmetic progressions that the numbers fall into."""
    at = 0
    while at < len(values):
        step = values[at + 1] - values[at] if at + 1 < len(values) else 0
        end = at + 1
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        yield values[at], step, end - at
        at = end


def sample_count(tokens: int, wanted: int) -> int:
    """How many of a row's tokens are measured; 0 wanted: all."""
    return min(tokens, wanted) if wanted else tokens


def sampled_tokens(tokens: int, wanted: int, device: torch.device | None = None) -> Tensor:
    """Which tokens are measured: one of each of `wanted` equal stretches, (min(tokens, wanted),) int64; 0 wanted: all.

    Its place in the stretch follows the golden ratio: a fixed one would take the same column of the picture again and again wherever
    the stretch is as long as the picture is wide.
    """
    if sample_count(tokens, wanted) == tokens:
        return torch.arange(tokens, device=device)
    number = torch.arange(wanted, device=device)
    starts = (torch.arange(wanted + 1, device=device) * tokens).div(wanted, rounding_mode="floor")
    # The fraction in 2^-24: whole numbers, because not every device has float64.
    return starts[:-1] + (((number * _GOLDEN) % (1 << _BITS) * starts.diff()) >> _BITS)


__all__ = ["RowIndices", "Rows", "sample_count", "sampled_tokens"]
