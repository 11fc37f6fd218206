"""A plan's pictures, by as many makers in as many processes on as many machines as share its folder."""

from __future__ import annotations

import io
import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..version import VERSION
from .atomic import write_whole
from .claims import Claim, Claims
from .folder import EvaluationError, Picture
from .makers import Job, Made, Maker, MakerGoneError
from .plan import Plan

ABOUT = "dynfuse evaluation"
"""The text of a PNG that says who made it in how many seconds."""
_POLL = 2.0  # seconds
_SHOWN_EVERY = 1.0  # seconds


def jobs_of(plan: Plan) -> list[Job]:
    """All pictures of a plan. Pair by pair and method by method: what a fusion prepares serves all prompts and seeds."""
    return [
        Job(Picture(pair.name, method.name, prompt, seed), method.of(pair), method.loras, settings)
        for pair in plan.pairs
        for method in plan.methods
        for settings in [method.settings_for(pair)]
        for prompt in range(len(pair.prompts))
        for seed in plan.make.seeds
    ]


@dataclass
class _State:
    """What the makers of this process share."""

    folder: Path
    claims: Claims
    jobs: Sequence[Job]
    bar: Any
    lock: threading.Lock
    error: BaseException | None = None
    shown: float = 0.0


def make_pictures(
    plan: Plan, folder: Path, makers: Sequence[Callable[[], Maker]], claims: Claims, *, show: bool = True, poll: float = _POLL
) -> list[str]:
    """Until all of the plan's pictures are there, whoever made them. Returns the notes of those that were made here.

    That a maker has gone is told on standard error when it happens.

    makers: each is called in a thread of its own (a single one in this one). show: a progress bar. poll: seconds between looks at what
    other processes do. Raises EvaluationError when the last maker has gone or the disk is full, and whatever else a maker raises; what is
    finished stays.
    """
    jobs = jobs_of(plan)
    there = [job for job in jobs if (folder / job.picture.file).is_file()]
    notes: dict[str, None] = {}
    if len(there) == len(jobs):
        return []
    bar = tqdm(
        total=len(jobs), initial=len(there), unit=" pictures", desc=plan.title, dynamic_ncols=True, disable=not show, file=sys.stderr
    )
    state = _State(folder, claims, jobs, bar, threading.Lock())
    with bar:
        gone = [_work(state, makers[0], notes, poll)] if len(makers) == 1 else _in_threads(state, makers, notes, poll)
    if state.error is not None:
        raise state.error
    if reasons := [reason for reason in gone if reason]:
        left = sum(not (folder / job.picture.file).is_file() for job in jobs)
        if left:
            told = " ".join(dict.fromkeys(reasons))
            raise EvaluationError(f"{told} {left} of {len(jobs)} pictures are missing: start the command again to go on.")
    return list(notes)


def _in_threads(state: _State, makers: Sequence[Callable[[], Maker]], notes: dict[str, None], poll: float) -> list[str]:
    gone = [""] * len(makers)

    def work(index: int) -> None:
        gone[index] = _work(state, makers[index], notes, poll)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(makers))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # an interrupt by the keyboard reaches this thread alone
    except BaseException as error:
        state.error = error
        raise
    return gone


def _work(state: _State, new_maker: Callable[[], Maker], notes: dict[str, None], poll: float) -> str:
    """Make pictures until there are none left to be made; returns why this maker ended before that."""
    try:
        maker = new_maker()
        while state.error is None:
            taken = _taken(state, maker)
            if taken is None:
                return ""
            if not taken:
                time.sleep(poll)
                continue
            try:
                _make(state, maker, taken, notes)
            finally:
                for _, claim in taken:
                    state.claims.give_back(claim)
    except MakerGoneError as error:
        with tqdm.external_write_mode():
            print(f"Note: {error}", file=sys.stderr)
        return str(error)
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            raise
        state.error = state.error or error
    return ""


def _taken(state: _State, maker: Maker) -> list[tuple[Job, Claim]] | None:
    """The next pictures for one call of the maker; none where others make all that are left, None where all are there."""
    missing = [job for job in state.jobs if not (state.folder / job.picture.file).is_file()]
    with state.lock:
        state.bar.n = len(state.jobs) - len(missing)
        state.bar.refresh()
    if not missing:
        return None
    taken: list[tuple[Job, Claim]] = []
    for job in missing:
        if taken and (len(taken) >= maker.together(taken[0][0]) or not _alike(job, taken[0][0])):
            break
        path = state.folder / job.picture.file
        claim = state.claims.take(path)
        if claim is None:
            continue
        if path.is_file():  # finished while this was found out
            state.claims.give_back(claim)
        else:
            taken.append((job, claim))
    return taken


def _alike(job: Job, other: Job) -> bool:
    return (job.picture.pair, job.picture.method, job.picture.prompt) == (other.picture.pair, other.picture.method, other.picture.prompt)


def _make(state: _State, maker: Maker, taken: Sequence[tuple[Job, Claim]], notes: dict[str, None]) -> None:
    jobs = [job for job, _ in taken]
    what = f"{jobs[0].picture.pair}, {jobs[0].picture.method}"

    def on_step(done: int, steps: int) -> None:
        if state.error is not None:
            raise InterruptedError
        with state.lock:
            state.bar.set_postfix_str(f"{what}, step {done} of {steps}", refresh=False)
            if time.monotonic() - state.shown > _SHOWN_EVERY:
                state.shown = time.monotonic()
                state.bar.refresh()

    start = time.perf_counter()
    made = maker.make(jobs, on_step)
    seconds = (time.perf_counter() - start) / len(jobs)
    for job, result in zip(jobs, made, strict=True):
        save_picture(state.folder / job.picture.file, result, maker.name, seconds)
        notes.update({f"{what}: {note}": None for note in result.notes})
        with state.lock:
            state.bar.update()


def save_picture(path: Path, made: Made, maker: str, seconds: float) -> None:
    """As PNG, with its settings. One that is there already stays. Raises EvaluationError where it cannot be written."""
    if path.is_file():
        return
    about = {"seconds": round(seconds, 3), "maker": maker, "machine": platform.node(), "dynfuse": VERSION, "notes": list(made.notes)}
    information = PngInfo()
    information.add_text("parameters", made.infotext)
    information.add_text(ABOUT, json.dumps(about))
    content = io.BytesIO()
    made.image.save(content, "PNG", pnginfo=information)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror or error}): what is finished is kept, start the command again to go on."
        ) from None


__all__ = ["ABOUT", "jobs_of", "make_pictures", "save_picture"]
