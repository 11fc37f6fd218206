"""Texts that a console can show, whatever is in them."""

import io

import pytest

from lib_dynfuse.printable import encodable, printable, shown


@pytest.mark.parametrize("text", ["", "a dog", "水彩", "Ünïcödé – “quoted”", "x" * 120])
def test_an_ordinary_text_stays_as_it_is(text):
    assert printable(text) == text


def test_control_characters_are_left_out_and_lines_are_joined():
    assert printable("a\x1b[31mred\x07\x9b\u202egod\u2028b\nc\td\ud800") == "a[31mredgod b c d"


@pytest.mark.parametrize("length", [121, 960, 961, 10_000_000])
def test_a_long_text_keeps_its_beginning_and_its_end(length):
    text = printable("begin" + "\x00x" * length + "end")
    assert len(text) == 120
    assert text.startswith("beginx")
    assert " ... x" in text
    assert text.endswith("xend")


def test_any_value_can_be_shown():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "a huge number"
    assert shown([10**5000]) == "a list that cannot be shown"
    assert shown(deep) == "a list that cannot be shown"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) == 80


def test_what_an_encoding_lacks_is_a_question_mark():
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert encodable("水彩 × 2", console) == "?? × 2"
    assert encodable("水彩", io.StringIO()) == "水彩"
