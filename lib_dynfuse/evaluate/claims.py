"""Who does what, where several processes on several machines share a folder and nothing else.

A piece of work is claimed by creating a file, which only one process can. Its owner touches it while it works; where that stops, the
process has died, and another takes over by creating a file named after the dead one's claim, which again only one can. So nothing that
lives is ever taken away, and no lock is left behind that nobody may remove.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BEAT_SECONDS = 10.0
STALE_SECONDS = 180.0
"""Without a beat, by the watch of the process that waits: a shared folder may show another machine's times a minute late."""


@dataclass(frozen=True)
class Claim:
    """One's own, until it is given back. work: the path that it is about."""

    work: Path
    file: Path
    token: str


class Claims:
    """A process's claims. Its thread touches all of them. Use as a context manager: what is still held is given back at the end."""

    def __init__(self, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self._beat, self._stale = beat, stale
        self._held: set[Claim] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._seen: dict[Path, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for claim in list(self._held):
            self.give_back(claim)

    def take(self, work: Path) -> Claim | None:
        """None where another process that lives has it. Raises OSError where the folder cannot be written to."""
        work.parent.mkdir(parents=True, exist_ok=True)
        file = work.with_name(f"{work.name}.claim")
        while True:
            token = secrets.token_hex(8)
            if _created(file, token):
                claim = Claim(work, file, token)
                with self._lock:
                    self._held.add(claim)
                return claim
            holder = _holder(file)
            if holder is None:  # given back just now, or not yet written
                if not file.exists():
                    return None
                holder = _Holder("", 0, "unwritten")
            if not self._is_dead(file, holder):
                return None
            file = work.with_name(f"{work.name}.claim-{holder.token}")

    def give_back(self, claim: Claim) -> None:
        """Of finished work, or for others to take."""
        with self._lock:
            self._held.discard(claim)
        for file in _chain(claim.work):
            with contextlib.suppress(OSError):
                file.unlink()

    @contextmanager
    def held(self, work: Path) -> Iterator[bool]:
        """Inside, whether the work is one's own."""
        claim = self.take(work)
        try:
            yield claim is not None
        finally:
            if claim is not None:
                self.give_back(claim)

    def _is_dead(self, file: Path, holder: _Holder) -> bool:
        if holder.host == socket.gethostname() and not _runs(holder.process):
            return True
        try:
            touched = file.stat().st_mtime
        except OSError:
            return False
        now = time.monotonic()
        if self._seen.get(file, (touched, 0.0))[0] != touched or file not in self._seen:
            self._seen[file] = (touched, now)
        return now - self._seen[file][1] > self._stale

    def _beats(self) -> None:
        while not self._ended.wait(self._beat):
            with self._lock:
                held = list(self._held)
            for claim in held:
                with contextlib.suppress(OSError):
                    os.utime(claim.file)


@dataclass(frozen=True)
class _Holder:
    host: str
    process: int
    token: str


def _created(file: Path, token: str) -> bool:
    content = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": token}).encode()
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        os.write(handle, content)
    except OSError:  # a full disk: nobody is to wait for an owner that the file does not name
        with contextlib.suppress(OSError):
            file.unlink()
        raise
    finally:
        os.close(handle)
    return True


def _holder(file: Path) -> _Holder | None:
    try:
        content = json.loads(file.read_text("utf-8"))
        return _Holder(str(content["host"]), int(content["process"]), str(content["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _chain(work: Path) -> list[Path]:
    """The claims of one piece of work, those of dead processes too, the oldest first: whoever comes now begins a chain of its own."""
    files = [file for file in work.parent.iterdir() if file.name.startswith(f"{work.name}.claim")]
    return sorted(files, key=lambda file: file.stat().st_mtime_ns if file.name != f"{work.name}.claim" else 0)


def _runs(process: int) -> bool:
    if sys.platform == "win32":  # os.kill(process, 0) would end it there; its beats tell
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = ["Claim", "Claims"]
