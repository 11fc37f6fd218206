"""The script's arguments: what the panel sends, and what an API client puts under alwayson_scripts.dynfuse.args.

Two forms, both starting with the panel's switch:

    [true, {"subject": "dog", "style": "watercolor", "criterion": "js"}]      names as in FuseSettings
    [true, "dog", "watercolor", 1.0, 1.0, "dynfuse", ...]                     all fields, in the order of FuseSettings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..settings import FuseSettings, SettingsError, field_types
from .tag import check_pair


def read_arguments(arguments: Sequence[Any]) -> FuseSettings | None:
    """What the arguments ask for: None when the panel is switched off.

    Raises SettingsError: one sentence that names an unknown key, a wrong type or a value outside its range.
    """
    enabled, values = (arguments[0], arguments[1:]) if arguments else (False, ())
    if not isinstance(enabled, bool):
        raise SettingsError(f"the first argument must be true or false, not {enabled!r}; the settings are the second: [true, {{...}}]")
    if not enabled:
        return None
    # Behind a dict the host fills the remaining places with the panel's own values; they are not the client's.
    named = values and isinstance(values[0], Mapping)
    settings = FuseSettings.from_mapping(values[0]) if named else _read_positions(values)
    check_pair(settings)
    return settings


def _read_positions(values: Sequence[Any]) -> FuseSettings:
    names = list(field_types())
    if len(values) > len(names):
        raise SettingsError(f"{len(values)} values were given; the settings are {len(names)}: {', '.join(names)}")
    # An emptied control sends None, and so does an empty place for a picture.
    return FuseSettings.from_mapping({name: value for name, value in zip(names, values, strict=False) if value is not None})
