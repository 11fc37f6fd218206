"""What votes say, against counting by hand, all draws of a small bootstrap, and all ways in which votes can fall."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from lib_dynfuse.evaluate.preferences import chance_of, followers, majority, positions, preferences
from lib_dynfuse.evaluate.votes import Ballot, Vote


def ballot(name, *answers, shown=("direct", "a")):
    """answers: (question, chosen) or (question, chosen, shown)."""
    votes = [Vote(str(question), 0, 0, tuple(rest[0]) if rest else shown, chosen) for question, chosen, *rest in answers]
    return Ballot(name, "study", name, "Which?", tuple(votes))


def by_method(found):
    return {preference.method: preference for preference in found}


def test_a_share_counts_the_questions_that_showed_the_method():
    votes = ballot("anna", (1, "a"), (2, "direct"), (3, "a", ("b", "a")), (4, None), (5, "b", ("b", "direct")))
    found = by_method(preferences([votes]))
    assert {method: (one.shown, one.chosen, one.share.mean) for method, one in found.items()} == {
        "a": (3, 2, 2 / 3), "b": (2, 1, 1 / 2), "direct": (3, 1, 1 / 3),
    }  # fmt: skip
    assert found["a"].of_all.mean == 2 / 4
    assert found["a"].over_plain_sum.mean == 0
    assert found["b"].over_plain_sum.mean == 1
    assert found["direct"].over_plain_sum is None


def test_a_method_that_never_stood_beside_the_plain_sum_is_not_compared_with_it():
    found = by_method(preferences([ballot("anna", (1, "a", ("b", "a")), (2, "direct", ("direct", "b")))]))
    assert found["a"].over_plain_sum is None


def test_the_largest_share_comes_first():
    assert [one.method for one in preferences([ballot("anna", (1, "a"), (2, "a"), (3, "direct"))])] == ["a", "direct"]


def test_without_a_vote_nothing_is_said():
    assert preferences([]) == preferences([ballot("anna", (1, None))]) == []


def exact_interval(votes, wins):
    """Of sum(wins) / count over all draws of voters and of questions with replacement; votes: (voter, question)."""
    voters, questions = (sorted({vote[side] for vote in votes}) for side in (0, 1))
    values = []
    for drawn in itertools.product(voters, repeat=len(voters)):
        for asked in itertools.product(questions, repeat=len(questions)):
            weights = [drawn.count(voter) * asked.count(question) for voter, question in votes]
            if sum(weights):
                values.append(Fraction(sum(weight * win for weight, win in zip(weights, wins)), sum(weights)))
    values.sort()
    return [(values[int(len(values) * (q - 0.012))], values[int(len(values) * (q + 0.012))]) for q in (0.025, 0.975)]


def test_the_interval_is_that_of_all_draws_of_voters_and_questions():
    votes = [("x", "1"), ("x", "2"), ("x", "3"), ("y", "1"), ("y", "2"), ("y", "3"), ("z", "1"), ("z", "3")]
    wins = [1, 1, 1, 1, 0, 0, 1, 0]
    ballots = [
        ballot(voter, *[(question, "a" if win else "direct") for (who, question), win in zip(votes, wins) if who == voter])
        for voter in "xyz"
    ]
    share = by_method(preferences(ballots))["a"].share
    assert share.mean == 5 / 8
    # 27 times 27 draws: the exact quantile, give or take what 4,000 draws may miss it by.
    for found, (least, most) in zip((share.low, share.high), exact_interval(votes, wins)):
        assert float(least) - 1e-12 <= found <= float(most) + 1e-12
    over = by_method(preferences(ballots))["a"].over_plain_sum
    assert (over.mean, over.low, over.high) == pytest.approx((2 * share.mean - 1, 2 * share.low - 1, 2 * share.high - 1))


def test_people_who_agree_with_themselves_only_make_a_wide_interval():
    """Ten questions each; drawn as if all votes were independent, the interval would be a third as wide."""
    ballots = [ballot(f"{n}", *[(question, "a" if n % 2 else "direct") for question in range(10)]) for n in range(10)]
    share = by_method(preferences(ballots))["a"].share
    assert share.high - share.low > 0.5


def test_of_one_voter_the_questions_are_drawn_and_of_one_vote_nothing():
    share = by_method(preferences([ballot("anna", *[(n, "a" if n < 5 else "direct") for n in range(10)])]))["a"].share
    assert 0.1 <= share.low < 0.5 < share.high <= 0.9
    share = by_method(preferences([ballot("anna", (1, "a"))]))["a"].share
    assert (share.mean, share.low, share.high) == (1, None, None)


@pytest.mark.parametrize("counts", [(3, 0), (4, 4), (9, 2), (0, 5, 1), (2, 2, 2), (6, 0, 0, 0), (3, 1, 1, 2), (0, 0, 4, 2)])
def test_the_test_of_positions_sums_over_all_ways_in_which_votes_can_fall(counts):
    ways = {}
    for fallen in itertools.product(range(len(counts)), repeat=sum(counts)):
        seen = tuple(fallen.count(place) for place in range(len(counts)))
        ways[seen] = ways.get(seen, 0) + 1
    expected = Fraction(sum(number for number in ways.values() if number <= ways[counts]), len(counts) ** sum(counts))
    assert chance_of(counts) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("counts", [(180, 140), (100, 90, 140), (90, 100, 70, 110)])
def test_of_many_votes_it_is_the_chi_square_test(counts):
    expected = sum(counts) / len(counts)
    x = sum((count - expected) ** 2 for count in counts) / expected
    tail = {2: math.erfc(math.sqrt(x / 2)), 3: math.exp(-x / 2)}
    tail[4] = math.erfc(math.sqrt(x / 2)) + math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
    assert chance_of(counts) == pytest.approx(tail[len(counts)], rel=1e-9)


@pytest.mark.parametrize("counts", [(116, 84), (62, 50, 40, 48), (61, 80, 59)])
def test_the_two_tests_agree_where_one_takes_over_from_the_other(counts, monkeypatch):
    exact = chance_of(counts)
    monkeypatch.setattr("lib_dynfuse.evaluate.preferences.EXACT_UP_TO", 0)
    assert chance_of(counts) == pytest.approx(exact, abs=0.02)
    assert chance_of(counts) != exact


def test_who_always_presses_the_same_key_is_named_and_nobody_else():
    chance = random.Random(3)
    shown = ("direct", "a", "b", "c")
    honest = [ballot(f"{n}", *[(q, "a", chance.sample(shown, 4)) for q in range(30)]) for n in range(20)]
    lazy = ballot("lazy", *[(q, order[2], order) for q in range(30) for order in [chance.sample(shown, 4)]])
    found = followers([*honest, lazy])
    assert list(found) == ["lazy"]
    assert found["lazy"].counts == {4: (0, 0, 30, 0)}
    assert found["lazy"].chance == pytest.approx(4 * 0.25**30)


def test_positions_of_two_and_of_four_pictures_are_counted_apart():
    where = positions(ballot("x", (1, "a"), (2, "a"), (3, None), (4, "b", ("b", "a", "c", "d"))).votes)
    assert where.counts == {2: (0, 2), 4: (1, 0, 0, 0)}
    assert where.chance == 1
    five = [(n, "a") for n in range(5)]
    assert positions(ballot("x", *five, (9, "b", ("b", "a", "c", "d"))).votes).chance == pytest.approx(2 * 2 * 0.5**5)


@pytest.mark.parametrize(
    ("runs", "winner"),
    [
        ("aab", "a"),
        ("abb", "b"),
        ("abc", None),
        ("aa-", "a"),
        ("a--", None),
        ("ab-", None),
        ("---", None),
        ("a", None),
        ("aa", "a"),
        ("aaa", "a"),
    ],
)
def test_a_majority_is_more_than_half_of_the_times(runs, winner):
    votes = tuple(
        Vote("pair", 0, 1, tuple(sorted("abcd", key=lambda name: (name + str(number))[::-1])), None if run == "-" else run)
        for number, run in enumerate(runs)
    )
    (decided,) = majority(Ballot("judge", "judge", "m", "?", votes), 3).votes
    assert (decided.chosen, decided.shown) == (winner, ("a", "b", "c", "d"))
