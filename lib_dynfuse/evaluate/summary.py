"""What the scores of a plan's pictures say: means with intervals, differences to the plain sum, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..settings import FuseSettings
from .folder import Evaluation, Method, Pair, Picture
from .metrics import Metric
from .statistics import Floats, Interval, Resamples, harmonic_mean

Scores = Mapping[str, Mapping[Picture, float]]
"""metric -> picture -> score"""


@dataclass(frozen=True)
class Column:
    """name: of a metric, or of a family's harmonic mean. sources: the metrics that it is made of."""

    name: str
    sources: tuple[type[Metric], ...]


@dataclass(frozen=True)
class Row:
    """means, and differences to the plain sum (none for itself, and where there is none): by column. warnings: column -> why the method
    can score high there without being better."""

    method: Method
    means: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    warnings: Mapping[str, str]


@dataclass(frozen=True)
class Summary:
    """pairs: those that count, all of whose pictures have all scores. plain_sum: the method that differences are to."""

    pairs: tuple[Pair, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    plain_sum: str | None


def columns_of(metrics: Sequence[type[Metric]]) -> tuple[Column, ...]:
    """The metrics, and for each family that has both sides the harmonic mean of its first ones."""
    columns = [Column(metric.name, (metric,)) for metric in metrics]
    for family in dict.fromkeys(metric.family for metric in metrics):
        sides = [next((m for m in metrics if m.family == family and m.side == side), None) for side in ("subject", "style")]
        if sides[0] is not None and sides[1] is not None:
            columns.append(Column(f"harmonic mean ({sides[0].name}, {sides[1].name})", (sides[0], sides[1])))
    return tuple(columns)


def summarised(evaluation: Evaluation, metrics: Sequence[type[Metric]], scores: Scores) -> Summary:
    """Only pairs of which nothing is missing count, so that all methods are compared on the same pictures."""
    columns = columns_of(metrics)
    pairs = tuple(pair for pair in evaluation.pairs if _is_complete(evaluation, pair, metrics, scores))
    plain_sum = next((method.name for method in evaluation.methods if is_plain_sum(method)), None)
    if not pairs or not metrics:
        return Summary(pairs, columns, (), plain_sum)
    measured = {method.name: _measured(evaluation, pairs, method.name, columns, scores) for method in evaluation.methods}
    draws = Resamples.draw(*next(iter(measured[evaluation.methods[0].name].values())).shape)
    reference = measured.get(plain_sum or "")
    rows = []
    for method in evaluation.methods:
        own = measured[method.name]
        compared = reference is not None and method.name != plain_sum
        rows.append(
            Row(
                method,
                {name: draws.of_mean(values) for name, values in own.items()},
                {name: draws.of_mean(values - reference[name]) for name, values in own.items()} if compared and reference else {},
                _warnings(method, columns),
            )
        )
    return Summary(pairs, columns, tuple(rows), plain_sum)


def is_plain_sum(method: Method) -> bool:
    """Whether it is what two ordinary LoRA tags give."""
    return method.loras == "both" and dict(method.settings) == {"method": "direct"}


def _warnings(method: Method, columns: Sequence[Column]) -> dict[str, str]:
    settings = FuseSettings.from_mapping(method.settings)
    found = {column.name: [reason for source in column.sources if (reason := source.optimised_by(settings))] for column in columns}
    return {name: reasons[0] for name, reasons in found.items() if reasons}


def _is_complete(evaluation: Evaluation, pair: Pair, metrics: Sequence[type[Metric]], scores: Scores) -> bool:
    wanted = [
        Picture(pair.name, method.name, prompt, seed)
        for method in evaluation.methods
        for prompt in range(len(pair.prompts))
        for seed in evaluation.seeds
    ]
    return all(picture in scores[metric.name] for metric in metrics for picture in wanted)


def _measured(evaluation: Evaluation, pairs: Sequence[Pair], method: str, columns: Sequence[Column], scores: Scores) -> dict[str, Floats]:
    """By column: (pairs, prompts and seeds). A similarity below zero counts as none in a harmonic mean."""

    def values(metric: type[Metric]) -> Floats:
        return np.array(
            [
                [scores[metric.name][Picture(pair.name, method, prompt, seed)] for prompt in range(len(pair.prompts)) for seed in seeds]
                for pair in pairs
            ],
            dtype=np.float64,
        )

    seeds = evaluation.seeds
    return {
        column.name: values(column.sources[0])
        if len(column.sources) == 1
        else harmonic_mean(*(values(source).clip(min=0.0) for source in column.sources))
        for column in columns
    }


__all__ = ["Column", "Row", "Scores", "Summary", "columns_of", "is_plain_sum", "summarised"]
