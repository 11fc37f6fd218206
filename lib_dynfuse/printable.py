"""Texts of files and of people, made fit for a console, a page or a sentence."""

from __future__ import annotations

from typing import Any, TextIO


def printable(text: str, limit: int = 120) -> str:
    """text in one line, without characters that are not to be seen; beyond `limit` characters (at least 16), its beginning and its end."""
    far = len(text) > 8 * limit  # a text of megabytes takes no time
    head, tail = (_clean(text[: 4 * limit]), _clean(text[-4 * limit :])) if far else (_clean(text),) * 2
    if not far and len(head) <= limit:
        return head
    end = limit // 4
    return f"{head[: limit - end - 5]} ... {tail[-end:]}"


def shown(value: Any, limit: int = 80) -> str:
    """repr of any value, for a sentence; of a number too long to be written, what it is."""
    try:
        return printable(repr(value), limit)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return "a huge number" if isinstance(value, int) else f"a {type(value).__name__} that cannot be shown"


def encodable(text: str, stream: TextIO) -> str:
    """text as the stream's encoding has it, with "?" for what it lacks."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, "replace").decode(encoding) if encoding else text


def _clean(text: str) -> str:
    return text if text.isprintable() else "".join(_seen(character) for character in text)


def _seen(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else ""


__all__ = ["encodable", "printable", "shown"]
