"""One layer of the denoiser with its LoRAs: the fused forward.

A layer computes y = y0 + sum over b of w_b up_b down_b h: its own output plus the low-rank products of its LoRAs under the rule's
weights. Where one LoRA has all the weight, for all images alike, only that one is computed; where the images of a batch differ, each row
has its own weights, and a LoRA at weight 0 is not computed into the sum. Nothing here waits for the device: decisions are tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.branch import Dense, LowRank
from ..lora.naming import Site
from ..memory import is_out_of_memory
from .call import Entries, FusionState
from .divergence import token_divergences
from .folding import FoldedWeight, OwnWeight
from .operators import Operators
from .patching import PatchedLayer, argument
from .rewriting import Binding
from .views import Pixels, Tokens, View, turned
from .votes import Ballot


@dataclass
class FusedSite:
    """A site with the LoRAs that change it, and what was decided for it.

    number: of the site in the session. members: numbers of the LoRAs that change it, in order. strengths: their constant factors, folded
    into the operators. choice: (images, B), the rule's weights as decided in the layer in this step; known: the images that it holds for.
    votes: (images, B), what that was decided by. pair: the matrices that stand for all rows of this step, (down, up) as
    View.add_pair takes them, where they were made for all sites at once. ballot, place: where samples for the next decision are put.
    folded: it is in the layer's FoldedWeight, and needs no pair.
    """

    number: int
    site: Site
    bindings: Sequence[Binding]
    members: tuple[int, ...]
    strengths: tuple[float, ...]
    operators: Operators | None = None
    choice: Tensor | None = None
    known: frozenset[int] = frozenset()
    votes: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None
    ballot: Ballot | None = None
    place: int = 0
    silent: bool = False
    folded: bool = False
    tokens: int = 0

    def forget(self) -> None:
        """Start a new step."""
        self.choice, self.known, self.votes = None, frozenset(), None

    def bind(self, weight: Callable[[], Tensor]) -> list[LowRank | Dense]:
        return [binding.bind(self.site, weight) for binding in self.bindings]


class FusedLayer(PatchedLayer):
    """A layer and the sites on it. folded: a weight that has all of them in it, in the steps whose weights are known before."""

    folded: FoldedWeight | None = None

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sites: list[FusedSite],
        state: FusionState,
        weight_of: Callable[[nn.Module], Tensor],
        own_weight: OwnWeight,
    ):
        super().__init__(name, module)
        self.sites = sites
        self.state = state
        self.weight_of, self.own_weight = weight_of, own_weight
        self.convolution = is_convolution(module)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with its LoRAs added: same shape, dtype and device as the layer's own output.

        x: (N, ..., in) for a linear layer, (N, in, H, W) for a convolution.
        """
        state = self.state
        if self.folded is not None and state.paired and state.active and state.only is None:
            if self.folded.stands_for(self.own_weight(self.module)):
                return self._with_weight(self.folded.weight, *args, **kwargs)
            self.fold(None)
            state.rebound = True
        y = self._base(*args, **kwargs)
        if not state.active:
            return y
        x = argument(args, kwargs)
        if x.dtype != y.dtype:
            x = x.to(y.dtype)  # under autocast the layer's type is the output's
        y = self._writable(y, x)
        for site in self.sites:
            part = site.site.part
            if part is not None:
                unit = y.shape[-1] // part.units
                self._add(site, Tokens(x, y, part.start * unit, part.length * unit))
            else:
                self._add(site, Pixels(self.module, x, y) if self.convolution else Tokens(x, y))
        return y

    def fold(self, folded: FoldedWeight | None) -> None:
        """From the next step on compute with this weight; None: add the LoRAs to what the layer's own gives."""
        self.folded = folded
        for site in self.sites:
            site.folded = folded is not None

    def _with_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives with another weight than its own."""
        parameters: dict[str, Any] = self.module._parameters
        own = parameters["weight"]
        parameters["weight"] = weight
        try:
            return self._base(*args, **kwargs)
        finally:
            parameters["weight"] = own

    def _writable(self, y: Tensor, x: Tensor) -> Tensor:
        """The output as a tensor that may be written to: itself where it is the fresh result of its class's forward, else a copy.

        A fresh tensor for every layer's sum costs a third of the fusion's time on a CPU.
        """
        if not (y.is_contiguous() or (self.convolution and y.is_contiguous(memory_format=torch.channels_last))):
            return y.contiguous()
        # Three holders: the caller's variable, this one and the counting itself. One more is somebody who keeps the output.
        fresh = sys.getrefcount(y) <= 3 and (y.is_meta or (y.data_ptr() != x.data_ptr() and not _is_a_piece(y)))
        return y if fresh and not self._had_instance_forward and not torch.is_grad_enabled() else y.clone()

    def operators_of(self, site: FusedSite, device: torch.device, dtype: torch.dtype) -> Operators:
        """Bound at the first call, after the layer's own forward: hosts merge other LoRAs into the weight as late as that."""
        operators = site.operators
        if operators is None or operators.dtype != dtype or operators.device != device:
            branches = site.bind(lambda: self.weight_of(self.module))
            operators = site.operators = Operators.make(branches, site.strengths, device, dtype)
            site.pair = site.ballot = None
            site.silent, self.state.rebound = False, True
        return operators

    def _add(self, site: FusedSite, view: View) -> None:
        state = self.state
        operators = self.operators_of(site, view.device, view.dtype)
        if state.only is not None:
            if state.watch is not None:
                state.watch(site, view)
            self._add_alone(site, operators, view, state.only)
            return
        if state.sampling and len(site.members) > 1 and site.number not in state.left_out:
            self._sample(site, operators, view)
        factors = state.row_factors(view.batch, view.device)
        if factors is not None:
            self._add_by_row(site, operators, view, factors)
            return
        if state.paired and (site.pair is not None or site.silent):
            if site.pair is not None:
                view.add_pair(*site.pair, 1.0)
            return
        one = len(site.members) == 1
        if one and (state.rule.measures or state.rule.uniform):
            self._add_one(operators, view, state.level(site.members[0]))
            return
        if state.rule.uniform:
            levels = state.member_levels(site.members, view.device)
            self._add_weighted(operators, view, None if levels is None else levels.expand(view.batch, -1))
            return
        weights = state.weights_of(site, view.batch, view.device)
        if weights is None:
            weights = self._decided_here(site, operators, view)
        if not one and state.count == 1 and state.rule.selects and state.settings.granularity == "image":
            self._add_selected(site, operators, view, weights[:1])
        else:
            self._add_weighted(operators, view, state.with_levels(state.columns(weights, site.members), site.members))

    def _add_by_row(self, site: FusedSite, operators: Operators, view: View, factors: Tensor) -> None:
        """As _add, with a factor on each row. factors: (N,)."""
        state = self.state
        if state.rule.uniform or (state.rule.measures and len(site.members) == 1):
            weights = torch.ones(view.batch, len(site.members), device=view.device)
        else:
            held = state.weights_of(site, view.batch, view.device)
            weights = state.columns(self._decided_here(site, operators, view) if held is None else held, site.members)
        weights = state.with_levels(weights, site.members)
        self._add_weighted(operators, view, weights * factors.view(-1, *[1] * (weights.dim() - 1)))

    def _add_alone(self, site: FusedSite, operators: Operators, view: View, only: tuple[int, ...]) -> None:
        """The sum of some LoRAs, consecutive ones, each at its strength."""
        state = self.state
        places = [place for place, member in enumerate(site.members) if member in only and state.level(member)]
        if not places:
            return
        span = slice(places[0], places[-1] + 1)
        members = site.members[span]
        weights = state.member_levels(members, view.device)
        factors = state.row_factors(view.batch, view.device)
        if weights is not None or factors is not None:
            weights = torch.ones(len(members), device=view.device) if weights is None else weights
            weights = weights.expand(view.batch, -1)
            weights = weights if factors is None else weights * factors[:, None]
        self._add_weighted(operators.of_members(span), view, weights)

    def _add_one(self, operators: Operators, view: View, level: float) -> None:
        """The only LoRA of a site, at its strength."""
        if not level:
            return
        if operators.downs is not None and operators.ups is not None:
            view.add_pair(turned(operators.downs[0]), operators.ups[0], level)
        else:
            assert operators.dense is not None
            view.add_dense(operators.dense[0], None if operators.biases is None else operators.biases[0], level)

    def _add_selected(self, site: FusedSite, operators: Operators, view: View, weights: Tensor) -> None:
        """The LoRA that has the weight, alone. weights: (1, B), one-hot."""
        winner = self.state.columns(weights, site.members).argmax(-1)
        level = self.state.chosen_level(winner, site.members)
        if operators.downs is not None and operators.ups is not None:
            down = operators.downs.index_select(0, winner).squeeze(0)
            up = operators.ups.index_select(0, winner).squeeze(0)
            view.add_pair(turned(down), up if level is None else up * level.to(up.dtype), 1.0)
            return
        assert operators.dense is not None
        weight = operators.dense.index_select(0, winner).squeeze(0)
        bias = None if operators.biases is None else operators.biases.index_select(0, winner).squeeze(0)
        if level is not None:
            weight = weight * level.to(weight.dtype)
            bias = None if bias is None else bias * level.to(weight.dtype)
        view.add_dense(weight, bias, 1.0)

    def _add_weighted(self, operators: Operators, view: View, weights: Tensor | None) -> None:
        """The sum under weights: (N, P) by row, (N, T, P) by token; None: all 1."""
        if operators.downs is None or operators.ups is None:
            assert operators.dense is not None
            for member in range(operators.dense.shape[0]):
                bias = None if operators.biases is None else operators.biases[member]
                if weights is None:
                    view.add_dense(operators.dense[member], bias, 1.0)
                else:
                    view.add_dense_by_row(operators.dense[member], bias, weights[..., member])
            return
        down, up = turned(operators.downs.flatten(0, 1)), operators.ups.flatten(0, 1)
        if weights is None:
            view.add_pair(down, up, 1.0)
        else:
            view.add_by_row(down, up, weights)

    def _decided_here(self, site: FusedSite, operators: Operators, view: View) -> Tensor:
        """Measure and choose in the layer. Returns weights by row, (N, B), or (N, T, B) when tokens choose."""
        state = self.state
        assert state.step is not None
        entries = state.entries(view.batch)
        rows, fold = entries.rows, entries.fold
        if state.settings.granularity != "image":
            return self._decided_by_row(site, operators, view)
        site.tokens = view.tokens(state)
        positions, conditional = rows.deciding(site.known)
        if positions:
            if not conditional:
                state.fallbacks += 1
                state.undecided = True
            votes = self._votes(site, operators, view, positions)  # (n, B)
            chosen = state.rule.weights(state.step, state.votes_of(site, votes.unsqueeze(0))).squeeze(0)
            images = tuple(rows.images[position] for position in positions)
            self._remember(site, images, votes, chosen)
            if conditional:
                site.known = site.known | frozenset(images)
        assert site.choice is not None
        return state.by_row(site.choice, rows, fold, view.device)

    def _remember(self, site: FusedSite, images: tuple[int, ...], votes: Tensor, chosen: Tensor) -> None:
        count = self.state.count
        if images == tuple(range(count)):
            site.votes, site.choice = votes, chosen
            return
        places = self.state.indices(votes.device).numbers(images)
        for name, new in (("votes", votes), ("choice", chosen)):
            old = getattr(site, name)
            setattr(site, name, (new.new_zeros(count, new.shape[-1]) if old is None else old).index_copy(0, places, new))

    def _votes(self, site: FusedSite, operators: Operators, view: View, positions: tuple[int, ...]) -> Tensor:
        """(n, B) float32: the divergences of all LoRAs at these rows, over their sampled tokens."""
        wanted = self.state.settings.vote_tokens
        x, y = view.sampled(positions, wanted, self.state)
        per_token = self._measured(site, operators, x, y)  # (P, n, t)
        return self.state.spread(per_token.mean(-1).t(), site.members)

    def _measured(self, site: FusedSite, operators: Operators, x: Tensor, y: Tensor) -> Tensor:
        """(P, n, t) float32, the divergence of every token. x: (n, t, in), kernels unfolded; y: (n, t, out)."""
        state = self.state
        settings = state.settings
        levels = state.member_levels(site.members, y.device)
        n, t, _ = y.shape
        if operators.downs is not None and operators.ups is not None:
            downs, ups = operators.downs.flatten(2), operators.ups
            inner = torch.matmul(x.reshape(1, n * t, -1), downs.transpose(1, 2))  # (P, n t, r)
            if levels is not None:
                inner = inner * levels.to(inner.dtype)[:, None, None]
            inner = inner.view(len(ups), n, t, -1)

            def deltas(start: int, length: int) -> Tensor:
                some = state.workspace.room("delta", (len(ups), n * length, ups.shape[-1]), ups.dtype, ups.device)
                return torch.bmm(inner.narrow(2, start, length).flatten(1, 2), ups, out=some).view(len(ups), n, length, -1)

        else:
            assert operators.dense is not None
            whole = torch.matmul(x.reshape(1, n * t, -1), operators.dense.flatten(2).transpose(1, 2))
            if operators.biases is not None:
                whole = whole + operators.biases.unsqueeze(1)
            if levels is not None:
                whole = whole * levels.to(whole.dtype)[:, None, None]
            whole = whole.view(-1, n, t, y.shape[-1])

            def deltas(start: int, length: int) -> Tensor:
                return whole.narrow(2, start, length).to(torch.float32, copy=True)

        return token_divergences(settings.criterion, y, deltas, rms=settings.temperature == "rms", workspace=state.workspace)

    def _decided_by_row(self, site: FusedSite, operators: Operators, view: View) -> Tensor:
        """Every row, or every token, chooses for itself; the record has each image's first conditional row's mean."""
        state = self.state
        assert state.step is not None
        entries = state.entries(view.batch)
        rows, fold = entries.rows, entries.fold
        everything = tuple(range(len(rows.images)))
        x, y = view.sampled(everything, 0, state)
        per_token = self._measured(site, operators, x, y)  # (P, rows, T)
        by_row = state.spread(per_token.mean(-1).t(), site.members)  # (rows, B)
        positions, conditional = rows.deciding(site.known)
        if positions:
            places = state.indices(view.device).numbers(positions)
            recorded = by_row.index_select(0, places)
            chosen = state.rule.weights(state.step, state.votes_of(site, recorded.unsqueeze(0))).squeeze(0)
            images = tuple(rows.images[position] for position in positions)
            self._remember(site, images, recorded, chosen)
            if conditional:
                site.known = site.known | frozenset(images)
        image_of_row = state.indices(view.device).numbers(rows.images)
        if state.settings.granularity == "row":
            chosen = state.rule_by_row(site, by_row, image_of_row, rows.count)
            return chosen.repeat_interleave(fold, 0) if fold > 1 else chosen
        by_token = state.spread(per_token.permute(1, 2, 0), site.members)  # (rows, T, B)
        tokens = by_token.shape[1]
        chosen = state.rule_by_row(site, by_token.flatten(0, 1), image_of_row.repeat_interleave(tokens), rows.count)
        return chosen.view(view.batch, -1, chosen.shape[-1])

    def _sample(self, site: FusedSite, operators: Operators, view: View) -> None:
        """Keep what the decision for the next step needs, or measure it now where the site has no like."""
        state = self.state
        entries = state.entries(view.batch)
        if not entries.positions or state.too_short:
            return
        try:
            self._keep_sample(site, operators, view, entries)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            state.too_short = True

    def _keep_sample(self, site: FusedSite, operators: Operators, view: View, entries: Entries) -> None:
        state = self.state
        if site.ballot is not None and view.put(site.ballot, site.place, entries, state):
            return
        state.collected.append((site.number, entries.images, self._votes(site, operators, view, entries.positions)))


def _is_a_piece(tensor: Tensor) -> bool:
    """Whether it lies in a larger memory, which somebody else may hold."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def is_convolution(module: nn.Module) -> bool:
    return hasattr(module, "_conv_forward") or (hasattr(module, "stride") and hasattr(module, "padding") and hasattr(module, "dilation"))


__all__ = ["FusedLayer", "FusedSite", "is_convolution"]
