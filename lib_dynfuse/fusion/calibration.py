"""What the layers are given with one side's LoRAs alone, for rules that go by it (SSR)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lora.branch import LowRank
from ..lora.naming import Site
from .rows import Rows

if TYPE_CHECKING:
    from .call import FusionState
    from .layer import FusedSite
    from .predictions import Alone, Call
    from .rules import Member
    from .views import View


@dataclass(frozen=True)
class Correlation:
    """Of a site that several LoRAs change, all products of thin matrices.

    matrix: (R, R) float32, Z Z^T with Z = A X, A the down matrices of all its LoRAs one below the other, X the inputs of the layer.
    of_subject: (R,) bool, whether a row is of a subject's LoRA.
    """

    matrix: Tensor
    of_subject: Tensor


Correlations = Mapping[Site, Correlation]


class SeenEnough(RuntimeError):
    """Ends a run of which the first step was wanted. correlations: what it showed."""

    def __init__(self, correlations: Correlations):
        super().__init__("DynFuse has seen what it needs.")
        self.correlations = correlations


class Calibration:
    """Of one session, while it is shown a side.

    side: whose LoRAs are alone on the model, "subject" or "style"; None: the session fuses.
    """

    def __init__(self, state: FusionState, members: Sequence[Member], bind: Callable[[FusedSite], Sequence[Any]], alone: Alone):
        """bind: a site's changes, at strength 1. alone: puts LoRAs on the model."""
        self.side: str | None = None
        self._state, self._members, self._bind, self._alone = state, members, bind, alone
        self._found: dict[Site, Correlation] = {}

    def begin(self, side: str) -> None:
        self.side = side
        self._found = {}

    @property
    def correlations(self) -> Correlations:
        """What was found, on the CPU."""
        return {site: Correlation(found.matrix.cpu(), found.of_subject) for site, found in self._found.items()}

    def predicted(self, call: Call, rows: Rows | None) -> Any:
        """The model call's prediction with the side alone. Rows that see the negative prompt are not looked at."""
        state = self._state
        own = tuple(number for number, member in enumerate(self._members) if member.subject == (self.side == "subject"))
        with self._alone(own, rows):
            state.watch = self._see
            try:
                return call(None)
            finally:
                state.watch = None

    @torch.no_grad()
    def _see(self, site: FusedSite, view: View) -> None:
        positions = self._state.entries(view.batch).positions
        if len(site.members) < 2 or not positions:
            return
        changes = self._bind(site)
        if not all(isinstance(change, LowRank) for change in changes):
            return
        inputs, _ = view.sampled(positions, 0, self._state)
        downs = torch.cat([change.down.flatten(1).float() for change in changes]).to(inputs.device)
        signals = inputs.flatten(0, 1).float() @ downs.t()
        matrix = signals.t() @ signals
        if site.site in self._found:
            matrix = matrix + self._found[site.site].matrix
        rows = [self._members[number].subject for number, change in zip(site.members, changes) for _ in range(change.rank)]
        self._found[site.site] = Correlation(matrix, torch.tensor(rows))


__all__ = ["Calibration", "Correlation", "Correlations", "SeenEnough"]
