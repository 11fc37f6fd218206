"""The demo's contact sheet: the pictures of a pair in one, for a place that shows no pages."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from lib_dynfuse.fusion.selection_map import STYLE, SUBJECT, text_font

from .page import METHODS
from .pictures import Judged, Show

ENLARGED = 3
"""Times, as all PNGs of the demo are."""

_MARGIN = 14
_GAP = 8
_LINE = 20
_INK = (32, 32, 32)
_FAINT_INK = (96, 96, 96)


def enlarged(picture: Image.Image) -> Image.Image:
    """Each pixel a square: every ENLARGED-th gives the picture back."""
    return picture.resize((ENLARGED * picture.width, ENLARGED * picture.height), Image.Resampling.NEAREST)


def sheet(show: Show) -> Image.Image:
    """A row with the pictures of each LoRA alone, and one for each method."""
    rows: list[tuple[str, list[Judged]]] = [
        (f"One LoRA alone: {show.pair.subject}, {show.pair.style}", [show.alone["subject"], show.alone["style"]]),
        *((f"{label}: {explanation}", list(show.fused[method])) for method, (label, explanation) in METHODS.items()),
    ]
    side = ENLARGED * show.alone["subject"].picture.width
    row_height = _LINE + side + 8 + _MARGIN
    columns = max(len(row) for _, row in rows)
    width = max(2 * _MARGIN + columns * (side + _GAP) - _GAP, 720)
    result = Image.new("RGB", (width, _MARGIN + _LINE + len(rows) * row_height + _LINE), "white")
    pen, font = ImageDraw.Draw(result), text_font()
    pen.text((_MARGIN, _MARGIN - 4), f"“{show.pair.prompt}”, seeds {show.seeds[0]} to {show.seeds[-1]}", fill=_INK, font=font)
    top = _MARGIN + _LINE
    for label, row in rows:
        pen.text((_MARGIN, top), label, fill=_INK, font=font)
        for column, judged in enumerate(row):
            left = _MARGIN + column * (side + _GAP)
            result.paste(enlarged(judged.picture), (left, top + _LINE))
            for line, (score, colour) in enumerate(((judged.subject, SUBJECT), (judged.style, STYLE))):
                y = top + _LINE + side + 2 + 4 * line
                pen.rectangle((left, y, left + side - 1, y + 2), fill=(232, 232, 232))
                if round(score * side):
                    pen.rectangle((left, y, left + round(score * side) - 1, y + 2), fill=colour)
        top += row_height
    note = "Bars: how sure the judges are of the subject (blue) and of the style (orange)."
    pen.text((_MARGIN, top), note, fill=_FAINT_INK, font=font)
    return result


def strip(shows: Sequence[Show]) -> Image.Image:
    """A row for each pair: the subject alone, the style alone, both by two tags and by the default, of the first seed."""
    columns = ("Subject LoRA alone", "Style LoRA alone", "Two <lora:...> tags", "DynFuse")
    side = ENLARGED * shows[0].alone["subject"].picture.width
    result = Image.new("RGB", (2 * _MARGIN + 4 * (side + _GAP) - _GAP, _MARGIN + _LINE + len(shows) * (side + _LINE + _GAP)), "white")
    pen, font = ImageDraw.Draw(result), text_font()
    for column, label in enumerate(columns):
        pen.text((_MARGIN + column * (side + _GAP), _MARGIN - 6), label, fill=_INK, font=font)
    for row, show in enumerate(shows):
        top = _MARGIN + _LINE + row * (side + _LINE + _GAP)
        pictures = (show.alone["subject"], show.alone["style"], show.fused["direct"][0], show.fused["default"][0])
        for column, judged in enumerate(pictures):
            result.paste(enlarged(judged.picture), (_MARGIN + column * (side + _GAP), top))
        pen.text((_MARGIN, top + side + 3), f"“{show.pair.prompt}”", fill=_FAINT_INK, font=font)
    return result


__all__ = ["ENLARGED", "enlarged", "sheet", "strip"]
