"""The similarity curve: a picture of a guidance record, the three similarities over the steps.

Pillow alone draws it, in the look of the selection map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..fusion.selection_map import STYLE, SUBJECT, text_font
from .guide import GuidanceRecord
from .score import LABELS

# The LoRAs' colours of the selection map for CLIP; for DINO Okabe and Ito's green, which stays apart from both.
STYLE_DINO = (0, 158, 115)
COLOURS = (SUBJECT, STYLE, STYLE_DINO)

_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_FAINT_INK = (96, 96, 96)
_GRID = (228, 228, 228)

_MARGIN = 14
_AXIS_WIDTH = 40
_LINE = 20
_PLOT_HEIGHT = 220
_LEAST_WIDTH = 480

# The plot is drawn this much larger and scaled down: Pillow's lines have hard edges.
_SUPERSAMPLING = 4

Colour = tuple[int, int, int]


def draw(record: GuidanceRecord, width: int = 640) -> Image.Image:
    """The similarities before each guided step's correction, mean over the images, as an RGB picture of that width.

    Several images: each has a thin line of its own behind the mean. A term without weight was not measured and is only named.
    """
    width = max(width, _LEAST_WIDTH)
    steps, _, images = record.similarities.shape
    if not steps or not images or not any(record.wanted):
        return _sentence("No step was guided: nothing to show.", width)
    values = record.similarities.double()
    shown = [term for term, wanted in enumerate(record.wanted) if wanted]
    bottom, top, interval = _range(values[:, shown])

    legend = _legend(record, values, width - 2 * _MARGIN, _decimals(interval) + 1)
    heading = _heading(record, images, width - 2 * _MARGIN)
    head = _LINE * (1 + max(row for row, *_ in legend)) + _LINE * len(heading) + 6
    plot_width = width - 2 * _MARGIN - _AXIS_WIDTH
    left, upper = _MARGIN + _AXIS_WIDTH, _MARGIN + head
    picture = Image.new("RGB", (width, upper + _PLOT_HEIGHT + _LINE + 6 + _MARGIN), _BACKGROUND)
    pen = _Pen(picture)

    for row, x, label, colour in legend:
        y = _MARGIN + row * _LINE
        if colour is None:
            pen.text((_MARGIN + x, y), label, _FAINT_INK)
            continue
        pen.canvas.rectangle((_MARGIN + x, y + 2, _MARGIN + x + 12, y + 14), fill=colour)
        pen.text((_MARGIN + x + 20, y), label)
    for above, line in enumerate(reversed(heading), 1):
        pen.text((_MARGIN, upper - _LINE * above - 4), line, _FAINT_INK)

    places = [_place(step, record.total_steps, plot_width) for step in record.steps]
    heights = (_PLOT_HEIGHT - 1) * (1 - (values - bottom) / (top - bottom))
    ticks = [bottom + interval * i for i in range(round((top - bottom) / interval) + 1)]
    picture.paste(_plot(plot_width, places, heights, shown, len(ticks) - 1), (left, upper))
    for tick in ticks:
        y = upper + round((_PLOT_HEIGHT - 1) * (top - tick) / (top - bottom))
        number = f"{tick + 0.0:.{_decimals(interval)}f}"
        pen.text((left - 8 - pen.width(number), y - 8), number)
    _step_axis(pen, left, upper + _PLOT_HEIGHT, plot_width, max(record.total_steps, record.steps[-1] + 1))
    return picture


def _heading(record: GuidanceRecord, images: int, width: int) -> list[str]:
    """What is shown, in as many lines as it needs."""
    pen = _Pen(Image.new("RGB", (1, 1)))
    lines = ["Cosine similarity before each step's correction"]
    said = [f"mean of {images} images"] * (images > 1) + [f"limited {record.bites} times"] * bool(record.bites)
    for part in said:
        longer = f"{lines[-1]}, {part}"
        lines[-1:] = [longer] if pen.width(longer) <= width else [f"{lines[-1]},", part]
    return lines


def _legend(record: GuidanceRecord, values: Tensor, width: int, decimals: int) -> list[tuple[int, int, str, Colour | None]]:
    """(row, left, text, colour) of each term, in as many rows as they need: its first and last mean, or that it had no weight."""
    pen = _Pen(Image.new("RGB", (1, 1)))
    places: list[tuple[int, int, str, Colour | None]] = []
    row = x = 0
    for term, (label, colour, wanted) in enumerate(zip(LABELS, COLOURS, record.wanted)):
        means = values[:, term].nanmean(1)
        text = f"{label}: no weight"
        if wanted:
            first, last = (f"{float(mean):.{decimals}f}" for mean in (means[0], means[-1]))
            text = f"{label}: {first} to {last}" if len(means) > 1 else f"{label}: {first}"
        size = pen.width(text) + (20 if wanted else 0)
        if x and x + size > width:
            row, x = row + 1, 0
        places.append((row, x, text, colour if wanted else None))
        x += size + 24
    return places


def _range(values: Tensor) -> tuple[float, float, float]:
    """Lowest and highest value of the axis and the interval of its ticks: round numbers around the data, at least 0.04 apart."""
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if high - low < 0.04:
        low, high = (low + high) / 2 - 0.02, (low + high) / 2 + 0.02
    interval = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / step <= 5)
    bottom = math.floor(low / interval + 1e-9)
    top = math.ceil(high / interval - 1e-9)
    return bottom * interval, top * interval, interval


def _decimals(interval: float) -> int:
    return 2 if interval < 0.1 else 1


def _place(step: int, total: int, width: int) -> float:
    """Where on the axis a step is: in the middle of its share, as in the selection map."""
    return (step + 0.5) * width / max(total, step + 1)


def _plot(width: int, places: Sequence[float], heights: Tensor, shown: Sequence[int], intervals: int) -> Image.Image:
    """heights: (steps, 3, images), pixels from the top; not finite where nothing can be shown."""
    large = _SUPERSAMPLING
    plot = Image.new("RGB", (width * large, _PLOT_HEIGHT * large), _BACKGROUND)
    canvas = ImageDraw.Draw(plot)
    for i in range(intervals + 1):
        y = round((_PLOT_HEIGHT - 1) * i / intervals) * large
        canvas.rectangle((0, y, plot.width, y + large - 1), fill=_GRID)
    images = heights.shape[2]
    if images > 1:
        for term in shown:
            for image in range(images):
                _curve(canvas, places, heights[:, term, image], _paler(COLOURS[term]), 1.0, 0.0)
    roomy = len(places) == 1 or min(b - a for a, b in pairwise(places)) >= 14
    for term in shown:
        _curve(canvas, places, heights[:, term].nanmean(1), COLOURS[term], 2.25, 3.5 if roomy else 0.0)
    return plot.resize((width, _PLOT_HEIGHT), Image.Resampling.BOX)


def _curve(canvas: ImageDraw.ImageDraw, places: Sequence[float], heights: Tensor, colour: Colour, thickness: float, dot: float) -> None:
    """A line through the points, with dots of that radius; interrupted where a height is not finite."""
    large = _SUPERSAMPLING
    run: list[tuple[float, float]] = []
    for x, y in [*zip(places, heights.tolist(), strict=True), (0.0, math.nan)]:
        if math.isfinite(y):
            run.append((x * large, (y + 0.5) * large))
            continue
        if len(run) > 1:
            canvas.line(run, fill=colour, width=round(thickness * large), joint="curve")
        # A single point has no line: without a dot it could not be seen.
        radius = (dot or (thickness if len(run) == 1 else 0.0)) * large
        if radius:
            for point_x, point_y in run:
                canvas.ellipse((point_x - radius, point_y - radius, point_x + radius, point_y + radius), fill=colour)
        run = []


def _paler(colour: Colour) -> Colour:
    red, green, blue = (round(255 - (255 - part) * 0.4) for part in colour)
    return red, green, blue


def _step_axis(pen: _Pen, left: int, top: int, width: int, total: int) -> None:
    """The numbers of the first and some later steps under the plot, and "Step" before them."""
    widest = pen.width(str(total)) + 14
    interval = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n * width / total >= widest), total)
    pen.text((_MARGIN - 4, top + 6), "Step", _FAINT_INK)
    for step in range(total):
        # Round numbers, and 1; the round one next to 1 would be too close to it where it is 2.
        if step and ((step + 1) % interval or step < 0.75 * interval):
            continue
        middle = left + round(_place(step, total, width))
        pen.canvas.line((middle, top + 1, middle, top + 4), fill=_FAINT_INK)
        pen.text((middle - pen.width(str(step + 1)) // 2, top + 6), str(step + 1))


class _Pen:
    """Text on a picture, in the selection map's font."""

    def __init__(self, picture: Image.Image):
        self.canvas = ImageDraw.Draw(picture)
        self.font: ImageFont.FreeTypeFont | ImageFont.ImageFont = text_font()

    def width(self, text: str) -> int:
        return round(self.font.getlength(text))

    def text(self, position: tuple[int, int], text: str, colour: Colour = _INK) -> None:
        """position: left end of the text, top of its line."""
        self.canvas.text(position, text, fill=colour, font=self.font)


def _sentence(text: str, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, _LINE + 2 * _MARGIN), _BACKGROUND)
    _Pen(picture).text((_MARGIN, _MARGIN), text)
    return picture


__all__ = ["COLOURS", "draw"]
