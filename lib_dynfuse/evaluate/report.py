"""The report of a plan: one page and two tables, beside the pictures.

PLAN.html         tables with intervals, warnings, votes, pictures, and what is needed to repeat it
PLAN.csv          a line for each picture, with every score
PLAN-means.csv    a line for each method and metric
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..settings import format_value
from ..version import VERSION
from .atomic import write_whole
from .folder import Evaluation, Pair, Picture
from .making import ABOUT
from .metrics import Metric
from .plan import Plan
from .statistics import RESAMPLES, Interval
from .summary import Column, Row, Scores, Summary

_STYLE_SHEET = Path(__file__).with_name("report.css")
_SHOWN_SEEDS = 4
_OPEN_PAIRS = 8
"""More would be megabytes at once; the others open by a click."""
_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "Pillow")


@dataclass(frozen=True)
class Report:
    """All that a report tells. study, judges: as results.py has them. about: what each picture's file says of how it was made."""

    plan: Plan
    evaluation: Evaluation
    metrics: Sequence[type[Metric]]
    scores: Scores
    summary: Summary
    study: Mapping[str, Any] | None
    judges: Sequence[Mapping[str, Any]]
    about: Mapping[Picture, Mapping[str, Any]]

    @property
    def finished(self) -> list[Picture]:
        return list(self.about)


def about_pictures(evaluation: Evaluation) -> dict[Picture, dict[str, Any]]:
    """What the finished pictures' files say: seconds, maker, machine, version; nothing for a picture of somebody else's."""
    paths = {picture: evaluation.path(picture) for picture in evaluation.pictures()}
    return {picture: _about(path) for picture, path in paths.items() if path.is_file()}


def seconds_of(path: Path) -> float | None:
    """What a finished picture took; None for one that is not there, or does not say."""
    return _about(path).get("seconds") if path.is_file() else None


def _about(path: Path) -> dict[str, Any]:
    try:
        with Image.open(path) as file:
            content = json.loads(getattr(file, "text", {}).get(ABOUT, "{}"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_report(report: Report) -> list[Path]:
    """Returns the files. Raises OSError."""
    folder, name = report.evaluation.folder, report.plan.name
    files = {
        folder / f"{name}.html": page(report),
        folder / f"{name}.csv": _csv(_picture_lines(report)),
        folder / f"{name}-means.csv": _csv(_mean_lines(report)),
    }
    for path, text in files.items():
        write_whole(path, text.encode())
    return list(files)


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _picture_lines(report: Report) -> Iterable[Sequence[Any]]:
    names = [metric.name for metric in report.metrics]
    yield ["pair", "subject", "style", "method", "prompt", "seed", "picture", "seconds", *names]
    for picture, about in report.about.items():
        pair = report.evaluation.pair(picture.pair)
        scores = [report.scores[name].get(picture, "") for name in names]
        prompt = pair.prompts[picture.prompt]
        yield [pair.name, pair.subject, pair.style, picture.method, prompt, picture.seed, picture.file, about.get("seconds", ""), *scores]


def _mean_lines(report: Report) -> Iterable[Sequence[Any]]:
    head = ["method", "metric", "mean", "low", "high", "difference", "difference low", "difference high", "warning"]
    yield head
    for row in report.summary.rows:
        for column in report.summary.columns:
            mean, difference = row.means[column.name], row.differences.get(column.name)
            yield [
                *(row.method.name, column.name, mean.mean, mean.low, mean.high),
                *((difference.mean, difference.low, difference.high) if difference else ("", "", "")),
                row.warnings.get(column.name, ""),
            ]


def page(report: Report) -> str:
    """The whole page; its pictures are files beside it."""
    evaluation, plan = report.evaluation, report.plan
    count = f"{len(report.finished)} of {plan.count} pictures: {len(evaluation.pairs)} pairs, {len(evaluation.methods)} methods"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(plan.title)}</title>
<style>
{_STYLE_SHEET.read_text("utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(plan.title)}</h1>
<p class="lead">{escape(count)}, {len(evaluation.seeds)} seeds.</p>
<nav aria-label="Parts"><ul><li><a href="#scores">Scores</a></li><li><a href="#votes">Votes</a></li>
<li><a href="#pictures">Pictures</a></li><li><a href="#repeat">To repeat it</a></li></ul></nav>
</header>
<main>
{_scores(report)}
{_votes(report)}
{_pictures(report)}
{_repeat(report)}
</main>
</body>
</html>
"""


def _scores(report: Report) -> str:
    summary, total = report.summary, len(report.evaluation.pairs)
    if not report.metrics:
        return '<section id="scores"><h2>Scores</h2><p>The plan names no metrics.</p></section>'
    if not summary.rows:
        return (
            f'<section id="scores"><h2>Scores</h2><p>None of the {total} pairs has all its pictures and scores yet.</p>'
            "<p>The means are told when one has.</p></section>"
        )
    missing = "" if len(summary.pairs) == total else f" Of {total} pairs {len(summary.pairs)} have all their pictures and count."
    sections = [
        f"<p>Means over {len(summary.pairs)} pairs, their prompts and seeds, with 95 % intervals: {RESAMPLES} bootstrap draws of pairs, "
        f"and of pictures within each.{missing}</p>",
        _table("Means", summary, _mean_cell),
    ]
    if summary.plain_sum is not None and any(row.differences for row in summary.rows):
        caption = f"Differences to {summary.plain_sum}, picture by picture; bold where the interval leaves out zero"
        sections.append(_table(caption, summary, _difference_cell))
    else:
        sections.append('<p class="faint">No differences: the plan has no plain sum, a method with method = "direct" and nothing else.</p>')
    return f'<section id="scores">\n<h2>Scores</h2>\n{"".join(sections)}{_warnings(summary)}{_protocols(report.metrics)}\n</section>'


def _table(caption: str, summary: Summary, cell: Any) -> str:
    warned = {column.name for column in summary.columns for row in summary.rows if column.name in row.warnings}
    head = "".join(f'<th scope="col">{escape(column.name)}{_mark(column.name in warned)}</th>' for column in summary.columns)
    body = "\n".join(
        f'<tr data-method="{escape(row.method.name)}"><th scope="row">{escape(row.method.name)}</th>'
        f"{''.join(cell(row, column) for column in summary.columns)}</tr>"
        for row in summary.rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="numbers">'
        f"<caption>{escape(caption)}.</caption>"
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _mark(is_warned: bool) -> str:
    return ' <abbr class="warning" title="A compared method optimises this: see the warnings">⚠</abbr>' if is_warned else ""


def _mean_cell(row: Row, column: Column) -> str:
    value = row.means[column.name]
    warned = ' class="warned"' if column.name in row.warnings else ""
    return f'<td{warned}>{value.mean:.3f}<span class="interval">{value.low:.3f} to {value.high:.3f}</span></td>'


def _difference_cell(row: Row, column: Column) -> str:
    value = row.differences.get(column.name)
    if value is None:
        return '<td class="faint">the plain sum</td>'
    warned = ' class="warned"' if column.name in row.warnings else ""
    text = f"{value.mean:+.3f}"
    return f"<td{warned}>{f'<strong>{text}</strong>' if value.excludes_zero else text}{_range(value)}</td>"


def _range(value: Interval) -> str:
    return f'<span class="interval">{value.low:+.3f} to {value.high:+.3f}</span>'


def _warnings(summary: Summary) -> str:
    told: dict[str, list[str]] = {}
    for row in summary.rows:
        for column in summary.columns:
            if reason := row.warnings.get(column.name):
                told.setdefault(f"{column.name}: {reason}", []).append(row.method.name)
    if not told:
        return '<p class="faint">No method here optimises what it is measured by.</p>'
    items = "".join(f"<li>⚠ {escape(what)}: {escape(', '.join(methods))}.</li>" for what, methods in told.items())
    return (
        f'<div class="warnings"><h3>Warnings</h3><p>These scores are what the method itself raises, so they are no evidence that it is '
        f"better:</p><ul>{items}</ul></div>"
    )


def _protocols(metrics: Sequence[type[Metric]]) -> str:
    items = "".join(f"<dt>{escape(metric.name)}</dt><dd>{escape(metric.protocol)}</dd>" for metric in metrics)
    return f"<details><summary>How each score is computed</summary><dl>{items}</dl></details>"


def _votes(report: Report) -> str:
    asked = [("People", report.study)] if report.study else []
    asked += [(f"The model {judge['judge']}", judge) for judge in report.judges]
    if not asked:
        return (
            '<section id="votes"><h2>Votes</h2><p class="faint">None yet: <code>dynfuse study</code> asks people, '
            "<code>dynfuse judge</code> a model.</p></section>"
        )
    return f'<section id="votes">\n<h2>Votes</h2>\n{"".join(_asked(title, result) for title, result in asked)}\n</section>'


def _asked(title: str, result: Mapping[str, Any]) -> str:
    """Of a study's or a judge's result (results.py)."""
    voters = f"{result['participants']} participants, " if "participants" in result else ""
    lines = [
        (found["method"], f"{found['chosen']} of {found['shown']}", *(_share(found[key]) for key in ("share", "over_plain_sum")))
        for found in result["methods"]
    ]
    head = ("method", "chosen of shown", "share where shown", f"less the share of {result['plain_sum']}")
    return (
        f"<h3>{escape(title)}</h3><p>“{escape(' / '.join(result['questions']))}” {voters}{result['answers']} answers.</p>"
        f"{_plain(head, lines)}<p>{escape(' '.join(result['notes']))}</p>"
    )


def _share(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None or estimate["mean"] is None:
        return ""
    mean = f"{100 * estimate['mean']:.1f} %"
    if estimate["low"] is None or estimate["high"] is None:
        return mean
    return f"{mean} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def _pictures(report: Report) -> str:
    pairs = "\n".join(_pair(report, pair, number < _OPEN_PAIRS) for number, pair in enumerate(report.evaluation.pairs))
    return f'<section id="pictures">\n<h2>Pictures</h2>\n{pairs}\n</section>'


def _pair(report: Report, pair: Pair, is_open: bool) -> str:
    evaluation, finished = report.evaluation, set(report.finished)
    questions = [(prompt, seed) for prompt in range(len(pair.prompts)) for seed in evaluation.seeds][:_SHOWN_SEEDS]
    head = "".join(f'<th scope="col">{escape(pair.prompts[prompt])}, seed {seed}</th>' for prompt, seed in questions)
    rows = []
    for method in evaluation.methods:
        cells = []
        for prompt, seed in questions:
            picture = Picture(pair.name, method.name, prompt, seed)
            there = picture in finished
            alternative = f"{pair.name}, {method.name}, seed {seed}"
            cells.append(f"<td>{_image(picture.file, alternative) if there else '<span class=faint>not yet</span>'}</td>")
        rows.append(f'<tr><th scope="row">{escape(method.name)}</th>{"".join(cells)}</tr>')
    references = "".join(
        f"<figure><figcaption>{side}: {escape(getattr(pair, side))}</figcaption>"
        + "".join(
            _image(path.relative_to(evaluation.folder).as_posix(), f"Reference of the {side} {getattr(pair, side)}")
            for path in getattr(pair, f"{side}_references")[:5]
        )
        + "</figure>"
        for side in ("subject", "style")
        if getattr(pair, f"{side}_references")
    )
    return (
        f'<details{" open" if is_open else ""}><summary>{escape(pair.name)}</summary><div class="references">{references}</div>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(pair.name)}">'
        f'<table class="pictures"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _image(file: str, alternative: str) -> str:
    address = quote(file)
    return f'<a href="{address}"><img src="{address}" loading="lazy" alt="{escape(alternative)}"></a>'


def _repeat(report: Report) -> str:
    make = dict(report.evaluation.make)
    sides, merged = make.pop("sides", {}), make.pop("merged files", {})
    model_file = make.pop("model file", None) or {}
    facts = {**{key: value for key, value in make.items() if value not in (None, "")}, "model hash": model_file.get("hash", "")}
    loras = [
        (
            name,
            *(" + ".join(side["loras"]), str(side["weight"]), " + ".join(file["hash"] for file in side["files"] if file) or "unknown here"),
        )
        for name, side in sides.items()
    ] + [(name, file["name"], "1.0", file["hash"]) for name, file in merged.items() if file]
    methods = [
        (method.name, method.loras, ", ".join(f"{key}={format_value(value)}" for key, value in method.settings.items()) or "defaults")
        for method in report.evaluation.methods
    ]
    return f"""<section id="repeat">
<h2>To repeat it</h2>
{_plain(("what", "value"), [(key, str(value)) for key, value in facts.items() if value != ""])}
{_plain(("method", "LoRAs", "settings that differ from the defaults"), methods)}
{_plain(("LoRA of", "name", "weight", "hash"), loras)}
{_plain(("method", "made by", "pictures", "s / picture"), _seconds(report))}
{_notes(report)}
<p>DynFuse {VERSION}; this page: Python {platform.python_version()}, {escape(", ".join(_versions()))}.</p>
<details><summary>The plan</summary><pre>{escape(report.plan.text)}</pre></details>
</section>"""


def _seconds(report: Report) -> list[tuple[str, ...]]:
    found: dict[tuple[str, str], list[float]] = {}
    for picture, about in report.about.items():
        if "seconds" in about:
            found.setdefault((picture.method, f"{about.get('maker', '')}, {about.get('machine', '')}"), []).append(float(about["seconds"]))
    return [(method, maker, str(len(seconds)), f"{sum(seconds) / len(seconds):.2f}") for (method, maker), seconds in found.items()]


def _notes(report: Report) -> str:
    """What was told while pictures were made, such as a gradient that memory did not allow."""
    found: dict[tuple[str, str], int] = {}
    for picture, about in report.about.items():
        for note in about.get("notes", ()):
            found[picture.method, note] = found.get((picture.method, note), 0) + 1
    lines = [(method, str(count), note) for (method, note), count in found.items()]
    return _plain(("method", "pictures", "note"), lines) if lines else ""


def _versions() -> Iterable[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _plain(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table class="plain"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


__all__ = ["Report", "about_pictures", "page", "seconds_of", "write_report"]
