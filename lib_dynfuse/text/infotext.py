"""The infotext: the line of "name: value" pairs under an image, and in its file, from which a WebUI restores its panels.

Pure text: the host quotes values that hold a comma or a colon (infotext_utils.quote), and parses the line into a dict.
Every name starts with "DynFuse"; beside the method only values that differ from the defaults are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..settings import LORA_FIELDS, FuseSettings, SettingsError, default_value, field_types, join_names, split_names
from . import tag

ENABLED = "DynFuse"
HASHES = "DynFuse LoRA hashes"
NOTE = "DynFuse note"
TUNED = "DynFuse tuned"


def field_key(name: str) -> str:
    """The name in the infotext of a field of FuseSettings."""
    return f"{ENABLED} {name.replace('_', ' ')}"


def settings_fields(settings: FuseSettings) -> dict[str, str]:
    """The infotext's entries that restore the panel."""
    told = {"method": settings.method, **settings.non_default()}  # what the default method is may change
    return {ENABLED: "True", **{field_key(name): tag.format_field(name, told[name]) for name in field_types() if name in told}}


def hash_field(names: Iterable[str], hash_of: Callable[[str], str | None]) -> dict[str, str]:
    """The infotext's entry that identifies LoRAs by their contents; empty when no hash is known.

    hash_of: the host's short hash of a LoRA, None if it has none.
    """
    hashes = {name: hash_of(name) for name in names if name}
    pairs = [f"{tag.escape(name)}: {value}" for name, value in hashes.items() if value]
    return {HASHES: ", ".join(pairs)} if pairs else {}


def read_hashes(entries: Mapping[str, Any]) -> dict[str, str]:
    """LoRA names and their hashes as hash_field wrote them."""
    pairs = (pair.strip().rpartition(":") for pair in str(entries.get(HASHES) or "").split(","))
    return {tag.unescape(name.strip()): value.strip() for name, _, value in pairs if name}


def is_enabled(entries: Mapping[str, Any]) -> bool:
    """Whether the image was made with the panel switched on."""
    return entries.get(ENABLED) == "True"


def read_value(entries: Mapping[str, Any], name: str) -> Any:
    """A field's typed value: the default where the infotext does not name it. Raises SettingsError for an impossible value."""
    key = field_key(name)
    text = entries.get(key)
    # The host takes "512x512" for a size and splits it in two (infotext_utils.re_imagesize), even if it is a LoRA's name.
    if text is None and f"{key}-1" in entries:
        text = f"{entries[f'{key}-1']}x{entries[f'{key}-2']}"
    if text is None:
        return default_value(name)
    return getattr(FuseSettings.from_mapping({name: tag.parse_field(name, str(text))}), name)


def read_settings(entries: Mapping[str, Any], rename: Callable[[str, str | None], str] | None = None) -> FuseSettings | None:
    """The settings of an image, None if it was made with the panel off. Raises SettingsError for an impossible value.

    rename: see known_name; takes a LoRA's name and hash, gives the name it has here.
    """
    if not is_enabled(entries):
        return None
    values = {name: read_value(entries, name) for name in field_types()}
    if rename is not None:
        hashes = read_hashes(entries)
        values.update({name: renamed_names(values[name], hashes, rename) for name in LORA_FIELDS})
    return FuseSettings(**values)


def known_name(is_known: Callable[[str], bool], name_by_hash: Callable[[str], str | None]) -> Callable[[str, str | None], str]:
    """A rename for read_settings and renamed_tags: a name that is unknown here is replaced by that of the LoRA with the same hash."""

    def rename(name: str, value: str | None) -> str:
        if not name or not value or is_known(name):
            return name
        return name_by_hash(value) or name

    return rename


def renamed_names(text: str, hashes: Mapping[str, str], rename: Callable[[str, str | None], str]) -> str:
    """A side's text with the names that its LoRAs have here. hashes: by the names it has."""
    return join_names(rename(name, hashes.get(name)) for name in split_names(text))


def renamed_tags(prompt: str, hashes: Mapping[str, str], rename: Callable[[str, str | None], str]) -> str:
    """A pasted prompt in which the LoRAs of DynFuse tags have the names they have here. A tag that cannot be read stays."""

    def replacement(items: list[str]) -> str | None:
        try:
            settings = tag.parse_tag(items)
        except SettingsError:
            return None
        names = {name: renamed_names(getattr(settings, name), hashes, rename) for name in LORA_FIELDS}
        if all(getattr(settings, name) == value for name, value in names.items()):
            return None
        return tag.format_tag(FuseSettings(**{**settings.non_default(), **names}))

    return tag.replace_tags(prompt, replacement)


def pasted_loras(entries: Mapping[str, Any], rename: Callable[[str, str | None], str]) -> list[str]:
    """The LoRAs that an infotext's panel and tags name, each once, under the names they have here. rename: see known_name."""
    asked: list[FuseSettings] = []
    for items in (items for key in ("Prompt", "Hires prompt") for items in tag.find_tags(str(entries.get(key) or ""))):
        try:
            asked.append(tag.parse_tag(items))
        except SettingsError:
            continue
    texts = [getattr(settings, name) for settings in asked for name in LORA_FIELDS]
    if is_enabled(entries):
        for name in LORA_FIELDS:
            try:
                texts.append(read_value(entries, name))
            except SettingsError:
                continue
    hashes = read_hashes(entries)
    return list(dict.fromkeys(rename(name, hashes.get(name)) for text in texts for name in split_names(text)))
