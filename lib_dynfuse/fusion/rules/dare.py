"""DARE (arXiv 2311.03099): most elements of each LoRA's change are dropped at random, and those that are left made larger."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ...lora.branch import Dense, LowRank
from ...lora.naming import Site
from .direct import Direct
from .rule import Member


class Dare(Direct):
    """y = y0 + sum over b of (M_b * dW_b / density) h, each element of M_b 1 with probability `density`, else 0.

    On the whole matrices, never on their thin factors. The coins follow from the setting dare_seed, the LoRA's name and the layer's, so
    that a picture can be made again.
    """

    name = "dare"
    summary = "of each LoRA a random part of its weights, made larger, added up (DARE)"
    rewrites = True

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], members: Sequence[Member], strengths: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        density, seed = self.places.settings.density, self.places.settings.dare_seed
        made = []
        for change, member in zip(changes, members):
            weight = change.delta_weight()
            coins = torch.rand(weight.shape, generator=torch.Generator().manual_seed(coin_seed(seed, member.name, site)))
            made.append(Dense(torch.where(coins.to(weight.device) < density, weight / density, 0.0), change.bias))
        return made


def coin_seed(seed: int, name: str, site: Site) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{site.layer}/{site.part}".encode()).digest()[:8], "big", signed=True)


__all__ = ["Dare", "coin_seed"]
