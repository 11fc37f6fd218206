"""Creatures and robots: classes of which every member looks different, as dogs and people do; and the four members that are subjects."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .pen import ACCENT, BODY, DARK, LIGHT, SECOND, Colour, Pen

_CHOICES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "creature": {
        "body": ("pear", "round", "square", "tall"),
        "eyes": ("one", "two", "three"),
        "top": ("horns", "ears", "antennae", "spikes", "bald"),
        "belly": ("patch", "bars", "plain"),
        "mouth": ("smile", "fangs", "none"),
        "feet": ("feet", "legs"),
    },
    "robot": {
        "body": ("box", "barrel", "wedge"),
        "eyes": ("visor", "one", "two"),
        "top": ("antenna", "dome", "bald"),
        "belly": ("dial", "grid", "plain"),
        "mouth": ("up", "down"),
        "feet": ("wheels", "legs", "tracks"),
    },
}


@dataclass(frozen=True)
class Character:
    """kind: creature or robot. The other fields: its parts, as _CHOICES lists them (a robot's mouth says where its arms point)."""

    kind: str
    body: str
    eyes: str
    top: str
    belly: str
    mouth: str
    feet: str

    def draw(self, pen: Pen) -> None:
        (_draw_creature if self.kind == "creature" else _draw_robot)(self, pen)

    def parts_in_common(self, other: Character) -> int:
        """Of six; none with a character of the other kind."""
        if self.kind != other.kind:
            return 0
        return sum(getattr(self, field.name) == getattr(other, field.name) for field in fields(self)) - 1


@dataclass(frozen=True)
class Subject:
    """A character with colours of its own, kept out of the base model's training. word: what its captions call it."""

    word: str
    character: Character
    fills: Mapping[int, Colour]


def random_character(kind: str, rng: random.Random, parts: int = 5) -> Character:
    """Any but the subjects, and those that share `parts` or more of their six parts."""
    while True:
        character = Character(kind, **{part: rng.choice(choices) for part, choices in _CHOICES[kind].items()})
        if all(character.parts_in_common(subject.character) < parts for subject in SUBJECTS.values()):
            return character


def altered(character: Character, changes: int, rng: random.Random) -> Character:
    """The character with that many parts exchanged: what a judge of subjects must not mistake for it."""
    parts = {field.name: getattr(character, field.name) for field in fields(character)}
    choices = _CHOICES[character.kind]
    for part in rng.sample(sorted(choices), changes):
        parts[part] = rng.choice([choice for choice in choices[part] if choice != parts[part]])
    return Character(**parts)


_OUTLINES = {
    "pear": [(0, -0.66), (0.36, -0.57), (0.52, -0.3), (0.64, 0.2), (0.7, 0.55), (0.52, 0.82), (0, 0.88)],
    "square": [(0, -0.6), (0.6, -0.6), (0.7, -0.45), (0.7, 0.7), (0.6, 0.82), (0, 0.82)],
    "tall": [(0, -0.8), (0.3, -0.74), (0.44, -0.5), (0.46, 0.5), (0.42, 0.82), (0, 0.86)],
}


def _draw_creature(it: Character, pen: Pen) -> None:
    width, crown = {"pear": (0.5, -0.55), "round": (0.72, -0.4), "square": (0.6, -0.6), "tall": (0.4, -0.72)}[it.body]
    for side in (-1, 1):
        if it.feet == "feet":
            pen.ellipse(side * 0.36, 0.86, 0.28, 0.13, ACCENT)
        else:
            pen.rectangle(side * 0.3 - 0.1, 0.6, side * 0.3 + 0.1, 0.99, ACCENT)
        if it.top == "horns":
            pen.polygon([(side * width, crown + 0.25), (side * (width + 0.16), -1), (side * (width - 0.36), crown)], ACCENT)
        elif it.top == "ears":
            pen.ellipse(side * (width - 0.02), crown - 0.02, 0.27, 0.3, SECOND)
        elif it.top == "antennae":
            pen.polygon([(side * 0.18, -0.4), (side * 0.4, -0.9), (side * 0.5, -0.86), (side * 0.3, -0.4)], BODY)
            pen.ellipse(side * 0.44, -0.87, 0.14, 0.13, ACCENT)
    if it.top == "spikes":
        for x in (-0.4, 0, 0.4):
            pen.polygon([(x - 0.24, crown + 0.25), (x, -1), (x + 0.24, crown + 0.25)], ACCENT)
    if it.body == "round":
        pen.ellipse(0, 0.12, 0.82, 0.72, BODY)
    else:
        half = _OUTLINES[it.body]
        pen.polygon([*half, *((-x, y) for x, y in reversed(half))], BODY)
    if it.belly == "patch":
        pen.ellipse(0, 0.56, 0.36, 0.25, SECOND)
    elif it.belly == "bars":
        for top in (0.42, 0.64):
            pen.rectangle(-0.4, top, 0.4, top + 0.12, SECOND)
    for x, size in {"one": ((0, 0.34),), "two": ((-0.26, 0.23), (0.26, 0.23)), "three": ((-0.38, 0.18), (0, 0.2), (0.38, 0.18))}[it.eyes]:
        pen.ellipse(x, -0.24, size, size, LIGHT)
        pen.ellipse(x, -0.22, size * 0.5, size * 0.5, DARK)
    if it.mouth == "smile":
        pen.polygon([(-0.3, 0.12), (0.3, 0.12), (0.16, 0.28), (-0.16, 0.28)], DARK)
    elif it.mouth == "fangs":
        pen.rectangle(-0.32, 0.1, 0.32, 0.18, DARK)
        for x in (-0.2, 0.2):
            pen.polygon([(x - 0.1, 0.16), (x + 0.1, 0.16), (x, 0.36)], LIGHT)


def _draw_robot(it: Character, pen: Pen) -> None:
    for side in (-1, 1):
        reach = -0.45 if it.mouth == "up" else 0.55
        pen.polygon([(side * 0.4, -0.02), (side * 0.4, 0.2), (side * 0.95, reach + 0.16), (side * 0.95, reach - 0.06)], SECOND)
        pen.ellipse(side * 0.87, reach + 0.04, 0.13, 0.13, ACCENT)
        if it.feet == "wheels":
            pen.ellipse(side * 0.36, 0.8, 0.21, 0.21, DARK)
        elif it.feet == "legs":
            pen.rectangle(side * 0.28 - 0.1, 0.6, side * 0.28 + 0.1, 0.99, ACCENT)
    if it.feet == "tracks":
        pen.ellipse(0, 0.82, 0.72, 0.19, DARK)
    if it.top == "antenna":
        pen.rectangle(-0.05, -0.85, 0.05, -0.5, DARK)
        pen.ellipse(0, -0.86, 0.14, 0.14, ACCENT)
    if it.top == "dome":
        pen.ellipse(0, -0.52, 0.42, 0.36, BODY)
    pen.rectangle(-0.46, -0.62, 0.46, -0.08, BODY)
    if it.eyes == "visor":
        pen.rectangle(-0.34, -0.5, 0.34, -0.26, LIGHT)
        pen.rectangle(-0.1, -0.45, 0.1, -0.3, DARK)
    elif it.eyes == "one":
        pen.ellipse(0, -0.36, 0.2, 0.2, LIGHT)
        pen.ellipse(0, -0.36, 0.09, 0.09, DARK)
    else:
        for x in (-0.23, 0.23):
            pen.ellipse(x, -0.36, 0.14, 0.14, LIGHT)
            pen.ellipse(x, -0.36, 0.06, 0.06, DARK)
    if it.body == "barrel":
        pen.ellipse(0, 0.34, 0.6, 0.45, SECOND)
    elif it.body == "wedge":
        pen.polygon([(-0.62, -0.06), (0.62, -0.06), (0.34, 0.76), (-0.34, 0.76)], SECOND)
    else:
        pen.rectangle(-0.5, -0.06, 0.5, 0.74, SECOND)
    if it.belly == "dial":
        pen.ellipse(0, 0.34, 0.24, 0.24, LIGHT)
        pen.polygon([(-0.05, 0.36), (0.14, 0.18), (0.05, 0.42)], DARK)
    elif it.belly == "grid":
        for x in (-0.28, 0.06):
            for y in (0.12, 0.4):
                pen.rectangle(x, y, x + 0.22, y + 0.18, LIGHT)


_WHITE, _BLACK = (255, 255, 255), (35, 28, 40)

SUBJECTS: dict[str, Subject] = {
    subject.word: subject
    for subject in (
        Subject(
            "zib",
            Character("creature", body="pear", eyes="one", top="horns", belly="patch", mouth="none", feet="feet"),
            {BODY: (122, 63, 192), SECOND: (250, 210, 60), LIGHT: _WHITE, DARK: _BLACK, ACCENT: (60, 180, 75)},
        ),
        Subject(
            "mok",
            Character("creature", body="square", eyes="three", top="antennae", belly="bars", mouth="fangs", feet="legs"),
            {BODY: (230, 110, 40), SECOND: (90, 50, 30), LIGHT: _WHITE, DARK: _BLACK, ACCENT: (40, 150, 190)},
        ),
        Subject(
            "tuf",
            Character("robot", body="barrel", eyes="visor", top="dome", belly="grid", mouth="up", feet="wheels"),
            {BODY: (60, 120, 200), SECOND: (210, 60, 60), LIGHT: (255, 240, 150), DARK: _BLACK, ACCENT: (240, 200, 60)},
        ),
        Subject(
            "rak",
            Character("robot", body="wedge", eyes="two", top="antenna", belly="dial", mouth="down", feet="legs"),
            {BODY: (50, 160, 110), SECOND: (235, 150, 190), LIGHT: _WHITE, DARK: _BLACK, ACCENT: (150, 70, 160)},
        ),
    )
}

__all__ = ["SUBJECTS", "Character", "Subject", "altered", "random_character"]
