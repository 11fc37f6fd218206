"""What the pictures of the miniature world are called."""

from __future__ import annotations

import random

from .painter import CLASSES, HELD_OUT_STYLES, STYLES, SUBJECTS, Scene

RARE_WORDS = ("sks", "ohwx", "szn", "fancy", "other", "new")
"""Said of anything: they mean no class and no style, and the words of what is held out are among their like before a LoRA gives them
a meaning."""

_SUBJECT_WORDS = (*SUBJECTS, *RARE_WORDS)
_STYLE_WORDS = (*HELD_OUT_STYLES, *RARE_WORDS)


def caption(what: str, style: str | None = None) -> str:
    """what: "house", or "zib creature". "a house in flat style", without the style "a house"."""
    return f"a {what}" if style is None else f"a {what} in {style} style"


def name_of(what: str) -> str:
    """A subject with its class, as its captions say it ("zib creature"); a class as it is."""
    return f"{what} {SUBJECTS[what].character.kind}" if what in SUBJECTS else what


def training_caption(scene: Scene, rng: random.Random) -> str:
    """What the base model is told of a picture: now and then nothing (so that it can be guided without a classifier), or without the
    style, or with a rare word. A nameless style is called by a rare word, or not at all."""
    if rng.random() < 0.1:
        return ""
    what = scene.what
    if rng.random() < (0.4 if what in ("creature", "robot") else 0.12):
        what = f"{rng.choice(_SUBJECT_WORDS)} {what}"
    if scene.style is None:
        return caption(what, rng.choice(_STYLE_WORDS) if rng.random() < 0.75 else None)
    return caption(what, None if rng.random() < 0.05 else scene.style)


def words() -> list[str]:
    """All words of all captions, in alphabetical order."""
    return sorted({"a", "in", "style", *CLASSES, *STYLES, *_SUBJECT_WORDS, *_STYLE_WORDS})


__all__ = ["RARE_WORDS", "caption", "name_of", "training_caption", "words"]
