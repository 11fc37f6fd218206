"""LoRA files that were named on the command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .fusion import FusionError
from .lora import LoraFile, compatible, read_lora
from .settings import FuseSettings, SettingsError, join_names

Loras = tuple[LoraFile, ...]


def read_sides(subjects: Sequence[Path], styles: Sequence[Path], settings: FuseSettings) -> tuple[Loras, Loras, FuseSettings]:
    """(subjects, styles, the settings with their names).

    Raises LoraError for a file that cannot be used, FusionError for files that do not go together, SettingsError for one that is given
    twice and where weights do not go with the files.
    """
    sides = tuple(map(read_lora, subjects)), tuple(map(read_lora, styles))
    named = _named(settings, *sides)
    for one, other in itertools.combinations((*sides[0], *sides[1]), 2):
        if reason := compatible(one, other):
            raise FusionError(reason)
    return *sides, named


def _named(settings: FuseSettings, subjects: Loras, styles: Loras) -> FuseSettings:
    paths = [file.path.resolve() for file in (*subjects, *styles)]
    for path in paths:
        if paths.count(path) > 1:
            raise SettingsError(f"{path.name} is given twice; name different LoRAs.")
    names = {"subject": join_names(file.name for file in subjects), "style": join_names(file.name for file in styles)}
    try:
        return replace(settings, **names)  # type: ignore[arg-type]
    except SettingsError as error:
        raise SettingsError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None


__all__ = ["read_sides"]
