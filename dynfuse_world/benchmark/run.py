"""All rows of all pairs, on as many processors as there are, with the same numbers on any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Event

import torch
from tqdm import tqdm

from lib_dynfuse.threads import one_thread

from .making import Studio
from .work import Outcome, Setup, Task


def made(work: Sequence[Task], setup: Setup, workers: int) -> list[Outcome]:
    """The outcomes, in the order of the tasks. Shows its progress on standard error.

    workers: processes of one thread each; 1 for this process alone. An exception, and an interrupt by the keyboard, ends all of them within
    a denoising step.
    """
    outcomes: dict[int, Outcome] = {}
    making = _here(work, setup) if workers == 1 else _in_processes(work, setup, workers)
    with closing(making), tqdm(total=len(work) * len(setup.seeds), unit=" pictures", desc="bench", dynamic_ncols=True) as bar:
        for position, outcome in making:
            outcomes[position] = outcome
            bar.set_postfix_str(f"{outcome.pair.name}, {outcome.row}", refresh=False)
            bar.update(len(setup.seeds))
    return [outcomes[position] for position in range(len(work))]


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(work: Sequence[Task], setup: Setup) -> Generator[tuple[int, Outcome], None, None]:
    with one_thread():
        studio = Studio(setup)
        for position, task in enumerate(work):
            yield position, studio.make(task)


def _in_processes(work: Sequence[Task], setup: Setup, workers: int) -> Generator[tuple[int, Outcome], None, None]:
    # Spawned, as on every system: a forked process would inherit the locks of PyTorch's threads.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with _memory_kept(), ProcessPoolExecutor(workers, context, _begin, (setup, stop)) as pool:
        try:
            futures: dict[Future[Outcome], int] = {pool.submit(_make, task): position for position, task in enumerate(work)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _memory_kept() -> Iterator[None]:
    """Processes that are begun meanwhile do not give memory back to a Linux system: taking it anew costs a thirtieth of the whole run."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class Stopped(Exception):
    """The parent process wants no more."""


_studio: Studio | None = None
_begin_with: tuple[Setup, Event] | None = None


def _begin(setup: Setup, stop: Event) -> None:
    global _begin_with
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches all processes of the terminal; the parent tells these
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _begin_with = setup, stop


def _make(task: Task) -> Outcome:
    global _studio
    assert _begin_with is not None
    setup, stop = _begin_with

    def on_step() -> None:
        if stop.is_set():
            raise Stopped

    if _studio is None:  # not in _begin: what fails there, the parent could not say
        _studio = Studio(setup, on_step)
    return _studio.make(task)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__ = ["made", "processors"]
