"""`python -m lib_dynfuse demo`: two LoRAs in one picture, in the miniature world, on a page to look at. Needs no network."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from lib_dynfuse.threads import one_thread

from ..benchmark.protocol import REPORTED, STEPS, Pair
from ..model import WEIGHTS, load_pipeline
from ..shipped import verify
from .page import choices, page, similarities
from .pictures import SIDES, Show, make, steps_in_all
from .sheet import enlarged, sheet, strip


def drawn() -> tuple[Pair, Pair]:
    """Of the pairs on which no setting was chosen, two that have neither the subject nor the style in common."""
    chance = random.Random("demo")
    first = chance.choice(REPORTED)
    return first, chance.choice([pair for pair in REPORTED if pair.subject != first.subject and pair.style != first.style])


PAIRS = drawn()
"""Drawn by lot (the page says so)."""
SEEDS = tuple(range(6))


def run(out: Path, weights: Path = WEIGHTS) -> int:
    """Make the pictures and the page, with progress on standard error. Returns the exit code.

    out: the folder for index.html, which holds all pictures; demo.png, a contact sheet of the first pair; strip.png, the first picture of
    each pair by two tags and by DynFuse; and a folder of PNGs for each pair. weights: those of the miniature world. Raises WeightsError
    for missing or damaged ones.
    """
    from tqdm import tqdm

    from ..judges import load_judges

    started = time.monotonic()
    verify(weights)
    out.mkdir(parents=True, exist_ok=True)
    pipeline, judges = load_pipeline(weights), load_judges(weights / "judges.safetensors")
    shows = []
    with one_thread(), tempfile.TemporaryDirectory() as cache, tqdm(total=steps_in_all(len(PAIRS), STEPS), unit="step") as bar:

        def show(what: str) -> None:
            bar.set_description(f"{what:<24}")
            bar.update()

        for pair in PAIRS:
            shows.append(make(pipeline, judges, pair, weights, Path(cache), SEEDS, STEPS, show))
    for made in shows:
        _save(made, out / made.pair.name)
    sheet(shows[0]).save(out / "demo.png")
    strip(shows).save(out / "strip.png")
    seconds = time.monotonic() - started
    index = out / "index.html"
    index.write_text(page(shows, seconds), "utf-8")
    print(f"Open {index} in a browser: a page with all pictures, made in {seconds:.0f} seconds.")
    return 0


def _save(show: Show, folder: Path) -> None:
    """Each picture as a PNG of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        enlarged(show.alone[side].picture).save(folder / f"{side}-alone.png")
        for number, (_, picture) in enumerate(show.taught[side], 1):
            enlarged(picture).save(folder / f"{side}-taught-{number}.png")
    for name, row in show.fused.items():
        for seed, judged in zip(show.seeds, row):
            enlarged(judged.picture).save(folder / f"{name}-{seed}.png")
    choices(show).save(folder / "selection-map.png")
    similarities(show).save(folder / "similarities.png")


__all__ = ["PAIRS", "SEEDS", "STEPS", "run"]
