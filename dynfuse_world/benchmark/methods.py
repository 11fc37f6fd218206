"""The rows of the benchmark's table: floor, ceiling, the methods, and the settings that are tried on the tuning pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lib_dynfuse.guidance.guide import wants_guidance
from lib_dynfuse.settings import FuseSettings, SettingsError

from .protocol import REFERENCE_SEED, Pair

METHODS = {
    "direct": FuseSettings(method="direct"),
    "default": FuseSettings(),
    "best": FuseSettings.from_mapping({"preset": "best"}),
    "tuned": FuseSettings(tune="auto"),
    "selection": FuseSettings(method="dynfuse"),
    "guidance": FuseSettings(method="direct", guidance=True),
    "both": FuseSettings(method="dynfuse", guidance=True),
}
"""What a row's first word stands for."""
RANDOM = "random"
"""Another first word: a coin decides for each layer."""


class RowError(ValueError):
    """A row that does not exist. One sentence for the user."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    loras: "pair", the pair's two; "oracle", one that was trained on true pictures of the pair; "none"; "random", the pair's two, and for
    each layer and picture a coin says which; "ziplora", one that is merged of the pair's by trained coefficients. group: "floor",
    "ceiling", "method", "paper" (of its own tables), "sweep" (on the tuning pairs only) or "tried" (by the command line). settings: of the
    fusion, where there are two LoRAs.
    """

    name: str
    loras: str = "pair"
    group: str = "method"
    settings: FuseSettings = METHODS["direct"]

    def settings_for(self, pair: Pair) -> FuseSettings:
        """With the pair's references."""
        return replace(self.settings, subject_prompt=pair.subject_prompt, style_prompt=pair.style_prompt, reference_seed=REFERENCE_SEED)

    @property
    def guided(self) -> bool:
        return wants_guidance(self.settings)


def row_of(text: str, group: str) -> Row:
    """The row that "selection bias=2 criterion=js" means: one of METHODS or RANDOM, with other settings. Raises RowError."""
    method, *changes = text.split()
    methods = {**METHODS, RANDOM: METHODS["selection"]}
    if method not in methods or not all("=" in change for change in changes):
        raise RowError(f"{text!r} is no row: name {', '.join(methods)}, and settings as in 'selection bias=2 criterion=js'")
    values = dict(change.split("=", 1) for change in changes)
    try:
        given = FuseSettings.from_text(values)
    except SettingsError as error:
        raise RowError(f"{text!r} is no row: {error}") from None
    changed = {name: getattr(given, name) for name in values}
    loras = "random" if method == RANDOM else "pair"
    return Row(" ".join([method, *changes]), loras, group, replace(methods[method], **changed))


ROWS = (
    Row("base model", loras="none", group="floor"),
    Row("subject only", group="floor", settings=FuseSettings(method="direct", style_weight=0.0)),
    Row("style only", group="floor", settings=FuseSettings(method="direct", subject_weight=0.0)),
    Row("random choice", loras="random", group="floor", settings=METHODS["selection"]),
    Row("direct"),
    Row("default", settings=METHODS["default"]),
    Row("best", settings=METHODS["best"]),
    Row("tuned", settings=METHODS["tuned"]),
    Row("selection", settings=METHODS["selection"]),
    Row("guidance", settings=METHODS["guidance"]),
    Row("both", settings=METHODS["both"]),
    Row("oracle", loras="oracle", group="ceiling", settings=FuseSettings(method="direct", style_weight=0.0)),
)
"""On all pairs."""

ZIPLORA = Row("ziplora", loras="ziplora", settings=FuseSettings(method="direct", style_weight=0.0))
"""Not made unless asked for: the coefficients of each pair are trained first."""

SWEEP = tuple(
    row_of(text, "sweep")
    for text in (
        "direct subject_weight=0.7",
        "direct style_weight=0.7",
        "direct subject_weight=1.3 style_weight=1.3",
        "direct contrast=1.5",
        "default contrast=0",
        "default contrast=1",
        "default contrast=2",
        "default contrast_every=1",
        "default contrast_every=5",
        "default contrast_start=0.5",
        "default contrast_end=0.5",
        "default contrast_every=1 contrast_start=0.5",
        "default contrast_every=1 contrast_end=0.5",
        "default contrast=0 subject_contrast=1.5",
        "default contrast=0 style_contrast=1.5",
        "default contrast_every=1 subject_contrast=1",
        "default contrast_every=1 style_contrast=1",
        "selection criterion=js",
        "selection criterion=cosine",
        "selection criterion=dot",
        "selection scope=attention",
        "selection bias=2",
        "selection loser=0.5",
        "selection contrast=1",
        "direct method=klora",
        "direct method=est-lora",
        "direct method=np-lora",
        "direct method=ties",
        "direct method=dare",
        "direct method=ssr",
        "direct method=switch",
    )
)
"""On the tuning pairs."""


def chosen(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose name or group fits one of the patterns ("selection*", "floor"); all without any. Raises RowError."""
    for pattern in patterns:
        if not any(fits(row, pattern) for row in rows):
            raise RowError(f"no row fits {pattern!r}; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not patterns or any(fits(row, pattern) for pattern in patterns)]


def fits(row: Row, pattern: str) -> bool:
    return pattern == row.group or fnmatchcase(row.name, pattern)


__all__ = ["METHODS", "RANDOM", "ROWS", "SWEEP", "ZIPLORA", "Row", "RowError", "chosen", "row_of"]
