"""Weights over the steps and block by block: what the texts mean, against interpolation by hand."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from fractions import Fraction

import pytest

from lib_dynfuse.settings import SettingsError
from lib_dynfuse.strength import BlockText, Schedule, number_text, one_each, parse_blocks, split_each


@dataclass
class Step:
    index: int
    count: int

    @property
    def progress(self):
        return self.index / max(self.count - 1, 1)


def weights(text, count):
    schedule = Schedule.parse(text)
    return [schedule.at(Step(index, count)) for index in range(count)]


def test_a_number_is_the_same_at_every_step():
    assert weights(" 0.9 ", 4) == pytest.approx([0.9] * 4)
    assert Schedule.of(0.9) == Schedule.of("0.9") == Schedule.parse("0.9@0.5") == Schedule.parse("0.9@0,0.9@1")


def test_between_two_points_the_weight_goes_in_a_straight_line():
    assert weights("0@0,1@1", 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_outside_the_points_the_weight_stays():
    assert weights("0.5@0.25,1@0.5", 5) == pytest.approx([0.5, 0.5, 1, 1, 1])


def test_a_place_above_1_is_a_steps_number_counted_from_1():
    assert weights("0@3,1@5", 7) == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])


def test_a_place_of_exactly_1_is_the_end():
    assert weights("0@0,1@1", 3)[-1] == pytest.approx(1)
    assert weights("0@0,4@1", 5) == pytest.approx([0, 1, 2, 3, 4])


def test_fractions_and_step_numbers_may_be_mixed():
    assert weights("1@1,0@3,1@0", 5) == pytest.approx([1, 0.5, 0, 0.5, 1])
    assert weights("1@1,0@3,1@0", 9)[1:3] == pytest.approx([0.5, 0])


def test_a_step_beyond_the_last_is_only_approached():
    assert weights("0@0,1@9", 5) == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])


def test_two_weights_at_one_place_are_a_jump_to_the_later_one():
    assert weights("0@0.5,1@0.5", 5) == pytest.approx([0, 0, 1, 1, 1])
    assert weights("1@0.5,0@0.5", 5) == pytest.approx([1, 1, 0, 0, 0])
    assert weights("0@0,1@0.5,3@0.5,5@1", 5) == pytest.approx([0, 0.5, 3, 4, 5])


def test_the_order_of_the_points_does_not_matter_unless_they_share_a_place():
    assert Schedule.parse("1@1, 0@0 ,0.5@0.3") == Schedule.parse("0@0,0.5@0.3,1@1")


@pytest.mark.parametrize("text", ["0@0,1@0.3", "0@2,1@5", "0.3"])
def test_a_job_of_one_step_is_at_its_start(text):
    assert weights(text, 1) == pytest.approx([Schedule.parse(text).points[0][0]])


def test_any_schedule_is_the_broken_line_through_its_points():
    chance = random.Random(3)
    for _ in range(300):
        count = chance.randint(2, 30)
        places = sorted(chance.sample(range(1, 400), chance.randint(2, 6)))
        points = [(chance.randint(-40, 40) / 16, Fraction(place, 400)) for place in places]
        text = ",".join(f"{weight}@{float(place)}" for weight, place in chance.sample(points, len(points)))
        for index, weight in enumerate(weights(text, count)):
            assert weight == pytest.approx(on_the_line(points, Fraction(index, count - 1)), abs=1e-9)


def on_the_line(points, at):
    """The exact height over `at` of the line through (height, place), sorted by place."""
    if at <= points[0][1]:
        return points[0][0]
    for (low, start), (high, end) in itertools.pairwise(points):
        if at <= end:
            return float(Fraction(low) + (Fraction(high) - Fraction(low)) * (at - start) / (end - start))
    return points[-1][0]


def test_step_numbers_mean_the_same_places_as_their_fractions():
    chance = random.Random(4)
    for _ in range(200):
        count = chance.randint(3, 40)
        numbers = chance.sample(range(2, count + 1), min(3, count - 1))
        points = [(chance.randint(-8, 8) / 4, number) for number in numbers]
        by_number = ",".join(f"{weight}@{number}" for weight, number in points)
        by_place = ",".join(f"{weight}@{(number - 1) / (count - 1)!r}" for weight, number in points)
        assert weights(by_number, count) == pytest.approx(weights(by_place, count))


@pytest.mark.parametrize(
    ("text", "constant", "full", "shortest"),
    [
        ("1.0", 1.0, 1.0, "1"),
        ("-0.50", -0.5, -0.5, "-0.5"),
        ("0@0,1@0.30,0.6@1", None, 1.0, "0@0,1@0.3,0.6@1"),
        ("-2@0,1@1", None, -2.0, "-2@0,1@1"),
        ("0.7@0,0.7@5", 0.7, 0.7, "0.7"),
        ("1@20,0@0", None, 1.0, "0@0,1@20"),
        ("1e+300", 1e300, 1e300, "1e300"),
    ],
)
def test_what_a_text_says_at_a_glance(text, constant, full, shortest):
    schedule = Schedule.parse(text)
    assert (schedule.constant, schedule.full, schedule.text()) == (constant, full, shortest)


@pytest.mark.parametrize("text", ["0.1", "-1e-07", "1e300", "0@0,1@0.3", "1@0.5,0@0.5", "1@2,0@11,0.30000000000000004@1", "-1@0,2@1"])
def test_the_shortest_text_reads_back_as_the_same(text):
    schedule = Schedule.parse(text)
    assert Schedule.parse(schedule.text()) == schedule
    assert len(schedule.text()) <= len(text)
    assert not set(schedule.text()) & set("+:= ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strong", ["must be a number", "0@0,1@0.3,0.6@1", "'strong'"]),
        ("", ["must be a number"]),
        ("0.5,1", ["'0.5' has no place"]),
        ("0@0,,1@1", ["'' has no place"]),
        ("a@0,1@1", ["must be points", "'a'"]),
        ("0@0,1@b", ["place of '1@b'", "'b'"]),
        ("0@0@0", ["place of '0@0@0'"]),
        ("0@-0.5,1@1", ["'0@-0.5'", "from 0 to 1", "-0.5"]),
        ("0@0,1@1.5", ["whole number of a step", "1.5"]),
        ("nan", ["finite"]),
        ("0@0,inf@1", ["finite"]),
        ("0@0,1@inf", ["place of '1@inf'", "finite"]),
    ],
)
def test_a_malformed_schedule_is_answered_with_one_sentence(text, words):
    with pytest.raises(SettingsError) as raised:
        Schedule.parse(text, "subject_weight")
    assert "subject_weight" in str(raised.value)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


def test_very_large_weights_do_not_overflow_between_their_points():
    assert all(math.isfinite(weight) for weight in weights("-1.7e308@0,1.7e308@1", 9))


def test_blocks_are_named_alone_or_by_ranges():
    assert parse_blocks(" in4 - in8 = 0.5 ,out3=0, mid=-1.5") == BlockText(
        (("in4", "in8", 0.5), ("out3", "out3", 0.0), ("mid", "mid", -1.5))
    )


@pytest.mark.parametrize("count", [12, 17, 20, 26, 61])
def test_blocks_may_be_a_plain_list_of_numbers(count):
    assert parse_blocks(", ".join(["0.5"] * count)) == BlockText(numbers=(0.5,) * count)


def test_one_name_is_a_preset_and_no_text_is_nothing():
    assert parse_blocks(" style-only ") == BlockText(preset="style-only")
    assert parse_blocks("  ") == BlockText() == BlockText((), (), "")


@pytest.mark.parametrize("text", ["in4-in8=0.5,out3=0", "mid=1e300", "1,0,0,0,1,1,1,1,1,1,1,0.25", "style-only", ""])
def test_the_shortest_text_of_blocks_reads_back_as_the_same(text):
    assert parse_blocks(text).text() == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,3", ["12, 17, 20, 26 or 61", "not 3"]),
        ("0.5", ["12, 17, 20, 26 or 61", "not 1"]),
        ("in4=", ["factor of in4", "number"]),
        ("in4=much", ["factor of in4", "'much'"]),
        ("in4=nan", ["factor of in4", "finite"]),
        ("in4=1,mid", ["'mid' is none"]),
        ("in4=1,", ["'' is none"]),
        ("4-8=0.5", ["'4-8=0.5' is none"]),
        ("in4-in6-in8=0.5", ["is none"]),
        ("=1", ["'=1' is none"]),
        (",".join(["1"] * 11 + ["x"]), ["'x'"]),
        ("two words", ["'two words'"]),
        ("inf", ["finite"]),
    ],
)
def test_malformed_blocks_are_answered_with_one_sentence(text, words):
    with pytest.raises(SettingsError) as raised:
        parse_blocks(text, "style_blocks")
    assert "style_blocks" in str(raised.value)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_texts_of_several_loras_are_parted_at_a_plus_that_belongs_to_no_number():
    assert split_each("1 + 0.5") == ["1", "0.5"]
    assert split_each("1e+5+2E+3") == ["1e+5", "2E+3"]
    assert split_each("out3=0+in4=1e-3+style") == ["out3=0", "in4=1e-3", "style"]
    assert split_each("") == [""]


def test_one_value_is_for_all_and_others_are_one_each():
    assert one_each(["a"], 3, "x") == ("a", "a", "a")
    assert one_each(["a", "b"], 2, "x") == ("a", "b")
    with pytest.raises(SettingsError, match="style_weight has 2 parts for 3 LoRAs"):
        one_each([1, 2], 3, "style_weight")
    with pytest.raises(SettingsError, match="style_weight has 2 parts for 1 LoRA;"):
        one_each([1, 2], 1, "style_weight")


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 0.1 + 0.2, 1e-7, 1e15, 1e300, -1e300, 5e-324])
def test_a_numbers_text_reads_back_and_has_no_plus(value):
    assert float(number_text(value)) == value
    assert "+" not in number_text(value)
