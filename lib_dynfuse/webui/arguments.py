"""The script's arguments: what the panel sends, and what an API client puts under alwayson_scripts.dynfuse.args.

Two forms, both starting with the panel's switch:

    [true, {"subject": "dog", "style": "watercolor", "criterion": "js"}]      names as in FuseSettings
    [true, ["dog"], ["watercolor"], 1.0, 1.0, "dynfuse", ...]                 all fields, in the order of FuseSettings

Behind the fields the panel has a text for each of WEIGHTS, which goes before the number unless it is empty: a slider holds no points.

A picture comes in base64, or as a PIL image from other code, is kept in the cache of references, and from then on is the few digits
that stand for it there: a tag and an infotext never hold the picture itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from ..guidance.references import ReferenceCache
from ..settings import FuseSettings, SettingsError, field_metadata, field_types
from ..text.tag import check_pair

WEIGHTS = ("subject_weight", "style_weight")


def read_arguments(arguments: Sequence[Any], cache: ReferenceCache) -> FuseSettings | None:
    """What the arguments ask for: None when the panel is switched off.

    cache: where pictures are kept.
    Raises SettingsError: one sentence that names an unknown key, a wrong type, a value outside its range or an unreadable picture.
    """
    enabled, values = (arguments[0], arguments[1:]) if arguments else (False, ())
    if not isinstance(enabled, bool):
        raise SettingsError(f"the first argument must be true or false, not {enabled!r}; the settings are the second: [true, {{...}}]")
    if not enabled:
        return None
    # Behind a dict the host fills the remaining places with the panel's own values; they are not the client's.
    named = values and isinstance(values[0], Mapping)
    settings = FuseSettings.from_mapping(_with_kept_pictures(values[0] if named else _named(values), cache))
    check_pair(settings)
    return settings


def _named(values: Sequence[Any]) -> dict[str, Any]:
    names = list(field_types())
    if len(values) > len(names) + len(WEIGHTS):
        raise SettingsError(f"{len(values)} values were given; the settings are {len(names)}: {', '.join(names)}")
    # An emptied control sends None, and so does an empty place for a picture.
    named = {name: value for name, value in zip(names, values, strict=False) if value is not None}
    texts = zip(WEIGHTS, values[len(names) :], strict=False)
    return {**named, **{name: text for name, text in texts if text is not None and text != ""}}


def _with_kept_pictures(values: Mapping[str, Any], cache: ReferenceCache) -> dict[str, Any]:
    pictures = [name for name in values if name in field_types() and field_metadata(name)["picture"]]
    return {**values, **{name: _kept_picture(name, values[name], cache) for name in pictures}}


def _kept_picture(name: str, value: Any, cache: ReferenceCache) -> str:
    """The digits that stand for a picture."""
    if value is None or value == "":
        return ""
    if not isinstance(value, (str, Image.Image)):
        raise SettingsError(f"{name} must be a picture in base64, not of type {type(value).__name__}")
    try:
        if isinstance(value, str):
            # Upright, as the panel hands over a photo. Digits stand for themselves: keeping a kept picture changes nothing.
            value = ImageOps.exif_transpose(cache.picture(value))
        return cache.keep_picture(value)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from None
    except Exception as error:
        # Pillow raises nearly anything for a damaged picture, and a full disk an OSError.
        raise SettingsError(f"{name}: the picture cannot be read and kept: {error}") from None
