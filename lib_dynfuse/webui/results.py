"""What is left of a job to look at: selection maps, curves of the guidance and the references it was steered towards.

Shown in the panel; maps and curves are, if the user wants, also saved beside the images.
"""

from __future__ import annotations

import html
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..fusion import Trace, selection_map
from ..guidance import curve
from ..guidance.guide import GuidanceRecord
from ..guidance.references import Reference
from ..hosts.webui.passes import FusionPass, Recipe
from ..settings import FuseSettings
from . import map_page, options, pictures
from .tuning import Sheet

# What the host saves of an image besides the image itself (modules/processing.py, images.save_image(..., suffix=)).
_OTHER_SAVES = ("-before-highres-fix", "-before-face-restoration", "-before-color-correction", "-mask", "-mask-composite", "-init-image")

# About as wide as its place in the panel: its letters are then read as they were drawn.
CURVE_WIDTH = 480


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
    tuned: Sheet | None


@dataclass(frozen=True)
class Batch:
    """What is kept of a batch. seeds: of its pictures."""

    passes: tuple[_Seen, ...]
    seeds: tuple[int, ...]


_KEPT = 12
_MOST_PICTURES = 64
_seen_jobs: dict[str, OrderedDict[str, list[Batch]]] = {}
"""By tab and job, the newest last: several browsers may have jobs of the same tab."""

USED, SELECTED = "what was used", "what the selection would choose"
VIEWS = (USED, SELECTED)


def job_of(processed: Any) -> str:
    """What tells a finished job apart: the host's time stamp of it, which the browser gets with its pictures (Processed.js)."""
    return str(getattr(processed, "job_timestamp", ""))


def batch_of(passes: Sequence[FusionPass], seeds: Sequence[int]) -> Batch:
    """What is kept of a batch whose pictures are done."""
    return Batch(tuple(_seen(p) for p in passes), tuple(int(seed) for seed in seeds))


def remember(tab: str, job: str, batches: Sequence[Batch]) -> None:
    """Keep a finished job. job: see job_of. A plot runs several under one stamp: their pictures come one after another."""
    jobs = _seen_jobs.setdefault(tab, OrderedDict())
    if not batches:
        return
    own = [*jobs.pop(job, []), *batches]
    while len(own) > 1 and sum(len(batch.seeds) for batch in own) > _MOST_PICTURES:
        own.pop()
    jobs[job] = own
    while len(jobs) > _KEPT or (len(jobs) > 1 and sum(len(batch.seeds) for kept in jobs.values() for batch in kept) > _MOST_PICTURES):
        jobs.popitem(last=False)


@dataclass(frozen=True)
class Shown:
    """One picture of the job that the browser has.

    title: "Picture 2 of 4, seed 8". place: in its batch. passes: of that.
    """

    title: str
    place: int
    passes: tuple[_Seen, ...]


def pictures_of(tab: str, job: str | None) -> list[Shown]:
    """Those of which something is known, in the order in which they were made. job: see job_of."""
    places = [(batch, place) for batch in _batches(tab, job) for place in range(max(1, len(batch.seeds)))]
    shown = []
    for number, (batch, place) in enumerate(places, 1):
        seed = f", seed {batch.seeds[place]}" if batch.seeds else ""
        title = f"Picture {number} of {len(places)}{seed}" if len(places) > 1 else f"The picture{seed}"
        shown.append(Shown(title, place, batch.passes))
    return shown


def has_selection(shown: Shown) -> bool:
    """Whether it was measured what the selection would choose, where something else was used."""
    return any(_selected(p) is not None for p in shown.passes)


def map_part(shown: Shown, view: str = USED) -> str:
    """The selection maps of a picture, one of VIEWS."""
    return "".join(_map_html(p, shown, view) for p in shown.passes)


def beside_part(shown: Shown) -> str:
    """What stands beside them: references, curves and notes."""
    curves = "".join(_curve_html(p) for p in shown.passes)
    # Every pass of a job is steered towards the same two.
    references = next((p.references for p in reversed(shown.passes) if p.references), ())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(note for p in shown.passes for note in p.notes))
    return _references_html(references) + curves + (f"<ul>{notes}</ul>" if notes else "")


def recipe(shown: Shown) -> Recipe | None:
    """Of the last pass of a picture; None if nothing was fused."""
    found = next((p.recipe for p in reversed(shown.passes) if p.recipe is not None), None)
    if found is None or found.trace.weights.shape[2] <= shown.place:
        return found
    return replace(found, trace=found.trace.of_image(shown.place))


def tuned(tab: str, job: str | None) -> Sheet | None:
    """The search of a job; None if there was none. job: see job_of."""
    return next((p.tuned for batch in _batches(tab, job) for p in batch.passes if p.tuned is not None), None)


def job_in(information: str | None) -> str:
    """The job whose pictures a browser has, which it keeps over a reload of the page. Empty for a tab without pictures."""
    try:
        return str(json.loads(information or "")["job_timestamp"])
    except (KeyError, TypeError, ValueError):
        return ""


def _batches(tab: str, job: str | None) -> list[Batch]:
    return _seen_jobs.get(tab, OrderedDict()).get(job or "", [])


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
    search = Sheet(p.tuned, p.settings) if p.tuned is not None and p.settings is not None else None
    return _Seen(p.settings, p.trace, _record(p), references, tuple(p.notes), p.hires, p.recipe, search)


def _seen_reference(reference: Reference) -> _SeenReference:
    return _SeenReference(reference.side, reference.prompt, reference.given, pictures.shown_address(reference.picture))


def _record(p: FusionPass) -> GuidanceRecord | None:
    return p.guidance.record if p.guidance is not None else None


def _map(trace: Trace | None, settings: FuseSettings | None) -> Image.Image | None:
    """None also where it would be a field of one colour."""
    if trace is None or trace.uniform is not None:
        return None
    assert settings is not None, "a pass that ran had settings"
    return selection_map.draw(trace, *settings.subjects, *settings.styles)


def _curve(record: GuidanceRecord | None, width: int = CURVE_WIDTH) -> Image.Image | None:
    return curve.draw(record, width) if record is not None and record.steps else None


def _selected(p: _Seen) -> Trace | None:
    """What the selection would have used, where the pass used something else."""
    return p.trace.selected(p.settings) if p.trace is not None and p.settings is not None and p.settings.method != "dynfuse" else None


def _map_html(p: _Seen, shown: Shown, view: str) -> str:
    trace = _selected(p) if view == SELECTED else p.trace
    if trace is None or p.settings is None or not len(trace.weights) or trace.weights.shape[2] <= shown.place:
        return ""
    names = (*p.settings.subjects, *p.settings.styles)
    part = f"{'hires pass, ' if p.hires else ''}{view}"
    weights = trace.of_image(shown.place).uniform if view == USED else None
    if weights is None:
        return map_page.map_html(trace, shown.place, names, f"{shown.title}: {part}")
    # In place of a field of one colour.
    told = " and ".join(f"{html.escape(name)} at {weight:.3g}" for name, weight in zip(names, weights))
    return f"<p><b>{html.escape(shown.title)}</b>{': hires pass' if p.hires else ''}</p><p>Every layer used {told}, at every step.</p>"


def _curve_html(p: _Seen) -> str:
    picture = _curve(p.record)
    if picture is None:
        return ""
    caption = f"Guidance{', hires pass' if p.hires else ''}"
    alt = "Similarities to the references over the steps"
    address = pictures.picture_address(picture)
    return f'<figure class="dynfuse-curve"><figcaption>{caption}</figcaption><img src="{address}" alt="{alt}"></figure>'


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
