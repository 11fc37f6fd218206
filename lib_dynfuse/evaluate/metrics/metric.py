"""What a metric is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...settings import FuseSettings
from ..folder import Pair
from .encoders import Shelf


class Metric(ABC):
    """A number for each picture; more is better.

    name: in plans, tables and folders. side: "subject" or "style", what it tells of. family: a subject's and a style's metric of one
    family are joined by their harmonic mean. protocol: for the report, exactly what is computed. needs_references: sides whose reference
    pictures it compares with. revision: another one when the computation changes, so that older scores are not mixed with new ones.
    """

    name: ClassVar[str]
    side: ClassVar[str]
    family: ClassVar[str]
    protocol: ClassVar[str]
    needs_references: ClassVar[tuple[str, ...]] = ()
    revision: ClassVar[int] = 1

    def __init__(self, shelf: Shelf) -> None:
        """shelf: has the encoders."""
        self.shelf = shelf

    @property
    def identity(self) -> str:
        """Stands for the networks that it uses."""
        return ""

    def prepare(self) -> None:  # noqa: B027 (most of one's own need nothing)
        """Find out whether its networks can be had, and fetch them, before hours are spent on pictures. Raises EncoderError."""

    @abstractmethod
    def scores(self, pair: Pair, pictures: Sequence[Path]) -> list[float]:
        """One for each picture of the pair. Raises EncoderError, and OSError for a picture that cannot be read."""

    @classmethod
    def optimised_by(cls, settings: FuseSettings) -> str:
        """Why a method with these settings can score high without being better; empty for a metric that judges it fairly."""
        return ""


__all__ = ["Metric"]
