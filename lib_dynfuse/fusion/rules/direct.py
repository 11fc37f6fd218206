"""The plain sum, as several <lora:...> tags give it: y = y0 + sum over b of d_b."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class Direct(Rule):
    name = "direct"
    summary = "all LoRAs added everywhere, as ordinary <lora:...> tags do"
    constant = True
    uniform = True

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        sites, members = self.places.present.shape
        return torch.ones(sites, 1, members, device=self.device)


__all__ = ["Direct"]
