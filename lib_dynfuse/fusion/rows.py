"""Rows: which image each row of a denoiser batch belongs to, and whether it is conditional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_GOLDEN = (5**0.5 - 1) / 2


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
    """Rows and sampled tokens as tensors on a device, made once for each pattern so that no later step copies indices there."""

    device: torch.device
    _known: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def numbers(self, values: Sequence[int]) -> Tensor:
        """(n,) int64."""
        key = ("numbers", *values)
        if key not in self._known:
            self._known[key] = self._kept(torch.tensor(values, dtype=torch.long))
        return self._known[key]

    def samples(self, positions: Sequence[int], tokens: int, wanted: int) -> Tensor:
        """Where the samples of these rows lie in a batch of rows of `tokens` tokens, flattened: (rows * samples,) int64."""
        key = ("samples", tokens, wanted, *positions)
        if key not in self._known:
            chosen = sampled_tokens(tokens, wanted)
            self._known[key] = self._kept((torch.tensor(positions, dtype=torch.long)[:, None] * tokens + chosen).flatten())
        return self._known[key]

    def reciprocals(self, values: Sequence[int]) -> Tensor:
        """1 / n for each number, 1 for 0: (n,) float32."""
        key = ("reciprocals", *values)
        if key not in self._known:
            self._known[key] = self._kept(1.0 / torch.tensor(values, dtype=torch.float32).clamp_min(1))
        return self._known[key]

    def _kept(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return tensor.to(self.device, copy=True)


def sample_count(tokens: int, wanted: int) -> int:
    """How many of a row's tokens are measured; 0 wanted: all."""
    return min(tokens, wanted) if wanted else tokens


def sampled_tokens(tokens: int, wanted: int) -> Tensor:
    """Which tokens are measured: one of each of `wanted` equal stretches, (min(tokens, wanted),) int64; 0 wanted: all.

    Its place in the stretch follows the golden ratio: a fixed one would take the same column of the picture again and again wherever
    the stretch is as long as the picture is wide.
    """
    if sample_count(tokens, wanted) == tokens:
        return torch.arange(tokens)
    number = torch.arange(wanted)
    starts = torch.arange(wanted + 1) * tokens // wanted
    return starts[:-1] + ((number * _GOLDEN) % 1.0 * starts.diff()).long()


__all__ = ["RowIndices", "Rows", "sample_count", "sampled_tokens"]
