"""What is left of a job to look at: its selection maps, shown in the panel and, if the user wants, saved beside the images."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..fusion import Trace, selection_map
from ..hosts.fusion_pass import FusionPass
from ..settings import FuseSettings
from . import options, pictures

# What the host saves of an image besides the image itself (modules/processing.py, images.save_image(..., suffix=)).
_OTHER_SAVES = ("-before-highres-fix", "-before-face-restoration", "-before-color-correction", "-mask", "-mask-composite", "-init-image")


@dataclass(frozen=True)
class _Seen:
    """What is shown of a pass. Not the pass itself: that holds the LoRAs' tensors."""

    settings: FuseSettings | None
    trace: Trace | None
    notes: tuple[str, ...]
    hires: bool


_last: dict[str, list[_Seen]] = {}


def forget(tab: str) -> None:
    """A new job has begun in a tab; an older job's map must not stand beside its image."""
    _last.pop(tab, None)


def remember(tab: str, passes: Sequence[FusionPass]) -> None:
    """Keep the passes of a finished job's last batch."""
    _last[tab] = [_Seen(p.settings, p.trace, tuple(p.notes), p.hires) for p in passes]


def result_html(tab: str) -> str:
    """The panel's view of a tab's last job; empty if it was not fused."""
    passes = _last.get(tab, [])
    figures = "".join(_figure(_map(p.trace, p.settings), p.hires) for p in passes if p.trace is not None)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(note for p in passes for note in p.notes))
    return figures + (f"<ul>{notes}</ul>" if notes else "")


def save_beside(filename: str, passes: Sequence[FusionPass]) -> None:
    """The host has saved an image: save the map of its batch under the same name with "-dynfuse.png", if the user wants it.

    Grids, masks and earlier stages of an image get no map. With hires fix the first pass's map stands above the second's.
    """
    stem = os.path.splitext(filename)[0]
    if not options.saves_map() or stem.endswith(_OTHER_SAVES) or os.path.basename(stem).startswith("grid-"):
        return
    maps = [_map(trace, p.settings) for p in passes if (trace := p.trace) is not None]
    if maps:
        _stacked(maps).save(f"{stem}-dynfuse.png")


def _map(trace: Trace, settings: FuseSettings | None) -> Image.Image:
    assert settings is not None, "a pass that ran had settings"
    return selection_map.draw(trace, settings.subject, settings.style)


def _figure(picture: Image.Image, hires: bool) -> str:
    caption = "<figcaption>Hires pass</figcaption>" if hires else ""
    return f'<figure>{caption}<img src="{pictures.picture_address(picture)}" alt="Selection map: steps by layers"></figure>'


def _stacked(maps: Sequence[Image.Image]) -> Image.Image:
    stacked = Image.new("RGB", (max(picture.width for picture in maps), sum(picture.height for picture in maps)), "white")
    top = 0
    for picture in maps:
        stacked.paste(picture, (0, top))
        top += picture.height
    return stacked
