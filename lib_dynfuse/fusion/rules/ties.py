"""TIES (arXiv 2306.01708): of each LoRA's change the largest elements, of these those that agree in their sign, and their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from ...lora.naming import Site
from .direct import Direct
from .rule import Member


class Ties(Direct):
    """On the whole matrices s_b dW_b, never on their thin factors: trimmed to the share `density` of largest magnitude, T_b; the sign
    elected in each place that of sum T_b; the result the mean of the T_b that are not 0 and have that sign.

    The share is taken of each layer's elements, where the paper takes it of all layers' together: those are never in memory at once.
    Changes of biases are added.
    """

    name = "ties"
    summary = "each LoRA's largest weights alone, averaged where their signs agree (TIES)"
    rewrites = True

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], members: Sequence[Member], strengths: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        trimmed = [trim(change.delta_weight() * strength, self.places.settings.density) for change, strength in zip(changes, strengths)]
        total = torch.stack(trimmed).sum(0)
        agree = [part * total > 0 for part in trimmed]
        count = torch.stack(agree).sum(0).clamp_min(1)
        parts = [torch.where(same, part, 0.0) / count for part, same in zip(trimmed, agree)]
        return [Dense(part / strength if strength else part, change.bias) for part, strength, change in zip(parts, strengths, changes)]


def trim(change: Tensor, density: float) -> Tensor:
    """With all but the share `density` of the elements of largest magnitude set to 0; at least one is left."""
    flat = change.flatten().abs()
    count = max(1, round(density * flat.numel()))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count).indices] = True
    return torch.where(kept.view_as(change), change, 0.0)


__all__ = ["Ties", "trim"]
