"""A sum of LoRAs on any layers, for as long as they run: what text encoders get, where there is nothing to choose by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..lora.naming import Site
from ..settings import FuseSettings
from ..strength import Schedule
from .call import FusionState
from .layer import FusedLayer, FusedSite
from .rewriting import Binding
from .rules.direct import Direct


@dataclass(frozen=True)
class Summand:
    """A layer and what is added to it: (LoRA, strength) each."""

    name: str
    module: nn.Module
    parts: Sequence[tuple[Binding, float]]


class LayerSum:
    """y = y0 + sum of s_b d_b on each of the layers while attached; nothing of it is on them before or after."""

    def __init__(self, summands: Sequence[Summand], weight_of: Callable[[nn.Module], Tensor]):
        """weight_of: gives a layer's dequantised weight; called only for kinds that depend on it."""
        most = max((len(summand.parts) for summand in summands), default=0)
        self._state = FusionState(FuseSettings(method=Direct.name), Direct(), (Schedule.of(1.0),) * most)
        self.layers = [self._layer(number, summand, weight_of) for number, summand in enumerate(summands)]

    def _layer(self, number: int, summand: Summand, weight_of: Callable[[nn.Module], Tensor]) -> FusedLayer:
        bindings, strengths = zip(*summand.parts)
        site = FusedSite(number, Site(summand.name), bindings, tuple(range(len(bindings))), strengths)
        return FusedLayer(summand.name, summand.module, [site], self._state, weight_of, _no_weight)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the sums on the layers; they are off again whatever happens inside."""
        try:
            for layer in self.layers:
                layer.attach()
            self._state.active = True
            yield
        finally:
            self._state.active = False
            for layer in self.layers:
                layer.detach()


def _no_weight(module: nn.Module) -> None:
    """The layers compute with their own weights: a sum of one call is not worth a copy."""


__all__ = ["LayerSum", "Summand"]
