"""What a maker of pictures is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from ...settings import FuseSettings
from ..folder import Picture
from ..plan import PlannedPair


@dataclass(frozen=True)
class Job:
    """A picture to make. settings: with the pair's LoRAs. loras: as a method's."""

    picture: Picture
    pair: PlannedPair
    loras: str
    settings: FuseSettings

    @property
    def prompt(self) -> str:
        return self.pair.prompts[self.picture.prompt]


@dataclass(frozen=True)
class Made:
    """infotext: as WebUIs keep it in a PNG, under "parameters". notes: sentences that the user should see."""

    image: Image.Image
    infotext: str
    notes: Sequence[str] = ()


class MakerGoneError(RuntimeError):
    """This maker makes no more pictures, and others may go on. One sentence for the user."""


OnStep = Callable[[int, int], None]
"""(steps done, steps in all)"""


class Maker(Protocol):
    """name: for people."""

    name: str

    def together(self, job: Job) -> int:
        """How many pictures of that pair, prompt and method it makes at once."""

    def make(self, jobs: Sequence[Job], on_step: OnStep) -> list[Made]:
        """One for each job, all of one pair, prompt and method. Raises MakerGoneError; any other error ends the evaluation."""


__all__ = ["Job", "Made", "Maker", "MakerGoneError", "OnStep"]
