"""Claims: every piece of work has one owner, whoever dies."""

import itertools
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lib_dynfuse.evaluate.claims import Claims

NOBODY = 2**22 + 1
"""More than the highest number of a process."""


def claimed(work, host="elsewhere", process=1):
    """The file of somebody else's claim."""
    file = work.with_name(f"{work.name}.claim")
    file.write_text(json.dumps({"host": host, "process": process, "token": f"{host} {process}"}))
    return file


def test_work_has_one_owner_until_it_is_given_back(tmp_path):
    with Claims() as mine, Claims() as other:
        claim = mine.take(tmp_path / "a.png")
        assert claim is not None
        assert other.take(tmp_path / "a.png") is None
        assert other.take(tmp_path / "b.png") is not None
        mine.give_back(claim)
        assert other.take(tmp_path / "a.png") is not None
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_of_this_machine_had_is_taken_over_at_once_by_one(tmp_path):
    work = tmp_path / "a.png"
    claimed(work, socket.gethostname(), NOBODY)
    with Claims() as first, Claims() as second:
        claim = first.take(work)
        assert claim is not None
        assert second.take(work) is None
        first.give_back(claim)
        assert list(tmp_path.iterdir()) == []


def test_another_machines_claim_is_taken_over_when_it_stops_being_touched(tmp_path):
    file = claimed(tmp_path / "a.png")
    with Claims(stale=0.2) as claims:
        for _ in range(4):
            assert claims.take(tmp_path / "a.png") is None
            time.sleep(0.1)
            os.utime(file)
        assert claims.take(tmp_path / "a.png") is None
        time.sleep(0.3)
        assert claims.take(tmp_path / "a.png") is not None


def test_one_who_works_long_keeps_its_claim(tmp_path):
    with Claims(beat=0.02) as working, Claims(stale=0.3) as waiting:
        claim = working.take(tmp_path / "a.png")
        file = claim.file
        file.write_text(json.dumps({"host": "elsewhere", "process": 1, "token": claim.token}))  # as if on another machine
        for _ in range(8):
            assert waiting.take(tmp_path / "a.png") is None
            time.sleep(0.1)


def test_a_claim_that_was_never_written_to_its_end_is_taken_over_too(tmp_path):
    (tmp_path / "a.png.claim").write_text("")
    with Claims(stale=0.1) as claims:
        assert claims.take(tmp_path / "a.png") is None
        time.sleep(0.2)
        assert claims.take(tmp_path / "a.png") is not None


def test_of_many_who_want_the_same_at_once_one_gets_it(tmp_path):
    for index in range(0, 30, 3):
        claimed(tmp_path / f"{index}.png", socket.gethostname(), NOBODY)
    start = threading.Barrier(6)

    def take(claims):
        start.wait()
        return [index for index in range(30) if claims.take(tmp_path / f"{index}.png") is not None]

    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        processes = [stack.enter_context(Claims()) for _ in range(6)]
        taken = list(pool.map(take, processes))
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(30))


def test_a_full_disk_leaves_no_claim_behind(tmp_path, monkeypatch):
    def full(handle, content):
        raise OSError(28, "No space left on device")

    with Claims() as claims:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space"):
            claims.take(tmp_path / "a.png")
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []
