"""LoRA Switch (arXiv 2402.16843, section 3.2): one LoRA at a time, in their order, for some steps each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class Switch(Rule):
    """LoRA floor(step / switch_every) mod B, the subjects first."""

    name = "switch"
    summary = "one LoRA at a time, in turn, for some steps each (LoRA Switch)"
    selects = True

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        sites, members = self.places.present.shape
        weights = torch.zeros(sites, 1, members, device=self.device)
        weights[..., step.index // self.places.settings.switch_every % members] = 1.0
        return weights


__all__ = ["Switch"]
