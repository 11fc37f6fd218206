"""LoRA Switch (arXiv 2402.16843, section 3.2): one LoRA at a time, in their order, for some steps each."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class Switch(Rule):
    """LoRA floor(step / switch_every) mod B, the subjects first. With a tilt the turns are of switch_every f_b steps: a step is that LoRA's
    in whose turn it begins.
    """

    name = "switch"
    summary = "one LoRA at a time, in turn, for some steps each (LoRA Switch)"
    selects = True

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        sites, members = self.places.present.shape
        weights = torch.zeros(sites, 1, members, device=self.device)
        ends = [self.places.settings.switch_every * end for end in itertools.accumulate(self.places.tilts)]
        # Rounded: 0.1 and 0.2 make no 0.3, and a turn would end a step late.
        place = round(math.fmod(step.index, ends[-1]), 9)
        weights[..., next((member for member, end in enumerate(ends) if place < round(end, 9)), 0)] = 1.0
        return weights


__all__ = ["Switch"]
