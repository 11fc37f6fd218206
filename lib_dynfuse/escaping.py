"""Characters that mean something, written as in a web address: "%3A" for ":"."""

from __future__ import annotations

import functools
import re

_ESCAPED_OUTER_SPACES = re.compile(r"^(?:%20)+|(?:%20)+$")


def escape(text: str, reserved: str) -> str:
    """text with the reserved characters, and spaces at its ends, written as %XX; a "%" only where it would be read as the start of one.

    reserved: characters other than "%" and " ".
    """
    body = text.strip(" ")
    before, after = text[: len(text) - len(text.lstrip(" "))], text[len(text.rstrip(" ")) :] if body else ""
    escaped = _to_escape(reserved).sub(lambda found: f"%{ord(found[0]):02X}", body)
    return "%20" * len(before) + escaped + "%20" * len(after)


def unescape(text: str, reserved: str) -> str:
    """The inverse of escape. %XX of a character that needs no escaping is left alone: "my%20lora" is a file's name."""
    spaced = _ESCAPED_OUTER_SPACES.sub(lambda codes: " " * (len(codes[0]) // 3), text)
    return _escaped(reserved).sub(lambda code: chr(int(code[0][1:], 16)), spaced)


@functools.cache
def _to_escape(reserved: str) -> re.Pattern[str]:
    codes = "|".join(f"{ord(character):02X}" for character in f"%{reserved}")
    return re.compile(f"[{re.escape(reserved)}]|%(?={codes}|20$)|^%(?=20)", re.IGNORECASE)


@functools.cache
def _escaped(reserved: str) -> re.Pattern[str]:
    return re.compile("|".join(f"%{ord(character):02X}" for character in f"%{reserved}"), re.IGNORECASE)
