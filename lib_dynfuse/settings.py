"""FuseSettings: the one typed description of a fusion.

The prompt tag, the panel, the infotext, the API and the command line are all made from the fields below, so a
setting has one name, one type, one range and one explanation everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_type_hints

from .errors import SettingsError
from .escaping import escape, unescape
from .printable import shown
from .strength import BLOCKS_EXAMPLE, SCHEDULE_EXAMPLE, BlockText, Schedule, number_text, one_each, parse_blocks, split_each

LORA_FIELDS = ("subject", "style")
"""The two sides; each may name several LoRAs."""

METHODS: dict[str, str] = {}
"""The rules that can be chosen as method, and what each does, in one line."""


def register_method(name: str, summary: str) -> None:
    """Add a method to the choices of tag, panel, API and command line. summary: one line for people, without a full stop."""
    METHODS[name] = summary


def join_names(names: Iterable[str]) -> str:
    """The text of LoRAs' names: joined by "+"; a "+" inside a name is written %2B."""
    return "+".join(escape(name, _JOINT) for name in names)


def split_names(text: str) -> tuple[str, ...]:
    """The names that join_names joined; spaces beside a "+" do not count."""
    parts = text.split("+")
    return tuple(unescape(part.strip(" ") if len(parts) > 1 else part, _JOINT) for part in parts) if text else ()


_JOINT = "+"
# What torch takes as a seed or a size.
_WHOLE = 2**63


def _names(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return join_names(item for item in value if item)
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be text or a list of names, not {shown(value)}")
    names = split_names(value)
    if not all(names):
        raise SettingsError(f"{name} must be names of LoRAs with + between, and %2B for a + inside a name, not {shown(value)}")
    return join_names(names)


def _weights(name: str, value: Any) -> float | str:
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SettingsError(f"{name} must be a number or points such as {SCHEDULE_EXAMPLE}, not {shown(value)}")
        return _number(name, float, value)
    schedules = [Schedule.parse(text, name) for text in split_each(value)]
    if len(schedules) == 1 and schedules[0].constant is not None:
        return schedules[0].constant
    return "+".join(schedule.text() for schedule in schedules)


def _hires(name: str, value: Any) -> str:
    """Texts of both sides with "/" between; an empty one: as in the first pass. A number is the subject's."""
    if isinstance(value, (int, float)):
        return format_value(_number(name, float, value))
    sides = _text(name, value).split("/")
    if len(sides) > 2:
        raise SettingsError(f"{name} must be the subject's weight, or SUBJECT/STYLE, not {shown(value)}")
    return "/".join(format_value(_weights(name, side)) if side.strip() else "" for side in sides).removesuffix("/")


def _blocks(name: str, value: Any) -> str:
    texts = [parse_blocks(text, name).text() for text in split_each(_text(name, value))]
    return "+".join(texts) if any(texts) else ""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be text, not {shown(value)}")
    return value


def setting(
    default: Any,
    label: str,
    tooltip: str | Callable[[], str],
    *,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    slider: tuple[float, float, float] | None = None,
    picture: bool = False,
    canonical: Callable[[str, Any], Any] | None = None,
) -> Any:
    """Declare a field.

    label, tooltip: what the panel shows, in plain words.
    choices: the permitted strings; empty for free text and numbers. A function, as for tooltip, is asked at each use.
    minimum, maximum: smallest and largest permitted number; None for any finite one.
    slider: (lowest, highest, step) that the panel offers; a tag or the API may go beyond it.
    picture: the text stands for a picture (see guidance.references.ReferenceCache.picture).
    canonical: (field's name, given value) -> the value as it is kept, for texts with a grammar. Raises SettingsError. But for names it
        holds none of the characters that a tag or an infotext reserves.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "label": label,
            "tooltip": tooltip,
            "choices": choices,
            "minimum": minimum,
            "maximum": maximum,
            "slider": slider,
            "picture": picture,
            "canonical": canonical,
        },
    )


RECOMMENDED = -1.0
"""In place of a contrast: what the method recommends. So is everything below 0, which a slider passes on its way."""


@dataclass(frozen=True)
class FuseSettings:
    """How a subject LoRA and a style LoRA are fused. Raises SettingsError for a value outside its range."""

    subject: str = setting(
        "",
        "Subject LoRAs",
        "The LoRA of the character, creature or thing to show. Pick another to add it; in a tag several are joined by +: dog+hat.",
        canonical=_names,
    )
    style: str = setting(
        "",
        "Style LoRAs",
        "The LoRA of the way it is drawn. Pick another to add it; in a tag several are joined by +: watercolor+ink.",
        canonical=_names,
    )
    subject_weight: float | str = setting(
        1.0,
        "Subject weight",
        "Strength of the subject LoRA, as in <lora:name:weight>. It also counts in the choice: a stronger LoRA wins more layers. "
        f"In place of a number it may be points over the steps ({SCHEDULE_EXAMPLE}), and one each for several LoRAs (1+0.5).",
        slider=(0.0, 2.0, 0.05),
        canonical=_weights,
    )
    style_weight: float | str = setting(
        1.0,
        "Style weight",
        "Strength of the style LoRA, as in <lora:name:weight>. It also counts in the choice: a stronger LoRA wins more layers. "
        f"In place of a number it may be points over the steps ({SCHEDULE_EXAMPLE}), and one each for several LoRAs (1+0.5).",
        slider=(0.0, 2.0, 0.05),
        canonical=_weights,
    )
    method: str = setting(
        "balanced",
        "Method",
        lambda: " ".join(f"{name}: {summary}." for name, summary in METHODS.items()),
        choices=lambda: tuple(METHODS),
    )
    criterion: str = setting(
        "kl",
        "Change measured by",
        "How the change of a layer's features is measured. kl: Kullback-Leibler divergence from the base model's features (the paper's). "
        "js: Jensen-Shannon divergence. cosine: one minus the cosine similarity. dot: fall of the dot product with the base features.",
        choices=("kl", "js", "cosine", "dot"),
    )
    te_weight: float = setting(
        1.0,
        "Text encoder weight",
        "Factor on both LoRAs' text-encoder parts, which are added up (the method only chooses inside the denoiser). "
        "0 leaves the text encoder alone.",
        slider=(0.0, 2.0, 0.05),
    )
    granularity: str = setting(
        "image",
        "One choice per",
        "image: one choice per layer and image, made on the prompt and used for the negative prompt too. "
        "row: prompt and negative prompt choose on their own. token: every place in the picture chooses on its own (experimental).",
        choices=("image", "row", "token"),
    )
    scope: str = setting(
        "all",
        "Layers",
        "all: every layer that both LoRAs change. attention: only the query, key, value and output layers of the attention blocks, "
        "as in the paper's experiments; other layers are left to the base model.",
        choices=("all", "attention"),
    )
    temperature: str = setting(
        "raw",
        "Scale of features",
        "raw: features as they are (the paper's). rms: features divided by their spread, so that a few loud channels do not decide alone.",
        choices=("raw", "rms"),
    )
    balance: str = setting(
        "none",
        "Balance of loudness",
        "none: the divergences are compared as they are (the paper's); a louder LoRA wins nearly everywhere. "
        "gamma: the style's divergences are scaled so that both LoRAs weigh the same over the first step.",
        choices=("none", "gamma"),
    )
    bias: float = setting(
        1.0,
        "Bias to the style",
        "The subject wins a layer if its divergence is at least this many times the style's. "
        "Above 1 favours the style, below 1 the subject.",
        minimum=0.0,
        slider=(0.0, 4.0, 0.05),
    )
    one_sided: str = setting(
        "apply",
        "Layers of one LoRA only",
        "What to do with a layer that only one of the two LoRAs changes. apply: that LoRA is used there. "
        "skip: the layer stays as in the base model.",
        choices=("apply", "skip"),
    )
    guidance: bool = setting(
        False,
        "Guidance",
        "At every step, nudge the picture towards two reference pictures, one made with each LoRA alone. "
        "Takes more time: the references are made once and kept. Needs a CLIP and a DINO encoder, which are downloaded once.",
    )
    m: float = setting(
        10.0,
        "Guidance strength",
        "How strongly each step is nudged towards the references (m in tag and paper). 10 is the paper's for 50 steps; with other "
        "numbers of steps it is scaled to the same total. 0 is no guidance.",
        minimum=0.0,
        slider=(0.0, 50.0, 0.5),
    )
    content_weight: float = setting(
        1 / 3,
        "Subject CLIP weight",
        "How much the CLIP similarity to the subject's reference counts.",
        minimum=0.0,
        slider=(0.0, 1.0, 0.01),
    )
    style_clip_weight: float = setting(
        1 / 3,
        "Style CLIP weight",
        "How much the CLIP similarity to the style's reference counts.",
        minimum=0.0,
        slider=(0.0, 1.0, 0.01),
    )
    style_dino_weight: float = setting(
        1 / 3,
        "Style DINO weight",
        "How much the DINO similarity to the style's reference counts.",
        minimum=0.0,
        slider=(0.0, 1.0, 0.01),
    )
    start: float = setting(
        0.0,
        "Guide from (0-1)",
        "The guidance begins at this fraction of the steps.",
        minimum=0.0,
        maximum=1.0,
        slider=(0.0, 1.0, 0.05),
    )
    end: float = setting(
        1.0,
        "Guide until (0-1)",
        "The guidance ends at this fraction of the steps.",
        minimum=0.0,
        maximum=1.0,
        slider=(0.0, 1.0, 0.05),
    )
    every: int = setting(
        1,
        "Guide every n steps",
        "Guide only every n-th step of the range: faster, and weaker.",
        minimum=1,
        slider=(1, 10, 1),
    )
    gradient: str = setting(
        "fast",
        "Gradient",
        "fast: of the score with respect to the predicted picture. exact: with respect to the noisy latent, through the whole denoiser "
        "(the paper's); two to three times slower, and takes much more memory.",
        choices=("fast", "exact"),
    )
    decoder: str = setting(
        "vae-small",
        "Decoder",
        "How the predicted picture is decoded for the encoders. vae-small: the model's VAE at about 256 pixels. vae: the model's VAE "
        "in full; much more memory and time. taesd: the small preview decoder of the WebUI.",
        choices=("vae-small", "vae", "taesd"),
    )
    limit: float = setting(
        0.05,
        "Most change a step",
        "No step changes the predicted picture by more than this fraction of its own strength (RMS). 0 takes the limit away.",
        minimum=0.0,
        slider=(0.0, 0.5, 0.01),
    )
    subject_prompt: str = setting(
        "",
        "Subject reference prompt",
        "Prompt of the subject's reference picture. Empty: the LoRA's activation text, or else the prompt of the picture.",
    )
    style_prompt: str = setting(
        "",
        "Style reference prompt",
        "Prompt of the style's reference picture. Empty: the LoRA's activation text, or else the prompt of the picture.",
    )
    subject_image: str = setting(
        "",
        "Subject picture",
        "A picture of the subject to use in place of a generated reference.",
        picture=True,
    )
    style_image: str = setting(
        "",
        "Style picture",
        "A picture of the style to use in place of a generated reference.",
        picture=True,
    )
    reference_seed: int = setting(
        -1,
        "Reference seed",
        "Seed of the reference pictures. -1: the seed of the picture; another seed of its own keeps the references for many pictures.",
        minimum=-1,
    )
    hr: str = setting(
        "",
        "Weights in the hires pass",
        "With hires fix, the weights of its second pass: the subject's (0.7), or both (0.7/1), each written like the weights over the "
        "steps. Empty: as in the first pass.",
        canonical=_hires,
    )
    subject_blocks: str = setting(
        "",
        "Subject block weights",
        f"Factors on the subject LoRA in parts of the model: blocks by name ({BLOCKS_EXAMPLE}), the list of 12, 17, 20, 26 or 61 numbers "
        "that block weights are often written as, or a preset's name. Empty: 1 everywhere.",
        canonical=_blocks,
    )
    style_blocks: str = setting(
        "",
        "Style block weights",
        f"Factors on the style LoRA in parts of the model: blocks by name ({BLOCKS_EXAMPLE}), the list of 12, 17, 20, 26 or 61 numbers "
        "that block weights are often written as, or a preset's name. Empty: 1 everywhere.",
        canonical=_blocks,
    )
    decide: str = setting(
        "next",
        "When to choose",
        "next: the first step measures and chooses in each layer, and every other one goes by what was measured in the step before; much "
        "faster on a fast card. now: measure and choose in each layer at every step, as in the paper.",
        choices=("next", "now"),
    )
    decide_every: int = setting(
        1,
        "Choose every n steps",
        "Choose anew only at every n-th step, and keep the choice in between: faster, and coarser.",
        minimum=1,
        slider=(1, 10, 1),
    )
    vote_tokens: int = setting(
        64,
        "Measured places",
        "At how many places of the picture a layer's features are measured. More is slower and takes more memory. 0: all, as in the paper.",
        minimum=0,
        slider=(0, 1024, 16),
    )
    contrast: float = setting(
        RECOMMENDED,
        "Contrast",
        "Stronger LoRAs without burning: moves the prompt's prediction away from what the model would draw without any of the LoRAs. In "
        "units of the CFG scale: 1 is as much as one step of CFG. 0 is none. -1: what the method recommends, which is 1 for balanced and "
        "none for all others. Costs one more prediction of the prompt at the steps at which it is made.",
        minimum=RECOMMENDED,
        slider=(RECOMMENDED, 5.0, 0.1),
    )
    style_contrast: float = setting(
        0.0,
        "Away from the style",
        "The same, away from what the style's LoRAs would draw alone: more of the subject.",
        minimum=0.0,
        slider=(0.0, 5.0, 0.1),
    )
    subject_contrast: float = setting(
        0.0,
        "Away from the subject",
        "The same, away from what the subject's LoRAs would draw alone: more of the style.",
        minimum=0.0,
        slider=(0.0, 5.0, 0.1),
    )
    contrast_every: int = setting(
        10,
        "Contrast every n steps",
        "Make the direction of the contrast anew only at every n-th step, and keep it in between: nearly as good, and cheaper.",
        minimum=1,
        slider=(1, 20, 1),
    )
    contrast_start: float = setting(
        0.0,
        "Contrast from (0-1)",
        "The contrast begins at this fraction of the steps.",
        minimum=0.0,
        maximum=1.0,
        slider=(0.0, 1.0, 0.05),
    )
    contrast_end: float = setting(
        1.0,
        "Contrast until (0-1)",
        "The contrast ends at this fraction of the steps.",
        minimum=0.0,
        maximum=1.0,
        slider=(0.0, 1.0, 0.05),
    )
    negative_weight: float = setting(
        1.0,
        "Negative prompt weight",
        "Factor on the LoRAs where the model sees the negative prompt, in the denoiser. 1: as for the prompt. 0: none of them there "
        "(CRAFT-LoRA's asymmetric guidance).",
        minimum=0.0,
        slider=(0.0, 2.0, 0.05),
    )
    loser: float = setting(
        0.0,
        "Weight of the losers",
        "For methods that choose one LoRA for each layer: how much of the others is used there all the same. 0: nothing, as in the papers. "
        "0.5: half a choice. 1: the plain sum.",
        minimum=0.0,
        maximum=1.0,
        slider=(0.0, 1.0, 0.05),
    )
    switch_every: int = setting(
        5,
        "Steps of a turn (switch)",
        "For the method switch: after how many steps the next LoRA has its turn.",
        minimum=1,
        slider=(1, 20, 1),
    )
    density: float = setting(
        0.2,
        "Density (ties, dare)",
        "For the methods ties and dare: the share of each LoRA's weights that is kept.",
        minimum=0.01,
        maximum=1.0,
        slider=(0.05, 1.0, 0.05),
    )
    dare_seed: int = setting(
        0,
        "Seed (dare)",
        "For the method dare: which weights are kept by chance.",
        minimum=0,
    )
    tilt: float = setting(
        0.0,
        "More subject (-1) or more style (1)",
        "One slider between the two sides, for every method. 0: the weights as they are. Towards -1 the style's weights fall to nothing, "
        "towards 1 the subject's; the other side keeps its own. Methods that choose by something else than the weights follow it too.",
        minimum=-1.0,
        maximum=1.0,
        slider=(-1.0, 1.0, 0.05),
    )
    tune: str = setting(
        "off",
        "Tune",
        "auto: before the first picture, small pictures at a few tilts between subject and style and a few contrasts are made, and the "
        "settings of the best are used; they are kept, so that the same job has them at once. Needs the guidance's CLIP and DINO encoders. "
        "Measured in a small world of our own it finds nothing better than the default on average: look at the small pictures yourself.",
        choices=("off", "auto"),
    )

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        if self.start > self.end:
            raise SettingsError(f"start ({format_value(self.start)}) must not be after end ({format_value(self.end)})")
        if self.contrast_start > self.contrast_end:
            begin, end = format_value(self.contrast_start), format_value(self.contrast_end)
            raise SettingsError(f"contrast_start ({begin}) must not be after contrast_end ({end})")
        for side in LORA_FIELDS:
            self.given_schedules(side)
            self._block_texts(side)
        try:
            self.for_hires()
        except SettingsError as error:
            raise SettingsError(f"hr: {error}") from None

    @property
    def subjects(self) -> tuple[str, ...]:
        """The names of the subject's LoRAs."""
        return split_names(self.subject)

    @property
    def styles(self) -> tuple[str, ...]:
        """The names of the style's LoRAs."""
        return split_names(self.style)

    @property
    def subject_schedules(self) -> tuple[Schedule, ...]:
        """The weight of each of the subject's LoRAs, with the tilt; of as many as are written where none has a name."""
        return tuple(schedule.times(self.tilted(subject=True)) for schedule in self.given_schedules("subject"))

    @property
    def style_schedules(self) -> tuple[Schedule, ...]:
        """The weight of each of the style's LoRAs, with the tilt; of as many as are written where none has a name."""
        return tuple(schedule.times(self.tilted(subject=False)) for schedule in self.given_schedules("style"))

    def tilted(self, *, subject: bool) -> float:
        """What the tilt t multiplies a side by: min(1, 1 - t) for the subject, min(1, 1 + t) for the style."""
        return min(1.0, 1.0 - self.tilt if subject else 1.0 + self.tilt)

    @property
    def guidance_weights(self) -> tuple[float, float, float]:
        """Of the similarities, with the tilt: content_weight, style_clip_weight, style_dino_weight."""
        subject, style = self.tilted(subject=True), self.tilted(subject=False)
        return subject * self.content_weight, style * self.style_clip_weight, style * self.style_dino_weight

    @property
    def subject_block_texts(self) -> tuple[BlockText, ...]:
        """The factors on the blocks for each of the subject's LoRAs; for as many as are written where none has a name."""
        return self._block_texts("subject")

    @property
    def style_block_texts(self) -> tuple[BlockText, ...]:
        """The factors on the blocks for each of the style's LoRAs; for as many as are written where none has a name."""
        return self._block_texts("style")

    def for_hires(self) -> FuseSettings:
        """The settings of the hires pass: hr, where it is given, takes the weights' place."""
        weights = zip(LORA_FIELDS, self.hr.split("/"), strict=False)
        given = {f"{side}_weight": text for side, text in weights if text}
        return dataclasses.replace(self, **given, hr="") if given else self  # type: ignore[arg-type]

    def given_schedules(self, side: str) -> tuple[Schedule, ...]:
        """The weights of a side's LoRAs as they are written, without the tilt."""
        value = getattr(self, f"{side}_weight")
        schedules = [Schedule.of(text) for text in split_each(value)] if isinstance(value, str) else [Schedule.of(value)]
        return one_each(schedules, len(split_names(getattr(self, side))) or len(schedules), f"{side}_weight")

    def _block_texts(self, side: str) -> tuple[BlockText, ...]:
        texts = [parse_blocks(text) for text in split_each(getattr(self, f"{side}_blocks"))]
        return one_each(texts, len(split_names(getattr(self, side))) or len(texts), f"{side}_blocks")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FuseSettings:
        """Settings from typed values (API, panel). The key "preset" names one of PRESETS; other keys go before its values.

        Raises SettingsError that names unknown keys and wrong types.
        """
        values = dict(values)
        preset = preset_values(values.pop(PRESET)) if PRESET in values else {}
        known = field_types()
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise SettingsError(f"unknown setting {', '.join(map(shown, unknown[:9]))}; {_meant(unknown, known)}")
        return cls(**{**preset, **values})

    @classmethod
    def from_text(cls, values: Mapping[str, str]) -> FuseSettings:
        """Settings from strings (tag, infotext). Raises SettingsError as from_mapping does."""
        known = field_types()
        return cls.from_mapping({key: parse_value(key, text) if key in known else text for key, text in values.items()})

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in the order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


_own_presets: Callable[[], Mapping[str, Mapping[str, Any]]] = dict

PRESET = "preset"
"""The key that stands for many fields at once. It is no field: what is stored and shown are the fields' values."""

_PAPER: dict[str, Any] = {
    "method": "dynfuse",
    "criterion": "kl",
    "granularity": "image",
    "scope": "attention",
    "temperature": "raw",
    "balance": "none",
    "bias": 1.0,
    "one_sided": "apply",
    "guidance": True,
    "m": 10.0,
    "content_weight": 1 / 3,
    "style_clip_weight": 1 / 3,
    "style_dino_weight": 1 / 3,
    "start": 0.0,
    "end": 1.0,
    "every": 1,
    "gradient": "exact",
    "decoder": "vae",
    "limit": 0.0,
    "decide": "now",
    "decide_every": 1,
    "vote_tokens": 0,
    "contrast": 0.0,
    "style_contrast": 0.0,
    "subject_contrast": 0.0,
    "contrast_every": 1,
    "contrast_start": 0.0,
    "contrast_end": 1.0,
    "negative_weight": 1.0,
    "loser": 0.0,
    "tune": "off",
}
"""Sections 4.1, 4.2 and 5.1 of the paper (arXiv 2602.15539); what it leaves open is as in the defaults."""

_DEFAULT = {name: FuseSettings.__dataclass_fields__[name].default for name in _PAPER}

PRESETS: dict[str, Mapping[str, Any]] = {
    "default": _DEFAULT,
    "best": {**_DEFAULT, "contrast": 2.0, "contrast_every": 1},
    "paper": _PAPER,
}
"""Values of the same fields each, so that one takes back what another set."""


def preset_values(name: Any) -> Mapping[str, Any]:
    """The fields that a preset sets. Raises SettingsError for a name that is not known."""
    known = {**_own_presets(), **PRESETS}
    if not isinstance(name, str) or name not in known:
        raise SettingsError(f"{PRESET} must be one of {', '.join([*PRESETS, *_own_presets()])}, not {shown(name)}")
    return known[name]


def preset_names() -> tuple[str, ...]:
    """Ours, then the user's own."""
    return (*PRESETS, *_own_presets())


def _meant(unknown: Iterable[str], known: Iterable[str]) -> str:
    close = [match for name in unknown for match in difflib.get_close_matches(name, list(known), n=2)]
    return f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "docs/settings.md lists those that there are"


def use_own_presets(source: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
    """source: gives the presets that the user has now, name -> fields."""
    global _own_presets
    _own_presets = source


@functools.cache
def field_types() -> Mapping[str, Any]:
    """The fields of FuseSettings and their types, in the order of declaration."""
    hints = get_type_hints(FuseSettings)
    return MappingProxyType({f.name: hints[f.name] for f in dataclasses.fields(FuseSettings)})


def default_value(name: str) -> Any:
    """Of a field of FuseSettings."""
    return FuseSettings.__dataclass_fields__[name].default


def field_metadata(name: str) -> Mapping[str, Any]:
    """label, tooltip, choices, minimum, maximum, slider, picture and canonical of a field (see setting), as they are now."""
    metadata = FuseSettings.__dataclass_fields__[name].metadata
    told = {key: metadata[key]() for key in ("tooltip", "choices") if callable(metadata[key])}
    return {**metadata, **told} if told else metadata


def parse_value(name: str, text: str) -> Any:
    """The typed value that a tag's, an infotext's or a command line's text means. Raises SettingsError."""
    kind = field_types()[name]
    if canonical := field_metadata(name)["canonical"]:
        return canonical(name, text.strip())
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise SettingsError(f"{name} must be a number, not {shown(text)}") from None
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{name} must be a whole number, not {shown(text)}") from None
    if kind is bool:
        lower = text.strip().lower()
        if lower not in ("true", "false"):
            raise SettingsError(f"{name} must be true or false, not {shown(text)}")
        return lower == "true"
    return text.strip()


def format_value(value: Any) -> str:
    """The shortest text that parse_value reads back as the same value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number_text(value)
    return str(value)


def _checked(name: str, kind: Any, value: Any) -> Any:
    metadata = field_metadata(name)
    if metadata["canonical"]:
        return metadata["canonical"](name, value)
    if kind is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{name} must be true or false, not {shown(value)}")
        return value
    if kind in (int, float):
        return _in_range(name, _number(name, kind, value))
    value = _text(name, value)
    if metadata["choices"] and value not in metadata["choices"]:
        raise SettingsError(f"{name} must be one of {', '.join(metadata['choices'])}, not {shown(value)}")
    return value


def _number(name: str, kind: type, value: Any) -> float:
    # bool is an int in Python; a JSON true is no weight.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"{name} must be a {'whole ' if kind is int else ''}number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise SettingsError(f"{name} must be a finite number, not {shown(value)}")
    if kind is float:
        return number
    # A slider of the panel sends 2.0 for 2.
    if number != int(number):
        raise SettingsError(f"{name} must be a whole number, not {format_value(value)}")
    if abs(number) >= _WHOLE:
        raise SettingsError(f"{name} must be less than {_WHOLE}, not {shown(value)}")
    return int(value)


def _in_range(name: str, value: float) -> float:
    metadata = field_metadata(name)
    if metadata["minimum"] is not None and value < metadata["minimum"]:
        raise SettingsError(f"{name} must be at least {format_value(metadata['minimum'])}, not {format_value(value)}")
    if metadata["maximum"] is not None and value > metadata["maximum"]:
        raise SettingsError(f"{name} must be at most {format_value(metadata['maximum'])}, not {format_value(value)}")
    return value
