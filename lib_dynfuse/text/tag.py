"""The prompt tag: `<dynfuse:SUBJECT:STYLE[:subject weight[:style weight]][:key=value...]>`.

Pure text: nothing here knows a WebUI. A host cuts the tag out of the prompt and splits its inside at ":"; parse_tag
takes those items. SUBJECT and STYLE may each be several LoRAs, joined by "+".

A LoRA's name may hold characters that mean something in a tag or in a prompt. They are written as in a web address:
"%3A" for ":", "%3E" for ">", "%2B" for "+" and so on (RESERVED); format_tag does so, and any other "%" stands for itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import escaping
from ..printable import printable
from ..settings import (
    LORA_FIELDS,
    FuseSettings,
    SettingsError,
    field_metadata,
    field_types,
    format_value,
    join_names,
    parse_value,
    split_names,
)

POSITIONAL = ("subject", "style", "subject_weight", "style_weight")
SYNTAX = "<dynfuse:SUBJECT:STYLE>"

# ":" "<" ">" "=" "+" are the tag's own; "," and '"' are the infotext's; "#" starts a comment in A1111's prompts
# (modules/processing_scripts/comments.py); a line break ends the infotext's prompt; white space at the ends is cut off.
RESERVED = ':<>=+,"#\n\r\t\v\f'

_ERROR_KEY = "error"
_ERROR_START = f"<dynfuse:{_ERROR_KEY}="
_IN_THE_NEGATIVE_PROMPT = "the tag <dynfuse:...> stands in the negative prompt, where it does nothing; it belongs into the prompt"
# Cut as the host cuts (modules/extra_networks.py, re_extra_net): "<lora:dog<dynfuse:a:b>" is one tag, and not ours.
_NAMES = "; in a LoRA's name {} is written {}"
_TAG = re.compile(r"<(\w+):([^>]+)>")
_LOOSE = re.compile(r"<\s*(dynfuse)\s*:([^>]*)>", re.I)
# What is left of one without its colon, or without brackets of its own: "dynfuse:a:b>", "(dynfuse:a:b)".
_BROKEN = re.compile(r"<\s*dynfuse\b[^<>]*>?|\bdynfuse\s*:[^<>\n]*>?", re.I)
_ANY = re.compile(r"<\s*([\w \t-]{4,14}?)\s*[:;]([^<>]*)>")
# "dynfuze", "dynfus", "dyn fuse"; not "dynamic".
_ALIKE = 0.75


def escape(text: str) -> str:
    """text with the reserved characters, and spaces at its ends, written as %XX."""
    return escaping.escape(text, RESERVED)


def unescape(text: str) -> str:
    """The inverse of escape. %XX of a character that needs no escaping is left alone: "my%20lora" is a file's name."""
    return escaping.unescape(text, RESERVED)


def format_field(name: str, value: Any) -> str:
    """The text of a field's value in a tag or an infotext, which parse_field reads back."""
    if name in LORA_FIELDS:
        return "+".join(map(escape, split_names(value)))
    text = format_value(value)
    # What has a grammar holds no reserved character but "," "+" and "=", behind the key: it stays as people write it.
    return text if field_metadata(name)["canonical"] else escape(text)


def parse_field(name: str, text: str) -> Any:
    """The value of a field of FuseSettings that format_field wrote, or a user. Raises SettingsError."""
    if name in LORA_FIELDS:
        return join_names(unescape(part.strip()) for part in text.split("+"))
    # Text is taken here, not by parse_value: that would cut off the spaces that belong to it.
    return unescape(text.strip()) if field_types()[name] is str else parse_value(name, text)


def format_tag(settings: FuseSettings) -> str:
    """The shortest tag that parse_tag reads back as these settings."""
    changed = settings.non_default()
    last = max((index for index, name in enumerate(POSITIONAL) if name in changed), default=1)
    items = [format_field(name, getattr(settings, name)) for name in POSITIONAL[: max(last, 1) + 1]]
    items += [f"{name}={format_field(name, value)}" for name, value in changed.items() if name not in POSITIONAL]
    return f"<dynfuse:{':'.join(items)}>"


def format_error(sentence: str) -> str:
    """A tag that parse_tag answers with SettingsError(sentence).

    The panel and the API hand their mistakes on this way: a WebUI swallows what a script's hook raises, and a tag is
    read where an exception reaches the user.
    """
    return f"{_ERROR_START}{escape(sentence)}>"


def is_error(text: str) -> bool:
    """Whether a tag is one of format_error's."""
    return text.startswith(_ERROR_START)


def parse_tag(items: Sequence[str]) -> FuseSettings:
    """Settings of one tag.

    items: the text between "<dynfuse:" and ">", split at ":". Items without "=" are, in order, subject, style, subject
    weight and style weight; the others name any field of FuseSettings.
    Raises SettingsError: one sentence with what is wrong and how it is written.
    """
    tag = f"<dynfuse:{':'.join(items)}>"
    texts: dict[str, str] = {}
    positions = iter(POSITIONAL)
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            name = next(positions, None)
            if name is None:
                raise SettingsError(f"{tag} has too many parts; after the two weights only key=value may follow{_written(':')}")
            key, text = name, item
        key = key.strip()
        if key == _ERROR_KEY:
            raise SettingsError(unescape(text))
        if key in texts:
            raise SettingsError(f"{tag} gives {key} twice")
        texts[key] = text.strip()
    try:
        settings = FuseSettings.from_mapping({key: _parse(key, text) for key, text in texts.items()})
    except SettingsError as error:
        hint = "" if "did you mean" in str(error) else _perhaps_a_name(items, texts)
        raise SettingsError(f"{tag}: {error}{hint}") from None
    try:
        check_pair(settings)
    except SettingsError as error:
        raise SettingsError(f"{error}{_written('>') if settings.subject and not settings.style else ''}") from None
    return settings


def _perhaps_a_name(items: Sequence[str], texts: dict[str, str]) -> str:
    """How a name is written, where a tag that cannot be read looks as if one had been cut in two."""
    if any(key not in field_types() for key in texts):
        return _written("=")
    weights = [item for item in items if "=" not in item][2:]
    return _written(":") if any(re.search(r"[^\W\d_]", item) for item in weights) else ""


def _written(character: str) -> str:
    return _NAMES.format(character, f"%{ord(character):02X}")


def corrected(prompt: str) -> str:
    """The prompt with every tag of ours as the WebUIs read it: "< DynFuse : a:b>" is "<dynfuse: a:b>".

    Raises SettingsError for one that is empty or not whole, or whose name is misspelt: to the WebUI these are text, or unknown tags that it
    cuts out.
    """

    def tidy(found: re.Match[str]) -> str:
        inside = found[2].strip()
        if not inside.strip(": "):
            raise SettingsError(f"{found[0]} names no LoRA; write {SYNTAX}")
        return f"<dynfuse:{inside}>"

    prompt = _LOOSE.sub(tidy, prompt)
    for found in _ANY.finditer(prompt):
        word = re.sub(r"[\s_-]", "", found[1]).lower()
        if not found[0].startswith("<dynfuse:") and difflib.SequenceMatcher(None, word, "dynfuse").ratio() > _ALIKE:
            raise SettingsError(f"{found[0]} is no tag that is known; {SYNTAX} was meant, perhaps")
    if broken := _BROKEN.search(_TAG.sub("", prompt)):
        raise SettingsError(f"{printable(broken[0], 60)} is no whole tag; write {SYNTAX}")
    return prompt


def put_right(prompt: str) -> str:
    """The prompt corrected, or with a tag in front that says what is wrong with it."""
    try:
        return corrected(prompt)
    except SettingsError as error:
        return format_error(str(error)) + prompt


def misplaced(negative_prompts: Iterable[str]) -> str:
    """A tag that says so where one of ours stands in a negative prompt, which the WebUIs read no tags from; else nothing."""
    found = any(find_tags(put_right(prompt)) for prompt in negative_prompts)
    return format_error(_IN_THE_NEGATIVE_PROMPT) if found else ""


def find_tags(prompt: str) -> list[list[str]]:
    """The items (see parse_tag) of every DynFuse tag in a prompt."""
    return [items.split(":") for name, items in _TAG.findall(prompt) if name == "dynfuse"]


def replace_tags(prompt: str, replacement: Callable[[list[str]], str | None]) -> str:
    """The prompt with every DynFuse tag replaced by what replacement makes of its items (see parse_tag); None leaves a tag as it is."""

    def replaced(found: re.Match[str]) -> str:
        text = replacement(found[2].split(":")) if found[1] == "dynfuse" else None
        return found[0] if text is None else text

    return _TAG.sub(replaced, prompt)


def parse_tags(tags: Sequence[Sequence[str]]) -> FuseSettings | None:
    """What the tags of one prompt ask for: None without a tag. Raises SettingsError as parse_tag does, and for two tags."""
    if not tags:
        return None
    for items in tags:
        if items[0].startswith(f"{_ERROR_KEY}="):
            return parse_tag(items)
    if len(tags) > 1:
        raise SettingsError("the prompt has more than one <dynfuse:...> tag; several LoRAs of a side are joined by + in one")
    return parse_tag(tags[0])


def check_pair(settings: FuseSettings) -> None:
    """Raises SettingsError unless both sides name a LoRA, and none is named twice."""
    missing = [name for name in ("subject", "style") if not getattr(settings, name)]
    if missing:
        raise SettingsError(
            f"no {' and no '.join(missing)} LoRA is chosen; pick one in the DynFuse panel, or write {SYNTAX} with the names of both"
        )
    names = settings.subjects + settings.styles
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"the same LoRA, {name!r}, is named twice; pick different ones")


def _parse(key: str, text: str) -> Any:
    return parse_field(key, text) if key in field_types() else unescape(text)
