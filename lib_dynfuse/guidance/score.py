"""How far a picture is from the two references: the score R and its three terms (paper, Eqs. 16-19)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoders import Embeddings, Encoders

TERMS = ("content", "style_clip", "style_dino")
LABELS = ("Subject CLIP", "Style CLIP", "Style DINO")


@dataclass(frozen=True, eq=False)
class Targets:
    """What a picture is compared with: content_clip (C,), style_clip (C,), style_dino (C',), each of length 1."""

    content_clip: Tensor
    style_clip: Tensor
    style_dino: Tensor

    @classmethod
    def of(cls, subject: Embeddings, style: Embeddings) -> Targets:
        """subject, style: embeddings of one picture each."""
        return cls(subject.clip[0], style.clip[0], style.dino[0])

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.content_clip.to(device), self.style_clip.to(device), self.style_dino.to(device))


def similarities(pictures: Tensor, targets: Targets, encoders: Encoders, wanted: tuple[bool, bool, bool] = (True, True, True)) -> Tensor:
    """The three cosines of Eqs. 16-18, (3, B) float32, differentiable, in the order of TERMS.

    pictures: (B, 3, H, W) in about [-1, 1]. wanted: the terms to compute; the others are zero, and an encoder that none of them needs
    does not run.
    """
    nothing = pictures.new_zeros(pictures.shape[0], dtype=torch.float32)
    content = style = dino = nothing
    if wanted[0] or wanted[1]:
        embedding = encoders.clip(pictures)
        nothing = nothing.to(embedding)
        content = embedding @ targets.content_clip.to(embedding) if wanted[0] else nothing
        style = embedding @ targets.style_clip.to(embedding) if wanted[1] else nothing
    if wanted[2]:
        embedding = encoders.dino(pictures)
        dino = embedding @ targets.style_dino.to(embedding)
    return torch.stack([term.to(dino) for term in (content, style, dino)])


def score(similarities: Tensor, weights: Sequence[float]) -> Tensor:
    """R = 1 - sum_k w_k sim_k, one per image, (B,): Eq. 19. similarities: (3, B). weights: one per term."""
    # Term by term: weights made into a tensor would have to be brought to the device, which the step would wait for.
    return 1 - sum(weight * term for weight, term in zip(weights, similarities, strict=True))
