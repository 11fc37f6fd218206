"""The paper taken literally, as a baseline for speed: full products for the base, the subject and the style, and eager divergences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusion.layer import FusedLayer
from ..fusion.session import FusionSession


@contextmanager
def literally_fused(session: FusionSession) -> Iterator[None]:
    """Give the session's layers the forward that Eqs. 9 to 13 spell out, with W0 + dW made beforehand, for the length of the block."""
    patched: list[nn.Module] = []
    try:
        for layer in session.layers:
            if isinstance(layer, FusedLayer) and layer.sites[0].two_sided:
                layer.module.__dict__["forward"] = _literal_forward(layer)
                patched.append(layer.module)
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _literal_forward(layer: FusedLayer) -> Any:
    module: Any = layer.module
    weight: Tensor = module.weight.detach()
    site = layer.sites[0]
    merged = []
    for branch, strength in zip(site.bind(lambda: weight), site.strengths):
        assert branch is not None
        merged.append((weight.float() + strength * branch.delta_weight().reshape(weight.shape).to(weight.device)).to(weight.dtype))

    def product(x: Tensor, w: Tensor) -> Tensor:
        if layer.convolution:
            return module._conv_forward(x, w, module.bias)
        return F.linear(x, w, module.bias)

    axis = 1 if layer.convolution else -1

    def forward(x: Tensor) -> Tensor:
        base = product(x, weight)
        changed = [product(x, w) for w in merged]
        log_p = F.log_softmax(base.float(), axis)
        # F.kl_div(input, target) is KL(target || input).
        divergences = [
            F.kl_div(log_p, F.log_softmax(c.float(), axis), reduction="none", log_target=True).sum(axis).flatten(1).mean(1) for c in changed
        ]
        wins = divergences[0] >= divergences[1]
        return torch.where(wins.view(-1, *(1,) * (base.dim() - 1)), changed[0], changed[1])

    return forward
