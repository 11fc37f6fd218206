"""The selection map as a part of the page: in the letters and on the background of the WebUI's theme.

The cells are a picture with nothing behind them; all that is read is text of the page, so that it stays as large as it is in a panel of
any width.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby

from ..fusion import Trace
from ..fusion.selection_map import NOT_REACHED_PAINT, ONE_SIDED, Block, Layout, entries, painted, percent, plot
from . import pictures

# Of the map's width: about the room of two digits in a narrow panel.
_NUMBER = 0.035
_LETTER = 0.016


def map_html(trace: Trace, image: int, names: Sequence[str], caption: str) -> str:
    """A figure of one image. trace: of at least one step. names: of the LoRAs, for the legend. caption: plain text."""
    own = trace.of_image(image)
    layout = Layout.of(own)
    cells = plot(painted(own, 0)[:, layout.columns], layout.lefts, layout.cell_width, layout.cell_height)
    legend = "".join(_key(entry.colour, f"{entry.role}: {entry.name}", percent(entry.share)) for entry in entries(own, names))
    alone = int((~own.decided).sum())
    if alone:
        legend += _key(ONE_SIDED, "changed by one LoRA only", f"{alone} of {len(layout.columns)} layers")
    if not own.reached.all():
        legend += _key(NOT_REACHED_PAINT, "not measured", "")
    steps = "".join(_at(place, str(number), "top") for number, place in _step_numbers(len(own.weights), layout.cell_height))
    numbers, groups = _block_labels(layout)
    address, height = pictures.picture_address(cells), cells.height
    return (
        f'<figure class="dynfuse-map"><figcaption>{html.escape(caption)}</figcaption><div class="dynfuse-legend">{legend}</div>'
        f'<div class="dynfuse-plot"><span class="dynfuse-axis">Step</span><div class="dynfuse-steps">{steps}</div>'
        f'<img src="{address}" style="height: {height}px" alt="Steps, from the top, by layers of the denoiser">'
        f'<span class="dynfuse-axis">Block</span><div class="dynfuse-blocks">{numbers}</div>'
        f'<div class="dynfuse-groups">{groups}</div></div></figure>'
    )


def _key(colour: tuple[int, ...], text: str, share: str) -> str:
    """colour: red, green, blue, and how solid it is, each to 255."""
    red, green, blue, solid = (*colour, 255)[:4]
    told = f" <b>{share}</b>" if share else ""
    return f'<span><i style="background: rgba({red}, {green}, {blue}, {solid / 255:.3g})"></i>{html.escape(text)}{told}</span>'


def _at(place: float, text: str, side: str) -> str:
    return f'<span style="{side}: {100 * place:.2f}%">{html.escape(text)}</span>'


def _step_numbers(steps: int, cell_height: int) -> Iterator[tuple[int, float]]:
    """(number of a step, middle of its row as a part of the height): the first, and every 2nd, 5th, ... as there is room."""
    interval = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if n * cell_height >= 15 or n >= steps)
    for step in range(steps):
        if step == 0 or ((step + 1) % interval == 0 and step * cell_height >= 15):
            yield step + 1, (step + 0.5) / steps


def _block_labels(layout: Layout) -> tuple[str, str]:
    """The blocks' numbers, as many as there is room for, and the names of their groups over their width."""

    def edges(first: Block, last: Block) -> tuple[float, float]:
        right = layout.lefts[last.start + last.length - 1] + layout.cell_width
        return layout.lefts[first.start] / layout.width, right / layout.width

    numbers, groups = [], []
    end = named = 0.0
    for group, members in groupby(layout.blocks, key=lambda block: block.group):
        own = list(members)
        for block in own:
            middle = sum(edges(block, block)) / 2
            if block.number and middle - _NUMBER / 2 >= end:
                numbers.append(_at(middle, block.number, "left"))
                end = middle + _NUMBER / 2
        left, right = edges(own[0], own[-1])
        room = _LETTER * len(group)
        text = html.escape(group) if left >= named and left + room <= 1.0 + _LETTER else ""
        named = left + room if text else named
        groups.append(
            f'<span style="left: {100 * left:.2f}%; width: {100 * (right - left):.2f}%" title="{html.escape(group)}">{text}</span>'
        )
    return "".join(numbers), "".join(groups)


__all__ = ["map_html"]
