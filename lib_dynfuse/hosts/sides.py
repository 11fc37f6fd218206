"""The LoRAs of the two sides, subject and style: one or several each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lora import LoraFile
from ..settings import FuseSettings

SIDES = ("subject", "style")

Loras = LoraFile | Sequence[LoraFile]


def names_of(settings: FuseSettings, side: str) -> tuple[str, ...]:
    """The names of a side's LoRAs."""
    names: tuple[str, ...] | None = getattr(settings, f"{side}s", None)
    return names if names is not None else (getattr(settings, side),)


def strengths_of(settings: FuseSettings, side: str, count: int) -> tuple[float, ...]:
    """One strength for each of a side's `count` LoRAs, where it does not depend on the step: in the text encoders."""
    schedules = getattr(settings, f"{side}_schedules", None)
    if schedules is not None:
        return tuple(schedule.full for schedule in schedules)
    return (getattr(settings, f"{side}_weight"),) * count


def text_strengths(settings: FuseSettings, subjects: int, styles: int) -> tuple[float, ...]:
    """The strengths of the text-encoder parts of so many subject LoRAs, then so many style LoRAs."""
    both = (*strengths_of(settings, "subject", subjects), *strengths_of(settings, "style", styles))
    return tuple(settings.te_weight * strength for strength in both)


def as_tuple(loras: Loras) -> tuple[LoraFile, ...]:
    """A side's LoRAs as a tuple."""
    return (loras,) if isinstance(loras, LoraFile) else tuple(loras)


def one_or_all(loras: Sequence[LoraFile]) -> Any:
    """As a session takes a side's LoRAs: the one, or all of several."""
    return loras[0] if len(loras) == 1 else loras


__all__ = ["SIDES", "Loras", "as_tuple", "names_of", "one_or_all", "strengths_of", "text_strengths"]
