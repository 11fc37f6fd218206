"""How strong a LoRA is: over the steps (Schedule), and block by block (BlockText).

The texts that people write, and what they mean. Several LoRAs' texts are joined by "+" (split_each).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .errors import SettingsError
from .printable import printable, shown

SCHEDULE_EXAMPLE = "0@0,1@0.3,0.6@1"
BLOCKS_EXAMPLE = "in4-in8=0.5,out3=0"
NUMBER_COUNTS = (12, 17, 20, 26, 61)

# "1e+5" is one number.
_JOINT = re.compile(r"(?<![\d.][eE])\+")
_NAME = r"[A-Za-z_][\w.]*"
_ASSIGNED = re.compile(rf"({_NAME})(?:\s*-\s*({_NAME}))?", re.ASCII)
_PRESET = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
T = TypeVar("T")


class Step(Protocol):
    """A step of a job. index: from 0. count: steps of the job. progress: index / max(count - 1, 1)."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def progress(self) -> float: ...


@dataclass(frozen=True)
class Schedule:
    """A weight over the steps: linear between its points, constant before the first and after the last.

    points: (weight, progress). progress: up to 1 a fraction of the steps, above 1 a step's number, counted from 1. Of two points at
    one place the later one holds from there on.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, value: float | str) -> Schedule:
        """A number's or a text's schedule. Raises SettingsError as parse does."""
        return cls.parse(value) if isinstance(value, str) else cls(((float(value), 0.0),))

    @classmethod
    def parse(cls, text: str, name: str = "a weight") -> Schedule:
        """A number, or points `weight@progress` with commas between them.

        name: of the setting, for the message. Raises SettingsError: one sentence.
        """
        if "@" not in text and "," not in text:
            return cls(((_number(text, name, f"a number or points such as {SCHEDULE_EXAMPLE}"), 0.0),))
        points = [_point(item.strip(), name) for item in text.split(",")]
        if len({weight for weight, _ in points}) == 1:
            return cls(((points[0][0], 0.0),))
        return cls(tuple(sorted(points, key=lambda point: point[1])))

    def at(self, step: Step) -> float:
        """The weight at a step."""
        places = sorted(((_place(progress, step.count), weight) for weight, progress in self.points), key=lambda pair: pair[0])
        after = bisect_right(places, step.progress, key=lambda pair: pair[0])
        if after == 0:
            return places[0][1]
        start, weight = places[after - 1]
        if after == len(places) or places[after][1] == weight:
            return weight
        end, following = places[after]
        part = (step.progress - start) / (end - start)
        return (1 - part) * weight + part * following

    @property
    def constant(self) -> float | None:
        """The weight if it is the same at every step."""
        weights = {weight for weight, _ in self.points}
        return self.points[0][0] if len(weights) == 1 else None

    @property
    def full(self) -> float:
        """The weight that is farthest from 0: the references' and the text encoders'."""
        return max((weight for weight, _ in self.points), key=abs)

    def times(self, factor: float) -> Schedule:
        """All weights multiplied."""
        return Schedule(tuple((factor * weight, place) for weight, place in self.points)) if factor != 1 else self

    def text(self) -> str:
        """The shortest text that parse reads back as the same schedule."""
        if self.constant is not None:
            return number_text(self.constant)
        return ",".join(f"{number_text(weight)}@{number_text(progress)}" for weight, progress in self.points)


@dataclass(frozen=True)
class BlockText:
    """Factors on the blocks of a model, as they were written: one of the three, or none of them for factors of 1.

    assignments: (first, last, factor) by name; first and last are the same for a single block. numbers: as many as one of NUMBER_COUNTS.
    preset: a name. Which blocks there are is known to the model's family.
    """

    assignments: tuple[tuple[str, str, float], ...] = ()
    numbers: tuple[float, ...] = ()
    preset: str = ""

    def text(self) -> str:
        """The shortest text that parse_blocks reads back as the same."""
        ranges = [
            f"{first}={number_text(factor)}" if first == last else f"{first}-{last}={number_text(factor)}"
            for first, last, factor in self.assignments
        ]
        return ",".join([*ranges, *map(number_text, self.numbers)]) or self.preset


def parse_blocks(text: str, name: str = "the blocks' text") -> BlockText:
    """`in4-in8=0.5,out3=0`, or 12, 17, 20, 26 or 61 numbers with commas between them, or the name of a preset; empty for factors of 1.

    name: of the setting, for the message. Raises SettingsError: one sentence.
    """
    text = text.strip()
    if not text:
        return BlockText()
    if "=" in text:
        return BlockText(assignments=tuple(_assignment(item.strip(), name) for item in text.split(",")))
    if _PRESET.fullmatch(text) and not _is_number(text):
        return BlockText(preset=text)
    expected = f"blocks with factors such as {BLOCKS_EXAMPLE}, a list of numbers or a preset's name"
    numbers = tuple(_number(item, name, expected) for item in text.split(","))
    if len(numbers) not in NUMBER_COUNTS:
        *counts, last = map(str, NUMBER_COUNTS)
        raise SettingsError(f"{name} must be {', '.join(counts)} or {last} numbers, not {len(numbers)}; or {expected}")
    return BlockText(numbers=numbers)


def split_each(text: str) -> list[str]:
    """The texts of several LoRAs, which are joined by "+", without white space around them."""
    return [part.strip() for part in _JOINT.split(text)]


def one_each(values: Sequence[T], count: int, name: str) -> tuple[T, ...]:
    """A value for each of count LoRAs: values has one for all or one for each. Raises SettingsError, naming the setting."""
    if len(values) == 1:
        return tuple(values) * count
    if len(values) != count:
        loras = "1 LoRA" if count == 1 else f"{count} LoRAs"
        raise SettingsError(f"{name} has {len(values)} parts for {loras}; give one for all of them, or one each with + between")
    return tuple(values)


def number_text(value: float) -> str:
    """The shortest text of a number, without a "+"."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value).replace("e+", "e")


def _point(item: str, name: str) -> tuple[float, float]:
    weight, at, place = item.partition("@")
    if not at:
        raise SettingsError(f"{name} must be a number or points such as {SCHEDULE_EXAMPLE}; {shown(item)} has no place")
    expected = f"points such as {SCHEDULE_EXAMPLE}"
    progress = _number(place, f"the place of {shown(item)} in {name}", "a fraction of the steps or a step's number")
    if progress < 0 or (progress > 1 and not progress.is_integer()):
        raise SettingsError(
            f"the place of {shown(item)} in {name} must be a fraction of the steps from 0 to 1, or the whole number of a step, "
            f"not {number_text(progress)}"
        )
    return _number(weight, name, expected), progress


def _place(progress: float, count: int) -> float:
    """Where a point lies, as a step's progress."""
    return progress if progress <= 1 else (progress - 1) / max(count - 1, 1)


def _assignment(item: str, name: str) -> tuple[str, str, float]:
    blocks, equals, factor = item.partition("=")
    found = _ASSIGNED.fullmatch(blocks.strip())
    if not equals or found is None:
        raise SettingsError(f"{name} must be blocks with factors such as {BLOCKS_EXAMPLE}; {shown(item)} is none")
    return found[1], found[2] or found[1], _number(factor, f"the factor of {printable(found[0])} in {name}", "a number")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, name: str, expected: str) -> float:
    if not _is_number(text):
        raise SettingsError(f"{name} must be {expected}, not {shown(text.strip())}")
    value = float(text)
    if not math.isfinite(value):
        raise SettingsError(f"{name} must be a finite number, not {value}")
    return value


__all__ = ["BlockText", "Schedule", "Step", "number_text", "one_each", "parse_blocks", "split_each"]
