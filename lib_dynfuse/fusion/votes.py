"""Votes for the coming step: samples kept while a call runs, and measured after it, all layers of one shape together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .divergence import largest_chunk, measured
from .operators import Group

Room = tuple[Tensor, Tensor]
"""Where a site's samples go: of its input, (n, in), and of its base output, (n, out)."""


@dataclass
class Ballot:
    """The samples of one group's sites in one call. The group's layers are linear, or convolutions of 1 x 1.

    wanted: tokens a row at most, 0 for all. tokens: of a row of these layers; sampled: of these, how many are kept.
    """

    group: Group
    numbers: tuple[int, ...]
    tokens: int
    wanted: int
    _boxes: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    _rooms: dict[tuple[int, int], Room] = field(default_factory=dict)
    _filled: dict[tuple[int, ...], set[int]] = field(default_factory=dict)

    @property
    def sampled(self) -> int:
        return min(self.tokens, self.wanted) if self.wanted else self.tokens

    def room(self, number: int, images: tuple[int, ...], tokens: int) -> Room | None:
        """Of the site of this number for one conditional row per entry of images; None where its layer has another number of tokens."""
        if tokens != self.tokens:
            return None
        self._filled.setdefault(images, set()).add(number)
        key = (number, len(images))
        if key not in self._rooms:
            x, y = self._box(len(images))
            place = self.numbers.index(number)
            self._rooms[key] = x[place], y[place]
        return self._rooms[key]

    def _box(self, rows: int) -> tuple[Tensor, ...]:
        if rows not in self._boxes:
            samples = rows * self.sampled
            with torch.inference_mode(False), torch.no_grad():
                downs, ups = self.group.downs, self.group.ups
                self._boxes[rows] = tuple(side.new_empty(self.group.size, samples, side.shape[-1]) for side in (downs, ups))
        return self._boxes[rows]

    @torch.no_grad()
    def counted(self, criterion: str, rms: bool, levels: Tensor | None) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
        """What the calls since the last counting left: (numbers of the sites, images of the rows, (L, rows, P) float32)."""
        for images, filled in self._filled.items():
            if not filled:
                continue
            x, y = self._box(len(images))
            numbers = tuple(number for number in self.numbers if number in filled)
            downs, ups = self.group.downs, self.group.ups
            if len(numbers) < self.group.size:  # a host left layers out of this call
                places = torch.tensor([self.numbers.index(number) for number in numbers], device=x.device)
                x, y, downs, ups = (side.index_select(0, places) for side in (x, y, downs, ups))
            yield numbers, images, _divergences(criterion, rms, x, y, downs, ups, levels, len(images))
        self._filled.clear()


def _divergences(criterion: str, rms: bool, x: Tensor, y: Tensor, downs: Tensor, ups: Tensor, levels: Tensor | None, rows: int) -> Tensor:
    """(L, rows, P). x: (L, n, in), y: (L, n, out), downs: (L, P, r, in), ups: (L, P, r, out); n = rows * samples. levels: (P,)."""
    layers, members, rank, _ = downs.shape
    inner = torch.bmm(downs.flatten(1, 2), x.transpose(1, 2)).view(layers, members, rank, -1)
    if levels is not None:
        inner = inner * levels.to(inner.dtype)[:, None, None]
    chunk = max(1, largest_chunk(x.device) // (members * y.shape[1] * y.shape[2]))
    pieces = []
    for start in range(0, layers, chunk):
        some = slice(start, start + chunk)
        delta = torch.bmm(inner[some].flatten(0, 1).transpose(1, 2), ups[some].flatten(0, 1)).view(-1, members, *y.shape[1:])
        pieces.append(measured(criterion, y[some].unsqueeze(1), delta, rms=rms).view(-1, members, rows, y.shape[1] // rows).mean(-1))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).transpose(1, 2)


__all__ = ["Ballot", "Room"]
