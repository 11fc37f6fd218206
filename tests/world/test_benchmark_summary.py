"""From outcomes to the table and the pictures, without making any."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dynfuse_world.benchmark.diagnosis import Diagnosis
from dynfuse_world.benchmark.methods import ROWS
from dynfuse_world.benchmark.pictures import bars, plane, sheet, write_pictures
from dynfuse_world.benchmark.protocol import REPORTED
from dynfuse_world.benchmark.summary import ALL, COLOUR, OF_MEANS, agreements, as_json, summaries
from dynfuse_world.benchmark.table import agreement_text, colour_table, diagnosis_table, scores_table, second_table
from dynfuse_world.benchmark.work import SCORES, Outcome

PAIRS = REPORTED[:3]
SEEDS = 6
NAMES = ("direct", "selection", "oracle")
CHOSEN = [row for row in ROWS if row.name in NAMES]


def outcome(pair, row, *, better=0.0, shown=0):
    """The same noise in every row."""
    rng = np.random.default_rng([*pair.name.encode()])
    scores = np.clip(rng.uniform(0.2, 0.6, (len(SCORES), SEEDS)) + better, 0, 1)
    pictures = rng.integers(0, 256, (shown, 8, 8, 3), dtype=np.uint8)
    found = Diagnosis(0.25, {"self q": 0.5}, {"mid": 0.125}, [0.25], 0.1, 0.5) if row == "selection" else None
    return Outcome(pair, row, *scores, 0.5, pictures, found)


OUTCOMES = [
    outcome(pair, row, better=better, shown=2) for pair in PAIRS for row, better in (("direct", 0.0), ("selection", 0.1), ("oracle", 0.3))
]


@pytest.fixture
def found():
    return summaries(OUTCOMES, ROWS, PAIRS)


def test_rows_that_were_made_are_summed_up_in_the_tables_order(found):
    assert [summary.row.name for summary in found] == list(NAMES)


def test_a_row_that_lacks_a_pair_is_left_out():
    assert [summary.row.name for summary in summaries(OUTCOMES[:-1], ROWS, PAIRS)] == ["direct", "selection"]
    assert summaries([], ROWS, PAIRS) == []


def test_means_are_of_each_picture_and_of_each_pair(found):
    direct = [outcome for outcome in OUTCOMES if outcome.row == "direct"]
    subject, style = (np.stack([getattr(o, name) for o in direct]) for name in ("subject", "style"))
    means = found[0].means
    assert means["subject"].mean == pytest.approx(subject.mean())
    assert means["harmonic mean"].mean == pytest.approx((2 / (1 / subject + 1 / style)).mean())
    assert means[OF_MEANS].mean == pytest.approx((2 / (1 / subject.mean(1) + 1 / style.mean(1))).mean())
    assert found[0].by_pair[PAIRS[1].name]["style"] == pytest.approx(style[1].mean())


def test_differences_are_those_of_the_same_pictures(found):
    assert found[0].differences is None
    difference = found[1].differences["subject"]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))


def test_sets_of_the_same_words_are_no_further_pairs():
    """Two sets in which each pair has the same scores, every seed alike: one set's interval, where six pairs of their own had a smaller."""
    pairs = {files: [replace(pair, files=files) for pair in REPORTED[:6]] for files in ("plain", "dropout")}
    level = {pair: np.full((len(SCORES), SEEDS), 0.1 + 0.1 * place) for of_set in pairs.values() for place, pair in enumerate(of_set)}
    made = [Outcome(pair, "direct", *scores, 0.5, np.zeros((0, 8, 8, 3), np.uint8), None) for pair, scores in level.items()]
    one, both = (summaries(made, ROWS, which)[0].means["subject"] for which in (pairs["plain"], pairs["plain"] + pairs["dropout"]))
    assert (both.mean, both.low, both.high) == pytest.approx((one.mean, one.low, one.high))
    assert one.high - one.low > 0.2


def test_there_are_no_differences_without_direct():
    alone = summaries([outcome for outcome in OUTCOMES if outcome.row != "direct"], ROWS, PAIRS)
    assert all(summary.differences is None for summary in alone)
    assert "to direct" in scores_table(alone)


def test_the_table_is_markdown_with_a_line_for_each_row(found):
    lines = scores_table(found).split("\n")
    assert len(lines) == 2 + len(NAMES)
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(NAMES)
    assert "**+0.1" in lines[3]


def test_the_second_judges_and_the_colours_have_tables_of_their_own(found):
    direct = [outcome for outcome in OUTCOMES if outcome.row == "direct"]
    subject, style = (np.stack([getattr(o, f"second_{name}") for o in direct]) for name in ("subject", "style"))
    assert found[0].means["second_harmonic_mean"].mean == pytest.approx((2 / (1 / subject + 1 / style)).mean())
    assert found[0].means["clipped"].mean == pytest.approx(np.mean([o.clipped for o in direct]))
    assert found[1].differences["saturation"].mean == pytest.approx(0.1)
    for table, columns in ((second_table(found), 5), (colour_table(found), 1 + 2 * len(COLOUR))):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n"))
        assert [line[0] for line in lines] == list(NAMES)
        assert {len(line) for line in (head, *lines)} == {columns}
        assert lines[0][-1] == ""
        assert lines[1][-1].startswith("**+0.1")
    assert f"{subject.mean():.2f} (" in second_table(found).split("\n")[2]


def test_how_far_two_judges_agree_is_pearsons_correlation_and_the_share_of_like_answers():
    first = np.array([0.1, 0.9, 0.6, 0.4, 0.2, 0.7])
    second = np.array([0.2, 0.8, 0.4, 0.45, 0.6, 0.9])
    pictures = np.zeros((0, 8, 8, 3), np.uint8)
    scores = dict.fromkeys(SCORES, first) | {"second_subject": second, "second_style": np.zeros(6)}
    halves = [
        Outcome(PAIRS[0], "direct", **{name: value[part] for name, value in scores.items()}, seconds=1.0, pictures=pictures, diagnosis=None)
        for part in (slice(0, 2), slice(2, 6))
    ]
    found = agreements(halves)
    a, b = first - first.mean(), second - second.mean()
    assert found["subject"].correlation == pytest.approx((a @ b) / np.sqrt((a @ a) * (b @ b)))
    assert found["subject"].same == pytest.approx(4 / 6)
    assert found["subject"].pictures == 6
    assert found["style"].correlation is None
    assert found["style"].same == pytest.approx(3 / 6)
    assert "67 %" in agreement_text(found)


def test_only_rows_that_choose_are_diagnosed(found):
    table = diagnosis_table(found)
    assert "0.25" in table
    assert "0.12" in table
    assert "oracle" not in table
    assert diagnosis_table([found[0]]) == ""


def test_a_summary_is_json(found):
    read = json.loads(json.dumps([as_json(summary) for summary in found]))
    assert read[1]["means"]["subject"][0] == pytest.approx(read[0]["means"]["subject"][0] + 0.1)
    assert read[1]["diagnosis"]["loudness"] == 0.5
    assert set(read[1]["means"]) == {*ALL, OF_MEANS}
    assert set(read[1]["differences_to_direct"]) == set(ALL)


def test_a_sheet_shows_every_picture_enlarged_in_its_row():
    rows = [("direct", OUTCOMES[0].pictures), ("selection with a label of many words", OUTCOMES[1].pictures)]
    picture = np.asarray(sheet("a prompt", rows))
    for _, pictures in rows:
        for pixels in pictures:
            large = pixels.repeat(2, 0).repeat(2, 1)
            places = np.lib.stride_tricks.sliding_window_view(picture, large.shape)[:, :, 0]
            assert (places == large).all((2, 3, 4)).any()


@pytest.mark.parametrize("figure", [bars, plane])
def test_figures_are_svg_and_name_every_row(figure, found):
    root = ElementTree.fromstring(figure(found))
    words = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("text"))
    assert all(name in words for name in NAMES)


def test_pictures_are_written_for_the_pairs_that_have_some(tmp_path, found):
    written = write_pictures(tmp_path / "new", OUTCOMES, CHOSEN, found, [])
    assert [path.name for path in written] == [f"{pair.name}.png" for pair in PAIRS] + ["reported-bars.svg", "reported-plane.svg"]
    assert all(path.is_file() for path in written)
    assert Image.open(written[0]).mode == "RGB"
