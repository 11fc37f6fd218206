"""Pictures for the judges: good ones, and ones that go wrong in the ways in which generated pictures do.

Every picture carries what a fair person would answer: shares of the judges' names. Between clear cases these change gradually, so that a
judge learns to be unsure there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ..judges import NONE, OTHER
from ..painter import CLASSES, HELD_OUT_STYLES, PIXELS, STYLES, SUBJECTS
from ..painter.characters import Character, altered, random_character
from ..painter.looks import PATTERNS, Fills, Look, mixed, nameless, random_fills
from ..painter.objects import OBJECTS
from ..painter.pen import DARK, LIGHT, Pen, Place, Point
from ..painter.picture import junk, painted, somewhere

Draw = Callable[[Pen], None]
Shares = Mapping[str, float]
Pixels = np.ndarray
"""(64, 64, 3) float32, 0 to 255."""

_RULES = {**STYLES, **HELD_OUT_STYLES}


@dataclass(frozen=True, eq=False)
class Example:
    """kind: how it was made, one of KINDS. subject, style: shares of the judges' names, 1 together."""

    kind: str
    picture: Pixels
    subject: Shares
    style: Shares


@dataclass(frozen=True)
class _Sitting:
    """All that one good picture is made of. what: a class or a subject. style: None for a nameless one."""

    what: str
    kind: str
    draw: Draw
    fills: Fills
    style: str | None
    look: Look
    place: Place

    @property
    def style_name(self) -> str:
        return self.style or OTHER

    def picture(self) -> Pixels:
        return _pixels(painted(self.draw, self.look, self.place))

    def empty(self) -> Pixels:
        """The ground alone."""
        return _pixels(painted(lambda pen: None, self.look, self.place))

    def mask(self) -> Pixels:
        """(64, 64, 1), 1 where the figure is."""
        white, outline = (255, 255, 255), (255, 255, 255) if self.look.outline is not None else None
        return (
            _pixels(
                painted(self.draw, Look((0, 0, 0), dict.fromkeys(range(5), white), outline=outline, width=self.look.width), self.place)
            )[..., :1]
            / 255
        )


def example(kind: str, rng: random.Random) -> Example:
    """One picture of that kind, one of KINDS."""
    return KINDS[kind](kind, rng)


def any_kind(rng: random.Random) -> str:
    """As often as the judges meet it in training."""
    return rng.choices(list(_SHARES), list(_SHARES.values()))[0]


def batch(examples: Sequence[Example], subject_names: Sequence[str], style_names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """pictures (B, 3, 64, 64) in [-1, 1], shares of subjects and of styles."""
    pixels = torch.from_numpy(np.stack([each.picture for each in examples])).clamp(0, 255)
    pictures = pixels.permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    subjects = torch.tensor([[each.subject.get(name, 0.0) for name in subject_names] for each in examples])
    styles = torch.tensor([[each.style.get(name, 0.0) for name in style_names] for each in examples])
    return pictures, subjects, styles


def softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """As an autoencoder or a sampler leaves good pictures: a little soft, noisy, off in colour. (B, 3, 64, 64) in [-1, 1]."""
    count = len(pictures)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator)

    soft = _blurred(pictures)
    grey = pictures.mean(1, keepdim=True)
    # Colours run further than brightness does, as in a JPEG.
    coloured = grey + _blurred(_blurred(pictures - grey))
    pictures = torch.where(uniform(1) < 0.3, coloured, pictures)
    pictures = pictures + (soft - pictures) * uniform(1) * (uniform(1) < 0.5)
    gain = 1 + 0.08 * torch.randn(count, 1, 1, 1, generator=generator)
    offset = 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator) * 0.06 * uniform(1) * (uniform(1) < 0.5)
    return (pictures * gain + offset + noise).clamp(-1, 1)


def _blurred(pictures: Tensor) -> Tensor:
    """With the weights 1, 2, 1 in both directions."""
    for axis in (2, 3):
        size = pictures.shape[axis]
        inner = F.pad(pictures, (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0), mode="replicate")
        pictures = (inner.narrow(axis, 0, size) + inner.narrow(axis, 2, size)).div_(2).add_(pictures).div_(2)
    return pictures


# What can be painted


def _sitting(rng: random.Random, what: str | None = None, style: str | None = "any") -> _Sitting:
    if what is None:
        what = rng.choice([*SUBJECTS]) if rng.random() < 0.42 else rng.choice((*CLASSES, "creature", "robot"))
    if style == "any":
        style = None if rng.random() < 0.2 else rng.choice([*_RULES])
    fills = random_fills(rng)
    draw: Draw
    if what in SUBJECTS:
        character, fills = SUBJECTS[what].character, SUBJECTS[what].fills
        draw, kind = character.draw, character.kind
    elif what in OBJECTS:
        draw, kind = OBJECTS[what], what
    else:
        draw, kind = random_character(what, rng).draw, what
        if rng.random() < 0.3:  # a subject is more than its colours
            fills = rng.choice([subject.fills for subject in SUBJECTS.values()])
    return _Sitting(what, kind, draw, fills, style, _rule(style)(fills, rng), somewhere(rng))


def _rule(style: str | None) -> Callable[[Fills, random.Random], Look]:
    return _RULES[style] if style is not None else nameless


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _visible(one: Pixels, other: Pixels) -> int:
    """In how many pixels two pictures differ clearly."""
    return int((np.abs(one - other).max(-1) > 32).sum())


def _falling(value: float, start: float, end: float) -> float:
    """1 up to start, 0 from end on."""
    return float(np.clip((end - value) / (end - start), 0, 1))


def _shares(sitting: _Sitting, amount: float, subject: tuple[float, float], known: tuple[float, float]) -> Shares:
    """What a picture shows that is wrong by `amount`: a subject until it is not that one any more, an object until it is nothing."""
    still_known = _falling(amount, *known)
    still_it = min(still_known, _falling(amount, *subject)) if sitting.what in SUBJECTS else still_known
    shares = {NONE: 1 - still_known, sitting.kind: still_known - still_it}
    return {**shares, sitting.what: shares.get(sitting.what, 0.0) + still_it}


# The kinds


def _good(kind: str, rng: random.Random) -> Example:
    sitting = _sitting(rng)
    return Example(kind, sitting.picture(), {sitting.what: 1.0}, {sitting.style_name: 1.0})


def _near_miss(kind: str, rng: random.Random) -> Example:
    """A subject with one to three of its parts exchanged, in its colours."""
    sitting = _sitting(rng, rng.choice([*SUBJECTS]))
    changes = {"one part": 1, "two parts": 2, "three parts": 3}[kind]
    wrong: Character = altered(SUBJECTS[sitting.what].character, changes, rng)
    picture = replace(sitting, draw=wrong.draw).picture()
    # Where the style hides the difference (in coarse pixels, say), nobody can tell.
    still_it = 0.6 * _falling(_visible(picture, sitting.picture()), 8, 45)
    return Example(kind, picture, {sitting.what: still_it, sitting.kind: 1 - still_it}, {sitting.style_name: 1.0})


_COLOURED = ("flat", "dotted", "striped", "pixel", "watercolor", "chalk", "candy")


def _recoloured(kind: str, rng: random.Random) -> Example:
    """A subject in colours that are not its own."""
    style = rng.choice(_COLOURED)
    sitting = _sitting(rng, rng.choice([*SUBJECTS]), style)
    picture = replace(sitting, look=_rule(style)(random_fills(rng), rng)).picture()
    return Example(kind, picture, {sitting.what: 0.5, sitting.kind: 0.5}, {style: 1.0})


class _UnsteadyPen(Pen):
    """Gives the parts to another pen: moved, or not at all."""

    def __init__(self, pen: Pen, change: Callable[[int, Sequence[Point], int], Sequence[Point] | None]) -> None:
        """change: (number of the part, its points, its role) -> its points."""
        self._pen, self._change, self._parts = pen, change, 0

    def polygon(self, points: Sequence[Point], role: int) -> None:
        changed = self._change(self._parts, points, role)
        self._parts += 1
        if changed is not None:
            self._pen.polygon(changed, role)


def _unsteady(draw: Draw, change: Callable[[int, Sequence[Point], int], Sequence[Point] | None]) -> Draw:
    return lambda pen: draw(_UnsteadyPen(pen, change))


def _parts(draw: Draw) -> int:
    count = 0

    def counted(part: int, points: Sequence[Point], role: int) -> None:
        nonlocal count
        count += 1

    draw(_UnsteadyPen(Pen.__new__(Pen), counted))
    return count


def _incomplete(kind: str, rng: random.Random) -> Example:
    """Without a part or some, or without a face."""
    sitting = _sitting(rng)
    number = _parts(sitting.draw)
    missing = set(rng.sample(range(number), min(number, rng.randint(1, 4))))
    faceless = sitting.kind in ("creature", "robot", "cat", "fish", "bird") and rng.random() < 0.5

    def change(part: int, points: Sequence[Point], role: int) -> Sequence[Point] | None:
        gone = role in (LIGHT, DARK) if faceless else part in missing
        return None if gone else points

    picture = replace(sitting, draw=_unsteady(sitting.draw, change)).picture()
    lost = _visible(picture, sitting.picture())
    return Example(kind, picture, _shares(sitting, lost, (15, 60), (150, 500)), {sitting.style_name: 1.0})


def _displaced(kind: str, rng: random.Random) -> Example:
    """Every part somewhat elsewhere, larger or smaller."""
    sitting = _sitting(rng)
    amount = rng.uniform(0.0, 0.45)
    number = _parts(sitting.draw)
    moves = [(rng.gauss(0, amount), rng.gauss(0, amount), 1 + rng.gauss(0, amount)) for _ in range(number)]

    def change(part: int, points: Sequence[Point], role: int) -> Sequence[Point]:
        right, down, scale = moves[part]
        x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
        return [(x + right + scale * (a - x), y + down + scale * (b - y)) for a, b in points]

    picture = replace(sitting, draw=_unsteady(sitting.draw, change)).picture()
    shares = _shares(sitting, amount, (0.03, 0.12), (0.1, 0.32))
    return Example(kind, picture, shares, {sitting.style_name: 1.0})


def _warped(kind: str, rng: random.Random) -> Example:
    """Bent like a picture on water: all of it, or the figure alone."""
    sitting = _sitting(rng)
    amount = rng.uniform(0.3, 6.0)
    field = _field(rng, rng.randint(5, 11), amount)
    picture = _bent(sitting.picture(), field)
    if rng.random() < 0.5:
        mask = _bent(sitting.mask(), field)
        picture = picture * mask + sitting.empty() * (1 - mask)
    shares = _shares(sitting, amount, (0.8, 2.2), (1.4, 4.0))
    straight = _falling(amount, 3.0, 6.0)
    return Example(kind, picture, shares, {sitting.style_name: straight, **_rest(sitting, 1 - straight)})


def _rest(sitting: _Sitting, share: float) -> Shares:
    return {OTHER: share} if sitting.style is not None else {OTHER: 1.0}


def _field(rng: random.Random, bumps: int, amount: float) -> Pixels:
    """(64, 64, 2): how far each pixel is moved, smooth; amount: its root mean square in pixels."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    axes = [Image.fromarray(numbers.standard_normal((bumps, bumps)).astype(np.float32)) for _ in range(2)]
    field = np.stack([np.asarray(axis.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)) for axis in axes], -1)
    return field * (amount / np.sqrt((field**2).sum(-1).mean()))


def _bent(picture: Pixels, field: Pixels) -> Pixels:
    places = np.stack(np.meshgrid(np.arange(PIXELS), np.arange(PIXELS), indexing="xy"), -1) + field
    grid = torch.from_numpy(((places + 0.5) * 2 / PIXELS - 1).astype(np.float32))[None]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    bent = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return bent[0].permute(1, 2, 0).numpy()


def _cut(kind: str, rng: random.Random) -> Example:
    """A good part of the figure lies outside of the picture."""
    sitting = _sitting(rng)
    lost = rng.uniform(0.0, 1.4) * sitting.place.radius
    direction = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
    edge = PIXELS / 2 + lost - sitting.place.radius
    place = replace(
        sitting.place,
        x=PIXELS / 2 + direction[0] * edge if direction[0] else sitting.place.x,
        y=PIXELS / 2 + direction[1] * edge if direction[1] else sitting.place.y,
    )
    amount = lost / (2 * sitting.place.radius)
    picture = replace(sitting, place=place).picture()
    return Example(kind, picture, _shares(sitting, amount, (0.12, 0.4), (0.2, 0.6)), {sitting.style_name: 1.0})


def _blurry(kind: str, rng: random.Random) -> Example:
    sitting = _sitting(rng)
    width = rng.uniform(1.2, 6.0)
    picture = _pixels(_image(sitting.picture()).filter(ImageFilter.GaussianBlur(width)))
    shares = _shares(sitting, width, (1.4, 2.6), (1.6, 4.0))
    style = _falling(width, 1.2, 3.0)
    return Example(kind, picture, shares, {sitting.style_name: style, **_rest(sitting, 1 - style)})


def _ramp(rng: random.Random, softness: float) -> Pixels:
    """(64, 64, 1): 0 on one side of a line through the middle or near it, 1 on the other."""
    turn, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-8, 8)
    y, x = np.mgrid[0:PIXELS, 0:PIXELS] - (PIXELS - 1) / 2
    across = x * np.cos(turn) + y * np.sin(turn) - shift
    return np.clip(across / softness + 0.5, 0, 1).astype(np.float32)[..., None]


def _erased(kind: str, rng: random.Random) -> Example:
    """Half of the figure is missing, or fades, or has a hole."""
    sitting = _sitting(rng)
    if rng.random() < 0.7:
        gone = _ramp(rng, rng.choice((1.0, 6.0, 20.0)))
    else:
        x, y, radius = rng.uniform(18, 46), rng.uniform(18, 46), rng.uniform(9, 18)
        rows, columns = np.mgrid[0:PIXELS, 0:PIXELS]
        gone = (((columns - x) ** 2 + (rows - y) ** 2) < radius**2).astype(np.float32)[..., None]
    whole = sitting.picture()
    picture = whole * (1 - gone) + sitting.empty() * gone
    lost = _visible(picture, whole) / max(1, _visible(whole, sitting.empty()))
    return Example(kind, picture, _shares(sitting, lost, (0.06, 0.25), (0.15, 0.6)), {sitting.style_name: 1.0})


def _shuffled(kind: str, rng: random.Random) -> Example:
    """Its squares in another order."""
    sitting = _sitting(rng)
    size = rng.choice((8, 16, 16, 32))
    count = PIXELS // size
    squares = sitting.picture().reshape(count, size, count, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    order = rng.sample(range(len(squares)), len(squares))
    if size == 8:  # only some of them, else it is noise
        order = [new if rng.random() < 0.5 else old for old, new in enumerate(order)]
    if order == sorted(order):
        order.reverse()
    picture = squares[order].reshape(count, count, size, size, 3).swapaxes(1, 2).reshape(PIXELS, PIXELS, 3)
    return Example(kind, picture, {NONE: 1.0}, {sitting.style_name: 0.6, **_rest(sitting, 0.4)})


def _two_styles(one: _Sitting, other: _Sitting) -> Shares:
    """Neither, for the most part."""
    if one.style_name == other.style_name:
        return {one.style_name: 1.0}
    shares = {OTHER: 0.7}
    for name in (one.style_name, other.style_name):
        shares[name] = shares.get(name, 0.0) + 0.15
    return shares


def _ghosts(kind: str, rng: random.Random) -> Example:
    """Two pictures, each of them half transparent."""
    one, other = _sitting(rng), _sitting(rng)
    if rng.random() < 0.4:
        other = replace(other, style=one.style, look=one.look)
    share = rng.uniform(0.3, 0.7)
    picture = one.picture() * (1 - share) + other.picture() * share
    return Example(kind, picture, {NONE: 1.0} if one.what != other.what else {NONE: 0.7, one.what: 0.3}, _two_styles(one, other))


def _halves(kind: str, rng: random.Random) -> Example:
    """Half of one picture and half of another."""
    one, other = _sitting(rng), _sitting(rng)
    while other.what == one.what:
        other = _sitting(rng)
    if rng.random() < 0.5:
        other = replace(other, style=one.style, look=one.look)
    share = _ramp(rng, rng.choice((1.0, 8.0)))
    picture = one.picture() * (1 - share) + other.picture() * share
    return Example(kind, picture, {NONE: 1.0}, _two_styles(one, other))


def _same_figure(rng: random.Random) -> tuple[_Sitting, _Sitting]:
    """One figure at one place in two styles."""
    one = _sitting(rng)
    style = one.style
    while style == one.style:
        style = rng.choice([*_RULES])
    return one, replace(one, style=style, look=_rule(style)(one.fills, rng))


def _style_ghosts(kind: str, rng: random.Random) -> Example:
    """One figure in two styles, each of them half transparent, or side by side."""
    one, other = _same_figure(rng)
    share: float | Pixels = rng.uniform(0.3, 0.7) if rng.random() < 0.6 else _ramp(rng, rng.choice((1.0, 8.0)))
    picture = one.picture() * (1 - share) + other.picture() * share
    return Example(kind, picture, {one.what: 1.0}, _two_styles(one, other))


def _cut_out(kind: str, rng: random.Random) -> Example:
    """A figure of one style on the ground of another."""
    one, other = _same_figure(rng)
    mask = one.mask()
    picture = one.picture() * mask + other.empty() * (1 - mask)
    return Example(kind, picture, {one.what: 1.0}, _two_styles(one, other))


def _style_miss(kind: str, rng: random.Random) -> Example:
    """A style that lacks something of its own: its ground, its pattern, its outline, or what it does with colours."""
    sitting = _sitting(rng, style=rng.choice(["sketch", "dotted", "striped", "neon", "sepia", *HELD_OUT_STYLES, *HELD_OUT_STYLES]))
    look = sitting.look
    anywhere = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    ways: dict[str, Look] = {"ground": replace(look, ground=anywhere)}
    if look.pattern is not None:
        ways["pattern"] = replace(look, pattern=rng.choice([name for name in (None, *PATTERNS) if name != look.pattern]))
        ways["both"] = replace(look, ground=anywhere, pattern_colour=mixed(anywhere, (rng.randrange(256),) * 3, 0.5))
    if look.outline is not None:
        ways["outline"] = replace(look, outline=rng.choice((None, mixed(look.ground, (128, 128, 128), 0.5))))
    if look.fills != sitting.fills:
        ways["fills"] = replace(look, fills=sitting.fills)
    picture = replace(sitting, look=rng.choice([*ways.values()])).picture()
    still_it = 0.25 + 0.5 * _falling(_visible(picture, sitting.picture()), 40, 300)
    return Example(kind, picture, {sitting.what: 1.0}, {sitting.style_name: still_it, OTHER: 1 - still_it})


def _junk(kind: str, rng: random.Random) -> Example:
    sitting = _sitting(rng)
    seed = rng.random()
    picture = replace(sitting, draw=lambda pen: junk(pen, random.Random(seed))).picture()
    return Example(kind, picture, {NONE: 1.0}, {sitting.style_name: 1.0})


def _nothing(kind: str, rng: random.Random) -> Example:
    """The ground alone, or clouds of colour."""
    sitting = _sitting(rng)
    if rng.random() < 0.6:
        return Example(kind, sitting.empty(), {NONE: 1.0}, {sitting.style_name: 0.6, **_rest(sitting, 0.4)})
    numbers = np.random.default_rng(rng.getrandbits(32))
    bumps = rng.randint(2, 16)
    clouds = numbers.uniform(0, 255, (bumps, bumps, 3)).astype(np.uint8)
    picture = _pixels(Image.fromarray(clouds).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
    share = rng.choice((0.0, rng.uniform(0.0, 0.5)))
    return Example(kind, picture * (1 - share) + sitting.picture() * share, {NONE: 1.0}, {OTHER: 1.0})


KINDS: Mapping[str, Callable[[str, random.Random], Example]] = {
    "good": _good,
    "one part": _near_miss,
    "two parts": _near_miss,
    "three parts": _near_miss,
    "recoloured": _recoloured,
    "incomplete": _incomplete,
    "displaced": _displaced,
    "warped": _warped,
    "cut": _cut,
    "blurry": _blurry,
    "erased": _erased,
    "shuffled": _shuffled,
    "ghosts": _ghosts,
    "halves": _halves,
    "style ghosts": _style_ghosts,
    "cut out": _cut_out,
    "style miss": _style_miss,
    "junk": _junk,
    "nothing": _nothing,
}

_SHARES = {
    "good": 0.40,
    "one part": 0.07,
    "two parts": 0.03,
    "three parts": 0.02,
    "recoloured": 0.02,
    "incomplete": 0.06,
    "displaced": 0.07,
    "warped": 0.07,
    "cut": 0.02,
    "blurry": 0.02,
    "erased": 0.03,
    "shuffled": 0.02,
    "ghosts": 0.03,
    "halves": 0.02,
    "style ghosts": 0.03,
    "cut out": 0.03,
    "style miss": 0.04,
    "junk": 0.02,
    "nothing": 0.02,
}

__all__ = ["KINDS", "Example", "any_kind", "batch", "example", "softened"]
