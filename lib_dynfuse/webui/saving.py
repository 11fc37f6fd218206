"""The button under the result: the LoRAs of the last picture as one file among the WebUI's own."""

from __future__ import annotations

import html
import logging
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..fusion import FusionError
from ..fusion.merging import Merged, merge_pictures, properties
from ..hosts.webui.catalogue import Catalogue
from ..hosts.webui.lora_files import FileVersion
from ..hosts.webui.passes import Recipe
from ..lora import LoraError, LoraFile, read_lora
from ..settings import FuseSettings

log = logging.getLogger(__name__)

ENDING = ".safetensors"
FORBIDDEN = '/\\:*?"<>|'
"""What a name may not contain: it would be a path, end a <lora:...> tag, or be no name on some system."""
LONGEST = 100

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # devices on Windows
_busy = threading.Lock()


class SavingError(ValueError):
    """A file that cannot be written under the name or in the form that was asked for. One sentence for the user."""


def proposed_name(settings: FuseSettings, catalogue: Catalogue) -> str:
    """A name that no LoRA has yet, made from those that are fused: "dog-watercolor"."""
    kept = "".join("-" if mark in FORBIDDEN or not mark.isprintable() else mark for mark in "-".join(settings.subjects + settings.styles))
    stem = kept[: LONGEST // 2].strip(" .-") or "merged"
    taken = (f"{stem}-{number}" for number in range(2, 1000))
    return next((name for name in (stem, *taken) if not _is_taken(name, catalogue)), stem)


def save(recipe: Recipe | None, name: str, rank: Any, catalogue: Catalogue) -> str:
    """Write the file, and have the WebUI find it. Returns what became of it, as HTML; never raises.

    name: of the file, without a folder. rank: highest rank of a layer, 0 for an exact file.
    """
    if not _busy.acquire(blocking=False):
        return _problem("The last file is still being written.")
    try:
        if recipe is None:
            raise SavingError("Make a picture with DynFuse first.")
        merged = _write(recipe, _target(name, catalogue), _rank(rank))
        catalogue.refresh()
    except (SavingError, LoraError, FusionError) as reason:
        return _problem(str(reason))
    except Exception as reason:
        log.exception("DynFuse could not write a merged LoRA")
        return _problem(f"The file could not be written: {type(reason).__name__}: {reason}")
    finally:
        _busy.release()
    return _success(merged)


def _write(recipe: Recipe, path: Path, rank: int | None) -> Merged:
    subjects, styles = _read(recipe.subjects), _read(recipe.styles)
    return merge_pictures(path, subjects, styles, recipe.settings, [recipe.trace], recipe.shapes, rank=rank)


def _read(versions: Sequence[FileVersion]) -> list[LoraFile]:
    return [read_lora(_unchanged(version)) for version in versions]


def _unchanged(version: FileVersion) -> str:
    name = os.path.basename(version.path)
    try:
        now = FileVersion.of(version.path)
    except OSError as error:
        raise SavingError(f"{name} cannot be read: {error.strerror or error}.") from None
    if now != version:
        raise SavingError(f"{name} is not the file any more that the picture was made with; make the picture again.")
    return version.path


def _target(name: str, catalogue: Catalogue) -> Path:
    """Where the file goes. Raises SavingError for what is no plain name, or one that a LoRA has."""
    folder = catalogue.folder()
    if folder is None:
        raise SavingError("The WebUI does not tell where its LoRAs are kept.")
    stem = name.strip().removesuffix(ENDING).strip()
    if not stem:
        raise SavingError("Give the new LoRA a name.")
    if any(mark in FORBIDDEN or not mark.isprintable() for mark in stem):
        raise SavingError(
            f"A name is no path and has none of {' '.join(FORBIDDEN)} in it: the file goes into the WebUI's folder for LoRAs."
        )
    if stem.startswith(".") or stem.endswith(".") or _RESERVED.fullmatch(stem) or len(stem) > LONGEST:
        raise SavingError(f"{stem[:LONGEST]!r} cannot be the name of a file; choose another.")
    if _is_taken(stem, catalogue):
        raise SavingError(f"There is a LoRA named {stem!r} already, and none is overwritten; choose another name.")
    return folder / f"{stem}{ENDING}"


def _is_taken(name: str, catalogue: Catalogue) -> bool:
    folder = catalogue.folder()
    return catalogue.path(name) is not None or (folder is not None and os.path.lexists(folder / f"{name}{ENDING}"))


def _rank(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
        raise SavingError(f"The rank must be a whole number, or 0 for an exact file, not {value!r}.")
    return int(value) or None


def _success(merged: Merged) -> str:
    name = html.escape(merged.path.name)
    tag = html.escape(f"<lora:{merged.path.stem}:1>")
    rows = "".join(f"<li><b>{html.escape(label)}</b>: {html.escape(text)}</li>" for label, text in properties(merged))
    return f"<p>Saved as <b>{name}</b>; in a prompt: <code>{tag}</code></p><ul>{rows}</ul>"


def _problem(sentence: str) -> str:
    return f'<p class="dynfuse-problem">{html.escape(sentence)}</p>'


__all__ = ["SavingError", "proposed_name", "save"]
