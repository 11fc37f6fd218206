"""The selection map: a picture of a trace, steps by layers, that shows how much of each LoRA each layer used.

Pillow alone draws it, because every host has it. No font is shipped: the first of a few common ones that the system has is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..lora.families import block_label
from .rules import Member
from .trace import Trace

# Okabe and Ito's blue and orange: they stay apart in every kind of colour blindness, and in print without colour.
SUBJECT = (0, 114, 178)
STYLE = (230, 159, 0)
# Further subjects and styles: their sky blue, bluish green and purple, vermilion, yellow.
MORE_SUBJECTS = ((86, 180, 233), (0, 158, 115), (120, 94, 240))
MORE_STYLES = ((213, 94, 0), (240, 228, 66), (204, 121, 167))
ONE_SIDED = (178, 178, 178)
NOT_REACHED = (238, 238, 238)
# The same on any background.
NOT_REACHED_PAINT = (128, 128, 128, 34)

_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_FAINT_INK = (96, 96, 96)

_MARGIN = 14
_AXIS_WIDTH = 46
_PLOT_WIDTH = 1000
_TEXT_SIZE = 13
_LINE = 20

_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "segoeui.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc")

# diffusers registers a U-Net's middle block after its upward blocks; data goes down, through the middle, and up.
_PLACE_IN_FLOW = {"embed": -2, "first": -1, "mid": 1, "up": 2, "out": 2, "last": 3}


@dataclass(frozen=True)
class Block:
    """Neighbouring columns of one block of the denoiser. group and number: "in" and "4", or "mid" and ""."""

    group: str
    number: str
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where a trace's cells lie. columns: sites in the order in which data meets their blocks. lefts: of the columns, in pixels."""

    columns: list[int]
    blocks: list[Block]
    lefts: list[int]
    cell_width: int
    cell_height: int

    @classmethod
    def of(cls, trace: Trace) -> Layout:
        """trace: of at least one step and site."""
        columns = _columns_in_flow(trace)
        blocks = list(_blocks([block_label(trace.sites[column]) for column in columns]))
        gap = 3 if len(blocks) < 40 else 2
        width = max(1, (_PLOT_WIDTH - gap * (len(blocks) - 1)) // len(columns))
        return cls(columns, blocks, _column_lefts(blocks, width, gap), width, min(26, max(3, round(360 / len(trace.weights)))))

    @property
    def width(self) -> int:
        return self.lefts[-1] + self.cell_width


def draw(trace: Trace, *names: str, most_images: int = 8) -> Image.Image:
    """The selection map of a job's images, one panel per image, as an RGB picture about 600 to 1100 pixels wide.

    names: for the legend, in place of the LoRAs' own. most_images: further images are only counted. A layer that mixes LoRAs has a
    colour between theirs, and is paler the less of them it used in all.
    """
    steps, _, images, _ = trace.weights.shape
    if not steps or not images:
        return _sentence("No choices were made: nothing to show.")
    layout = Layout.of(trace)
    columns, blocks, lefts, cell_width, cell_height = layout.columns, layout.blocks, layout.lefts, layout.cell_width, layout.cell_height
    plot_width, plot_height = lefts[-1] + cell_width, steps * cell_height
    shown = min(images, most_images)

    legend = entries(trace, names)
    head = _LINE * (1 + math.ceil(len(legend) / 2)) + 6
    caption = _LINE if images > 1 else 0
    panel = caption + plot_height + 2 * _LINE + 10
    width = max(_AXIS_WIDTH + plot_width, 560) + 2 * _MARGIN
    height = 2 * _MARGIN + head + shown * panel + (_LINE if shown < images else 0) + _LINE
    picture = Image.new("RGB", (width, height), _BACKGROUND)
    pen = _Pen(picture)

    _legend(pen, width - 2 * _MARGIN, legend, int((~trace.decided).sum()), len(columns), bool((trace.reached & trace.decided).any()))
    top = _MARGIN + head
    for image in range(shown):
        if images > 1:
            share = trace.of_image(image).subject_share()
            pen.text((_MARGIN + _AXIS_WIDTH, top), f"Image {image + 1}: subject {percent(share)}, style {percent(1 - share)}")
        left = _MARGIN + _AXIS_WIDTH
        picture.paste(plot(_colours(trace, image)[:, columns], lefts, cell_width, cell_height), (left, top + caption))
        _step_axis(pen, left, top + caption, steps, cell_height)
        _layer_axis(pen, left, top + caption + plot_height, blocks, lefts, cell_width)
        top += panel
    if shown < images:
        pen.text((_MARGIN + _AXIS_WIDTH, top), f"... and {images - shown} more images", _FAINT_INK)
        top += _LINE
    pen.text((_MARGIN + _AXIS_WIDTH, top), "Layers of the denoiser, grouped by block, from its input to its output", _FAINT_INK)
    return picture


def colours_of(members: Sequence[Member]) -> list[tuple[int, int, int]]:
    """Each LoRA's colour on the map: blues for subjects, oranges for styles."""
    used = {True: iter((SUBJECT, *MORE_SUBJECTS)), False: iter((STYLE, *MORE_STYLES))}
    return [next(used[member.subject], ONE_SIDED) for member in members]


class _Pen:
    """Text and rectangles on a picture, in one font."""

    def __init__(self, picture: Image.Image):
        self.canvas = ImageDraw.Draw(picture)
        self.picture_width = picture.width
        self.font = text_font()

    def width(self, text: str) -> int:
        return round(self.font.getlength(self._printable(text)))

    def text(self, position: tuple[int, int], text: str, colour: tuple[int, int, int] = _INK) -> None:
        """position: left end of the text, top of its line."""
        self.canvas.text(position, self._printable(text), fill=colour, font=self.font)

    def fitted(self, text: str, width: int) -> str:
        """The text, its middle left out if it is wider than that many pixels."""
        if self.width(text) <= width:
            return text
        for kept in range(len(text) - 1, 1, -1):
            shorter = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
            if self.width(shorter) <= width:
                return shorter
        return text[:1]

    def _printable(self, text: str) -> str:
        # Pillow's built-in bitmap font knows Latin-1 only and raises for anything else.
        return text if isinstance(self.font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


@functools.lru_cache(maxsize=1)
def text_font(size: int = _TEXT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The first common font that the system has, or Pillow's own."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except (OSError, ImportError):
            continue
    try:
        return ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1 the built-in font has one size
        return ImageFont.load_default()


def _columns_in_flow(trace: Trace) -> list[int]:
    """The sites in the order in which data meets their blocks."""
    return sorted(range(len(trace.sites)), key=lambda s: _PLACE_IN_FLOW.get(block_label(trace.sites[s]).split(" ")[0], 0))


def _blocks(labels: Iterable[str]) -> Iterator[Block]:
    start = 0
    for label, members in groupby(labels):
        length = len(list(members))
        group, _, number = label.rpartition(" ")
        yield Block(group, number, start, length) if number.isdigit() else Block(label, "", start, length)
        start += length


def _column_lefts(blocks: Sequence[Block], cell_width: int, gap: int) -> list[int]:
    return [(block.start + i) * cell_width + gap * index for index, block in enumerate(blocks) for i in range(block.length)]


def _colours(trace: Trace, image: int) -> Tensor:
    """(steps, sites, 3) uint8: as on white."""
    mixed, loudness = _mixed(trace, image)
    colours = (mixed * loudness + 255 * (1 - loudness)).round().to(torch.uint8)
    colours[:, ~trace.decided] = torch.tensor(ONE_SIDED, dtype=torch.uint8)
    colours[~trace.reached] = torch.tensor(NOT_REACHED, dtype=torch.uint8)
    return colours


def painted(trace: Trace, image: int) -> Tensor:
    """(steps, sites, 4) uint8, RGBA, for any background."""
    mixed, loudness = _mixed(trace, image)
    colours = torch.cat([mixed, 255 * loudness], -1).round().to(torch.uint8)
    colours[:, ~trace.decided] = torch.tensor((*ONE_SIDED, 255), dtype=torch.uint8)
    colours[~trace.reached] = torch.tensor(NOT_REACHED_PAINT, dtype=torch.uint8)
    return colours


def _mixed(trace: Trace, image: int) -> tuple[Tensor, Tensor]:
    """(steps, sites, 3): the LoRAs' colours in their parts. (steps, sites, 1), 0 to 1: how much of them is used in all."""
    palette = torch.tensor(colours_of(trace.members), dtype=torch.float32)
    used = trace.weights[:, :, image].abs().sum(-1, keepdim=True)
    # Two LoRAs at full strength are no louder than one on the map: what it shows is who is heard.
    loudness = (used / used.amax(0, keepdim=True).clamp(1e-9, 1.0)).clamp(0, 1)
    return trace.shares[:, :, image] @ palette, loudness


def plot(colours: Tensor, lefts: Sequence[int], cell_width: int, cell_height: int) -> Image.Image:
    """The cells without a frame. colours: (steps, columns, 3 or 4) uint8. lefts: of the columns, in pixels. Between them it is
    white, or transparent.
    """
    steps, _, channels = colours.shape
    pixels = torch.full((steps, lefts[-1] + cell_width, channels), 255 if channels == 3 else 0, dtype=torch.uint8)
    places = torch.tensor(lefts)[:, None] + torch.arange(cell_width)
    pixels[:, places.flatten()] = colours.repeat_interleave(cell_width, 1)
    if cell_width >= 12:
        pixels[:, torch.tensor(lefts[1:], dtype=torch.long)] = 255 if channels == 3 else 0
    pixels = pixels.repeat_interleave(cell_height, 0)
    if cell_height >= 14:
        pixels[cell_height::cell_height] = 255 if channels == 3 else 0
    return Image.fromarray(pixels.numpy())


@dataclass(frozen=True)
class Entry:
    """A LoRA in the legend. share: of all that was used where there was a choice."""

    role: str
    name: str
    colour: tuple[int, int, int]
    share: float


def entries(trace: Trace, names: Sequence[str]) -> list[Entry]:
    """names: in place of the LoRAs' own, as far as they go."""
    chosen = trace.reached & trace.decided
    shares = trace.shares[chosen].mean((0, 1)).tolist() if chosen.any() else [0.0] * len(trace.members)
    return [
        Entry("Subject" if member.subject else "Style", name, colour, share)
        for member, name, colour, share in zip(
            trace.members, [*names, *(member.name for member in trace.members[len(names) :])], colours_of(trace.members), shares
        )
    ]


def _legend(pen: _Pen, width: int, entries: Sequence[Entry], one_sided: int, layers: int, decided: bool) -> None:
    """Two LoRAs to a line, with their shares, and a line on what was not chosen."""
    top = _MARGIN
    for first in range(0, len(entries), 2):
        x = _MARGIN
        for entry in entries[first : first + 2]:
            ending = f"  {percent(entry.share)}" if decided else ""
            room = width // 2 - 34 - pen.width(f"{entry.role}: {ending}")
            text = f"{entry.role}: {pen.fitted(entry.name, room)}{ending}"
            _swatch(pen, x, top, entry.colour)
            pen.text((x + 20, top), text)
            x += 20 + pen.width(text) + 28
        top += _LINE
    facts = f"{layers} layers" if decided else f"{layers} layers, none with a choice"
    if one_sided:
        _swatch(pen, _MARGIN, top, ONE_SIDED)
        pen.text((_MARGIN + 20, top), f"Changed by one LoRA only, so without a choice: {one_sided} of {facts}", _FAINT_INK)
    else:
        pen.text((_MARGIN, top), f"{facts}, changed by more than one", _FAINT_INK)


def _swatch(pen: _Pen, left: int, top: int, colour: tuple[int, int, int]) -> None:
    pen.canvas.rectangle((left, top + 2, left + 12, top + 14), fill=colour)


def _step_axis(pen: _Pen, left: int, top: int, steps: int, cell_height: int) -> None:
    """ "step" and the numbers of the first, the last and some steps between, top to bottom."""
    interval = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if n * cell_height >= _LINE - 2 or n >= steps)
    pen.text((_MARGIN - 4, top + cell_height // 2 - 8), "Step", _FAINT_INK)
    for step in range(steps):
        if (step + 1) % interval and step:
            continue
        if step > 0 and interval > 1 and (step + 1) * cell_height < _LINE + cell_height:
            continue
        middle = top + step * cell_height + cell_height // 2
        number = str(step + 1)
        pen.text((left - 8 - pen.width(number), middle - 8), number)
        pen.canvas.line((left - 4, middle, left - 2, middle), fill=_FAINT_INK)


def _layer_axis(pen: _Pen, left: int, top: int, blocks: Sequence[Block], lefts: Sequence[int], cell_width: int) -> None:
    """The blocks' numbers, and under them a bracket with the name of each group of blocks."""

    def span(first: Block, last: Block) -> tuple[int, int]:
        return left + lefts[first.start], left + lefts[last.start + last.length - 1] + cell_width - 1

    numbers_end = names_end = 0
    for group, members in groupby(blocks, key=lambda block: block.group):
        members_of_group = list(members)
        for block in members_of_group:
            start, end = span(block, block)
            place = (start + end - pen.width(block.number)) // 2
            if block.number and place > numbers_end + 3:
                pen.text((place, top + 3), block.number)
                numbers_end = place + pen.width(block.number)
        start, end = span(members_of_group[0], members_of_group[-1])
        pen.canvas.line((start, top + _LINE + 1, end, top + _LINE + 1), fill=_FAINT_INK)
        place = min(max(_MARGIN, (start + end - pen.width(group)) // 2), pen.picture_width - pen.width(group) - 2)
        if place > names_end + 6:
            pen.text((place, top + _LINE + 4), group)
            names_end = place + pen.width(group)


def percent(share: float) -> str:
    """Whole percents, but neither 0 % nor 100 % for a LoRA that won, or lost, a little."""
    percent = round(100 * share)
    if percent in (0, 100) and share not in (0.0, 1.0):
        return "under 1 %" if percent == 0 else "over 99 %"
    return f"{percent} %"


def _sentence(text: str) -> Image.Image:
    picture = Image.new("RGB", (560, _LINE + 2 * _MARGIN), _BACKGROUND)
    _Pen(picture).text((_MARGIN, _MARGIN), text)
    return picture


__all__ = [
    *("MORE_STYLES", "MORE_SUBJECTS", "NOT_REACHED", "NOT_REACHED_PAINT", "ONE_SIDED", "STYLE", "SUBJECT"),
    *("Block", "Entry", "Layout", "colours_of", "draw", "entries", "painted", "percent", "plot", "text_font"),
]
