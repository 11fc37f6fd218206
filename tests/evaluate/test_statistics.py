"""Intervals against brute force, theory, and worlds whose truth is known."""

import numpy as np
import pytest

from lib_dynfuse.evaluate.statistics import Resamples, harmonic_mean


def scores(pairs, seeds, *, between=1.0, within=1.0, seed=0):
    """Pairs' means spread by `between` around 0, pictures by `within` around their pair's."""
    rng = np.random.default_rng(seed)
    return between * rng.normal(size=(pairs, 1)) + within * rng.normal(size=(pairs, seeds))


def test_the_harmonic_mean_is_the_reciprocal_of_the_mean_reciprocal():
    first, second = np.random.default_rng(0).uniform(0.01, 1, (2, 5, 7))
    np.testing.assert_allclose(harmonic_mean(first, second), 2 / (1 / first + 1 / second))


@pytest.mark.parametrize(("subject", "style", "expected"), [(0, 0, 0), (1, 0, 0), (0, 0.5, 0), (1, 1, 1), (1e-30, 1, 2e-30)])
def test_the_harmonic_mean_is_zero_where_either_is(subject, style, expected):
    assert harmonic_mean(np.array([float(subject)]), np.array([float(style)]))[0] == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_that_of_resampling_written_out():
    values, other = scores(3, 4), scores(3, 4, seed=1) ** 2
    draws = Resamples.draw(3, 4, count=200)
    means, harmonic = [], []
    for pairs, seeds in zip(draws.pairs, draws.seeds):
        drawn = [[values[pair, seed] for seed in of_pair] for pair, of_pair in zip(pairs, seeds)]
        means.append(np.mean(drawn))
        products = []
        for pair, of_pair in zip(pairs, seeds):
            a, b = np.mean([values[pair, seed] ** 2 for seed in of_pair]), np.mean([other[pair, seed] for seed in of_pair])
            products.append(2 * a * b / (a + b))
        harmonic.append(np.mean(products))
    found = draws.of_mean(values)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), *np.quantile(means, [0.025, 0.975])))
    found = draws.of_harmonic_mean_of_means(values**2, other)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(harmonic, [0.025, 0.975])))


def test_the_interval_has_the_width_that_theory_gives():
    values = scores(200, 6)
    found = Resamples.draw(200, 6, count=1000).of_mean(values)
    # Variance between pairs' means, and once more that of a pair's mean from drawing its seeds.
    variance = values.mean(1).var() + (values.var(1) / 6).mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * (variance / 200) ** 0.5, rel=0.1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draws = Resamples.draw(12, 8, count=400)
    intervals = [draws.of_mean(scores(12, 8, seed=seed)) for seed in range(300)]
    assert 0.88 <= np.mean([interval.low <= 0 <= interval.high for interval in intervals]) <= 0.98


def test_pictures_of_one_pair_vary_by_their_seeds_and_pairs_without_noise_by_themselves():
    assert Resamples.draw(1, 8).of_mean(scores(1, 8)).high > scores(1, 8).mean()
    assert Resamples.draw(8, 3).of_mean(scores(8, 3, within=0.0)).high > scores(8, 3, within=0.0).mean()


def test_a_paired_difference_is_found_where_two_intervals_overlap():
    common = scores(12, 24)
    better = common + 0.1 + 0.05 * np.random.default_rng(5).normal(size=common.shape)
    draws = Resamples.draw(12, 24)
    first, second, difference = draws.of_mean(common), draws.of_mean(better), draws.of_mean(better - common)
    assert first.high > second.low
    assert difference.excludes_zero
    assert difference.high - difference.low < 0.2 * (first.high - first.low)


def test_the_same_numbers_every_time():
    assert Resamples.draw(4, 5).of_mean(scores(4, 5)) == Resamples.draw(4, 5).of_mean(scores(4, 5))
