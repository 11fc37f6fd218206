"""What votes say: each method's share with its interval, paired against the plain sum, and whether votes follow the position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from .votes import Ballot, Vote

Floats = NDArray[np.float64]

PLAIN_SUM = "direct"
RESAMPLES = 4000
EXACT_UP_TO = 200
"""Votes, beyond which the test of positions is the chi-square one."""
ALARM = 0.05
"""How likely it is that anybody at all is named for positions by chance."""
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % bootstrap interval; low and high are None where nothing can be drawn anew (one voter and one question)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Preference:
    """What the votes say of a method.

    share: of the questions that showed it, those that it won. of_all: of all votes, those for it. over_plain_sum: of the questions that
    showed both, the share that it won less the share that the plain sum won; None for the plain sum, and where no question showed both.
    """

    method: str
    shown: int
    chosen: int
    share: Estimate
    of_all: Estimate
    over_plain_sum: Estimate | None


def preferences(ballots: Sequence[Ballot], plain_sum: str = PLAIN_SUM, resamples: int = RESAMPLES) -> list[Preference]:
    """What votes say of each method that they showed, the largest share first. Questions without an answer do not count.

    Intervals: voters and questions are both drawn anew with replacement, crossed, and a vote counts as often as its voter times its
    question (Owen, The pigeonhole bootstrap, 2007). Of one voter only the questions are drawn, and the other way round.
    """
    cast = [(ballot.name, vote) for ballot in ballots for vote in ballot.votes if vote.chosen is not None]
    votes = [vote for _, vote in cast]
    if not votes:
        return []
    draws = _Draws.of(cast, resamples)
    every = np.ones(len(votes))
    found = []
    for method in sorted({name for vote in votes for name in vote.shown}):
        shown = np.array([method in vote.shown for vote in votes], dtype=np.float64)
        chosen = np.array([vote.chosen == method for vote in votes], dtype=np.float64)
        both = np.array([method in vote.shown and plain_sum in vote.shown for vote in votes], dtype=np.float64)
        ahead = both * (chosen - np.array([vote.chosen == plain_sum for vote in votes], dtype=np.float64))
        over = draws.ratio(ahead, both) if method != plain_sum and both.any() else None
        found.append(Preference(method, int(shown.sum()), int(chosen.sum()), draws.ratio(chosen, shown), draws.ratio(chosen, every), over))
    return sorted(found, key=lambda preference: (-preference.share.mean, preference.method))


@dataclass(frozen=True)
class _Draws:
    """How often each voter (R, V) and each question (R, Q) is drawn; place: (N, 2), of each vote."""

    voters: Floats
    questions: Floats
    place: NDArray[np.int64]

    @classmethod
    def of(cls, votes: Sequence[tuple[str, Vote]], resamples: int) -> _Draws:
        voters = {voter: number for number, voter in enumerate(dict.fromkeys(voter for voter, _ in votes))}
        questions = {question: number for number, question in enumerate(dict.fromkeys(_question(vote) for _, vote in votes))}
        rng = np.random.default_rng(_SEED)

        def counts(of: int) -> Floats:
            return rng.multinomial(of, np.full(of, 1 / of), resamples).astype(np.float64)

        place = np.array([(voters[voter], questions[_question(vote)]) for voter, vote in votes])
        return cls(counts(len(voters)), counts(len(questions)), place)

    def ratio(self, above: Floats, below: Floats) -> Estimate:
        """sum(above) / sum(below) of values by vote, (N,) both."""
        mean = float(above.sum() / below.sum())
        if self.voters.shape[1] == 1 and self.questions.shape[1] == 1:
            return Estimate(mean, None, None)
        numerator, denominator = self._sums(above), self._sums(below)
        drawn = numerator[denominator > 0] / denominator[denominator > 0]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Estimate(mean, float(low), float(high))

    def _sums(self, values: Floats) -> Floats:
        table = np.zeros((self.voters.shape[1], self.questions.shape[1]))
        np.add.at(table, (self.place[:, 0], self.place[:, 1]), values)
        return ((self.voters @ table) * self.questions).sum(1)


def _question(vote: Vote) -> tuple[str, int, int]:
    return vote.pair, vote.prompt, vote.seed


def majority(ballot: Ballot, runs: int) -> Ballot:
    """Of a judge who is asked each question `runs` times, one vote for each question: for the method that more than half of the times are
    for, None where there is none. Times that brought no vote, or are still to come, count as times."""
    times: dict[tuple[str, int, int, frozenset[str]], list[Vote]] = {}
    for vote in ballot.votes:
        times.setdefault((*_question(vote), frozenset(vote.shown)), []).append(vote)
    votes = []
    for (pair, prompt, seed, shown), asked in times.items():
        method, count = Counter(vote.chosen for vote in asked).most_common(1)[0]
        votes.append(Vote(pair, prompt, seed, tuple(sorted(shown)), method if 2 * count > max(runs, len(asked)) else None))
    return replace(ballot, votes=tuple(votes))


@dataclass(frozen=True)
class Positions:
    """Where votes fell. counts: by the number of pictures shown, the votes for each place. chance: p, see `chance_of`."""

    counts: Mapping[int, tuple[int, ...]]
    chance: float


def positions(votes: Iterable[Vote]) -> Positions:
    """Where votes fell. The order of the pictures is random, so that no place is likelier than another."""
    places = Counter((len(vote.shown), vote.shown.index(vote.chosen)) for vote in votes if vote.chosen is not None)
    counts = {shown: tuple(places[shown, place] for place in range(shown)) for shown in sorted({shown for shown, _ in places})}
    smallest = min((chance_of(count) for count in counts.values()), default=1.0)
    return Positions(counts, min(1.0, smallest * len(counts)))  # Bonferroni, over questions of two, three and four pictures


def followers(ballots: Sequence[Ballot]) -> dict[str, Positions]:
    """By the ballot's name, those whose votes follow the position: p below ALARM divided by the number of ballots (Bonferroni)."""
    found = {ballot.name: positions(ballot.votes) for ballot in ballots}
    return {name: where for name, where in found.items() if where.chance < ALARM / len(found)}


def chance_of(counts: Sequence[int]) -> float:
    """How likely counts as unlikely as these are, or more so, if every place is equally likely.

    Up to EXACT_UP_TO votes the exact multinomial test, the sum over all counts of that many votes that are no likelier; beyond, Pearson's
    chi-square.
    """
    votes, places = sum(counts), len(counts)
    if not votes or places < 2:
        return 1.0
    if votes > EXACT_UP_TO:
        expected = votes / places
        statistic = sum((count - expected) ** 2 / expected for count in counts)
        half = torch.tensor([(places - 1) / 2, statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))
    factorials = np.array([math.lgamma(count + 1) for count in range(votes + 1)])
    every = factorials[votes] - votes * math.log(places) - _factorials(factorials, votes, places)
    seen = factorials[votes] - votes * math.log(places) - sum(factorials[count] for count in counts)
    return min(1.0, float(np.exp(every[every <= seen + 1e-9]).sum()))


def _factorials(table: Floats, votes: int, places: int) -> Floats:
    """The logarithm of the product of the factorials of the counts, for all ways in which votes may fall on places."""
    if places == 2:
        part: Floats = table[: votes + 1]
        return part + part[::-1]
    return np.concatenate([table[count] + _factorials(table, votes - count, places - 1) for count in range(votes + 1)])


__all__ = [
    "ALARM",
    "EXACT_UP_TO",
    "PLAIN_SUM",
    "RESAMPLES",
    "Estimate",
    "Positions",
    "Preference",
    "chance_of",
    "followers",
    "majority",
    "positions",
    "preferences",
]
