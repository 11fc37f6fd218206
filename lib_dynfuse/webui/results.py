"""What is left of a job to look at: selection maps, curves of the guidance and the references it was steered towards.

Shown in the panel; maps and curves are, if the user wants, also saved beside the images.
"""

from __future__ import annotations

import html
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..fusion import Trace, selection_map
from ..guidance import curve
from ..guidance.guide import GuidanceRecord
from ..guidance.references import Reference
from ..hosts.webui.passes import FusionPass, Recipe
from ..settings import FuseSettings
from . import options, pictures

# What the host saves of an image besides the image itself (modules/processing.py, images.save_image(..., suffix=)).
_OTHER_SAVES = ("-before-highres-fix", "-before-face-restoration", "-before-color-correction", "-mask", "-mask-composite", "-init-image")

# About as wide as the panel: its letters are then read as they were drawn.
CURVE_WIDTH = 640


@dataclass(frozen=True)
class _SeenReference:
    """address: of the picture, in the size in which it is shown."""

    side: str
    prompt: str
    given: bool
    address: str


@dataclass(frozen=True)
class _Seen:
    """What is shown of a pass. Not the pass itself: that holds the LoRAs' tensors."""

    settings: FuseSettings | None
    trace: Trace | None
    record: GuidanceRecord | None
    references: tuple[_SeenReference, ...]
    notes: tuple[str, ...]
    hires: bool
    recipe: Recipe | None


_KEPT = 12
_seen_jobs: dict[str, OrderedDict[str, list[_Seen]]] = {}
"""By tab and job, the newest last: several browsers may have jobs of the same tab."""


def job_of(processed: Any) -> str:
    """What tells a finished job apart: the host's time stamp of it, which the browser gets with its pictures (Processed.js)."""
    return str(getattr(processed, "job_timestamp", ""))


def remember(tab: str, job: str, passes: Sequence[FusionPass]) -> None:
    """Keep the passes of a finished job's last batch. job: see job_of."""
    jobs = _seen_jobs.setdefault(tab, OrderedDict())
    jobs[job] = [_seen(p) for p in passes]
    jobs.move_to_end(job)
    while len(jobs) > _KEPT:
        jobs.popitem(last=False)


def result_html(tab: str, information: str) -> str:
    """The panel's view of the job whose pictures the browser shows; empty if it was not fused. information: what came with them, JSON."""
    passes = _passes(tab, information)
    figures = "".join(_pass_html(p) for p in passes)
    # Every pass of a job is steered towards the same two.
    references = next((p.references for p in reversed(passes) if p.references), ())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(note for p in passes for note in p.notes))
    return figures + _references_html(references) + (f"<ul>{notes}</ul>" if notes else "")


def recipe(tab: str, information: str) -> Recipe | None:
    """Of the last pass of the job that the browser shows; None if nothing was fused."""
    return next((p.recipe for p in reversed(_passes(tab, information)) if p.recipe is not None), None)


def _passes(tab: str, information: str) -> list[_Seen]:
    try:
        job = str(json.loads(information)["job_timestamp"])
    except (KeyError, TypeError, ValueError):  # a tab without pictures has no text
        return []
    return _seen_jobs.get(tab, OrderedDict()).get(job, [])


def save_beside(filename: str, passes: Sequence[FusionPass]) -> None:
    """The host has saved an image: save the map and the curve of its batch under the same name with "-dynfuse.png", if the user wants it.

    Grids, masks and earlier stages of an image get none. With hires fix the first pass's pictures stand above the second's.
    """
    stem = os.path.splitext(filename)[0]
    if not options.saves_map() or stem.endswith(_OTHER_SAVES) or os.path.basename(stem).startswith("grid-"):
        return
    drawn: list[Image.Image] = []
    for p in passes:
        selection = _map(p.trace, p.settings)
        similarities = _curve(_record(p), CURVE_WIDTH if selection is None else selection.width)
        drawn += [picture for picture in (selection, similarities) if picture is not None]
    if drawn:
        _stacked(drawn).save(f"{stem}-dynfuse.png")


def _seen(p: FusionPass) -> _Seen:
    references = tuple(_seen_reference(reference) for reference in (p.guidance.references if p.guidance is not None else ()))
    return _Seen(p.settings, p.trace, _record(p), references, tuple(p.notes), p.hires, p.recipe)


def _seen_reference(reference: Reference) -> _SeenReference:
    return _SeenReference(reference.side, reference.prompt, reference.given, pictures.shown_address(reference.picture))


def _record(p: FusionPass) -> GuidanceRecord | None:
    return p.guidance.record if p.guidance is not None else None


def _map(trace: Trace | None, settings: FuseSettings | None) -> Image.Image | None:
    """None also where it would be a field of one colour: see _said."""
    if trace is None or trace.uniform is not None:
        return None
    assert settings is not None, "a pass that ran had settings"
    return selection_map.draw(trace, *settings.subjects, *settings.styles)


def _said(trace: Trace | None, settings: FuseSettings | None) -> str:
    """What a map has no need to show."""
    weights = trace.uniform if trace is not None else None
    if weights is None:
        return ""
    assert settings is not None, "a pass that ran had settings"
    told = " and ".join(f"{html.escape(name)} at {weight:.3g}" for name, weight in zip(settings.subjects + settings.styles, weights))
    return f"<p>Every layer used {told}, at every step.</p>"


def _curve(record: GuidanceRecord | None, width: int = CURVE_WIDTH) -> Image.Image | None:
    return curve.draw(record, width) if record is not None and record.steps else None


def _pass_html(p: _Seen) -> str:
    title = "Hires pass" if p.hires else ""
    drawn = [
        (_map(p.trace, p.settings), "Selection map: steps by layers"),
        (_curve(p.record), "Similarities to the references over the steps"),
    ]
    shown = [(picture, text) for picture, text in drawn if picture is not None]
    said = _said(p.trace, p.settings)
    if said and title and not shown:
        said = f"<p>{title}</p>{said}"
    return said + "".join(_figure(picture, text, title if index == 0 else "") for index, (picture, text) in enumerate(shown))


def _figure(picture: Image.Image, text: str, title: str) -> str:
    caption = f"<figcaption>{title}</figcaption>" if title else ""
    return f'<figure>{caption}<img src="{pictures.picture_address(picture)}" alt="{text}"></figure>'


def _references_html(references: Sequence[_SeenReference]) -> str:
    if not references:
        return ""
    cards = "".join(
        f'<figure><img src="{reference.address}" alt="{html.escape(reference.side)} reference"><figcaption>'
        f"<b>{html.escape(reference.side.capitalize())} reference</b>"
        f"<span>{_origin(reference)}</span></figcaption></figure>"
        for reference in references
    )
    return f'<div class="dynfuse-references">{cards}</div>'


def _origin(reference: _SeenReference) -> str:
    if reference.given:
        return "your picture"
    return f"generated: {html.escape(reference.prompt)}" if reference.prompt else "generated"


def _stacked(drawn: Sequence[Image.Image]) -> Image.Image:
    stacked = Image.new("RGB", (max(picture.width for picture in drawn), sum(picture.height for picture in drawn)), "white")
    top = 0
    for picture in drawn:
        stacked.paste(picture, (0, top))
        top += picture.height
    return stacked
