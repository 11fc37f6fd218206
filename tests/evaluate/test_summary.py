"""What scores say, against means and differences written out."""

from __future__ import annotations

import numpy as np
import pytest

from lib_dynfuse.evaluate.metrics import metric_class
from lib_dynfuse.evaluate.statistics import Resamples
from lib_dynfuse.evaluate.summary import summarised
from tests.evaluate.plans import evaluation_in

METRICS = [metric_class(name) for name in ("style-sim", "clip-score", "dino-score", "dinov2-content")]


def scores_of(evaluation, metrics=METRICS, seed=0):
    rng = np.random.default_rng(seed)
    return {metric.name: {picture: float(rng.uniform(-0.2, 1)) for picture in evaluation.pictures()} for metric in metrics}


def of_method(evaluation, scores, metric, method):
    """(pairs, seeds), looked up one by one."""
    rows = [[value for p, value in scores[metric].items() if (p.pair, p.method) == (pair.name, method)] for pair in evaluation.pairs]
    return np.array(rows, dtype=np.float64)


@pytest.fixture
def evaluation(tmp_path):
    return evaluation_in(tmp_path, pairs=3, methods=("direct", "default", "guided"), seeds=4)


def test_means_and_differences_are_those_written_out(evaluation):
    scores = scores_of(evaluation)
    found = {row.method.name: row for row in summarised(evaluation, METRICS, scores).rows}
    draws = Resamples.draw(3, 4)
    for metric in METRICS:
        own, sums = (of_method(evaluation, scores, metric.name, method) for method in ("default", "direct"))
        mean, difference = found["default"].means[metric.name], found["default"].differences[metric.name]
        assert mean.mean == pytest.approx(own.mean())
        assert difference.mean == pytest.approx((own - sums).mean())
        drawn = [
            np.mean([(own - sums)[p, s] for p, row in zip(pairs, seeds) for s in row]) for pairs, seeds in zip(draws.pairs, draws.seeds)
        ]
        assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found["direct"].differences == {}


def test_the_harmonic_mean_is_of_each_picture_and_nothing_where_a_similarity_is_below_zero(evaluation):
    scores = scores_of(evaluation)
    row = next(row for row in summarised(evaluation, METRICS, scores).rows if row.method.name == "guided")
    products = []
    for style, content in zip(*(of_method(evaluation, scores, metric, "guided").ravel() for metric in ("style-sim", "clip-score"))):
        products.append(2 * style * content / (style + content) if style > 0 and content > 0 else 0.0)
    assert 0.0 in products
    assert row.means["harmonic mean (clip-score, style-sim)"].mean == pytest.approx(np.mean(products))


def test_a_pair_of_which_something_is_missing_does_not_count_for_any_method(evaluation):
    scores = scores_of(evaluation)
    whole = summarised(evaluation, METRICS, scores)
    gone = next(picture for picture in evaluation.pictures() if picture.pair == evaluation.pairs[1].name)
    del scores["dino-score"][gone]
    found = summarised(evaluation, METRICS, scores)
    assert [pair.name for pair in found.pairs] == [evaluation.pairs[index].name for index in (0, 2)]
    own = of_method(evaluation, scores, "style-sim", "default")[[0, 2]]
    assert found.rows[1].means["style-sim"].mean == pytest.approx(own.mean())
    assert len(whole.pairs) == 3
    assert summarised(evaluation, METRICS, {metric.name: {} for metric in METRICS}).rows == ()


def test_warnings_stand_by_the_methods_and_columns_that_they_are_about(evaluation):
    warned = {row.method.name: set(row.warnings) for row in summarised(evaluation, METRICS, scores_of(evaluation)).rows}
    assert warned["direct"] == warned["default"] == set()
    assert warned["guided"] == {"style-sim", "clip-score", "dino-score", "harmonic mean (clip-score, style-sim)"}


def test_without_a_plain_sum_there_are_no_differences(tmp_path):
    evaluation = evaluation_in(tmp_path, methods=("default", "guided"))
    summary = summarised(evaluation, METRICS, scores_of(evaluation))
    assert summary.plain_sum is None
    assert all(row.differences == {} for row in summary.rows)
