"""Votes for the coming step: samples kept while a call runs, and measured after it, all layers of one width together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..settings import FuseSettings
from .divergence import Workspace, largest_chunk, measured
from .operators import Group
from .rows import RowIndices, sample_count

if TYPE_CHECKING:
    from .call import Entries, FusionState

Images = tuple[int, ...]


class Box:
    """The samples of a group's sites in calls with the same conditional rows.

    x: for each shape of input (g, n, in); y: (G, n, out), n samples of all rows together. rooms: each site's part, (n, in) and (n, out).
    filled: places of the sites that were run.
    """

    def __init__(self, group: Group, samples: int):
        with torch.inference_mode(False), torch.no_grad():
            self.x = [downs.new_empty(len(downs), samples, downs.shape[-1]) for downs in group.downs]
            self.y = group.ups.new_empty(group.size, samples, group.ups.shape[-1])
        self.rooms = list(zip(group.each(self.x), self.y))
        self.filled: set[int] = set()


@dataclass
class Ballot:
    """The samples of one group's sites. The group's layers are linear, or convolutions of 1 x 1.

    numbers: of the sites. samples: of a row; wanted: the most that the settings ask for, 0 for all.
    """

    group: Group
    numbers: tuple[int, ...]
    samples: int
    wanted: int
    _boxes: dict[Images, Box] = field(default_factory=dict)
    _slots: dict[tuple[tuple[int, ...], Images, int], tuple[Box, Tensor]] = field(default_factory=dict)

    def slot(self, place: int, entries: Entries, tokens: int, state: FusionState) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where a site's samples go, of its input and of its base output, and where they lie in its rows of so many tokens. None where
        they are not as many as there is room for.
        """
        key = (entries.positions, entries.images, tokens)
        known = self._slots.get(key)
        if known is None:
            if sample_count(tokens, self.wanted) != self.samples:
                return None
            images = entries.images
            if images not in self._boxes:
                self._boxes[images] = Box(self.group, len(images) * self.samples)
            places = state.indices(self.group.ups.device).samples(entries.positions, tokens, self.wanted)
            known = self._slots[key] = self._boxes[images], places
        box, places = known
        box.filled.add(place)
        x, y = box.rooms[place]
        return x, y, places

    def forget(self) -> None:
        """Let go of the samples, and of their memory."""
        self._boxes.clear()
        self._slots.clear()

    @torch.no_grad()
    def counted(
        self, criterion: str, rms: bool, levels: Tensor | None, workspace: Workspace, indices: RowIndices
    ) -> Iterator[tuple[tuple[int, ...], Images, Tensor]]:
        """What the calls since the last counting left: (numbers of the sites, images of the rows, (L, rows, P) float32)."""
        for images, box in self._boxes.items():
            if not box.filled:
                continue
            votes = _divergences(criterion, rms, box, self.group, levels, len(images), workspace)
            numbers = self.numbers
            if len(box.filled) < len(numbers):  # a host left layers out of this call
                filled = sorted(box.filled)
                numbers = tuple(numbers[place] for place in filled)
                votes = votes.index_select(0, indices.numbers(filled))
            box.filled.clear()
            yield numbers, images, votes


def measuring_memory(settings: FuseSettings, shapes: Sequence[tuple[int, int]], members: int, tokens: int, images: int) -> tuple[int, int]:
    """What measuring takes on the device beside the LoRAs: (numbers of the denoiser's type, bytes).

    shapes: (in, out) of the sites between whose LoRAs there is a choice. members: B. tokens: of the largest layer's row. Samples of all
    layers are kept where choices are made for the next step; the changes of one layer at a time, and the float32 terms of their
    divergence, are there in any case. An upper bound: deeper layers have fewer tokens, and large groups are cut into chunks.
    """
    if not shapes:
        return 0, 0
    samples = min(settings.vote_tokens or tokens, tokens)
    kept = 0 if settings.decide == "now" and settings.decide_every == 1 else images * samples * sum(map(sum, shapes))
    widest = max(width for _, width in shapes)
    return kept, 4 * (members + 2) * images * samples * widest


def _divergences(criterion: str, rms: bool, box: Box, group: Group, levels: Tensor | None, rows: int, workspace: Workspace) -> Tensor:
    """(G, rows, P). levels: (P,)."""
    ups, y = group.ups, box.y
    size, members, rank, width = ups.shape
    samples = y.shape[1]
    inner = workspace.room("inner", (size, members * rank, samples), y.dtype, y.device)
    for span, downs, x in zip(group.spans, group.downs, box.x):
        torch.bmm(downs.flatten(1, 2), x.transpose(1, 2), out=inner[span])
    if levels is not None:
        inner.view(size, members, -1).mul_(levels.to(inner.dtype)[:, None])
    inner, ups = inner.view(size * members, rank, samples).transpose(1, 2), ups.flatten(0, 1)
    chunk = max(1, largest_chunk(y.device) // (members * samples * width))
    pieces = []
    for start in range(0, size, chunk):
        length = min(chunk, size - start)
        some = slice(start * members, (start + length) * members)
        delta = workspace.room("delta", (length * members, samples, width), y.dtype, y.device)
        torch.bmm(inner[some], ups[some], out=delta)
        base = y.narrow(0, start, length).unsqueeze(1)
        per_token = measured(criterion, base, delta.view(length, members, samples, width), rms=rms, workspace=workspace)
        pieces.append(per_token.view(length, members, rows, -1).mean(-1))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).transpose(1, 2)


__all__ = ["Ballot", "Box", "measuring_memory"]
