"""Draws the pictures of the miniature world: an object or a subject, in a style, somewhere in 64 x 64 pixels."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .characters import SUBJECTS, random_character
from .looks import HELD_OUT_STYLES, STYLES, nameless, random_fills
from .objects import OBJECTS
from .pen import PIXELS, Pen
from .picture import junk, painted, somewhere

CLASSES = (*OBJECTS, "creature", "robot")
"""What the base model can draw, in the words of its captions."""
JUNK = "junk"


@dataclass(frozen=True)
class Scene:
    """what: one of CLASSES, SUBJECTS or JUNK. style: one of STYLES or HELD_OUT_STYLES, None for a nameless one."""

    what: str
    style: str | None = None


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """RGB, PIXELS x PIXELS. Everything the scene leaves open (place, size, colours, a character's parts) is drawn from rng."""
    fills = random_fills(rng)
    draw: Callable[[Pen], None]
    if scene.what in SUBJECTS:
        subject = SUBJECTS[scene.what]
        draw, fills = subject.character.draw, subject.fills
    elif scene.what in OBJECTS:
        draw = OBJECTS[scene.what]
    elif scene.what == JUNK:
        seed = rng.random()

        def draw(pen: Pen) -> None:  # called twice where lines lie across the figure
            junk(pen, random.Random(seed))

    else:
        draw = random_character(scene.what, rng).draw
    rule = {**STYLES, **HELD_OUT_STYLES}[scene.style] if scene.style is not None else nameless
    return painted(draw, rule(fills, rng), somewhere(rng))


__all__ = ["CLASSES", "HELD_OUT_STYLES", "JUNK", "PIXELS", "STYLES", "SUBJECTS", "Scene", "paint"]
