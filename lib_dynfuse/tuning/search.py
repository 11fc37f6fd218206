"""The search: every candidate's small picture, scored; the best is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..guidance.encoders import Encoders
from ..guidance.references import Reference
from ..settings import FuseSettings
from .plan import Frame, applied, candidates, described, untuned
from .score import Score, scored

MARGIN = 0.02
"""By how much the best must be better than the present settings to take their place."""
THUMBNAIL = 192
"""Longer side in pixels of what is kept of a small picture."""

PictureOf = Callable[[FuseSettings, int, int], Image.Image]
"""(settings, number from 1, how many) -> the small picture."""


@dataclass(frozen=True)
class Tried:
    """One candidate. changes: values of plan.FIELDS. label: the same in words. picture: small enough for a sheet."""

    changes: Mapping[str, Any]
    label: str
    score: Score
    picture: Image.Image


@dataclass(frozen=True)
class Tuned:
    """What was found. tried: the present settings first. best: position of what is used. frame: of the small pictures."""

    tried: tuple[Tried, ...]
    best: int
    frame: Frame

    def settings(self, asked: FuseSettings) -> FuseSettings:
        """The settings with what was found. asked: those that were searched for."""
        return replace(untuned(asked), **self.tried[self.best].changes)

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        best, present = self.tried[self.best], self.tried[0]
        made = f"{len(self.tried)} pictures of {self.frame.width}x{self.frame.height} and {self.frame.steps} steps"
        if best is present:
            return f"{best.label} as asked, score {best.score.total:.2f}; none of {made} is clearly better"
        return f"{best.label}, score {best.score.total:.2f}; as asked ({present.label}) {present.score.total:.2f}; {made}"

    def table(self) -> list[str]:
        """Lines for a console."""
        width = max(len(tried.label) for tried in self.tried)
        head = f"  {'':<{width}}  subject  style  score"
        return [head] + [
            f"{'*' if position == self.best else ' '} {tried.label:<{width}}  {tried.score.subject:7.2f}  {tried.score.style:5.2f}"
            f"  {tried.score.total:5.2f}"
            for position, tried in enumerate(self.tried)
        ]


def search(settings: FuseSettings, frame: Frame, references: Sequence[Reference], encoders: Encoders, picture_of: PictureOf) -> Tuned:
    """Make and score what is tried. references: the subject's and the style's. picture_of: may raise, which ends the search."""
    subject, style = (reference.embeddings for reference in references)
    plan = candidates(settings)
    tried = []
    for number, changes in enumerate(plan, 1):
        small = applied(settings, changes)
        picture = picture_of(small, number, len(plan))
        score = scored(encoders.embed_picture(picture), subject, style)
        tried.append(Tried(changes, described(small), score, thumbnail(picture)))
    return Tuned(tuple(tried), best_of([one.score for one in tried]), frame)


def best_of(scores: Sequence[Score]) -> int:
    """The position of the best, of the first unless it is beaten by more than MARGIN."""
    best = max(range(len(scores)), key=lambda position: (scores[position].total, -position))
    return best if scores[best].total > scores[0].total + MARGIN else 0


def thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return small


__all__ = ["MARGIN", "PictureOf", "Tried", "Tuned", "best_of", "search", "thumbnail"]
