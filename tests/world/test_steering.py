"""The guidance does what it is for: guided pictures come closer to their references."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import statistics

import pytest

pytest.importorskip("diffusers", reason="the miniature world's model is a diffusers pipeline")

from dynfuse_world import steering
from dynfuse_world.benchmark.protocol import TUNING
from lib_dynfuse.bench import main

SEEDS = range(4)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    make = steering.Maker(TUNING[0], tmp_path_factory.mktemp("steering"), SEEDS, 8)
    result = steering.measure(make, (0.0, 0.1, 10.0), ("fast", "exact"))
    return {(job["gradient"], job["m"]): job for job in result["jobs"]}


@pytest.mark.parametrize("gradient", ["fast", "exact"])
def test_guided_pictures_are_closer_to_their_references_than_unguided_ones_of_the_same_seeds(jobs, gradient):
    gains = jobs[gradient, 10.0]["gain"]
    # By accident a seed gains as often as it loses.
    assert all(gain > 0 for gain in gains)
    assert statistics.mean(gains) > statistics.stdev(gains)
    unguided, guided = jobs["none", 0.0]["terms"], jobs[gradient, 10.0]["terms"]
    assert all(statistics.mean(guided[term]) > statistics.mean(unguided[term]) for term in guided)


@pytest.mark.parametrize("gradient", ["fast", "exact"])
def test_the_score_falls_along_the_steps_and_further_than_it_does_by_itself(jobs, gradient):
    unguided, guided = jobs["none", 0.0]["along"], jobs[gradient, 10.0]["along"]
    assert unguided[0] == pytest.approx(guided[0], abs=1e-5)
    assert guided[-1] < guided[0] - 0.02
    assert guided[-1] < unguided[-1] - 0.02
    assert statistics.mean(guided) < statistics.mean(unguided)


def test_a_larger_m_gains_more_and_meets_the_limit_more_often(jobs):
    weak, strong = jobs["fast", 0.1], jobs["fast", 10.0]
    assert 0 == jobs["none", 0.0]["bitten"] <= weak["bitten"] < strong["bitten"]
    assert statistics.mean(weak["gain"]) < statistics.mean(strong["gain"])


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--steps", "1"]])
def test_impossible_sizes_are_refused(arguments, capsys):
    assert main(["steering", *arguments]) == 2
    assert "at least" in capsys.readouterr().err
