"""Axes of the WebUI's own X/Y/Z plot: one for every setting, and one for presets.

The plot makes each cell from a shallow copy of the job (scripts/xyz_grid.py, Script.run, `cell`), on which an axis leaves its value; the
job itself, and with it the next one, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..settings import LORA_FIELDS, PRESET, FuseSettings, SettingsError, field_metadata, field_types, preset_names, preset_values
from ..text import tag

ATTRIBUTE = "dynfuse_axes"
PREFIX = "[DynFuse] "
PLOT = "xyz_grid.py"


def add_axes(loaded: Sequence[Any], names: Callable[[], list[str]]) -> None:
    """Give the plot our axes, where it is among the WebUI's scripts.

    loaded: modules.scripts.scripts_data. names: of the LoRAs that there are now.
    """
    plot = next((script.module for script in loaded if getattr(script.script_class, "__module__", "") == PLOT), None)
    if plot is None:
        return
    known = {option.label for option in plot.axis_options}
    made = [_option(plot.AxisOption, name, names) for name in (PRESET, *field_types())]
    plot.axis_options.extend(option for option in made if option.label not in known)


def asked(p: Any) -> Mapping[str, Any]:
    """What the axes ask of this job: values of FuseSettings' fields."""
    return getattr(p, ATTRIBUTE, {})


def changed(settings: FuseSettings, axes: Mapping[str, Any]) -> FuseSettings:
    """The settings with what the axes ask for. Raises SettingsError."""
    return FuseSettings(**{**settings.non_default(), **axes})


def changed_tags(prompt: str, axes: Mapping[str, Any]) -> str:
    """The prompt, whose tags ask for the same as before but for what the axes say. A tag that cannot be read stays."""

    def replacement(items: list[str]) -> str | None:
        try:
            settings = tag.parse_tag(items)
        except SettingsError:
            return None
        try:
            return tag.format_tag(changed(settings, axes))
        except SettingsError as error:
            return tag.format_error(str(error))

    return tag.replace_tags(prompt, replacement)


def _option(option: Any, name: str, names: Callable[[], list[str]]) -> Any:
    """An AxisOption (xyz_grid.py): label, type of the values, apply(p, value, values), confirm(p, values), choices()."""
    kind: Any = field_types()[name] if name != PRESET else str
    metadata = field_metadata(name) if name != PRESET else {"label": "Preset", "choices": ()}
    choices = {bool: lambda: ["true", "false"]}.get(kind)
    if name == PRESET:
        choices = lambda: list(preset_names())  # noqa: E731
    elif metadata["choices"]:
        choices = lambda: list(field_metadata(name)["choices"])  # noqa: E731
    elif name in LORA_FIELDS:
        choices = names

    def apply(p: Any, value: Any, values: Any) -> None:
        # A new mapping: the copies of a job share the old one.
        setattr(p, ATTRIBUTE, {**asked(p), **_values(name, value)})

    def confirm(p: Any, values: Sequence[Any]) -> None:
        for value in values:
            try:
                FuseSettings(**_values(name, value))
            except SettingsError as error:
                raise RuntimeError(f"{PREFIX.strip()} {error}") from None

    return option(f"{PREFIX}{metadata['label']}", kind if kind in (int, float) else str, apply, confirm=confirm, choices=choices)


def _values(name: str, value: Any) -> dict[str, Any]:
    """Fields of FuseSettings that a value on an axis stands for. Raises SettingsError."""
    if name == PRESET:
        return dict(preset_values(value))
    return {name: tag.parse_field(name, value) if isinstance(value, str) else value}


__all__ = ["ATTRIBUTE", "PLOT", "PREFIX", "add_axes", "asked", "changed", "changed_tags"]
