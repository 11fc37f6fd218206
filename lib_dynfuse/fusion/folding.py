"""A layer's weight with its LoRAs in it: what makes a sum that stays as fast as no LoRA at all.

Where the weights of a sum are known and stay, W' = W + sum over b of w_b dW_b is made once, after the first step. It takes the place of the
layer's weight for the time of its own forward, which then does with it what the host has it do. The layer's own weight is not touched: it
computes the predictions without LoRAs that a contrast needs, and if the host merges other LoRAs into it, that is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..memory import free_memory, is_out_of_memory
from .call import FusionState

if TYPE_CHECKING:
    from .layer import FusedLayer, FusedSite

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHARE = 1 / 3
"""Of the free memory, what the weights may take: the picture is decoded beside them, and hosts reckon with what they left free."""
_TRIES = 3
"""How often weights are made that the host then changes: an extension that changes its LoRAs at every step is not run after."""

OwnWeight = Callable[[nn.Module], "Tensor | None"]
"""A layer -> the tensor that its forward computes with, other LoRAs merged; None where it computes with another one, or may write to it."""


@dataclass(frozen=True)
class FoldedWeight:
    """weight: W'. origin: W, as it was when W' was made; pointer, version: of its memory."""

    weight: Tensor
    origin: Tensor
    pointer: int
    version: int

    @classmethod
    def of(cls, weight: Tensor, origin: Tensor) -> FoldedWeight:
        return cls(weight, origin, origin.data_ptr(), _version(origin))

    def stands_for(self, weight: Tensor | None) -> bool:
        """Whether this is still the weight that it was made of."""
        return weight is self.origin and weight.data_ptr() == self.pointer and _version(weight) == self.version


class Folding:
    """Of one session's layers."""

    def __init__(self, state: FusionState, layers: Sequence[FusedLayer]):
        self._state = state
        self._layers = layers
        self._tries = 0

    @property
    def wanted(self) -> bool:
        """Whether the weights of the sum are the same in all rows and steps, and nobody wants the base's output to measure on."""
        state = self._state
        rule = state.rule
        stays = rule.constant and not (rule.measures or rule.composes or state.varying or state.watched)
        return stays and state.settings.negative_weight == 1.0 and self._tries < _TRIES

    def fold(self, weights: Tensor | None) -> None:
        """Make the weights of all layers that have run, or of none where memory is short or each image has its own. weights: (S, 1, B) or
        (S, I, B), the rule's; None: all 1.
        """
        self.unfold()
        self._tries += 1
        if weights is not None and weights.shape[1] > 1:
            return
        ready = {layer: weight for layer in self._layers if (weight := _foldable(layer)) is not None}
        if not _fits(ready):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                for layer, weight in ready.items():
                    layer.fold(FoldedWeight.of(self._folded(layer, weight, weights), weight))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.unfold()

    def unfold(self) -> None:
        """Let go of the weights. The layers add their LoRAs again."""
        for layer in self._layers:
            layer.fold(None)

    @property
    def folded(self) -> bool:
        return any(layer.folded is not None for layer in self._layers)

    def restart(self) -> None:
        """Another picture begins."""
        self._tries = 0

    def _folded(self, layer: FusedLayer, weight: Tensor, weights: Tensor | None) -> Tensor:
        """W', as W in type, shape and order in memory."""
        rows = torch.empty_like(weight, dtype=torch.float32, requires_grad=False).copy_(weight.detach()).flatten(1)
        for site in layer.sites:
            own = None if weights is None else self._state.columns(weights[site.number], site.members).squeeze(0)
            left, right = _change(site, own)
            part = site.site.part
            unit = weight.shape[0] // part.units if part is not None else 0
            some = rows if part is None else rows.narrow(0, part.start * unit, part.length * unit)
            some.addmm_(left, right)
        folded = rows.view(weight.shape)
        return (
            folded
            if weight.dtype == folded.dtype and weight.is_contiguous()
            else torch.empty_like(weight, requires_grad=False).copy_(folded)
        )


def _change(site: FusedSite, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two float32 matrices, (out, K) and (K, in), whose product is the sum of the site's LoRAs under their weights, (P,)."""
    operators = site.operators
    assert operators is not None
    if operators.downs is not None and operators.ups is not None:
        ups = operators.ups.float()
        ups = ups if weights is None else ups * weights[:, None, None]
        return ups.flatten(0, 1).t(), operators.downs.float().flatten(2).flatten(0, 1)
    assert operators.dense is not None
    dense = operators.dense.float().flatten(2)
    total = dense.sum(0) if weights is None else torch.einsum("p,poi->oi", weights, dense)
    return torch.eye(total.shape[0], device=total.device), total


def _foldable(layer: FusedLayer) -> Tensor | None:
    """The layer's weight, where a tensor like it in its place gives the sum."""
    if layer.patched_by_others:
        return None
    weight = layer.own_weight(layer.module)
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _TYPES:
        return None
    if layer.module._parameters.get("weight") is not weight:
        return None
    for site in layer.sites:
        operators = site.operators
        if operators is None or operators.biases is not None or (operators.dtype, operators.device) != (weight.dtype, weight.device):
            return None
    return weight


def _fits(weights: Mapping[FusedLayer, Tensor]) -> bool:
    if not weights:
        return False
    wanted: dict[torch.device, int] = {}
    for weight in weights.values():
        wanted[weight.device] = wanted.get(weight.device, 0) + weight.numel() * weight.element_size()
    return all(size <= _SHARE * free_memory(device) for device, size in wanted.items())


def _version(tensor: Tensor) -> int:
    """Counts the writes to it; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


__all__ = ["FoldedWeight", "Folding", "OwnWeight"]
