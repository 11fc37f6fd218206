"""Making a plan's pictures with makers that do as they are told."""

from __future__ import annotations

import json
import threading
import time

import pytest
from PIL import Image

from lib_dynfuse.evaluate.atomic import write_whole
from lib_dynfuse.evaluate.claims import Claims
from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.makers import Made, MakerGoneError
from lib_dynfuse.evaluate.making import ABOUT, jobs_of, make_pictures
from tests.evaluate.plans import PLAN, plan_in


class Painter:
    """Makes grey pictures; goes away, or fails, before the picture of that number."""

    def __init__(self, name="painter", *, gone_after=None, error=None, seconds=0.0, together=1):
        self.name, self.gone_after, self.error, self.seconds, self._together = name, gone_after, error, seconds, together
        self.calls = []

    def __call__(self):
        return self

    def together(self, job):
        return self._together

    def make(self, jobs, on_step):
        if self.gone_after is not None and len(self.calls) >= self.gone_after:
            raise self.error or MakerGoneError(f"{self.name} does not answer.")
        self.calls.append([job.picture for job in jobs])
        on_step(1, 4)
        time.sleep(self.seconds)
        return [Made(Image.new("L", (8, 8), job.picture.seed).convert("RGB"), f"{job.prompt}\nSeed: {job.picture.seed}") for job in jobs]

    @property
    def made(self):
        return [picture for call in self.calls for picture in call]


def run(plan, *painters):
    with Claims() as claims:
        return make_pictures(plan, plan.out, painters, claims, show=False, poll=0.01)


def plan_of(folder, seeds=4):
    return plan_in(folder, PLAN.replace("[1, 2]", str(list(range(seeds)))))


def test_every_picture_is_made_once_and_carries_its_settings(tmp_path):
    plan, painter = plan_of(tmp_path), Painter()
    run(plan, painter)
    assert sorted(painter.made) == sorted(job.picture for job in jobs_of(plan))
    for job in jobs_of(plan):
        with Image.open(plan.out / job.picture.file) as file:
            assert file.text["parameters"] == f"a sks dog in ink style\nSeed: {job.picture.seed}"
            assert json.loads(file.text[ABOUT])["maker"] == "painter"
            assert file.getpixel((0, 0)) == (job.picture.seed,) * 3
    assert [path for path in plan.out.rglob("*") if path.is_file() and path.suffix != ".png"] == []


def test_what_is_finished_is_not_made_again(tmp_path):
    plan, first, second = plan_of(tmp_path), Painter(gone_after=3), Painter()
    with pytest.raises(EvaluationError, match="5 of 8 pictures are missing: start the command again"):
        run(plan, first)
    run(plan, second)
    assert len(first.made) == 3
    assert sorted(first.made + second.made) == sorted(job.picture for job in jobs_of(plan))


def test_several_makers_share_the_work(tmp_path):
    plan = plan_of(tmp_path, seeds=10)
    painters = [Painter(str(number), seconds=0.02) for number in range(3)]
    run(plan, *painters)
    made = [picture for painter in painters for picture in painter.made]
    assert sorted(made) == sorted(job.picture for job in jobs_of(plan))
    assert all(painter.made for painter in painters)


def test_a_makers_picture_returns_when_it_goes_away_and_the_others_go_on(tmp_path, capsys):
    plan, weak, strong = plan_of(tmp_path), Painter("weak", gone_after=1), Painter("strong", seconds=0.02)
    assert run(plan, weak, strong) == []
    assert sorted(weak.made + strong.made) == sorted(job.picture for job in jobs_of(plan))
    assert capsys.readouterr().err == "Note: weak does not answer.\n"


def test_when_the_last_maker_goes_all_their_reasons_are_told(tmp_path):
    with pytest.raises(EvaluationError, match=r"one does not answer\. two does not answer\. 6 of 8 pictures"):
        run(plan_of(tmp_path), Painter("one", gone_after=1), Painter("two", gone_after=1))


@pytest.mark.parametrize("others", [0, 1])
def test_an_error_of_a_maker_ends_all_and_keeps_what_is_finished(tmp_path, others):
    plan = plan_of(tmp_path)
    painters = [Painter(gone_after=1, error=EvaluationError("No such sampler."))]
    with pytest.raises(EvaluationError, match="No such sampler"):
        run(plan, *painters, *[Painter(seconds=0.05) for _ in range(others)])
    assert (plan.out / painters[0].made[0].file).is_file()
    assert not list(plan.out.rglob("*.claim*"))


def test_a_full_disk_is_told_in_a_sentence_and_leaves_no_half_picture(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    written = []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr("lib_dynfuse.evaluate.making.write_whole", full)
    with pytest.raises(EvaluationError, match=r"cannot be written \(No space left on device\): what is finished is kept"):
        run(plan, Painter())
    assert len([path for path in plan.out.rglob("*") if path.is_file()]) == 2


def test_pictures_of_one_pair_prompt_and_method_are_made_together(tmp_path):
    plan, painter = plan_of(tmp_path, seeds=5), Painter(together=3)
    run(plan, painter)
    assert [len(call) for call in painter.calls] == [3, 2, 3, 2]
    assert all(len({picture.method for picture in call}) == 1 for call in painter.calls)


def test_one_waits_for_what_others_make_and_takes_over_what_they_leave(tmp_path):
    plan, painter = plan_of(tmp_path, seeds=1), Painter()
    other = Claims().__enter__()
    claim = other.take(plan.out / jobs_of(plan)[0].picture.file)
    working = threading.Thread(target=run, args=(plan, painter))
    working.start()
    time.sleep(0.2)
    assert working.is_alive()
    assert painter.made == [jobs_of(plan)[1].picture]
    other.give_back(claim)
    working.join(30)
    assert sorted(painter.made) == sorted(job.picture for job in jobs_of(plan))
