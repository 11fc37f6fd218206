import random

import pytest

from lib_dynfuse.escaping import escape, unescape
from lib_dynfuse.text import tag

TAGS, JOINT = tag.RESERVED, "+"


@pytest.mark.parametrize("reserved", [TAGS, JOINT])
def test_any_text_reads_back(reserved):
    chance = random.Random(7)
    for length in range(9):
        for _ in range(2000):
            text = "".join(chance.choices('%%%%2025BbCcDd3 ++:=<>#,"\n\ta', k=length))
            written = escape(text, reserved)
            assert unescape(written, reserved) == text
            assert not set(written) & set(reserved)
            assert written == written.strip(" ")


def test_a_percent_sign_is_written_out_only_where_it_would_be_read_as_a_code():
    assert escape("100% dog, my%20lora 50%3A %2b", TAGS) == "100% dog%2C my%20lora 50%253A %252b"
    assert escape("50%3A, a", JOINT) == "50%3A, a"
    assert escape("%20", JOINT) == "%2520"


def test_what_is_no_code_of_a_reserved_character_stands_for_itself():
    assert unescape("my%20lora %41 %zz %", TAGS) == "my%20lora %41 %zz %"
    assert unescape("%20a%2cb%3A", TAGS) == " a,b:"
