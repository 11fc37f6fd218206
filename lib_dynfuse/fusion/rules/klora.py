"""K-LoRA (arXiv 2502.18461, section 3): at each site the LoRA whose largest elements weigh more, the subject early and the style late."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from .one_of_two import OneOfTwo

ALPHA, BETA = 1.5, 0.5


class KLora(OneOfTwo):
    """scale = 1.5 tau + 0.5. S: sum of the K largest |dW| of the site, K = r_c r_s (of a LoRA that is no product of thin matrices, r is
    the smaller side of dW). gamma: of all |dW|.
    """

    name = "klora"
    summary = "each layer uses one LoRA, by its largest weights: the subject's early, the style's late (K-LoRA)"

    def scale(self, tau: float) -> float:
        return ALPHA * tau + BETA

    def sizes(self, subject: LowRank | Dense, style: LowRank | Dense) -> tuple[Tensor, Tensor]:
        changes = [branch.delta_weight().to(self.device).abs().flatten() for branch in (subject, style)]
        count = min(_rank(subject) * _rank(style), changes[0].numel())
        return torch.stack([change.topk(count).values.sum() for change in changes]), torch.stack([change.sum() for change in changes])


class KLoraStar(KLora):
    """The variant s* of the same paper: the style's sums times (1.5 tau + 1.3) mod 1.5."""

    name = "klora-s"
    summary = "the same with K-LoRA's second scale: the style in the first steps, then the subject, then the style again"

    def scale(self, tau: float) -> float:
        return (ALPHA * tau + 1.3) % ALPHA


def _rank(branch: LowRank | Dense) -> int:
    return branch.rank if isinstance(branch, LowRank) else min(branch.shape[0], branch.weight[0].numel())


__all__ = ["KLora", "KLoraStar"]
