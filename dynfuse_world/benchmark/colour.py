"""Colour and contrast of pictures: what a setting that pushes too hard would burn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601


class Colour(NamedTuple):
    """Of B pictures, (B,) from 0 to 1 each.

    saturation: the mean over pixels of the largest channel less the smallest (HSV's chroma; its quotient by the largest would say of dark
    noise that it is colourful). contrast: the standard deviation of luma over pixels. clipped: the share of pixels that have a channel
    of at most 1 or at least 254.
    """

    saturation: NDArray[np.float64]
    contrast: NDArray[np.float64]
    clipped: NDArray[np.float64]


def colour(pictures: NDArray[np.uint8]) -> Colour:
    """pictures: (B, H, W, 3)."""
    values = pictures.astype(np.float64)
    chroma = values.max(3) - values.min(3)
    return Colour(
        saturation=chroma.mean((1, 2)) / 255,
        contrast=(values @ _LUMA).std((1, 2)) / 255,
        clipped=((pictures <= 1) | (pictures >= 254)).any(3).mean((1, 2)),
    )


__all__ = ["Colour", "colour"]
