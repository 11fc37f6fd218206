"""Filled, outlined polygons on a canvas that is larger than the picture, so that edges come out smooth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

PIXELS = 64
OVERSAMPLING = 3

# What the parts of a figure are called by colour: a style may give each its own.
BODY, SECOND, LIGHT, DARK, ACCENT = range(5)


@dataclass(frozen=True)
class Place:
    """Where a figure lies. x, y: its middle; radius: half its size; all in pixels of the picture. mirrored: left and right swapped."""

    x: float
    y: float
    radius: float
    mirrored: bool = False


class Pen:
    """Draws the parts of one figure. Coordinates run from -1 to 1 in both directions, y downwards."""

    def __init__(self, canvas: Image.Image, place: Place, fills: Mapping[int, Colour], outline: Colour | None, width: float):
        """canvas: RGB, OVERSAMPLING times the picture. fills: by role. width: of the outline, in pixels of the picture."""
        self._draw = ImageDraw.Draw(canvas)
        self._place = place
        self._fills = fills
        self._outline = outline
        self._width = max(1, round(width * OVERSAMPLING))

    def polygon(self, points: Sequence[Point], role: int) -> None:
        corners = [self._on_canvas(*point) for point in points]
        self._draw.polygon(corners, fill=self._fills[role])
        if self._outline is not None:
            self._draw.line([*corners, *corners[:2]], fill=self._outline, width=self._width, joint="curve")

    def ellipse(self, x: float, y: float, across: float, down: float, role: int) -> None:
        """across, down: its half axes."""
        turns = [2 * math.pi * corner / 24 for corner in range(24)]
        self.polygon([(x + across * math.cos(turn), y + down * math.sin(turn)) for turn in turns], role)

    def rectangle(self, left: float, top: float, right: float, bottom: float, role: int) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], role)

    def _on_canvas(self, x: float, y: float) -> Point:
        place = self._place
        side = -1 if place.mirrored else 1
        return (place.x + side * x * place.radius) * OVERSAMPLING, (place.y + y * place.radius) * OVERSAMPLING


__all__ = ["ACCENT", "BODY", "DARK", "LIGHT", "OVERSAMPLING", "PIXELS", "SECOND", "Colour", "Pen", "Place", "Point"]
