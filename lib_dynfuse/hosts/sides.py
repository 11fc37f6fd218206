"""The LoRAs of the two sides, subject and style: one or several each."""

from __future__ import annotations

from collections.abc import Sequence

from ..lora import LoraFile
from ..settings import FuseSettings

SIDES = ("subject", "style")

Loras = LoraFile | Sequence[LoraFile]


def names_of(settings: FuseSettings, side: str) -> tuple[str, ...]:
    """The names of a side's LoRAs."""
    names: tuple[str, ...] = getattr(settings, f"{side}s")
    return names


def as_tuple(loras: Loras) -> tuple[LoraFile, ...]:
    """A side's LoRAs as a tuple."""
    return (loras,) if isinstance(loras, LoraFile) else tuple(loras)


__all__ = ["SIDES", "Loras", "as_tuple", "names_of"]
