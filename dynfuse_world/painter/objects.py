"""The object classes that always look the same but for their colours."""

from __future__ import annotations

import math
from collections.abc import Callable

from .pen import ACCENT, BODY, DARK, LIGHT, SECOND, Pen


def _house(pen: Pen) -> None:
    pen.rectangle(0.38, -0.92, 0.62, -0.3, DARK)
    pen.rectangle(-0.75, -0.1, 0.75, 0.95, BODY)
    pen.polygon([(-1, -0.08), (0, -0.95), (1, -0.08)], SECOND)
    pen.rectangle(-0.2, 0.3, 0.2, 0.95, DARK)
    pen.rectangle(-0.6, 0.1, -0.32, 0.42, LIGHT)
    pen.rectangle(0.32, 0.1, 0.6, 0.42, LIGHT)


def _fish(pen: Pen) -> None:
    pen.polygon([(0.4, 0), (1, -0.6), (1, 0.6)], SECOND)
    pen.polygon([(-0.3, -0.4), (0.15, -0.85), (0.35, -0.25)], SECOND)
    pen.ellipse(-0.18, 0, 0.8, 0.52, BODY)
    pen.ellipse(-0.6, -0.14, 0.15, 0.15, LIGHT)
    pen.ellipse(-0.62, -0.14, 0.07, 0.07, DARK)
    pen.polygon([(-0.12, 0.05), (0.25, -0.15), (0.25, 0.28)], SECOND)


def _tree(pen: Pen) -> None:
    pen.rectangle(-0.18, 0.2, 0.18, 0.98, SECOND)
    pen.polygon([(-0.85, 0.4), (0, -0.25), (0.85, 0.4)], BODY)
    pen.polygon([(-0.7, 0), (0, -0.62), (0.7, 0)], BODY)
    pen.polygon([(-0.52, -0.4), (0, -0.98), (0.52, -0.4)], BODY)


def _car(pen: Pen) -> None:
    pen.polygon([(-0.55, -0.08), (-0.32, -0.6), (0.38, -0.6), (0.65, -0.08)], SECOND)
    pen.polygon([(-0.28, -0.12), (-0.18, -0.45), (0.05, -0.45), (0.05, -0.12)], LIGHT)
    pen.rectangle(-0.98, -0.1, 0.98, 0.38, BODY)
    for x in (-0.52, 0.52):
        pen.ellipse(x, 0.4, 0.29, 0.29, DARK)
        pen.ellipse(x, 0.4, 0.11, 0.11, LIGHT)


def _cup(pen: Pen) -> None:
    pen.ellipse(0.6, 0.05, 0.38, 0.38, SECOND)
    pen.ellipse(0.6, 0.05, 0.19, 0.19, LIGHT)
    pen.polygon([(-0.75, -0.5), (0.55, -0.5), (0.4, 0.85), (-0.6, 0.85)], BODY)
    pen.ellipse(-0.1, -0.5, 0.65, 0.18, DARK)
    pen.polygon([(-0.7, 0.02), (0.5, 0.02), (0.46, 0.3), (-0.67, 0.3)], SECOND)


def _star(pen: Pen) -> None:
    turns = [-math.pi / 2 + corner * math.pi / 5 for corner in range(10)]
    reach = [1.0 if corner % 2 == 0 else 0.42 for corner in range(10)]
    pen.polygon([(length * math.cos(turn), length * math.sin(turn)) for turn, length in zip(turns, reach, strict=True)], BODY)
    pen.ellipse(0, 0.02, 0.26, 0.26, SECOND)


def _cat(pen: Pen) -> None:
    pen.polygon([(-0.82, -0.1), (-0.76, -0.98), (-0.15, -0.5)], BODY)
    pen.polygon([(0.82, -0.1), (0.76, -0.98), (0.15, -0.5)], BODY)
    pen.ellipse(0, 0.12, 0.88, 0.74, BODY)
    for x in (-0.35, 0.35):
        pen.ellipse(x, -0.08, 0.18, 0.2, LIGHT)
        pen.ellipse(x, -0.06, 0.08, 0.13, DARK)
    pen.ellipse(0, 0.45, 0.36, 0.24, SECOND)
    pen.polygon([(-0.13, 0.32), (0.13, 0.32), (0, 0.48)], DARK)


def _boat(pen: Pen) -> None:
    pen.rectangle(-0.06, -0.98, 0.06, 0.4, DARK)
    pen.polygon([(0.1, -0.92), (0.9, 0.25), (0.1, 0.25)], SECOND)
    pen.polygon([(-0.1, -0.7), (-0.7, 0.25), (-0.1, 0.25)], LIGHT)
    pen.polygon([(-0.98, 0.38), (0.98, 0.38), (0.6, 0.92), (-0.6, 0.92)], BODY)


def _mushroom(pen: Pen) -> None:
    pen.polygon([(-0.26, 0), (0.26, 0), (0.36, 0.97), (-0.36, 0.97)], LIGHT)
    turns = [math.pi + math.pi * corner / 14 for corner in range(15)]
    pen.polygon([(0.98 * math.cos(turn), 0.1 + math.sin(turn)) for turn in turns], BODY)
    for x, y in ((-0.45, -0.25), (0.12, -0.52), (0.55, -0.15)):
        pen.ellipse(x, y, 0.18, 0.18, SECOND)


def _flower(pen: Pen) -> None:
    pen.rectangle(-0.07, 0.1, 0.07, 0.98, DARK)
    pen.polygon([(0.05, 0.8), (0.6, 0.35), (0.5, 0.8)], DARK)
    for petal in range(6):
        turn = petal * math.pi / 3
        pen.ellipse(0.42 * math.cos(turn), -0.35 + 0.42 * math.sin(turn), 0.28, 0.28, BODY)
    pen.ellipse(0, -0.35, 0.25, 0.25, SECOND)


def _bird(pen: Pen) -> None:
    pen.polygon([(-0.7, -0.55), (-1, -0.35), (-0.65, -0.25)], SECOND)
    pen.polygon([(0.45, 0.1), (1, -0.35), (0.98, 0.3)], BODY)
    for x in (0, 0.28):
        pen.rectangle(x, 0.55, x + 0.08, 0.98, DARK)
    pen.ellipse(0.1, 0.18, 0.65, 0.48, BODY)
    pen.ellipse(-0.42, -0.42, 0.37, 0.37, BODY)
    pen.polygon([(-0.08, 0.05), (0.6, -0.08), (0.2, 0.5)], SECOND)
    pen.ellipse(-0.5, -0.48, 0.1, 0.1, DARK)


def _rocket(pen: Pen) -> None:
    pen.polygon([(-0.32, 0.2), (-0.75, 0.85), (-0.25, 0.7)], SECOND)
    pen.polygon([(0.32, 0.2), (0.75, 0.85), (0.25, 0.7)], SECOND)
    pen.polygon([(-0.22, 0.7), (0, 1), (0.22, 0.7)], ACCENT)
    pen.polygon([(0, -1), (0.28, -0.6), (0.37, -0.1), (0.3, 0.7), (-0.3, 0.7), (-0.37, -0.1), (-0.28, -0.6)], BODY)
    pen.polygon([(0, -1), (0.26, -0.62), (-0.26, -0.62)], SECOND)
    pen.ellipse(0, -0.2, 0.19, 0.19, LIGHT)


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "house": _house,
    "fish": _fish,
    "tree": _tree,
    "car": _car,
    "cup": _cup,
    "star": _star,
    "cat": _cat,
    "boat": _boat,
    "mushroom": _mushroom,
    "flower": _flower,
    "bird": _bird,
    "rocket": _rocket,
}

__all__ = ["OBJECTS"]
