"""Metrics by their names."""

from __future__ import annotations

import difflib
import importlib

from ...printable import shown
from ...reasons import first_line
from ..folder import EvaluationError, is_name
from .metric import Metric
from .similarities import SIMILARITIES

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in SIMILARITIES}


def known_metrics() -> tuple[str, ...]:
    """Their names, in the order of the tables."""
    return tuple(METRICS)


def metric_class(name: str) -> type[Metric]:
    """name: one of known_metrics(), or MODULE:CLASS for a metric of somebody's own. Raises EvaluationError."""
    if name in METRICS:
        return METRICS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(METRICS)}, and MODULE:CLASS for one of your own."
        raise EvaluationError(f"metrics: unknown metric {shown(name)}; {hint}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvaluationError(f"metrics: {name} cannot be imported ({first_line(error)}).") from None
    if not (isinstance(found, type) and issubclass(found, Metric)) or not is_name(found.name):
        raise EvaluationError(f"metrics: {name} is no metric: a class made from lib_dynfuse.evaluate.metrics.Metric, with a plain name.")
    return found


__all__ = ["METRICS", "known_metrics", "metric_class"]
