"""From outcomes to what is said of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib_dynfuse.evaluate.statistics import Floats, Interval, Resamples, harmonic_mean

from .colour import Colour
from .diagnosis import Diagnosis, over_pairs
from .methods import Row
from .protocol import Pair
from .work import SCORES, Outcome

MEASURES = ("subject", "style", "harmonic mean")
"""Of each picture. A picture's harmonic mean is 0 where the judge gives the subject or the style nothing."""
SECOND = ("second_subject", "second_style", "second_harmonic_mean")
"""The same by the second judges."""
COLOUR = Colour._fields
ALL = (*MEASURES, *SECOND, *COLOUR)
OF_MEANS = "harmonic mean of means"
"""Of each pair: of its mean subject score and its mean style score. Above the other where pictures have one or the other."""
COMPARED_WITH = "direct"


@dataclass(frozen=True)
class Summary:
    """A row over some pairs.

    means: ALL and OF_MEANS. differences: of ALL to the row that all are compared with, picture by picture; None for itself, and
    where there is no such row. by_pair: pair -> measure -> mean over the seeds. seconds: of one processor for one picture, mean over pairs.
    """

    row: Row
    means: dict[str, Interval]
    differences: dict[str, Interval] | None
    by_pair: dict[str, dict[str, float]]
    seconds: float
    diagnosis: Diagnosis | None
    by_pair_diagnosis: dict[str, Diagnosis]


def summaries(outcomes: Iterable[Outcome], rows: Sequence[Row], pairs: Sequence[Pair], compared_with: str = COMPARED_WITH) -> list[Summary]:
    """Of the rows that were made on all of these pairs. In the intervals, pairs of the same words in several sets are drawn together."""
    found = {(outcome.pair, outcome.row): outcome for outcome in outcomes}
    complete = {row.name: [found[pair, row.name] for pair in pairs] for row in rows if all((pair, row.name) in found for pair in pairs)}
    if not complete or not pairs:
        return []
    measured = {name: _measures(of_row) for name, of_row in complete.items()}
    draws = Resamples.draw_together(_same_words(pairs), next(iter(measured.values()))["subject"].shape[1])
    reference = measured.get(compared_with)
    return [
        _summary(row, complete[row.name], measured[row.name], None if row.name == compared_with else reference, draws)
        for row in rows
        if row.name in complete
    ]


def _same_words(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """(words, sets): the places of each subject and style's pairs."""
    places: dict[Pair, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.plain, []).append(place)
    return np.array(list(places.values()))


def _measures(outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    found = {name: np.stack([getattr(outcome, name) for outcome in outcomes]) for name in SCORES}
    found["harmonic mean"] = harmonic_mean(found["subject"], found["style"])
    found["second_harmonic_mean"] = harmonic_mean(found["second_subject"], found["second_style"])
    return found


def _summary(
    row: Row, outcomes: Sequence[Outcome], measured: Mapping[str, Floats], reference: Mapping[str, Floats] | None, draws: Resamples
) -> Summary:
    means = {name: draws.of_mean(measured[name]) for name in ALL}
    means[OF_MEANS] = draws.of_harmonic_mean_of_means(measured["subject"], measured["style"])
    diagnoses = {outcome.pair.name: outcome.diagnosis for outcome in outcomes if outcome.diagnosis is not None}
    return Summary(
        row,
        means,
        None if reference is None else {name: draws.of_mean(measured[name] - reference[name]) for name in ALL},
        {outcome.pair.name: {name: float(measured[name][i].mean()) for name in ALL} for i, outcome in enumerate(outcomes)},
        float(np.mean([outcome.seconds for outcome in outcomes])),
        over_pairs(diagnoses.values()) if diagnoses else None,
        diagnoses,
    )


@dataclass(frozen=True)
class Agreement:
    """How far the first judges and the second say the same, to one question.

    correlation: of their scores over the pictures (Pearson's), None where one of them never changes. same: the share of pictures in which
    both are above 0.5 or neither is.
    """

    correlation: float | None
    same: float
    pictures: int


def agreements(outcomes: Sequence[Outcome]) -> dict[str, Agreement]:
    """On "subject" and on "style", over all pictures of all rows."""
    return {
        question: _agreement(
            np.concatenate([getattr(outcome, question) for outcome in outcomes]),
            np.concatenate([getattr(outcome, f"second_{question}") for outcome in outcomes]),
        )
        for question in ("subject", "style")
    }


def _agreement(first: Floats, second: Floats) -> Agreement:
    constant = np.ptp(first) == 0 or np.ptp(second) == 0
    return Agreement(
        None if constant else float(np.corrcoef(first, second)[0, 1]), float(((first > 0.5) == (second > 0.5)).mean()), len(first)
    )


def as_json(summary: Summary) -> dict[str, Any]:
    return {
        "row": summary.row.name,
        "group": summary.row.group,
        "loras": summary.row.loras,
        "settings": summary.row.settings.non_default(),
        "means": _intervals(summary.means),
        "differences_to_direct": None if summary.differences is None else _intervals(summary.differences),
        "by_pair": summary.by_pair,
        "seconds_per_picture": summary.seconds,
        "diagnosis": None if summary.diagnosis is None else asdict(summary.diagnosis),
        "diagnosis_by_pair": {pair: asdict(found) for pair, found in summary.by_pair_diagnosis.items()},
    }


def _intervals(values: Mapping[str, Interval]) -> dict[str, list[float]]:
    """[mean, low, high]"""
    return {name: [value.mean, value.low, value.high] for name, value in values.items()}


__all__ = ["ALL", "COLOUR", "COMPARED_WITH", "MEASURES", "OF_MEANS", "SECOND", "Agreement", "Summary", "agreements", "as_json", "summaries"]
