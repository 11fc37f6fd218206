"""Sets of the eight LoRAs, which differ as users' files do, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
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


__all__ = ["PLAIN", "SETS", "TRAINED", "LoraSet", "lora_path"]
