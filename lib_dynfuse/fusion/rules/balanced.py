"""The sum of all LoRAs, none much louder than another: files of strangers differ up to nine times in loudness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...lora.pair import square_norm
from ..step import Step
from .rule import Rule, Votes

EVEN = 2.0
"""Two LoRAs that differ by less are left as they are: loudness is not all that a LoRA needs to be heard."""


class Balanced(Rule):
    """f_b = m_b / n_b, n_b = sqrt(sum over sites of |dW_b|_F^2) over the sites that all LoRAs change, log m_b that of n_b brought to within
    log(2) / 2 of the mean of all.

    So two LoRAs of which one is up to twice as loud are added as they are; else the louder one is twice as loud afterwards. The strengths
    that the user gives act beside it: they are not in n_b. Where the LoRAs have no site in common, or one changes nothing there, all
    factors are 1.
    """

    name = "balanced"
    summary = (
        "all LoRAs added everywhere, none more than twice as loud as another, away from the picture without them; "
        "no gain over the sum was measured with overfitted files"
    )
    constant = True
    contrast = 1.5

    _factors: Tensor | None = None

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        if self._factors is None or self._factors.device != self.device:
            with torch.inference_mode(False), torch.no_grad():
                self._factors = self._balance()
        return self._factors

    def _balance(self) -> Tensor:
        """(S, 1, B), the same at every site."""
        present = self.places.present
        sites, members = present.shape
        squares = torch.zeros(members, dtype=torch.float32, device=self.device)
        for site in present.all(1).nonzero().flatten().tolist():
            squares += torch.stack([square_norm(self.places.change(site, member), self.device) for member in range(members)])
        logs = 0.5 * squares.log()
        distance = logs - logs.mean()
        factors = (distance.clamp(-0.5 * math.log(EVEN), 0.5 * math.log(EVEN)) - distance).exp()
        factors = torch.where(factors.isfinite() & (factors > 0), factors, torch.ones_like(factors))
        return factors.expand(sites, 1, members).contiguous()


__all__ = ["EVEN", "Balanced"]
