"""Styles. A style is a rule that draws a look: the colours, patterns, outlines and effects of one picture.

Eight styles have names that the base model learns; four are kept out of its training; and any number of nameless ones, whose looks are put
together at random, give it, and the autoencoder, the room in which the four lie.
"""

from __future__ import annotations

import colorsys
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .pen import ACCENT, BODY, DARK, LIGHT, SECOND, Colour

Fills = Mapping[int, Colour]


@dataclass(frozen=True)
class Look:
    """ground: the background. pattern: one of PATTERNS in pattern_colour over it. fills: by role. outline: None for none; width in
    pixels. hatch: the colour of the lines drawn across the figure. effect: one of EFFECTS.
    """

    ground: Colour
    fills: Fills
    pattern: str | None = None
    pattern_colour: Colour = (0, 0, 0)
    outline: Colour | None = None
    width: float = 1.7
    hatch: Colour | None = None
    effect: str | None = None


PATTERNS = ("dots", "diagonals", "bars", "checks", "grid")
EFFECTS = ("pixels", "glow", "blur", "aged")

_INK: Colour = (32, 26, 36)
_WHITE: Colour = (255, 255, 255)
_MAIN: tuple[Colour, ...] = (
    (214, 48, 49),
    (232, 126, 34),
    (241, 196, 15),
    (39, 174, 96),
    (22, 160, 180),
    (41, 98, 210),
    (142, 68, 173),
    (232, 90, 150),
    (120, 75, 45),
)
_PASTEL: tuple[Colour, ...] = (
    (250, 235, 215),
    (214, 234, 248),
    (213, 245, 227),
    (252, 228, 236),
    (253, 246, 190),
    (230, 225, 245),
    (235, 235, 235),
)


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """share: how much of the other."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))  # type: ignore[return-value]


def random_fills(rng: random.Random) -> Fills:
    """The colours of an object that has none of its own."""
    body, second, accent = rng.sample(_MAIN, 3)
    return {BODY: body, SECOND: second, LIGHT: _WHITE, DARK: _INK, ACCENT: accent}


def _ramp(fills: Fills, dark: Colour, light: Colour) -> Fills:
    """The fills by their brightness alone, between two colours."""
    return {role: mixed(dark, light, (0.3 * r + 0.59 * g + 0.11 * b) / 255) for role, (r, g, b) in fills.items()}


def _all(colour: Colour) -> Fills:
    return dict.fromkeys(range(5), colour)


def _bright(rng: random.Random) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.7), 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _flat(fills: Fills, rng: random.Random) -> Look:
    return Look(rng.choice(_PASTEL), fills)


def _sketch(fills: Fills, rng: random.Random) -> Look:
    return Look((252, 252, 250), _all((252, 252, 250)), outline=_INK)


def _dotted(fills: Fills, rng: random.Random) -> Look:
    return Look(rng.choice(_PASTEL), fills, "dots", mixed(rng.choice(_MAIN), _WHITE, 0.35), outline=_WHITE, width=2.0)


def _striped(fills: Fills, rng: random.Random) -> Look:
    return Look(rng.choice(_PASTEL), fills, "diagonals", mixed(rng.choice(_MAIN), _WHITE, 0.35), outline=_INK)


def _pixel(fills: Fills, rng: random.Random) -> Look:
    return Look(rng.choice(_PASTEL), fills, effect="pixels")


def _neon(fills: Fills, rng: random.Random) -> Look:
    return Look((10, 8, 22), _all((16, 12, 32)), outline=_bright(rng), width=2.0, effect="glow")


def _watercolor(fills: Fills, rng: random.Random) -> Look:
    return Look((250, 248, 242), {role: mixed(colour, _WHITE, 0.4) for role, colour in fills.items()}, effect="blur")


def _sepia(fills: Fills, rng: random.Random) -> Look:
    return Look((236, 200, 150), _ramp(fills, (60, 35, 15), (225, 185, 135)), effect="aged")


def _blueprint(fills: Fills, rng: random.Random) -> Look:
    return Look((28, 72, 152), _all((20, 54, 122)), "grid", (74, 118, 196), outline=(236, 244, 255))


def _sunset(fills: Fills, rng: random.Random) -> Look:
    return Look((250, 136, 44), _ramp(fills, (20, 66, 84), (160, 212, 200)), "bars", (206, 62, 36), outline=(255, 240, 205))


def _chalk(fills: Fills, rng: random.Random) -> Look:
    ground = (34, 66, 52)
    pale = {role: mixed(colour, _WHITE, 0.35) for role, colour in fills.items()}
    return Look(ground, {**pale, DARK: ground}, outline=(238, 240, 226), hatch=ground)


def _candy(fills: Fills, rng: random.Random) -> Look:
    sweet = {role: mixed(colour, (255, 120, 190), 0.3) for role, colour in fills.items()}
    return Look((255, 232, 242), sweet, "checks", (255, 176, 208), outline=(120, 24, 96), width=2.2)


Rule = Callable[[Fills, random.Random], Look]

STYLES: dict[str, Rule] = {
    "flat": _flat,
    "sketch": _sketch,
    "dotted": _dotted,
    "striped": _striped,
    "pixel": _pixel,
    "neon": _neon,
    "watercolor": _watercolor,
    "sepia": _sepia,
}
HELD_OUT_STYLES: dict[str, Rule] = {"blueprint": _blueprint, "sunset": _sunset, "chalk": _chalk, "candy": _candy}


def nameless(fills: Fills, rng: random.Random) -> Look:
    """A look that is none of the held-out styles': it never has the mark of one (grid, bars, hatching, checks) in that one's colours."""
    dark = rng.random() < 0.45
    anywhere = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    ground = mixed(anywhere, (0, 0, 0) if dark else _WHITE, rng.uniform(0.2, 0.7))
    pattern = rng.choice((None, *PATTERNS))
    pattern_colour = mixed(ground, rng.choice(_MAIN) if rng.random() < 0.6 else (_WHITE if dark else _INK), rng.uniform(0.25, 0.7))
    way = rng.random()
    if way < 0.4:
        share = rng.choice((0.0, rng.uniform(0.0, 0.5)))
        towards = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        fills = {role: mixed(colour, towards, share) for role, colour in fills.items()}
    elif way < 0.65:
        fills = _all(mixed(ground, (0, 0, 0) if dark else _WHITE, rng.uniform(0.0, 0.4)))
    else:
        tone = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        fills = _ramp(fills, mixed(tone, (0, 0, 0), rng.uniform(0.5, 0.8)), mixed(tone, _WHITE, rng.uniform(0.4, 0.8)))
    outlined = way < 0.65 and way >= 0.4 or rng.random() < 0.6
    outline = rng.choice((_INK, _WHITE, mixed(_bright(rng), _WHITE, 0.3), mixed(rng.choice(_MAIN), (0, 0, 0), 0.3))) if outlined else None
    if outlined and way < 0.65 and way >= 0.4:  # without fills the outline is all there is to see
        outline = mixed(outline or _INK, _WHITE if dark else _INK, 0.7)
    look = Look(
        ground,
        fills,
        pattern,
        pattern_colour,
        outline,
        rng.uniform(1.4, 2.4),
        ground if rng.random() < 0.2 else None,
        rng.choice(EFFECTS) if rng.random() < 0.2 else None,
    )
    return nameless(fills, rng) if _is_held_out(look) else look


def _is_held_out(look: Look) -> bool:
    red, green, blue = (channel / 255 for channel in look.ground)
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    marks = {
        "grid": 0.54 < hue < 0.68,
        "bars": hue < 0.14 or hue > 0.95,
        "checks": hue > 0.86 or hue < 0.03,
    }
    coloured = saturation > 0.08
    hatched = look.hatch is not None and 0.3 < hue < 0.5
    return coloured and (hatched or marks.get(look.pattern or "", False))


__all__ = ["EFFECTS", "HELD_OUT_STYLES", "PATTERNS", "STYLES", "Fills", "Look", "Rule", "mixed", "nameless", "random_fills"]
