"""The paper taken literally, as a baseline for speed: full products for the base and each LoRA, and eager divergences."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusion.layer import FusedLayer
from ..fusion.session import FusionSession


@contextmanager
def literally_fused(session: FusionSession) -> Iterator[list[float]]:
    """Give the session's layers the forward that Eqs. 9 to 13 spell out, for the length of the block.

    W0 + dW of each LoRA is made beforehand on a GPU. On a CPU, whose memory need not hold the model three times, it is made in the
    forward; the seconds that this takes, which are no part of a step, are put into the list that is given.
    """
    patched: list[nn.Module] = []
    seconds_of_merging: list[float] = []
    try:
        layers = [layer for layer in session.layers if isinstance(layer, FusedLayer)]
        count = max((len(layer.sites[0].members) for layer in layers), default=0)
        for layer in layers:
            if len(layer.sites[0].members) == count:  # changed by all
                layer.module.__dict__["forward"] = _literal_forward(layer, seconds_of_merging)
                patched.append(layer.module)
        yield seconds_of_merging
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _merged(layer: FusedLayer) -> list[Tensor]:
    """W0 + dW of each LoRA, in the layer's type."""
    weight: Tensor = layer.module.weight.detach()
    site = layer.sites[0]
    merged = []
    for branch, strength in zip(site.bind(lambda: weight), site.strengths):
        merged.append((weight.float() + strength * branch.delta_weight().reshape(weight.shape).to(weight.device)).to(weight.dtype))
    return merged


def _literal_forward(layer: FusedLayer, seconds_of_merging: list[float]) -> Any:
    module: Any = layer.module
    weight: Tensor = module.weight.detach()
    beforehand = _merged(layer) if weight.device.type != "cpu" else None
    axis = 1 if layer.convolution else -1

    def weights() -> list[Tensor]:
        if beforehand is not None:
            return beforehand
        started = time.perf_counter()
        made = _merged(layer)
        seconds_of_merging.append(time.perf_counter() - started)
        return made

    def product(x: Tensor, w: Tensor) -> Tensor:
        if layer.convolution:
            return module._conv_forward(x, w, module.bias)
        return F.linear(x, w, module.bias)

    def forward(x: Tensor) -> Tensor:
        base = product(x, weight)
        changed = [product(x, w) for w in weights()]
        log_p = F.log_softmax(base.float(), axis)
        # F.kl_div(input, target) is KL(target || input).
        divergences = [
            F.kl_div(log_p, F.log_softmax(c.float(), axis), reduction="none", log_target=True).sum(axis).flatten(1).mean(1) for c in changed
        ]
        wins = torch.stack(divergences).argmax(0)  # the first of equals
        result = changed[0]
        for number, other in enumerate(changed[1:], 1):
            result = torch.where((wins == number).view(-1, *(1,) * (base.dim() - 1)), other, result)
        return result

    return forward
