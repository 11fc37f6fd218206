"""The WebUI's own list of LoRAs: names, aliases, files, hashes, previews. All hosts keep it under the same names in the module networks."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...text.tag import escape
from ..references import activation_texts
from .capabilities import Call, Value

PREVIEW_ENDINGS = tuple(f"{middle}.{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif") for middle in ("", ".preview"))

NEEDS = (
    Call("networks", "list_available_networks"),
    *(
        Value("networks", name)
        for name in ("available_networks", "available_network_aliases", "forbidden_network_aliases", "available_network_hash_lookup")
    ),
)


class UnknownLora(LookupError):
    """A name that the WebUI's list of LoRAs does not have. One sentence."""


class Catalogue:
    """A LoRA is looked up in here by name; a name is never taken for a path."""

    def names(self) -> list[str]:
        """The LoRAs as the WebUI's own list shows them: file names without ending."""
        return sorted(_networks().available_networks, key=str.lower)

    def refresh(self) -> None:
        """Look for LoRA files again."""
        _networks().list_available_networks()

    def folder(self) -> Path | None:
        """Where new LoRA files go; None if the WebUI does not tell."""
        from modules import shared

        folder = getattr(getattr(shared, "cmd_opts", None), "lora_dir", None)
        return Path(folder) if folder else None

    def path(self, name: str) -> str | None:
        """The file of a LoRA by file name or alias, None if the WebUI does not know it."""
        entry = self._entry(name)
        return entry.filename if entry is not None else None

    def known_path(self, name: str) -> str:
        """The same after another look for new files. Raises UnknownLora."""
        path = self.path(name)
        if path is None or not os.path.isfile(path):
            self.refresh()
            path = self.path(name)
        if path is None:
            raise UnknownLora(_unknown(name, [*_networks().available_networks, *_networks().available_network_aliases]))
        return path

    def is_among(self, name: str, paths: frozenset[str]) -> bool:
        """Whether a LoRA's file is one of these. paths: real paths."""
        path = self.path(name)
        return path is not None and os.path.realpath(path) in paths

    def hash(self, name: str) -> str | None:
        """The short hash under which the WebUI knows a LoRA; reads the file the first time."""
        entry = self._entry(name)
        if entry is None:
            return None
        entry.read_hash()
        return entry.shorthash or None

    def name_by_hash(self, value: str) -> str | None:
        """The LoRA of this short hash, as in names."""
        entry = _networks().available_network_hash_lookup.get(value)
        return entry.name if entry is not None else None

    def preview(self, name: str) -> str | None:
        """Path of the picture that the WebUI shows for a LoRA."""
        path = self.path(name)
        if path is None:
            return None
        stem = os.path.splitext(path)[0]
        return next((stem + ending for ending in PREVIEW_ENDINGS if os.path.isfile(stem + ending)), None)

    def activation_text(self, *names: str) -> str | None:
        """What the WebUI keeps as the activation texts of these LoRAs; None if there is none."""
        return activation_texts([path for name in names if (path := self.path(name)) is not None])

    def _entry(self, name: str) -> Any:
        """The WebUI's record of a LoRA. Looks names up as networks.load_networks does."""
        networks = _networks()
        # An alias that two files share stands for neither.
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name) or networks.available_networks.get(name)


def _networks() -> Any:
    """The WebUI's LoRA module."""
    import networks

    return networks


def _unknown(name: str, known: Sequence[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    # Written as a path, as some lists of LoRAs show them: "people/dog.safetensors" is dog.
    file = re.split(r"[\\/]", name.lower())[-1].removesuffix(".safetensors")
    close = [by_lower[match] for match in difflib.get_close_matches(file, by_lower, n=3, cutoff=0.5)]
    told = [other if escape(other) == other else f"{other} (in a tag {escape(other)})" for other in dict.fromkeys(close)]
    return f"there is no LoRA named {name!r}" + (f"; did you mean {' or '.join(told)}?" if told else ".")


__all__ = ["NEEDS", "Catalogue", "UnknownLora"]
