"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lib_dynfuse.evaluate.statistics import Interval

from .diagnosis import Diagnosis
from .summary import COLOUR, COMPARED_WITH, MEASURES, OF_MEANS, SECOND, Agreement, Summary


def scores_table(summaries: Sequence[Summary], compared_with: str = COMPARED_WITH) -> str:
    """Means with their intervals; differences to the row `compared_with` whose interval leaves out zero are bold."""
    head = ["", *MEASURES, OF_MEANS, f"harmonic mean, difference to {compared_with}", "s / picture"]
    lines = [
        [
            summary.row.name,
            *(_interval(summary.means[measure]) for measure in (*MEASURES, OF_MEANS)),
            _difference(summary.differences["harmonic mean"]) if summary.differences else "",
            f"{summary.seconds:.2f}",
        ]
        for summary in summaries
    ]
    return _markdown(head, lines)


def second_table(summaries: Sequence[Summary], compared_with: str = COMPARED_WITH) -> str:
    """What the second judges say."""
    head = ["second judges", *MEASURES, f"harmonic mean, difference to {compared_with}"]
    lines = [
        [
            summary.row.name,
            *(_interval(summary.means[measure]) for measure in SECOND),
            _difference(summary.differences["second_harmonic_mean"]) if summary.differences else "",
        ]
        for summary in summaries
    ]
    return _markdown(head, lines)


def colour_table(summaries: Sequence[Summary], compared_with: str = COMPARED_WITH) -> str:
    """Colour and contrast (colour.py), each with its difference to the row `compared_with`."""
    head = ["colour and contrast"]
    for measure in COLOUR:
        head += [measure, f"to {compared_with}"]
    lines = []
    for summary in summaries:
        line = [summary.row.name]
        for measure in COLOUR:
            line += [f"{summary.means[measure].mean:.3f}", _difference(summary.differences[measure]) if summary.differences else ""]
        lines.append(line)
    return _markdown(head, lines)


def agreement_text(found: Mapping[str, Agreement]) -> str:
    """A line for each question."""
    return "\n".join(
        f"First and second judges on the {question}, {agreement.pictures} pictures: correlation "
        f"{'-' if agreement.correlation is None else f'{agreement.correlation:.2f}'}, the same answer (above 0.5 or not) in "
        f"{100 * agreement.same:.0f} %."
        for question, agreement in found.items()
    )


def diagnosis_table(summaries: Sequence[Summary]) -> str:
    """Shares of choices for the subject, and what else a trace tells; empty where no row chose."""
    found = [(summary.row.name, summary.diagnosis, summary.by_pair_diagnosis) for summary in summaries if summary.diagnosis]
    if not found:
        return ""
    first = found[0][1]
    head = ["", "subject's share", "range over pairs", "changes per step", "loudness", "range over pairs", "both rows alike"]
    lines = [
        [
            name,
            f"{of_row.share:.2f}",
            _range([d.share for d in by_pair.values()]),
            f"{of_row.flips:.3f}",
            _number(of_row.loudness),
            _range([d.loudness for d in by_pair.values() if d.loudness is not None]),
            _number(of_row.agreement),
        ]
        for name, of_row, by_pair in found
    ]
    shares = [[name, *_shares(of_row, first)] for name, of_row, _ in found]
    return f"{_markdown(head, lines)}\n\n{_markdown(['subject share', *first.by_kind, *first.by_depth], shares)}"


def _shares(of_row: Diagnosis, like: Diagnosis) -> list[str]:
    both, order = {**of_row.by_kind, **of_row.by_depth}, (*like.by_kind, *like.by_depth)
    return [f"{both[name]:.2f}" if name in both else "" for name in order]


def _interval(value: Interval) -> str:
    return f"{value.mean:.2f} ({value.low:.2f}–{value.high:.2f})"


def _difference(value: Interval) -> str:
    text = f"{value.mean:+.3f} ({value.low:+.3f} to {value.high:+.3f})"
    return f"**{text}**" if value.excludes_zero else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}" if values else ""


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])


__all__ = ["agreement_text", "colour_table", "diagnosis_table", "scores_table", "second_table"]
