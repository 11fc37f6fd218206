"""What methods have in common that give each site to a subject's or to a style's LoRA by a size of their matrices and by the step."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...errors import SettingsError
from ...lora.branch import Dense, LowRank
from ..step import Step
from .rule import Places, Rule, Votes


class OneOfTwo(Rule):
    """The subject where S_c >= gamma S_s scale(tau), else the style.

    S: of a site, gamma: the ratio of sums over the sites that both change, see sizes. tau: step / steps, in [0, 1). A site that one LoRA
    changes gets that one. A tilt multiplies the sizes. S does not change from step to step, so that a site turns only where the scale
    passes its ratio.
    """

    selects = True

    _ratio: Tensor | None = None

    @abstractmethod
    def scale(self, tau: float) -> float:
        """What the style's sizes are multiplied by."""

    @abstractmethod
    def sizes(self, subject: LowRank | Dense, style: LowRank | Dense) -> tuple[Tensor, Tensor]:
        """Of a site: (2,) S_c and S_s, and (2,) what gamma's sums are of; float32 on self.device."""

    def prepare(self, places: Places) -> None:
        if len(places.members) != 2:
            count = len(places.members)
            raise SettingsError(f"The method {self.name} is defined for one subject LoRA and one style LoRA, not for {count} LoRAs.")
        super().prepare(places)
        self._ratio = None

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        if self._ratio is None or self._ratio.device != self.device:
            with torch.inference_mode(False), torch.no_grad():
                self._ratio = self._ratios()
        subject = (self._ratio >= self.scale(step.index / step.count)).float()
        return torch.stack([subject, 1.0 - subject], -1).unsqueeze(1)

    def _ratios(self) -> Tensor:
        """(S,): S_c / (gamma S_s); infinite where there is the subject's LoRA alone, minus infinity where there is the style's."""
        present = self.places.present
        size = torch.zeros(present.shape, device=self.device)
        total = torch.zeros(2, device=self.device)
        for site in present.all(1).nonzero().flatten().tolist():
            own, summed = self.sizes(*(self.places.change(site, member) for member in range(2)))
            size[site] = own
            total += summed
        subject, style = self.places.tilts
        ratio = subject * size[:, 0] / (style * total[0] / total[1] * size[:, 1])
        alone = torch.where(present[:, 0], torch.inf, -torch.inf).to(self.device)
        return torch.where(present.all(1).to(self.device), ratio.nan_to_num(torch.inf), alone)


__all__ = ["OneOfTwo"]
