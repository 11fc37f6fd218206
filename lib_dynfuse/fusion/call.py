"""What the layers of a session share while a denoiser call runs: its rows, the step, and the weights that hold in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..settings import FuseSettings
from ..strength import Schedule
from .divergence import Workspace
from .rows import RowIndices, Rows
from .rules import Rule, Votes
from .step import Step

if TYPE_CHECKING:
    from .layer import FusedSite
    from .views import View


@dataclass(frozen=True)
class Entries:
    """What the first axis of a layer's input holds in one call.

    call: the rows that the host told. rows: those of this layer; fold: consecutive entries that make up one row. positions: of the
    conditional rows; images: theirs.
    """

    call: Rows
    batch: int
    rows: Rows
    fold: int
    positions: tuple[int, ...]
    images: tuple[int, ...]

    @classmethod
    def of(cls, call: Rows, batch: int) -> Entries:
        rows = call.of_batch(batch)
        return cls(call, batch, rows, batch // len(rows.images), rows.voting, tuple(rows.images[position] for position in rows.voting))


@dataclass
class FusionState:
    """Owned by the session.

    schedules: of the B LoRAs. watched: whether divergences are recorded that the rule does not ask for. active: whether the layers add
    anything. sampling: whether they keep samples for the next decision.
    weights: (S, I or 1, B), the rule's, where this step has them before it begins; left_out: sites that they do not hold for.
    paired: whether the sites' pairs hold. undecided: rows ran in this step before their image's choice was known. fallbacks: choices so
    made. rebound: a layer's type or device changed. only: LoRAs that are added alone, each at its strength, whatever the rule says; None:
    all, as the rule says. watch: is shown every site's input while LoRAs are alone. collected: (site, images, (rows, B)) of samples that
    were measured at once. too_short: memory ran out for measuring in this step; unmeasured: steps in which it did.
    """

    settings: FuseSettings
    rule: Rule
    schedules: tuple[Schedule, ...]
    watched: bool = False
    rows: Rows | None = None
    step: Step | None = None
    active: bool = False
    sampling: bool = False
    weights: Tensor | None = None
    left_out: frozenset[int] = frozenset()
    paired: bool = False
    undecided: bool = False
    fallbacks: int = 0
    too_short: bool = False
    unmeasured: int = 0
    rebound: bool = False
    only: tuple[int, ...] | None = None
    watch: Callable[[FusedSite, View], None] | None = None
    collected: list[tuple[int, tuple[int, ...], Tensor]] = field(default_factory=list)
    workspace: Workspace = field(default_factory=Workspace)
    levels: tuple[float, ...] = ()
    """Each LoRA's strength at this step where it follows a schedule, and 1 where its strength is constant and in the operators."""

    _count: int = 1
    _entries: Entries | None = None
    _indices: dict[torch.device, RowIndices] = field(default_factory=dict)
    _level_tensors: dict[torch.device, Tensor] = field(default_factory=dict)
    _by_row: dict[tuple[Rows, int, torch.device], Tensor] = field(default_factory=dict)
    _factors: dict[tuple[Rows, int, torch.device], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.varying = any(schedule.constant is None for schedule in self.schedules)
        self.levels = (1.0,) * len(self.schedules)

    # The step.

    def begin(self, step: Step) -> None:
        """A step begins: nothing is known of it yet."""
        self.step = step
        self.weights, self.left_out, self.paired, self.undecided = None, frozenset(), False, False
        self._by_row.clear()
        if self.varying:
            self.levels = tuple(schedule.at(step) if schedule.constant is None else 1.0 for schedule in self.schedules)
            for tensor in self._level_tensors.values():
                self._fill(tensor)

    def hold(self, weights: Tensor, left_out: frozenset[int] = frozenset()) -> None:
        """These weights hold for the whole step."""
        self.weights, self.left_out = weights, left_out
        self._by_row.clear()

    def hold_given(self, device: torch.device) -> None:
        """Hold the weights of a rule that needs no votes, once the device is known: from the first layer on."""
        if self.weights is None and not self.rule.measures:
            assert self.step is not None
            self.rule.device = device
            self.hold(self.rule.weights(self.step, None))

    # Rows.

    @property
    def count(self) -> int:
        """Images of the batch; of the last call's between calls."""
        return self.rows.count if self.rows is not None else self._count

    def entries(self, batch: int) -> Entries:
        """What the first axis of a layer's input of this batch size holds."""
        known = self._entries
        if known is not None and known.batch == batch and known.call is self.rows:
            return known
        if self.rows is None:
            self.rows = Rows.separate(batch)
        self._count = self.rows.count
        self._entries = Entries.of(self.rows, batch)
        return self._entries

    def indices(self, device: torch.device) -> RowIndices:
        if device not in self._indices:
            self._indices[device] = RowIndices(device)
        return self._indices[device]

    def by_row(self, choice: Tensor, rows: Rows, fold: int, device: torch.device) -> Tensor:
        """(images, B) -> (entries, B)."""
        chosen = (
            choice.expand(len(rows.images), -1) if rows.count == 1 else choice.index_select(0, self.indices(device).numbers(rows.images))
        )
        return chosen.repeat_interleave(fold, 0) if fold > 1 else chosen

    def weights_of(self, site: FusedSite, batch: int, device: torch.device) -> Tensor | None:
        """The held weights of a site's entries, (entries, B); None where it is to decide itself."""
        self.hold_given(device)
        if self.weights is None or site.number in self.left_out:
            return None
        entries = self.entries(batch)
        rows, fold = entries.rows, entries.fold
        key = (rows, fold, device)
        if key not in self._by_row:
            weights = self.weights.to(device)
            if weights.shape[1] == 1:
                weights = weights.expand(-1, len(rows.images), -1)
            else:
                weights = weights.index_select(1, self.indices(device).numbers(rows.images))
            self._by_row[key] = weights.repeat_interleave(fold, 1) if fold > 1 else weights
        return self._by_row[key][site.number]

    def row_factors(self, batch: int, device: torch.device) -> Tensor | None:
        """(entries,) float32: what the LoRAs are multiplied by in each entry, beside their weights; None where that is 1 in all."""
        negative = self.settings.negative_weight
        if negative == 1.0:
            return None
        entries = self.entries(batch)
        if all(entries.rows.conditional):
            return None
        key = (entries.rows, entries.fold, device)
        if key not in self._factors:
            prompts = self.indices(device).numbers([int(sees) for sees in entries.rows.conditional]).float()
            factors = prompts + (1.0 - prompts) * negative
            self._factors[key] = factors.repeat_interleave(entries.fold) if entries.fold > 1 else factors
        return self._factors[key]

    # LoRAs.

    def columns(self, values: Tensor, members: tuple[int, ...]) -> Tensor:
        """(..., B) -> (..., P): of these LoRAs."""
        start, stop = members[0], members[-1] + 1
        if len(members) == stop - start:
            return values[..., start:stop]
        return values.index_select(-1, self.indices(values.device).numbers(members))

    def spread(self, values: Tensor, members: tuple[int, ...]) -> Tensor:
        """(..., P) -> (..., B), 0 for LoRAs that do not change the site."""
        if len(members) == len(self.schedules):
            return values
        columns = dict(zip(members, values.unbind(-1)))
        zero = torch.zeros_like(values[..., 0])
        return torch.stack([columns.get(number, zero) for number in range(len(self.schedules))], -1)

    def votes_of(self, site: FusedSite, values: Tensor) -> Votes:
        """One site's. values: (1, I, B)."""
        if len(site.members) == len(self.schedules):
            return Votes(values)
        flags = [number in site.members for number in range(len(self.schedules))]
        return Votes(values, self.indices(values.device).numbers([int(flag) for flag in flags]).bool().view(1, 1, -1))

    def rule_by_row(self, site: FusedSite, values: Tensor, image_of_row: Tensor, images: int) -> Tensor:
        """What the rule says of votes that are not one per image: (n, B) with the image of each -> (n, B)."""
        assert self.step is not None
        votes = self.votes_of(site, values.unsqueeze(1).expand(-1, images, -1))
        weights = self.rule.weights(self.step, votes)
        return weights.gather(1, image_of_row.view(-1, 1, 1).expand(-1, 1, weights.shape[-1])).squeeze(1)

    # Strengths that vary with the step.

    def strengths(self) -> Sequence[float]:
        """Each LoRA's strength at this step, 0 for those that are left out of the call; empty while nothing is added."""
        if not self.active:
            return ()
        only = self.only
        strengths = self.step_strengths
        return strengths if only is None else [own if member in only else 0.0 for member, own in enumerate(strengths)]

    @property
    def step_strengths(self) -> tuple[float, ...]:
        """Each LoRA's strength at this step, constant or not."""
        return tuple(level if schedule.constant is None else schedule.constant for level, schedule in zip(self.levels, self.schedules))

    def level(self, member: int) -> float:
        return self.levels[member]

    def member_levels(self, members: tuple[int, ...], device: torch.device) -> Tensor | None:
        """(P,) float32 on the device; None where all are constant."""
        return self.columns(self.level_tensor(device), members) if self.varying else None

    def with_levels(self, weights: Tensor, members: tuple[int, ...]) -> Tensor:
        """weights: (..., P)."""
        levels = self.member_levels(members, weights.device)
        return weights if levels is None else weights * levels

    def chosen_level(self, winner: Tensor, members: tuple[int, ...]) -> Tensor | None:
        """winner: (1,) int64 among the members."""
        levels = self.member_levels(members, winner.device)
        return None if levels is None else levels.index_select(0, winner)

    def level_tensor(self, device: torch.device) -> Tensor:
        if device not in self._level_tensors:
            with torch.inference_mode(False):
                self._level_tensors[device] = torch.empty(len(self.levels), device=device)
            self._fill(self._level_tensors[device])
        return self._level_tensors[device]

    def _fill(self, tensor: Tensor) -> None:
        for number, level in enumerate(self.levels):
            tensor[number].fill_(level)  # an argument of the kernel: nothing is copied to the device


__all__ = ["Entries", "FusionState"]
