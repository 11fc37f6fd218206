"""What is tried for a pair, and how small the pictures are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..fusion.rules import RULES
from ..settings import FuseSettings
from ..strength import number_text

OFF, AUTO = "off", "auto"

FIELDS = ("tilt", "contrast")
"""The settings that tuning changes."""

TILTS = (0.0, -0.15, 0.15)
"""Added to the present one: as it is, more of the subject, more of the style."""
CONTRASTS = (1.0, 2.0, 3.0)

STEPS = 12
"""Most of a small picture."""
_GRID = 64
"""Pixels that the sides of a small picture are multiples of: one of the deepest level of Stable Diffusion's U-Nets."""


@dataclass(frozen=True)
class Frame:
    """Of a picture. width, height: pixels. steps: of the sampler."""

    width: int
    height: int
    steps: int


def small_frame(width: int, height: int, steps: int, smallest: int) -> Frame:
    """The frame of the small pictures for a job's: about smallest squared pixels in the job's aspect, never larger than the job's own."""
    scale = smallest / math.sqrt(width * height)
    if scale < 1:
        width, height = (min(side, max(_GRID, round(side * scale / _GRID) * _GRID)) for side in (width, height))
    return Frame(width, height, min(steps, STEPS))


def wants_tuning(settings: FuseSettings) -> bool:
    """Whether the settings are to be found."""
    return settings.tune == AUTO


def untuned(settings: FuseSettings) -> FuseSettings:
    """The same as they are, without a search."""
    return replace(settings, tune=OFF)


def candidates(settings: FuseSettings) -> list[dict[str, Any]]:
    """What is tried, as values of FIELDS: the present settings first, then every other tilt and contrast."""
    present, own = settings.tilt, contrast_of(settings)
    tilts = dict.fromkeys(min(1.0, max(-1.0, round(present + change, 2))) for change in TILTS)
    tried = [(tilt, contrast) for contrast in sorted({own, *CONTRASTS}) for tilt in tilts if (tilt, contrast) != (present, own)]
    return [{"tilt": present, "contrast": settings.contrast}, *({"tilt": tilt, "contrast": contrast} for tilt, contrast in tried)]


def contrast_of(settings: FuseSettings) -> float:
    """The contrast that is used: the setting's, or what goes with the method."""
    return settings.contrast if settings.contrast >= 0 else RULES[settings.method].contrast


def applied(settings: FuseSettings, tried: Mapping[str, Any]) -> FuseSettings:
    """The settings of a small picture: without guidance, which would make the encoders judge what they have made."""
    return replace(untuned(settings), guidance=False, **tried)


def described(settings: FuseSettings) -> str:
    """ "tilt -0.2, contrast 2"."""
    return f"tilt {number_text(settings.tilt)}, contrast {number_text(contrast_of(settings))}"


__all__ = [
    "AUTO",
    "CONTRASTS",
    "FIELDS",
    "OFF",
    "STEPS",
    "TILTS",
    "Frame",
    "applied",
    "candidates",
    "contrast_of",
    "described",
    "small_frame",
    "untuned",
    "wants_tuning",
]
