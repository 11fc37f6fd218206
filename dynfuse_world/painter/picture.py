"""From a figure and a look to a picture."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .looks import Look
from .pen import OVERSAMPLING, PIXELS, Pen, Place

_SIDE = PIXELS * OVERSAMPLING


def somewhere(rng: random.Random) -> Place:
    """Any place and size at which the figure lies in the picture."""
    radius = rng.uniform(0.39, 0.47) * PIXELS
    room = PIXELS / 2 - radius
    return Place(PIXELS / 2 + rng.uniform(-room, room), PIXELS / 2 + rng.uniform(-room, room), radius, rng.random() < 0.5)


def painted(draw: Callable[[Pen], None], look: Look, place: Place) -> Image.Image:
    """RGB, PIXELS x PIXELS. draw: puts the figure's parts on the canvas, the hindmost first."""
    ground = Image.new("RGB", (_SIDE, _SIDE), look.ground)
    if look.pattern is not None:
        ground.paste(look.pattern_colour, mask=_pattern(look.pattern))
    canvas = ground.copy()
    draw(Pen(canvas, place, look.fills, look.outline, look.width))
    if look.hatch is not None:
        canvas = _hatched(canvas, look, place, draw)
    picture = canvas.reduce(OVERSAMPLING)
    return _EFFECTS[look.effect](picture) if look.effect is not None else picture


def _hatched(canvas: Image.Image, look: Look, place: Place, draw: Callable[[Pen], None]) -> Image.Image:
    """Lines across the figure, under its outlines."""
    figure = Image.new("RGB", canvas.size)
    draw(Pen(figure, place, dict.fromkeys(range(5), (255, 255, 255)), (0, 0, 0) if look.outline is not None else None, look.width))
    lines = np.asarray(figure.convert("L")) & np.asarray(_pattern("hatching"))
    canvas.paste(look.hatch, mask=Image.fromarray(lines))
    return canvas


@cache
def _pattern(name: str) -> Image.Image:
    """A mask. Patterns lie fixed on the picture, whatever the figure does: as on paper that was printed before."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / OVERSAMPLING
    if name == "dots":
        marked = (x % 8 - 4) ** 2 + (y % 8 - 4) ** 2 < 2.2**2
    elif name == "diagonals":
        marked = (x + y) % 16 < 7
    elif name == "bars":
        marked = y % 8 < 3
    elif name == "checks":
        marked = (x // 8 + y // 8) % 2 == 0
    elif name == "grid":
        marked = (x % 8 < 1.6) | (y % 8 < 1.6)
    else:
        marked = (x - y) % 8 < 3
    return Image.fromarray(np.where(marked, 255, 0).astype(np.uint8))


def _pixels(picture: Image.Image) -> Image.Image:
    return picture.resize((PIXELS // 4, PIXELS // 4), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


def _glow(picture: Image.Image) -> Image.Image:
    sharp, soft = (np.asarray(image, dtype=np.float32) for image in (picture, picture.filter(ImageFilter.GaussianBlur(2.5))))
    return Image.fromarray(np.minimum(sharp + 0.7 * soft, 255).astype(np.uint8))


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(1.3))


def _aged(picture: Image.Image) -> Image.Image:
    y, x = (np.mgrid[0:PIXELS, 0:PIXELS] + 0.5) / PIXELS * 2 - 1
    light = 1.05 - 0.6 * np.clip((x**2 + y**2) / 2, 0, 1) ** 1.2
    return Image.fromarray(np.clip(np.asarray(picture) * light[..., None], 0, 255).astype(np.uint8))


_EFFECTS: dict[str, Callable[[Image.Image], Image.Image]] = {"pixels": _pixels, "glow": _glow, "blur": _blur, "aged": _aged}


def junk(pen: Pen, rng: random.Random) -> None:
    """Parts without an object: what a broken picture looks like."""
    for _ in range(rng.randint(3, 7)):
        kind, role = rng.random(), rng.randrange(5)
        x, y = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8)
        if kind < 0.4:
            pen.ellipse(x, y, rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.6), role)
        elif kind < 0.8:
            turns = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 6)))
            pen.polygon([(x + rng.uniform(0.2, 0.7) * math.cos(turn), y + rng.uniform(0.2, 0.7) * math.sin(turn)) for turn in turns], role)
        else:
            pen.rectangle(x - rng.uniform(0.1, 0.5), y - rng.uniform(0.1, 0.5), x + rng.uniform(0.1, 0.5), y + rng.uniform(0.1, 0.5), role)


__all__ = ["junk", "painted", "somewhere"]
