"""What the benchmark keeps fixed, whichever method is tuned or added: pairs, prompts, seeds, and how a picture is made."""

from __future__ import annotations

from dataclasses import dataclass

from ..captions import caption, name_of
from ..lora_sets import PLAIN

STEPS = 15
CFG_SCALE = 5.0
PROMPT = caption("{subject}", "{style}")
SEEDS = tuple(range(24))
"""Of the pictures of every pair, so that methods are compared on the same noise."""
REFERENCE_SEED = 1000
"""Of the guidance's references: of none of the pictures, and the same for all of them, so that a reference is made once."""


@dataclass(frozen=True)
class Pair:
    """A subject's LoRA and a style's, by the words that stand for them. files: the set of LoRAs that they are of, one of lora_sets.SETS."""

    subject: str
    style: str
    files: str = PLAIN

    @property
    def name(self) -> str:
        return f"{self.subject}-{self.style}" + ("" if self.files == PLAIN else f"@{self.files}")

    @property
    def plain(self) -> Pair:
        """The same words, of the plain set."""
        return Pair(self.subject, self.style)

    @property
    def prompt(self) -> str:
        """What every method is asked for."""
        return self.asked(PROMPT)

    def asked(self, template: str) -> str:
        """The template with the subject and its class for {subject}, its word alone for {word}, and {style}. Raises KeyError."""
        return template.format(subject=name_of(self.subject), word=self.subject, style=self.style)

    @property
    def subject_prompt(self) -> str:
        """Of the subject's reference (paper, Eq. 14)."""
        return caption(name_of(self.subject))

    @property
    def style_prompt(self) -> str:
        """Of the style's reference (paper, Eq. 15): the style on something that no LoRA is about."""
        return caption("house", self.style)


TUNING = (Pair("zib", "blueprint"), Pair("mok", "sunset"), Pair("tuf", "chalk"), Pair("rak", "candy"))
"""Settings may be chosen on these: each subject and each style once."""

REPORTED = (
    *(Pair("zib", "sunset"), Pair("zib", "chalk"), Pair("zib", "candy")),
    *(Pair("mok", "blueprint"), Pair("mok", "chalk"), Pair("mok", "candy")),
    *(Pair("tuf", "blueprint"), Pair("tuf", "sunset"), Pair("tuf", "candy")),
    *(Pair("rak", "blueprint"), Pair("rak", "sunset"), Pair("rak", "chalk")),
)
"""What is said about methods is said of these alone."""

PAIRS = (*TUNING, *REPORTED)

PICTURED = (Pair("zib", "sunset"), Pair("mok", "chalk"), Pair("tuf", "candy"), Pair("rak", "blueprint"))
"""Shown as pictures; reported pairs, each subject and each style once."""
PICTURED_SEEDS = 8

__all__ = ["CFG_SCALE", "PAIRS", "PICTURED", "PICTURED_SEEDS", "PROMPT", "REFERENCE_SEED", "REPORTED", "SEEDS", "STEPS", "TUNING", "Pair"]
