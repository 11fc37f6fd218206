"""The sum of all LoRAs, each made as loud as the others: files of strangers differ up to nine times in loudness."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lora.pair import square_norm
from ..step import Step
from .rule import Rule, Votes


class Balanced(Rule):
    """f_b = (product of all n)^(1/B) / n_b, n_b = sqrt(sum over sites of |dW_b|_F^2) over the sites that all LoRAs change.

    So the LoRAs' loudness has the same geometric mean as before. The strengths that the user gives act beside it: they are not in n_b.
    Where the LoRAs have no site in common, or one changes nothing there, all factors are 1.
    """

    name = "balanced"
    summary = "all LoRAs added everywhere, each made as loud as the others, away from the picture without them"
    constant = True
    contrast = 1.0

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
        factors = (logs.mean() - logs).exp()
        factors = torch.where(factors.isfinite() & (factors > 0), factors, torch.ones_like(factors))
        return factors.expand(sites, 1, members).contiguous()


__all__ = ["Balanced"]
