"""The results to look at: sheets of the pictures, and figures of the scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lib_dynfuse.fusion.selection_map import STYLE, SUBJECT, text_font

from .methods import Row
from .summary import Summary
from .work import Outcome

_ENLARGED = 2
_GAP = 4
_TEXT = 14
_LABELS = 220

_BLUE, _ORANGE = ("#" + "".join(f"{channel:02x}" for channel in colour) for colour in (SUBJECT, STYLE))
_GREEN = "#009e73"  # Okabe and Ito's third that stays apart
_COLOURS = {"floor": "#999999", "ceiling": _GREEN}


def write_pictures(
    folder: Path, outcomes: Sequence[Outcome], rows: Sequence[Row], reported: Sequence[Summary], tuned: Sequence[Summary]
) -> list[Path]:
    """Sheets and figures of what there is; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    order = {row.name: position for position, row in enumerate(rows)}
    for pair in dict.fromkeys(outcome.pair for outcome in outcomes if len(outcome.pictures)):
        of_pair = sorted((outcome for outcome in outcomes if outcome.pair == pair), key=lambda outcome: order[outcome.row])
        written.append(folder / f"{pair.name}.png")
        sheet(pair.prompt, [(outcome.row, outcome.pictures) for outcome in of_pair if len(outcome.pictures)]).save(
            written[-1], optimize=True
        )
    for name, summaries in (("reported", reported), ("tuning", tuned)):
        if summaries:
            for kind, figure in (("bars", bars), ("plane", plane)):
                written.append(folder / f"{name}-{kind}.svg")
                written[-1].write_text(figure(summaries), "utf-8")
    return written


def sheet(title: str, rows: Iterable[tuple[str, np.ndarray]]) -> Image.Image:
    """One row per (label, (n, H, W, 3) uint8), one column per seed."""
    lines = list(rows)
    count, height, width = (max(pictures.shape[axis] for _, pictures in lines) for axis in range(3))
    across, down = width * _ENLARGED + _GAP, height * _ENLARGED + _GAP
    picture = Image.new("RGB", (_LABELS + count * across + _GAP, 2 * _TEXT + len(lines) * down + _GAP), "white")
    canvas, font = ImageDraw.Draw(picture), text_font(_TEXT)
    canvas.text((_GAP + 4, _TEXT // 2), title, fill=(96, 96, 96), font=font)
    for row, (label, pictures) in enumerate(lines):
        top = 2 * _TEXT + row * down
        canvas.multiline_text((_GAP + 4, top + down // 3), _wrapped(label), fill=(32, 32, 32), font=font)
        for column, pixels in enumerate(pictures):
            large = Image.fromarray(pixels).resize((width * _ENLARGED, height * _ENLARGED), Image.Resampling.NEAREST)
            picture.paste(large, (_LABELS + column * across, top))
    return picture


def _wrapped(label: str, width: int = 26) -> str:
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    return "\n".join(lines)


def bars(summaries: Sequence[Summary]) -> str:
    """An SVG: each row's harmonic mean with its interval."""
    left, right, line, plot = 330, 60, 24, 480
    largest = max(0.05, *(summary.means["harmonic mean"].high for summary in summaries))
    interval = _tick(largest)
    top = interval * int(np.ceil(largest / interval - 1e-9))
    height = line * len(summaries)

    def x(value: float) -> float:
        return left + plot * value / top

    parts = [_text(left, 16, "harmonic mean of subject and style score, with 95 % interval", "start", "#606060")]
    for tick in np.arange(0, top + interval / 2, interval):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="28" y2="{28 + height}" stroke="#e4e4e4"/>')
        parts.append(_text(x(tick), 44 + height, f"{tick:.2f}", "middle", "#606060"))
    for position, summary in enumerate(summaries):
        y = 28 + line * position
        value = summary.means["harmonic mean"]
        parts.append(_text(left - 8, y + 16, summary.row.name, "end"))
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{max(0.0, x(value.mean) - left):.1f}" height="{line - 8}" fill="{_colour(summary)}"/>'
        )
        parts.append(_whisker((x(value.low), y + line / 2), (x(value.high), y + line / 2)))
    return _svg(left + plot + right, 56 + height, parts)


def plane(summaries: Sequence[Summary]) -> str:
    """An SVG: each row at its subject score (across) and style score (up), with the intervals of both."""
    left, top, side, right = 60, 20, 480, 300

    def place(subject: float, style: float) -> tuple[float, float]:
        return left + side * subject, top + side * (1 - style)

    parts = []
    for tick in np.linspace(0, 1, 6):
        (x, y), end = place(tick, tick), left + side
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + side}" stroke="#e4e4e4"/>')
        parts.append(f'<line x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(x, top + side + 18, f"{tick:.1f}", "middle", "#606060"))
        parts.append(_text(left - 8, y + 5, f"{tick:.1f}", "end", "#606060"))
    parts.append(_text(left + side / 2, top + side + 38, "subject score", "middle"))
    parts.append(f'<g transform="translate(16 {top + side / 2}) rotate(-90)">{_text(0, 0, "style score", "middle")}</g>')
    for number, summary in enumerate(summaries, 1):
        subject, style = summary.means["subject"], summary.means["style"]
        x, y = place(subject.mean, style.mean)
        parts.append(_whisker(place(subject.low, style.mean), place(subject.high, style.mean), faint=True))
        parts.append(_whisker(place(subject.mean, style.low), place(subject.mean, style.high), faint=True))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{_colour(summary)}" fill-opacity="0.85"/>')
        parts.append(_text(x, y + 4, str(number), "middle", "white", 11))
        parts.append(_text(left + side + 24, top + 16 + 19 * (number - 1), f"{number}  {summary.row.name}", "start"))
    return _svg(left + side + right, max(top + side + 48, top + 24 + 19 * len(summaries)), parts)


def _whisker(start: tuple[float, float], end: tuple[float, float], faint: bool = False) -> str:
    (x1, y1), (x2, y2) = start, end
    colour = "#b0b0b0" if faint else "#202020"
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _colour(summary: Summary) -> str:
    own = _COLOURS.get(summary.row.group)
    return own or (_ORANGE if summary.row.settings.method == "dynfuse" else _BLUE)


def _tick(largest: float) -> float:
    return next(interval for interval in (0.01, 0.02, 0.05, 0.1, 0.2) if largest / interval <= 8)


def _text(x: float, y: float, words: str, anchor: str, colour: str = "#202020", size: int = _TEXT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{escape(words)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


__all__ = ["bars", "plane", "sheet", "write_pictures"]
