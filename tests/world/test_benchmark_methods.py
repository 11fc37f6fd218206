"""What is compared, and on what."""

from itertools import pairwise

import pytest

from dynfuse_world.benchmark.methods import ROWS, SWEEP, RowError, chosen, row_of
from dynfuse_world.benchmark.protocol import PAIRS, PICTURED, REFERENCE_SEED, REPORTED, SEEDS, TUNING
from dynfuse_world.benchmark.work import tasks
from dynfuse_world.painter import HELD_OUT_STYLES, SUBJECTS
from lib_dynfuse.settings import FuseSettings

EVERY = {(subject, style) for subject in SUBJECTS for style in HELD_OUT_STYLES}


def test_the_pairs_are_all_there_are():
    assert [(pair.subject, pair.style) for pair in sorted(PAIRS, key=lambda p: p.name)] == sorted(EVERY)


@pytest.mark.parametrize("pairs", [TUNING, PICTURED])
def test_some_pairs_have_each_subject_and_each_style_once(pairs):
    assert sorted(pair.subject for pair in pairs) == sorted(SUBJECTS)
    assert sorted(pair.style for pair in pairs) == sorted(HELD_OUT_STYLES)


def test_nothing_is_tuned_on_what_is_reported():
    assert not set(TUNING) & set(REPORTED)
    assert set(PICTURED) <= set(REPORTED)


def test_prompts_say_what_they_are_for():
    (pair,) = (pair for pair in PAIRS if pair.name == "tuf-chalk")
    assert pair.prompt == "a tuf robot in chalk style"
    assert pair.subject_prompt == "a tuf robot"
    assert pair.style_prompt == "a house in chalk style"


def test_the_references_begin_with_noise_of_their_own():
    assert REFERENCE_SEED not in SEEDS
    assert all(row.settings_for(TUNING[0]).reference_seed == REFERENCE_SEED for row in ROWS)


def test_rows_have_names_of_their_own_and_other_settings():
    rows = [*ROWS, *SWEEP]
    assert len({row.name for row in rows}) == len(rows)
    assert len({(row.loras, row.settings) for row in rows}) == len(rows)


def test_the_methods_are_the_products_defaults():
    settings = {row.name: row.settings for row in ROWS}
    assert settings["default"] == FuseSettings()
    assert settings["best"] == FuseSettings.from_mapping({"preset": "best"})
    assert settings["selection"] == FuseSettings(method="dynfuse")
    assert settings["both"] == FuseSettings(method="dynfuse", guidance=True)
    assert settings["direct"] == FuseSettings(method="direct")


def test_a_row_is_a_method_with_other_settings():
    row = row_of("both bias=2 criterion=js", "tried")
    assert row.settings == FuseSettings(method="dynfuse", guidance=True, bias=2.0, criterion="js")
    assert row.name == "both bias=2 criterion=js"
    # A value that is the default of the settings, but not of the method.
    assert row_of("guidance guidance=false", "tried").settings == FuseSettings(method="direct")


def test_a_coin_may_decide_between_a_lora_and_nothing():
    row = row_of("random style_weight=0", "tried")
    assert row.loras == "random"
    assert row.settings == FuseSettings(method="dynfuse", style_weight=0.0)


@pytest.mark.parametrize("text", ["fusion", "selection bias", "selection bias=x", "selection criterion=l2", "selection colour=red"])
def test_what_is_no_row_is_refused(text):
    with pytest.raises(RowError, match="is no row"):
        row_of(text, "tried")


def test_rows_are_chosen_by_name_and_group():
    assert [row.name for row in chosen(ROWS, ["direct*", "ceiling"])] == ["direct", "oracle"]
    assert chosen(ROWS, []) == list(ROWS)
    with pytest.raises(RowError, match="'oracles'"):
        chosen(ROWS, ["oracles"])


def test_the_sweep_sees_the_tuning_pairs_alone():
    work = tasks(PAIRS, [*ROWS, *SWEEP])
    assert {(task.pair, task.row.name) for task in work} == {(pair, row.name) for pair in PAIRS for row in ROWS} | {
        (pair, row.name) for pair in TUNING for row in SWEEP
    }
    assert len(work) == len(PAIRS) * len(ROWS) + len(TUNING) * len(SWEEP)


def test_guided_rows_come_first_and_no_pairs_second_before_every_pairs_first():
    """They take longest; and two processes would both make a pair's references."""
    work = tasks(PAIRS, [*ROWS, *SWEEP])
    guided = [task.row.guided for task in work]
    assert guided == sorted(guided, reverse=True)
    assert [task.pair for task in work[: len(PAIRS)]] == list(PAIRS)
    for one, other in pairwise(work[:4]):
        assert one.pair.subject != other.pair.subject
        assert one.pair.style != other.pair.style
