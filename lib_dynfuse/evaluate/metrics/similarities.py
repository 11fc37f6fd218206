"""Cosine similarity of a picture to reference pictures, by several encoders: mean over the references of the subject or of the style.

Table 1 of the paper (arXiv 2602.15539) has style-sim, clip-score and dino-score, its supplement the ViT and BLIP-2 scores. It names no
architecture, layer or preprocessing: what is assumed is the usual protocol, that of DreamBooth (arXiv 2208.12242) for the subject, and
the same with the style's picture for the style (ZipLoRA, arXiv 2311.13600). The held-out ones are steered by no method here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...fusion.rules import RULES
from ...guidance.guide import wants_guidance
from ...settings import FuseSettings
from ..folder import Pair
from .encoders import ENCODERS
from .metric import Metric

_GUIDED = {
    "clip": "guidance raises CLIP similarity to references that it makes with each LoRA",
    "dino": "guidance raises DINO similarity to the style's reference",
}


class Similarity(Metric):
    """encoder: one of ENCODERS."""

    encoder: ClassVar[str]

    @property
    def identity(self) -> str:
        return self.shelf.identity(self.encoder)

    def prepare(self) -> None:
        self.shelf.encoder(self.encoder)

    def scores(self, pair: Pair, pictures: Sequence[Path]) -> list[float]:
        references = self.shelf.encoded(self.encoder, getattr(pair, f"{self.side}_references")).double()
        found = self.shelf.encoded(self.encoder, pictures).double()
        return (found @ references.T).mean(1).tolist()

    @classmethod
    def optimised_by(cls, settings: FuseSettings) -> str:
        if cls.encoder in _GUIDED and wants_guidance(settings):
            return _GUIDED[cls.encoder]
        if cls.encoder == "dino" and RULES[settings.method].compares:
            return f"{settings.method} chooses by DINO similarity"
        return ""


def _similarity(name: str, encoder: str, side: str) -> type[Similarity]:
    what = "subject" if side == "subject" else "style"
    about = " ".join((ENCODERS[encoder].__doc__ or "").split()).rstrip(".")
    protocol = f"Cosine similarity to the {what}'s reference pictures, mean over them. {about}."
    attributes = {"name": name, "encoder": encoder, "side": side, "family": encoder, "protocol": protocol, "needs_references": (side,)}
    return type(f"{encoder.capitalize()}{what.capitalize()}Similarity", (Similarity,), {**attributes, "__doc__": protocol})


SIMILARITIES = (
    _similarity("style-sim", "clip", "style"),
    _similarity("clip-score", "clip", "subject"),
    _similarity("dino-score", "dino", "subject"),
    _similarity("vit-content", "vit", "subject"),
    _similarity("vit-style", "vit", "style"),
    _similarity("blip2-content", "blip2", "subject"),
    _similarity("blip2-style", "blip2", "style"),
    _similarity("dinov2-content", "dinov2", "subject"),
    _similarity("dinov2-style", "dinov2", "style"),
    _similarity("siglip-content", "siglip", "subject"),
    _similarity("siglip-style", "siglip", "style"),
    _similarity("csd-style", "csd", "style"),
)

__all__ = ["SIMILARITIES", "Similarity"]
