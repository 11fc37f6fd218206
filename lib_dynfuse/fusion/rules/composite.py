"""LoRA Composite (arXiv 2402.16843, section 3.3): the mean of what each LoRA predicts alone, for prompt and negative prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class Composite(Rule):
    """w_b = f_b / sum f_b with the factors f_b of the tilt: 1 / B without."""

    name = "composite"
    summary = "each LoRA predicts the picture alone, and the predictions are averaged; as many predictions as LoRAs (LoRA Composite)"
    constant = True
    composes = True

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        factors = torch.tensor(self.places.tilts, device=self.device)
        return (factors / factors.sum()).expand(len(self.places.sites), 1, -1).contiguous()


__all__ = ["Composite"]
