"""The paper's tables: its rows under its names, each setting made once, differences to the table's first row."""

import numpy as np
import pytest

from dynfuse_world.benchmark.command import main
from dynfuse_world.benchmark.methods import ROWS, SWEEP, ZIPLORA
from dynfuse_world.benchmark.paper import TABLES, distinct, paper_text, summaries_of, tables_of
from dynfuse_world.benchmark.protocol import REPORTED
from dynfuse_world.benchmark.work import SCORES, Outcome, tasks

PAIRS = REPORTED[:3]


def outcomes(rows, seeds=4):
    """A row's scores follow from its place."""
    made = []
    for place, row in enumerate(rows):
        for pair in PAIRS:
            scores = np.full(seeds, 0.1 + 0.05 * place)
            made.append(Outcome(pair, row.name, *[scores] * len(SCORES), 1.0, np.zeros((0, 4, 4, 3), np.uint8), None))
    return made


def test_the_rows_are_the_papers():
    assert [(table.number, [row.name for row in table.rows]) for table in TABLES] == [
        (3, ["Baseline", "Only with FLS", "Only with LLR", "Ours (FLS+LLR)"]),
        (4, ["KL", "JS", "Cosine Similarity", "Dot Product"]),
        (5, ["m = 1", "m = 5", "m = 10", "m = 20"]),
    ]
    assert [row.settings.m for row in TABLES[2].rows] == [1, 5, 10, 20]
    assert all(row.settings.guidance and row.settings.method == "dynfuse" and row.settings.limit == 0 for row in TABLES[2].rows)


def test_what_is_in_two_tables_is_made_once():
    rows = distinct(TABLES)
    assert len(rows) == 11
    assert len({row.settings for row in rows}) == 11
    assert len(tasks(PAIRS, rows)) == 33
    assert [table.number for table in tables_of("4")] == [4]
    assert tables_of("all") == TABLES


def test_each_table_has_all_its_rows_and_compares_with_its_first():
    rows = distinct(TABLES)
    made = outcomes(rows)
    found = [(table, summaries_of(table, made, rows, PAIRS)) for table in TABLES]
    for table, own in found:
        assert [summary.row.name for summary in own] == [row.name for row in table.rows]
        assert own[0].differences is None
        first = own[0].means["harmonic mean"].mean
        for summary in own[1:]:
            assert summary.differences["harmonic mean"].mean == pytest.approx(summary.means["harmonic mean"].mean - first)
    text = paper_text(found)
    assert "### The paper's Table 4" in text
    assert "difference to KL" in text


def test_ziplora_is_asked_for():
    assert ZIPLORA not in (*ROWS, *SWEEP)
    assert any(row.settings.method == "ssr" for row in SWEEP)


def test_other_tables_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--table", "6"])
    assert "--table" in capsys.readouterr().err
