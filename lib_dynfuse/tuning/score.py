"""How good a small picture is: how far it has come from each reference towards the other's, on both ways."""

from __future__ import annotations

from dataclasses import dataclass

from ..guidance.encoders import Embeddings


@dataclass(frozen=True)
class Score:
    """subject, style: 0 as unlike that side's reference as the other side's is (or more), 1 as the reference itself."""

    subject: float
    style: float

    @property
    def total(self) -> float:
        """The harmonic mean: what has one side and not the other is worth nothing."""
        total = self.subject + self.style
        return 2 * self.subject * self.style / total if total > 0 else 0.0


def scored(picture: Embeddings, subject: Embeddings, style: Embeddings) -> Score:
    """Of one picture. subject, style: of the two references.

    A side's position is (sim(picture, own) - sim(other, own)) / (1 - sim(other, own)), within 0 and 1: similarities of encoders have no
    zero, and a pair's references are alike to begin with. sim: for the subject CLIP's cosine, for the style the mean of CLIP's and
    DINO's, as in the guidance's score (paper, Eqs. 16-18).
    """
    return Score(
        _position(_content(picture, subject), _content(style, subject)),
        _position(_look(picture, style), _look(subject, style)),
    )


def _content(one: Embeddings, other: Embeddings) -> float:
    return float((one.clip[0].double().cpu() * other.clip[0].double().cpu()).sum())


def _look(one: Embeddings, other: Embeddings) -> float:
    dino = float((one.dino[0].double().cpu() * other.dino[0].double().cpu()).sum())
    return (_content(one, other) + dino) / 2


def _position(similarity: float, others: float) -> float:
    """others: of the other side's reference. 0 where both references are one picture: nothing can be told there."""
    if others >= 1 - 1e-6:
        return 0.0
    return min(1.0, max(0.0, (similarity - others) / (1 - others)))


__all__ = ["Score", "scored"]
