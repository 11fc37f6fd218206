"""From step to step: what was measured in one becomes the weights of those that follow.

    decide = now     every n-th step (decide_every) the layers measure and choose; the steps between keep the choice
    decide = next    the first step as now; after it every n-th step's samples are measured when its calls are over, and choose for the
                     steps that follow

Weights that are known before a step are brought into the layers for all sites at once: where one LoRA has all the weight, its matrices
are gathered, group by group, into tensors that stay the same, and a layer multiplies by them alone. Weights that stay for all steps go into
copies of the layers' own (folding), where memory allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..memory import is_out_of_memory
from .call import FusionState
from .folding import Folding
from .layer import FusedLayer, FusedSite
from .operators import Group
from .rows import RowIndices, sample_count
from .rules import Votes
from .step import Step
from .trace import Trace, TraceRecorder, TraceStep
from .views import turned
from .votes import Ballot

Numbers = tuple[int, ...]


class Decisions:
    """Of one session. begun: steps begun since the start. under_way: whether the last of them is not over."""

    def __init__(self, state: FusionState, layers: Sequence[FusedLayer], recorder: TraceRecorder):
        self.begun = 0
        self._state = state
        self._sites = sites = [site for layer in layers for site in layer.sites]
        self._folding = Folding(state, layers)
        self._recorder = recorder
        # Between these sites' LoRAs a rule that measures has to choose.
        self._compared = tuple(site.number for site in sites if len(site.members) > 1)
        self.under_way = self._called = False
        self._blocks: list[_Block] = []
        self._held: Tensor | None = None  # (S, images or 1, B): the weights of the steps to come
        self._known: set[int] = set()  # the sites that it holds for
        self._places: _Places | None = None
        self._in_place: tuple[object, ...] | None = None  # what the layers' pairs were made from
        self._tally: dict[Numbers, list[tuple[Numbers, Tensor]]] = {}
        self._undone = 0

    @property
    def _in_layers(self) -> bool:
        """Whether the layers choose at every step."""
        settings = self._state.settings
        return settings.granularity != "image" or (settings.decide == "now" and settings.decide_every == 1)

    # Steps.

    def begin(self, step: Step) -> None:
        state, rule, settings = self._state, self._state.rule, self._state.settings
        for site in self._sites:
            site.forget()
        state.begin(step)
        state.too_short = False
        self.under_way, self._called, self._undone = True, False, state.fallbacks
        self._tally.clear()
        chooses = self.begun % settings.decide_every == 0
        state.sampling = False
        if not rule.measures:
            state.sampling = state.watched and bool(self._blocks) and chooses
            # Not in the first step: that is computed as in a session that has just begun, or a batch's second picture would differ from the
            # same one alone by rounding.
            if (self._blocks or self._folding.folded) and self.begun:
                if not (rule.uniform or rule.composes) and not (rule.constant and self._held is not None):
                    self._held = rule.weights(step, None)
                if not rule.composes:
                    self._apply()
        elif self._held is not None and not self._in_layers and (settings.decide == "next" or not chooses):
            state.sampling = chooses
            self._apply()
        self.begun += 1

    def end(self) -> None:
        if not self.under_way:
            return
        self.under_way = False
        if not self._called:  # another model took over before a call: no step of this one
            self.begun -= 1
            return
        state = self._state
        if state.too_short:
            self._leave_uncounted()
            state.unmeasured += 1
        record = self._record()
        self._recorder.steps.append(record)
        if record.votes is not None and state.rule.measures:
            assert state.step is not None
            state.rule.observe(state.step, Votes(record.votes, self._presence(record.measured, record.votes.device)))
        if not state.rule.measures or not self._in_layers:
            if self.begun == 1 or state.rebound:
                if self._folding.wanted:
                    self._folding.fold(None if state.rule.uniform else state.weights)
                self._regroup()
                state.rebound = False
            if state.rule.measures:
                self._decide(record)

    def repeat(self) -> None:
        """The step's calls are made again, with the choices that the first ones brought."""
        state = self._state
        state.undecided, state.fallbacks = False, self._undone
        self._tally.clear()

    def restart(self) -> None:
        for site in self._sites:
            site.forget()
        self._recorder.steps.clear()
        self._state.fallbacks = self._state.unmeasured = 0
        self._state.rule.restart()
        self._folding.restart()
        self._held, self.under_way, self.begun = None, False, 0
        self._known.clear()
        self._tally.clear()

    def unfold(self) -> None:
        """Let go of the folded weights until the next step's end."""
        self._folding.unfold()
        self._blocks.clear()
        self._state.rebound = True

    def release(self) -> None:
        self._folding.unfold()
        for site in self._sites:
            site.operators = site.pair = site.ballot = None
        self._blocks.clear()
        self._in_place = self._places = None

    def trace(self) -> Trace:
        if not (self.under_way and self._called):
            return self._recorder.trace(self._state.fallbacks)
        steps = [*self._recorder.steps, record] if (record := self._record()).weights else self._recorder.steps
        return replace(self._recorder, steps=list(steps)).trace(self._state.fallbacks)

    def foreseen(self, steps: int) -> Trace:
        """What a picture of so many steps will bring under a rule that does not measure. Leaves the session as it was."""
        own = self._state
        assert not own.rule.measures
        state = FusionState(own.settings, own.rule, own.schedules)
        everywhere = tuple(range(len(self._sites)))
        recorder = replace(self._recorder, steps=[])
        for index in range(steps):
            step = Step.of(index, steps)
            state.begin(step)
            weights = state.rule.weights(step, None)
            recorder.steps.append(TraceStep([(everywhere, weights)], (), None, state.levels, state.step_strengths, 1))
        return recorder.trace()

    # Calls.

    def call_begins(self) -> None:
        if not self.under_way:
            self.begin(Step.of(self.begun, 0))
        self._called = True

    def call_ends(self) -> None:
        """Count the votes of a call's samples. Where memory runs out for that, the step's choices stay for the next."""
        if not self._state.sampling:
            return
        try:
            self._count()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._state.too_short = True
        if self._state.too_short:  # not in the except clause: the exception's frames hold on to the memory that ran out
            self._leave_uncounted()

    def _leave_uncounted(self) -> None:
        for block in self._blocks:
            if block.ballot is not None:
                block.ballot.forget()
        self._state.collected.clear()
        self._tally.clear()

    def _count(self) -> None:
        state, settings = self._state, self._state.settings
        if state.too_short:
            return
        with torch.no_grad():
            for block in self._blocks:
                if block.ballot is None:
                    continue
                levels = state.member_levels(block.group.members, block.group.ups.device)
                rms = settings.temperature == "rms"
                indices = state.indices(block.group.ups.device)
                for numbers, images, votes in block.ballot.counted(settings.criterion, rms, levels, state.workspace, indices):
                    self._tally.setdefault(images, []).append((numbers, state.spread(votes, block.group.members)))
            for number, images, own in state.collected:
                self._tally.setdefault(images, []).append(((number,), own.unsqueeze(0)))
            state.collected.clear()

    # What was measured, and what follows.

    def _record(self) -> TraceStep:
        """The step under way or just over, as far as it was run."""
        state = self._state
        pieces: list[tuple[Numbers, Tensor | None]] = []
        run = [site for site in self._sites if site.operators is not None]
        if state.rule.uniform:
            pieces.append((tuple(site.number for site in run), None))
        elif state.rule.measures:
            pieces.append((tuple(site.number for site in run if len(site.members) == 1), None))
        if state.weights is not None:
            held = tuple(number for number in range(len(self._sites)) if number not in state.left_out and self._takes_weights(number))
            pieces.append((held, state.weights.index_select(0, self._numbers(held, state.weights.device))))
        chosen = [site for site in run if site.choice is not None and site.votes is not None]
        measured: Numbers = ()
        votes: Tensor | None = None
        missing: list[tuple[int, int]] = []
        if chosen:
            measured = tuple(site.number for site in chosen)
            votes = _stacked([site.votes for site in chosen])
            pieces.append((measured, _stacked([site.choice for site in chosen])))
        elif self._tally:
            measured, votes, missing = self._counted()
        return TraceStep([piece for piece in pieces if piece[0]], measured, votes, state.levels, state.step_strengths, state.count, missing)

    def _takes_weights(self, number: int) -> bool:
        """Whether the rule's weights say something of a site: one that measures has nothing to say where there is one LoRA."""
        return not self._state.rule.measures or len(self._sites[number].members) > 1

    def _counted(self) -> tuple[Numbers, Tensor, list[tuple[int, int]]]:
        """Each site's and image's mean over its rows: (numbers, (L, images, B), (site, image) without a row)."""
        images, entries = next(iter(self._tally.items()))
        count = self._state.count
        everything = tuple(range(count))
        numbers = tuple(number for own, _ in entries for number in own)
        values = torch.cat([own for _, own in entries]) if len(entries) > 1 else entries[0][1]
        if len(self._tally) == 1 and images == everything and len(set(numbers)) == len(numbers):
            return numbers, values, []
        device = values.device
        total = values.new_zeros(len(self._sites), count, values.shape[-1])
        rows = [[0] * count for _ in self._sites]
        for images, entries in self._tally.items():
            own = tuple(number for some, _ in entries for number in some)
            summed = values.new_zeros(len(self._sites), len(images), values.shape[-1])
            summed.index_add_(0, self._numbers(own, device), torch.cat([some for _, some in entries]))
            total.index_add_(1, self._numbers(images, device), summed)
            for number in own:
                for image in images:
                    rows[number][image] += 1
        numbers = tuple(number for number, own in enumerate(rows) if any(own))
        counts = tuple(rows[number][image] for number in numbers for image in everything)
        indices = self._state.indices(device)
        means = total.index_select(0, self._numbers(numbers, device)) * indices.reciprocals(counts).view(-1, count, 1)
        missing = [(number, image) for number in numbers for image in everything if not rows[number][image]]
        return numbers, means, missing

    def _decide(self, record: TraceStep) -> None:
        """The weights of the steps to come."""
        state = self._state
        if record.votes is None or state.step is None:
            return
        device = record.votes.device
        if state.settings.decide == "now":
            weights = next(own for numbers, own in reversed(record.weights) if numbers == record.measured)
            assert weights is not None
        else:
            weights = state.rule.weights(state.step, Votes(record.votes, self._presence(record.measured, device)))
        places = self._numbers(record.measured, device)
        base = self._held
        if base is None or base.shape[1] != weights.shape[1] or base.device != device:
            base = weights.new_zeros(len(self._sites), *weights.shape[1:])
            self._known.clear()
        elif record.missing:
            gone = set(record.missing)
            kept = [int((number, image) in gone) for number in record.measured for image in range(weights.shape[1])]
            mask = state.indices(device).numbers(kept).bool().view(len(record.measured), -1, 1)
            weights = torch.where(mask, base.index_select(0, places), weights)
        self._held = base.index_copy(0, places, weights)
        self._known.update(record.measured)

    def _presence(self, numbers: Numbers, device: torch.device) -> Tensor | None:
        """Votes.present of these sites."""
        members = len(self._state.schedules)
        if all(len(self._sites[number].members) == members for number in numbers):
            return None
        flags = [int(member in self._sites[number].members) for number in numbers for member in range(members)]
        return self._numbers(tuple(flags), device).bool().view(-1, 1, members)

    def _numbers(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        return self._state.indices(device).numbers(tuple(numbers))

    # Weights into the layers.

    def _regroup(self) -> None:
        """Put sites side by side that are measured and chosen for together."""
        state = self._state
        self._blocks.clear()
        self._in_place = self._places = None
        groups: dict[tuple[Any, ...], list[FusedSite]] = {}
        for site in self._sites:
            site.pair = site.ballot = None
            operators = site.operators
            if site.folded or operators is None or operators.downs is None or operators.ups is None or not self._takes_weights(site.number):
                continue
            samples = sample_count(site.tokens, state.settings.vote_tokens) if operators.kernel is None else 0
            key = (site.members, operators.ups.shape, operators.dtype, operators.device, samples)
            groups.setdefault(key, []).append(site)
        for (*_, samples), sites in groups.items():
            sites.sort(key=lambda site: site.operators.downs.shape if site.operators and site.operators.downs is not None else ())
            numbers = tuple(site.number for site in sites)
            group = Group(sites[0].members, [site.operators for site in sites if site.operators is not None])
            ballot = None
            if (state.rule.measures or state.watched) and samples and len(sites[0].members) > 1:
                ballot = Ballot(group, numbers, samples, state.settings.vote_tokens)
                for place, site in enumerate(sites):
                    site.ballot, site.place = ballot, place
            self._blocks.append(_Block(group, sites, numbers, ballot))

    def _winners_places(self, device: torch.device) -> _Places:
        if self._places is None or self._places.numbers.device != device:
            self._places = _Places.of(self._blocks, len(self._state.schedules), self._state.indices(device))
        return self._places

    def _apply(self) -> None:
        """Bring the held weights into the layers."""
        state, rule = self._state, self._state.rule
        if self._held is not None:
            state.hold(self._held, frozenset(self._compared) - self._known if rule.measures else frozenset())
        if self._held is not None and self._held.shape[1] > 1:
            return  # the images' weights differ: by row
        state.paired = True
        made_from = (self._held, state.levels)
        if self._in_place is not None and self._in_place[0] is made_from[0] and self._in_place[1] == made_from[1]:
            return
        self._in_place = made_from
        if rule.selects:
            self._select()
        else:
            self._scale()

    def _select(self) -> None:
        """The LoRA that has the weight, alone."""
        state = self._state
        assert self._held is not None
        device = self._held.device
        places = self._winners_places(device)
        winners = self._held.squeeze(1).index_select(0, places.numbers).argmax(-1, keepdim=True)
        ups, downs = (table.gather(1, winners).squeeze(1) for table in (places.ups, places.downs))
        levels = state.level_tensor(device).index_select(0, winners.squeeze(1)) if state.varying else None
        for block, span in zip(self._blocks, places.spans):
            block.group.choose(ups[span], downs[span], None if levels is None else levels[span])
            if block.paired != "selected":
                chosen, up = block.group.chosen()
                block.pair(list(zip(block.group.each(chosen), up)), "selected")

    def _scale(self) -> None:
        """All LoRAs, one after another, each times its weight; without those whose strength is 0 at this step."""
        state = self._state
        for block in self._blocks:
            group = block.group
            levels = [state.levels[member] for member in group.members]
            used = [place for place, level in enumerate(levels) if level]
            if not used:
                block.pair([None] * group.size, "nothing")
                continue
            span = slice(used[0], used[-1] + 1)
            ups = group.ups[:, span]
            factors = state.member_levels(group.members, ups.device)
            if self._held is not None:
                own = state.columns(self._held.squeeze(1).index_select(0, self._numbers(block.numbers, ups.device)), group.members)
                factors = own if factors is None else own * factors
            if factors is not None:
                factors = factors[..., span].to(ups.dtype)
                ups = torch.mul(ups, factors.unsqueeze(-1).unsqueeze(-1) if factors.dim() == 2 else factors[:, None, None])
            downs = group.each([stack[:, span].flatten(1, 2) for stack in group.downs])
            block.pair(list(zip(downs, ups.flatten(1, 2))), "scaled")


class _Block:
    """A group, its sites, and where their samples go. paired: what the sites' pairs are."""

    def __init__(self, group: Group, sites: Sequence[FusedSite], numbers: Numbers, ballot: Ballot | None):
        self.group, self.sites, self.numbers, self.ballot = group, sites, numbers, ballot
        self.paired = ""

    def pair(self, pairs: Sequence[tuple[Tensor, Tensor] | None], what: str) -> None:
        """pairs: (down, up), None for nothing."""
        self.paired = what
        for site, pair in zip(self.sites, pairs):
            site.pair, site.silent = None if pair is None else (turned(pair[0]), pair[1]), pair is None


@dataclass(frozen=True)
class _Places:
    """Where every LoRA's matrices lie in the groups, for the n sites of all blocks, block by block.

    numbers: (n,) int64, of the sites. ups, downs: (n, B) int64, places in a group's stacks; those of its first LoRA for one that does not
    change the site. spans: of each block's sites.
    """

    numbers: Tensor
    ups: Tensor
    downs: Tensor
    spans: tuple[slice, ...]

    @classmethod
    def of(cls, blocks: Sequence[_Block], members: int, indices: RowIndices) -> _Places:
        numbers: list[int] = []
        ups: list[int] = []
        downs: list[int] = []
        spans = []
        for block in blocks:
            group = block.group
            own = [group.members.index(member) if member in group.members else 0 for member in range(members)]
            starts = [place * len(group.members) for span in group.spans for place in range(span.stop - span.start)]
            spans.append(slice(len(numbers), len(numbers) + group.size))
            numbers += block.numbers
            ups += [place * len(group.members) + at for place in range(group.size) for at in own]
            downs += [start + at for start in starts for at in own]
        up_table, down_table = (indices.numbers(values).view(-1, members) for values in (ups, downs))
        return cls(indices.numbers(numbers), up_table, down_table, tuple(spans))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack([tensor.to(present[0].device) for tensor in present])


__all__ = ["Decisions"]
