"""LoRA Composite (arXiv 2402.16843, section 3.3): the mean of what each LoRA predicts alone, for prompt and negative prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class Composite(Rule):
    name = "composite"
    summary = "each LoRA predicts the picture alone, and the predictions are averaged; as many predictions as LoRAs (LoRA Composite)"
    constant = True
    composes = True

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        sites, members = self.places.present.shape
        return torch.full((sites, 1, members), 1.0 / members, device=self.device)


__all__ = ["Composite"]
