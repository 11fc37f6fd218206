"""From outcomes to what is said of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lib_dynfuse.evaluate.statistics import Floats, Interval, Resamples, harmonic_mean

from .diagnosis import Diagnosis, over_pairs
from .methods import Row
from .protocol import Pair
from .work import Outcome

MEASURES = ("subject", "style", "harmonic mean")
"""Of each picture. A picture's harmonic mean is 0 where the judge gives the subject or the style nothing."""
OF_MEANS = "harmonic mean of means"
"""Of each pair: of its mean subject score and its mean style score. Above the other where pictures have one or the other."""
COMPARED_WITH = "direct"


@dataclass(frozen=True)
class Summary:
    """A row over some pairs.

    means: MEASURES and OF_MEANS. differences: of MEASURES to the row that all are compared with, picture by picture; None for itself, and
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
    """Of the rows that were made on all of these pairs."""
    found = {(outcome.pair, outcome.row): outcome for outcome in outcomes}
    complete = {row.name: [found[pair, row.name] for pair in pairs] for row in rows if all((pair, row.name) in found for pair in pairs)}
    if not complete or not pairs:
        return []
    measured = {name: _measures(of_row) for name, of_row in complete.items()}
    draws = Resamples.draw(*next(iter(measured.values()))["subject"].shape)
    reference = measured.get(compared_with)
    return [
        _summary(row, complete[row.name], measured[row.name], None if row.name == compared_with else reference, draws)
        for row in rows
        if row.name in complete
    ]


def _measures(outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    subject, style = (np.stack([getattr(outcome, name) for outcome in outcomes]) for name in ("subject", "style"))
    return {"subject": subject, "style": style, "harmonic mean": harmonic_mean(subject, style)}


def _summary(
    row: Row, outcomes: Sequence[Outcome], measured: Mapping[str, Floats], reference: Mapping[str, Floats] | None, draws: Resamples
) -> Summary:
    means = {name: draws.of_mean(measured[name]) for name in MEASURES}
    means[OF_MEANS] = draws.of_harmonic_mean_of_means(measured["subject"], measured["style"])
    diagnoses = {outcome.pair.name: outcome.diagnosis for outcome in outcomes if outcome.diagnosis is not None}
    return Summary(
        row,
        means,
        None if reference is None else {name: draws.of_mean(measured[name] - reference[name]) for name in MEASURES},
        {outcome.pair.name: {name: float(measured[name][i].mean()) for name in MEASURES} for i, outcome in enumerate(outcomes)},
        float(np.mean([outcome.seconds for outcome in outcomes])),
        over_pairs(diagnoses.values()) if diagnoses else None,
        diagnoses,
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


__all__ = ["COMPARED_WITH", "MEASURES", "OF_MEANS", "Summary", "as_json", "summaries"]
