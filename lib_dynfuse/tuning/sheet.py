"""Small pictures side by side: as they are kept, and labelled for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from ..fusion.selection_map import text_font

if TYPE_CHECKING:
    from .search import Tuned

_EDGE = 3
_INK, _PAPER, _MARK = "#222222", "#ffffff", "#2a9d5c"


def columns_of(count: int) -> int:
    """Of a sheet of that many pictures: as square as it can be."""
    return math.ceil(math.sqrt(count))


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size without anything between them, row by row."""
    width, height = pictures[0].size
    columns = columns_of(len(pictures))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), _PAPER)
    for position, picture in enumerate(pictures):
        sheet.paste(picture, (position % columns * width, position // columns * height))
    return sheet


def ungrid(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The inverse of grid, of that many pictures. Raises ValueError for none."""
    if count < 1:
        raise ValueError("a sheet has pictures")
    columns = columns_of(count)
    width, height = sheet.width // columns, sheet.height // math.ceil(count / columns)
    corners = ((position % columns * width, position // columns * height) for position in range(count))
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def draw(found: Tuned) -> Image.Image:
    """The contact sheet: under each picture its settings and score, a frame around the best."""
    width, height = found.tried[0].picture.size
    columns = columns_of(len(found.tried))
    font = text_font()
    labels = [(one.label, f"score {one.score.total:.2f}") for one in found.tried]
    widest = max(math.ceil(font.getlength(line)) for label in labels for line in label)
    line_height = math.ceil(font.getbbox("Ag")[3]) + _EDGE
    cell = (max(width, widest) + 4 * _EDGE, height + 2 * line_height + 5 * _EDGE)
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(labels) / columns) * cell[1]), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for position, (one, label) in enumerate(zip(found.tried, labels)):
        left, top = position % columns * cell[0], position // columns * cell[1]
        sheet.paste(one.picture, (left + 2 * _EDGE, top + 2 * _EDGE))
        for number, line in enumerate(label):
            pen.text((left + 2 * _EDGE, top + height + 3 * _EDGE + number * line_height), line, fill=_INK, font=font)
        if position == found.best:
            pen.rectangle((left, top, left + cell[0] - 1, top + cell[1] - 1), outline=_MARK, width=_EDGE)
    return sheet


__all__ = ["columns_of", "draw", "grid", "ungrid"]
