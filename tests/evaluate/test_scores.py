"""Scores are kept for each picture, and only what is missing is scored."""

from __future__ import annotations

import threading

import pytest

from lib_dynfuse.evaluate.claims import Claims
from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.metrics import EncoderNames, Metric, Shelf
from lib_dynfuse.evaluate.scores import ScoreBook, score_pictures
from tests.evaluate.plans import evaluation_in


class Counting(Metric):
    """The size of a picture's file, and what it was asked for."""

    name, side, family, protocol = "counting", "style", "own", "Bytes."

    def __init__(self, shelf=None, fails_after=None):
        super().__init__(shelf or Shelf(EncoderNames()))
        self.asked, self.fails_after, self.network = [], fails_after, "one"

    @property
    def identity(self):
        return self.network

    def scores(self, pair, pictures):
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise EvaluationError("enough")
        self.asked += pictures
        return [float(path.stat().st_size) for path in pictures]


def score(evaluation, *metrics):
    with Claims() as claims:
        score_pictures(evaluation, metrics, claims, show=False, poll=0.01)


def test_every_finished_picture_is_scored_once(tmp_path):
    evaluation = evaluation_in(tmp_path, seeds=20)
    missing = next(evaluation.pictures())
    evaluation.path(missing).unlink()
    metric = Counting()
    score(evaluation, metric)
    score(evaluation, metric)
    scores = ScoreBook(tmp_path, metric).read()
    assert scores == {picture: evaluation.path(picture).stat().st_size for picture in evaluation.pictures() if picture != missing}
    assert len(metric.asked) == len(set(metric.asked)) == 79


def test_what_was_scored_before_an_interruption_stays(tmp_path):
    evaluation = evaluation_in(tmp_path, seeds=20)
    interrupted, after = Counting(fails_after=32), Counting()
    with pytest.raises(EvaluationError, match="enough"):
        score(evaluation, interrupted)
    score(evaluation, after)
    assert len(interrupted.asked) == 32
    assert sorted(interrupted.asked + after.asked) == sorted(evaluation.path(picture) for picture in evaluation.pictures())


def test_a_line_that_was_not_written_to_its_end_is_scored_again(tmp_path):
    evaluation, metric = evaluation_in(tmp_path), Counting()
    score(evaluation, metric)
    (file,) = ScoreBook(tmp_path, metric).folder.glob("*.jsonl")
    file.write_text(file.read_text()[:-10])
    again = Counting()
    score(evaluation, again)
    assert len(again.asked) == 1
    assert len(ScoreBook(tmp_path, again).read()) == 8


def test_scores_of_another_network_are_not_taken_for_this_ones(tmp_path):
    evaluation, metric = evaluation_in(tmp_path), Counting()
    score(evaluation, metric)
    metric.network = "two"
    assert ScoreBook(tmp_path, metric).read() == {}


def test_several_processes_share_the_scoring(tmp_path):
    evaluation = evaluation_in(tmp_path, pairs=6)
    metrics = [Counting(), Counting()]
    threads = [threading.Thread(target=score, args=(evaluation, metric)) for metric in metrics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(metrics[0].asked + metrics[1].asked) == sorted(evaluation.path(picture) for picture in evaluation.pictures())


def test_a_damaged_picture_is_named(tmp_path):
    from lib_dynfuse.evaluate.metrics.encoders import opened

    class Opening(Counting):
        def scores(self, pair, pictures):
            return [float(opened(path).width) for path in pictures]

    evaluation = evaluation_in(tmp_path)
    path = evaluation.path(next(evaluation.pictures()))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(EvaluationError, match=r"cannot be read .*start the command again"):
        score(evaluation, Opening())


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    class Broken(Counting):
        def scores(self, pair, pictures):
            return [float("nan") for _ in pictures]

    with pytest.raises(EvaluationError, match="counting gives no finite score for .*png"):
        score(evaluation_in(tmp_path), Broken())
