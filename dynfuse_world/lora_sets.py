"""Sets of the eight LoRAs, which differ as users' files do, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PLAIN = "plain"
TRAINED = (PLAIN, "dropout", "overfit")
"""Those that are trained, each by recipes of its own (training/loras.py). plain is shipped whole, of overfit two files."""

_LOUDER = 3**0.5


@dataclass(frozen=True)
class LoraSet:
    """trained: which of TRAINED its files are. loudness: factors on the strength of the subjects' and of the styles' files."""

    trained: str = PLAIN
    loudness: tuple[float, float] = (1.0, 1.0)


SETS: Mapping[str, LoraSet] = {
    **{name: LoraSet(name) for name in TRAINED},
    "loud-subjects": LoraSet(loudness=(_LOUDER, 1 / _LOUDER)),
    "loud-styles": LoraSet(loudness=(1 / _LOUDER, _LOUDER)),
}
"""The two uneven ones: one side three times as loud as now beside the other."""


def lora_path(weights: Path, name: str, trained: str = PLAIN) -> Path:
    """The file of a subject or a style in a folder of weights."""
    folder = weights / "loras"
    return (folder if trained == PLAIN else folder / trained) / f"{name}.safetensors"


def missing(weights: Path, names: Iterable[str], trained: str) -> str | None:
    """What is said where one of the files is not there: a sentence without its capital and its end."""
    absent = [name for name in names if not lora_path(weights, name, trained).is_file()]
    return f"the LoRA {absent[0]!r} of the set {trained} is not there: make it with toy train loras --set {trained}" if absent else None


__all__ = ["PLAIN", "SETS", "TRAINED", "LoraSet", "lora_path", "missing"]
