"""Blocks of a model, and factors for them: a LoRA may act more in some blocks than in others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby

from ..errors import SettingsError
from ..settings import FuseSettings
from ..strength import BlockText, one_each
from . import families
from .families import Family
from .naming import Site
from .reader import LoraFile

TEXT = "base"
"""What the factors call all text encoders that have no name of their own there."""
REST = "rest"
"""The block of layers that lie in no block with a name."""

_PRESETS: Mapping[str, tuple[str, ...]] = {"ALL": (), "NONE": ()}


@dataclass(frozen=True)
class Blocks:
    """The blocks of one model.

    names: in the order in which data meets them, numbered as the authors' scheme does: "embed", "in0" ... "in11", "mid", "out0" ...
    "out11", "last" in a U-Net of either scheme; "embed", "first", "double0" ..., "single0" ..., "last" in Flux.
    text: names for the text encoders, before the blocks: "base", and "t5" where it counts apart from CLIP.
    forms: how many numbers -> what each of them stands for, in the forms that block-weight users know.
    presets: name -> the blocks that it leaves on; ALL leaves on everything. Blocks in forms and presets are names, or ranges "in0-in4".
    synonyms: other words for the kinds of blocks. by_layer: dotted layer name -> block.
    """

    names: tuple[str, ...]
    text: tuple[str, ...] = (TEXT,)
    forms: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _PRESETS)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    by_layer: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_model(cls, layers: Iterable[str]) -> Blocks:
        """layers: the denoiser's dotted layer names, in any scheme. A model that has not the blocks of a known family has no forms."""
        names = list(dict.fromkeys(layers))
        found = {family: by_layer for family in families.FAMILIES if (by_layer := family.blocks(names)) is not None}
        if not found:
            by_layer = {name: _own_block(name) for name in names if name}
            return cls(tuple(dict.fromkeys(by_layer.values())), by_layer=by_layer)
        family, by_layer = next(iter(found.items()))
        ordered = tuple(sorted(set(by_layer.values()), key=family.place))
        blocks = cls(ordered, (TEXT, *family.text_blocks), synonyms=family.block_synonyms, by_layer=by_layer)
        for known in found:
            if _published_blocks(known) == _numbered(ordered):
                return replace(blocks, forms=known.forms, presets={**_PRESETS, **known.presets})
        return blocks

    def of(self, site: Site) -> str:
        """Name of the block in which a site of this model lies; "rest" for a layer outside of all."""
        return self.by_layer.get(site.layer, REST)

    def within(self, first: str, last: str = "") -> tuple[str, ...]:
        """The blocks from the first to the last, in either order. "IN04" is "in4". Raises SettingsError for a name that does not exist."""
        order = (*self.text, *self.names)
        start, end = sorted(order.index(self._known(name)) for name in (first, last or first))
        return order[start : end + 1]

    def _known(self, name: str) -> str:
        existing = (*self.text, *self.names)
        candidates = [name.strip()]
        if found := re.fullmatch(r"([a-z_]+)(\d*)", name.strip().lower()):
            group, number = self.synonyms.get(found[1], found[1]), found[2].lstrip("0") or found[2][:1]
            candidates += [group + number, *([group] if number == "0" else [])]  # "M00" is the only middle block
        if known := next((candidate for candidate in candidates if candidate in existing), None):
            return known
        raise SettingsError(f"There is no block {name!r} in this model. Its blocks are {listing(existing)}.")


def block_factors(text: BlockText, blocks: Blocks) -> dict[str, float]:
    """Factor of every block of a model, of "rest", and of the text encoders ("base", and "t5" where blocks.text has it).

    A preset or a form of numbers comes first, and assignments change what it says. Blocks that nothing names have factor 1; after a
    preset, 0. A form of numbers sets blocks of the kinds that it names to 0 where it leaves them out, as sd-webui-lora-block-weight
    does. Raises SettingsError.
    """
    factors = dict.fromkeys((*blocks.text, *blocks.names, REST), 1.0)
    if text.preset:
        chosen = blocks.presets.get(text.preset.upper())
        if chosen is None:
            raise SettingsError(f"There is no preset {text.preset!r} for this model's blocks. There are {', '.join(blocks.presets)}.")
        factors = dict.fromkeys(factors, 1.0 if text.preset.upper() == "ALL" else 0.0)
        factors.update((name, 1.0) for span in chosen for name in blocks.within(*span.split("-")))
    if text.numbers:
        form = blocks.forms.get(len(text.numbers))
        if form is None:
            raise SettingsError(_no_form(len(text.numbers), blocks))
        named = [blocks.within(*span.split("-")) for span in form]
        kinds = {_group(name) for span in named for name in span}
        factors.update((name, 0.0) for name in blocks.names if _group(name) in kinds)
        factors.update((name, number) for span, number in zip(named, text.numbers) for name in span)
    for first, last, factor in text.assignments:
        factors.update((name, factor) for name in blocks.within(first, last))
    return factors


def text_factors(text: BlockText, family: str | None) -> dict[str, float]:
    """Factor of the block weights on each text encoder ("te1", "te2", "t5") of a LoRA for this base model.

    Blocks that the model does not have are for the denoiser to refuse: they count for nothing here.
    """
    if text == BlockText():
        return dict.fromkeys(("te1", "te2", "t5"), 1.0)
    blocks = Blocks.of_model(families.reference_layers(family)) if family is not None else Blocks(())
    try:
        factors = block_factors(text, blocks)
    except SettingsError:
        factors = {}
    base = factors.get(TEXT, 1.0)
    return {"te1": base, "te2": base, "t5": factors.get("t5", base)}


def text_strengths(settings: FuseSettings, subjects: Sequence[LoraFile], styles: Sequence[LoraFile]) -> list[dict[str, float]]:
    """For each LoRA, the strength of its part of each text encoder ("te1", "te2", "t5"): the settings' te_weight times its weight times
    the factor of its block weights. A weight that varies with the step counts in full: a prompt is encoded once.
    """
    files = (*subjects, *styles)
    schedules = (
        *one_each(settings.subject_schedules, len(subjects), "subject_weight"),
        *one_each(settings.style_schedules, len(styles), "style_weight"),
    )
    texts = (
        *one_each(settings.subject_block_texts, len(subjects), "subject_blocks"),
        *one_each(settings.style_block_texts, len(styles), "style_blocks"),
    )
    family = next((file.family for file in files if file.family is not None), None)
    strengths = [settings.te_weight * schedule.full for schedule in schedules]
    return [
        {encoder: strength * factor for encoder, factor in text_factors(text, family).items()} for strength, text in zip(strengths, texts)
    ]


def listing(names: Sequence[str]) -> str:
    """ "base, in0 to in8, mid": names with neighbouring numbers as ranges."""
    runs: list[str] = []
    for _, members in groupby(enumerate(names), key=lambda item: (_group(item[1]), _number(item[1]) - item[0])):
        run = [name for _, name in members]
        runs += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(runs)


def _no_form(count: int, blocks: Blocks) -> str:
    if not blocks.forms:
        return f"This model's blocks have no form of numbers. Name them: {listing((*blocks.text, *blocks.names))}."
    known = "; ".join(f"{size} ({listing(form).replace('-', ' to ')})" for size, form in sorted(blocks.forms.items()))
    return f"{count} numbers are no form of this model's blocks. The forms are {known}."


@cache
def _published_blocks(family: Family) -> frozenset[str]:
    return _numbered((family.blocks([name for name, _ in family.layers()]) or {}).values())


def _numbered(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if name[-1].isdigit())


def _own_block(layer: str) -> str:
    """Of a model of no known scheme: "blocks0" of "blocks.0.attn.to_q", "head" of "head"."""
    found = re.match(r"([^.]+)(?:\.(\d+)(?=\.|$))?", layer)
    assert found is not None
    return found[1] + (found[2] or "")


def _group(name: str) -> str:
    return name.rstrip("0123456789")


def _number(name: str) -> int:
    return int(name[len(_group(name)) :] or 0)


__all__ = ["REST", "TEXT", "Blocks", "block_factors", "listing", "text_factors", "text_strengths"]
