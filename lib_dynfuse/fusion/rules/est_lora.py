"""EST-LoRA (arXiv 2508.02165): at each site the LoRA of more energy, by how unlike the pictures of each LoRA alone are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from ...lora.pair import square_norm
from .one_of_two import OneOfTwo

ALPHA = 1.5


class EstLora(OneOfTwo):
    """scale = 1.5 tau + 1 - cos. S: the energy |dW|_F^2, and gamma the ratio of its sums (of which the paper does not say what they are
    over: here the sites that both change, as in K-LoRA).

    cos: the DINO similarity of two pictures, one made with each LoRA alone, of the picture's own prompt and seed. Where it is not known,
    0: the pictures have nothing in common.
    """

    name = "est-lora"
    summary = "each layer uses one LoRA, by the energy of its weights and how unlike the two LoRAs' own pictures are (EST-LoRA)"
    compares = True

    def scale(self, tau: float) -> float:
        return ALPHA * tau + 1.0 - self.similarity

    def sizes(self, subject: LowRank | Dense, style: LowRank | Dense) -> tuple[Tensor, Tensor]:
        energies = torch.stack([square_norm(branch, self.device) for branch in (subject, style)])
        return energies, energies


__all__ = ["EstLora"]
