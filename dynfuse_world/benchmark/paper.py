"""The paper's ablations (arXiv 2602.15539, Tables 3 to 5) in the miniature world, with its rows under its names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lib_dynfuse.settings import FuseSettings

from .methods import Row
from .protocol import Pair
from .summary import Summary, summaries
from .table import scores_table
from .work import Outcome


@dataclass(frozen=True)
class PaperTable:
    """rows: the first is what the others are compared with."""

    number: int
    title: str
    rows: tuple[Row, ...]


def _row(name: str, **settings: object) -> Row:
    return Row(name, group="paper", settings=FuseSettings(**settings))  # type: ignore[arg-type]


TABLES = (
    PaperTable(
        3,
        "feature-level selection (FLS) and latent-level refinement (LLR)",
        (
            _row("Baseline", method="direct"),
            _row("Only with FLS", method="dynfuse"),
            _row("Only with LLR", method="direct", guidance=True),
            _row("Ours (FLS+LLR)", method="dynfuse", guidance=True),
        ),
    ),
    PaperTable(
        4,
        "criteria of the selection",
        tuple(
            _row(name, method="dynfuse", criterion=criterion)
            for name, criterion in (("KL", "kl"), ("JS", "js"), ("Cosine Similarity", "cosine"), ("Dot Product", "dot"))
        ),
    ),
    PaperTable(
        5,
        "scaling factor m of the refinement, without this program's limit on a step",
        tuple(_row(f"m = {m}", method="dynfuse", guidance=True, m=float(m), limit=0.0) for m in (1, 5, 10, 20)),
    ),
)
"""What the paper's baseline adds up it does not say; here it is the plain sum."""


def tables_of(choice: str) -> tuple[PaperTable, ...]:
    """choice: a table's number, or "all"."""
    return tuple(table for table in TABLES if choice in ("all", str(table.number)))


def distinct(tables: Sequence[PaperTable]) -> list[Row]:
    """The rows to be made: those of the same settings once."""
    return list({row.settings: row for table in reversed(tables) for row in reversed(table.rows)}.values())[::-1]


def summaries_of(table: PaperTable, outcomes: Iterable[Outcome], made: Sequence[Row], pairs: Sequence[Pair]) -> list[Summary]:
    """outcomes: of the rows that were made, whatever their names."""
    by_name = {row.name: row.settings for row in made}
    own = [replace(outcome, row=row.name) for outcome in outcomes for row in table.rows if by_name.get(outcome.row) == row.settings]
    return summaries(own, table.rows, pairs, compared_with=table.rows[0].name)


def paper_text(found: Sequence[tuple[PaperTable, Sequence[Summary]]]) -> str:
    """Markdown, a heading and a table each."""
    return "\n\n".join(
        f"### The paper's Table {table.number}: {table.title}\n\n{scores_table(of_table, table.rows[0].name)}" for table, of_table in found
    )


__all__ = ["TABLES", "PaperTable", "distinct", "paper_text", "summaries_of", "tables_of"]
