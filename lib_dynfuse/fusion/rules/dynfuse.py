"""The paper's selection: at each site the LoRA with the largest divergence (arXiv 2602.15539, Eq. 13), for any number of LoRAs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Rule, Votes


class DynFuse(Rule):
    """One-hot at the largest of f_b D_b; f_b is the bias for a style and 1 for a subject, times gamma_b, and what a
    tilt multiplies the strength by, where both are balanced.

    A tie goes to the LoRA named first, subjects before styles. So does a choice in which a divergence is not finite: to the first
    LoRA that changes the site. The paper's D_c >= D_s says nothing of either.
    """

    name = "dynfuse"
    summary = "each layer uses the LoRA that changes its features most, chosen anew at every step (the paper's)"
    measures = True
    selects = True

    _gamma: Tensor | None = None
    _biases: Tensor | None = None
    _factors: Tensor | None = None

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        assert votes is not None
        scores = votes.values
        settings = self.places.settings
        if settings.bias != 1.0:
            if self._biases is None or self._biases.device != scores.device:
                factors = [1.0 if member.subject else settings.bias for member in self.places.members]
                self._biases = torch.tensor(factors, device=scores.device)
            scores = scores * self._biases
        if self._gamma is not None:
            scores = scores * self._gamma  # which takes back what the tilt did to the strengths
            if settings.tilt:
                scores = scores * self._tilts(scores.device)
        # Not finite: above every number at the first LoRA's place, so that argmax, which takes the first of equals, finds it.
        scores = scores.nan_to_num(torch.inf, torch.inf, torch.inf)
        if votes.present is not None:
            scores = scores.masked_fill(~votes.present, -torch.inf)
        if abs(settings.tilt) == 1.0:  # a side that is not there wins nothing, whatever the criterion makes of no change
            scores = scores.masked_fill(self._tilts(scores.device) == 0, -torch.inf)
        broken = scores.isposinf().any(-1, keepdim=True)
        best = scores.masked_fill(broken & scores.isfinite(), torch.inf).argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter_(-1, best, 1.0)

    def _tilts(self, device: torch.device) -> Tensor:
        if self._factors is None or self._factors.device != device:
            self._factors = torch.tensor(self.places.tilts, device=device)
        return self._factors

    def observe(self, step: Step, votes: Votes) -> None:
        if self.places.settings.balance == "gamma" and self._gamma is None:
            self._gamma = gamma(votes)

    def restart(self) -> None:
        self._gamma = None


def gamma(votes: Votes) -> Tensor:
    """The factors that make all LoRAs as loud as the first: sum |D_0| / sum |D_b| over the sites, for every image apart.

    votes: one step's, of all sites. Returns (I, B); 1 where a sum is zero or not finite. Only sites that all LoRAs change count.
    Absolute values, because the dot-product criterion may be negative.
    """
    values = votes.values.abs()
    counted = values.isfinite()
    if votes.present is not None:
        counted = counted & votes.present.all(-1, keepdim=True)
    loudness = torch.where(counted, values, torch.zeros_like(values)).sum(0)
    ratio = loudness[:, :1] / loudness
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


__all__ = ["DynFuse", "gamma"]
