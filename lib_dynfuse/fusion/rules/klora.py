"""K-LoRA (arXiv 2502.18461, section 3): at each site the LoRA whose largest elements weigh more, the subject early and the style late."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import SettingsError
from ...lora.branch import Dense, LowRank
from ..step import Step
from .rule import Places, Rule, Votes

ALPHA, BETA = 1.5, 0.5


class KLora(Rule):
    """The subject where S_c >= gamma S_s (1.5 tau + 0.5), else the style.

    S: sum of the K largest |dW| of the site, K = r_c r_s (of a LoRA that is no product of thin matrices, r is the smaller side of dW).
    gamma: sum of |dW_c| over the sum of |dW_s|, over the sites that both change. tau: step / steps, in [0, 1). A site that one LoRA
    changes gets that one. S does not change from step to step, so that each site turns at most once.
    """

    name = "klora"
    summary = "each layer uses one LoRA, by its largest weights: the subject's early, the style's late (K-LoRA)"
    selects = True

    _ratio: Tensor | None = None

    def prepare(self, places: Places) -> None:
        if len(places.members) != 2:
            count = len(places.members)
            raise SettingsError(f"The method {self.name} is defined for one subject LoRA and one style LoRA, not for {count} LoRAs.")
        super().prepare(places)
        self._ratio = None

    def scale(self, tau: float) -> float:
        """What the style's sums are multiplied by."""
        return ALPHA * tau + BETA

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        if self._ratio is None or self._ratio.device != self.device:
            with torch.inference_mode(False), torch.no_grad():
                self._ratio = self._sums()
        subject = (self._ratio >= self.scale(step.index / step.count)).float()
        return torch.stack([subject, 1.0 - subject], -1).unsqueeze(1)

    def _sums(self) -> Tensor:
        """(S,): S_c / (gamma S_s); infinite where there is the subject's LoRA alone, minus infinity where there is the style's."""
        present = self.places.present
        largest = torch.zeros(present.shape, device=self.device)
        total = torch.zeros(2, device=self.device)
        both = present.all(1).nonzero().flatten().tolist()
        for site in both:
            branches = [self.places.change(site, member) for member in range(2)]
            changes = [branch.delta_weight().to(self.device).abs().flatten() for branch in branches]
            count = min(_rank(branches[0]) * _rank(branches[1]), changes[0].numel())
            largest[site] = torch.stack([change.topk(count).values.sum() for change in changes])
            total += torch.stack([change.sum() for change in changes])
        ratio = largest[:, 0] / (total[0] / total[1] * largest[:, 1])
        alone = torch.where(present[:, 0], torch.inf, -torch.inf).to(self.device)
        return torch.where(present.all(1).to(self.device), ratio.nan_to_num(torch.inf), alone)


class KLoraStar(KLora):
    """The variant s* of the same paper: the style's sums times (1.5 tau + 1.3) mod 1.5."""

    name = "klora-s"
    summary = "the same with K-LoRA's second scale: the style in the first steps, then the subject, then the style again"

    def scale(self, tau: float) -> float:
        return (ALPHA * tau + 1.3) % ALPHA


def _rank(branch: LowRank | Dense) -> int:
    return branch.rank if isinstance(branch, LowRank) else min(branch.shape[0], branch.weight[0].numel())


__all__ = ["KLora", "KLoraStar"]
