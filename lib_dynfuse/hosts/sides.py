"""The LoRAs of the two sides, subject and style: one or several each."""

from __future__ import annotations

from collections.abc import Sequence

from ..lora import LoraFile
from ..settings import FuseSettings
from ..strength import one_each

SIDES = ("subject", "style")

Loras = LoraFile | Sequence[LoraFile]


def names_of(settings: FuseSettings, side: str) -> tuple[str, ...]:
    """The names of a side's LoRAs."""
    names: tuple[str, ...] = getattr(settings, f"{side}s")
    return names


def text_strengths(settings: FuseSettings, subjects: int, styles: int) -> tuple[float, ...]:
    """The strengths of the text-encoder parts of so many subject LoRAs, then so many style LoRAs.

    A weight that varies with the step counts in full: the prompt is encoded once.
    """
    schedules = (
        *one_each(settings.subject_schedules, subjects, "subject_weight"),
        *one_each(settings.style_schedules, styles, "style_weight"),
    )
    return tuple(settings.te_weight * schedule.full for schedule in schedules)


def as_tuple(loras: Loras) -> tuple[LoraFile, ...]:
    """A side's LoRAs as a tuple."""
    return (loras,) if isinstance(loras, LoraFile) else tuple(loras)


__all__ = ["SIDES", "Loras", "as_tuple", "names_of", "text_strengths"]
