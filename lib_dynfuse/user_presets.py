"""Presets that a user saves under a name of their own: all settings but LoRAs, prompts and pictures, in one JSON file."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .settings import LORA_FIELDS, PRESETS, FuseSettings, SettingsError, field_metadata, field_types, shown

FILE = "presets.json"
_NAME = re.compile(r"\w[\w .-]{0,39}")

FIELDS = tuple(
    name
    for name in field_types()
    if name not in LORA_FIELDS and not name.endswith("_prompt") and name != "reference_seed" and not field_metadata(name)["picture"]
)
"""What a preset sets: what does not belong to one picture."""


class UserPresets:
    """The file, read anew at each use: another WebUI may share the folder."""

    def __init__(self, path: Path):
        self.path = path

    def all(self) -> dict[str, dict[str, Any]]:
        """name -> values of FIELDS. What a later or an earlier version of the program wrote is left out where it means nothing here."""
        try:
            kept = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        found: dict[str, dict[str, Any]] = {}
        for name, values in kept.items() if isinstance(kept, dict) else ():
            if not _NAME.fullmatch(name) or not isinstance(values, dict):
                continue
            own = {field: value for field, value in values.items() if field in FIELDS}
            try:
                settings = FuseSettings(**own)
            except (SettingsError, TypeError):
                continue
            found[name] = {field: getattr(settings, field) for field in FIELDS}
        return found

    def save(self, name: str, settings: FuseSettings) -> str:
        """Under that name, also in place of what had it; the name as it is kept. Raises SettingsError, OSError."""
        name = checked_name(name)
        self._write({**self.all(), name: {field: getattr(settings, field) for field in FIELDS}})
        return name

    def delete(self, name: str) -> bool:
        """Whether there was one of that name. Raises OSError."""
        kept = self.all()
        if kept.pop(name, None) is None:
            return False
        self._write(kept)
        return True

    def _write(self, presets: Mapping[str, Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            unfinished.write_text(json.dumps(presets, indent=1, ensure_ascii=False) + "\n", "utf-8")
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def checked_name(name: str) -> str:
    """Raises SettingsError for a name that no preset can have."""
    name = str(name or "").strip()
    if not _NAME.fullmatch(name):
        raise SettingsError(f"a preset's name has 1 to 40 letters, digits, spaces, dots and hyphens, unlike {shown(name)}")
    if name.lower() in PRESETS:
        raise SettingsError(f"the preset {name.lower()!r} is DynFuse's own; choose another name")
    return name


__all__ = ["FIELDS", "FILE", "UserPresets", "checked_name"]
