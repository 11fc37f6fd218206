"""PEFT's settings of an adapter, which its tensors do not tell: the strength alpha/rank, and how rotations are written.

diffusers keeps them in the file's metadata, PEFT in a file adapter_config.json beside it. What the tensors say themselves goes before.
They are given to the kinds as further tensors: "scale", "series", "freedom", "scales_input" (kinds.py, rotations.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..printable import printable, shown
from .branch import LoraError
from .contents import ENDINGS
from .naming import KeyName

METADATA = "lora_adapter_metadata"
SIDECAR = "adapter_config.json"

# Longer texts hold no settings.
_LONGEST = 2_000_000
# diffusers begins the settings' names with the model's part.
_PARTS = {
    "denoiser": ("transformer", "unet", ""),
    "te1": ("text_encoder", ""),
    "te2": ("text_encoder_2", ""),
    "t5": ("text_encoder_3", "text_encoder_2", ""),
}
# Ways to begin a training that change the base model as well, so that the file alone is not the LoRA.
_ON_ANOTHER_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class Alpha:
    """What a layer's strength alpha/rank was made from; alpha/sqrt(rank) for rslora. source: in words."""

    value: float
    source: str
    rslora: bool = False


class AdapterConfig:
    """The settings that belong to a file. Every method raises LoraError, with a reason that the reader completes by the file."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        self._path, self._metadata = path, metadata
        self._parts: dict[str, _Part] | None = None
        self._failure: LoraError | None = None
        self._source = ""

    def of(self, name: KeyName, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Alpha | None]:
        """(further tensors of a layer, what its strength is made from) for the layer of this name. tensors: by their roles."""
        if (rank := _rank(tensors)) is not None:
            return self._scaled(name, tensors, rank)
        if "oft_R" in tensors:
            return self._part(name).rotation(), None
        if "oft_r" in tensors:
            return self._part(name).freedom(), None
        if "ia3_l" in tensors:
            return self._part(name).side(name.path), None
        return {}, None

    def _scaled(self, name: KeyName, tensors: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], Alpha | None]:
        for role, factor in (("scale", rank or 1), ("alpha", 1)):
            if role in tensors:
                return {}, Alpha(float(tensors[role]) * factor, "the file's tensors") if tensors[role].numel() == 1 else None
        part = self._part(name)
        value = part.alpha(name.path)
        if value is None:
            return {}, None
        said = part.rank(name.path)
        if rank and said is not None and said != rank:
            raise LoraError(f"its rank is {rank}, where {self._source} says {said}")
        rank = said or rank
        if not rank:
            raise LoraError(f"{self._source} gives it an alpha but no rank")
        rslora = part.flag("use_rslora")
        scale = value / math.sqrt(rank) if rslora else value / rank
        return {"scale": torch.tensor(scale, dtype=torch.float64)}, Alpha(value, self._source, rslora)

    def _part(self, name: KeyName) -> _Part:
        if self._failure is not None:
            raise self._failure
        if self._parts is None:
            try:
                self._parts = self._read()
            except LoraError as error:
                self._failure = error
                raise
        for part in _PARTS[name.component]:
            if part in self._parts:
                return self._parts[part]
        return _NO_SETTINGS

    def _read(self) -> dict[str, _Part]:
        """The settings by the model's part that they are for, "" for all parts."""
        if text := self._metadata.get(METADATA, ""):
            self._source = f"its metadata ({METADATA})"
            parts: dict[str, dict[str, Any]] = {}
            for key, value in _object(text, self._source).items():
                part, dot, setting = key.partition(".")
                parts.setdefault(part if dot else "", {})[setting if dot else key] = value
            return {part: _Part(settings, self._source) for part, settings in parts.items()}
        if (sidecar := _sidecar(self._path)) is None:
            return {}
        self._source = SIDECAR
        try:
            text = sidecar.read_bytes()[: _LONGEST + 1].decode()
        except (OSError, UnicodeDecodeError):
            raise LoraError(f"{SIDECAR} beside it cannot be read") from None
        return {"": _Part(_object(text, SIDECAR), SIDECAR)}


@dataclass(frozen=True)
class _Part:
    """Settings of one model. Values are checked when they are asked for."""

    settings: Mapping[str, Any]
    source: str
    _patterns: dict[str, _Patterns] = field(default_factory=dict)

    def alpha(self, module: str) -> float | None:
        """Of a module, by its dotted path; None where nothing is said."""
        default = self.settings.get("lora_alpha", self.settings.get("alpha"))
        value = self._by_module("alpha_pattern", module, default)
        if value is not None:
            self._refuse_another_base()
        return None if value is None else self._number("alpha", value)

    def rank(self, module: str) -> int | None:
        value = self._by_module("rank_pattern", module, self.settings.get("r"))
        if value is None:
            return None
        number = self._number("rank", value)
        if number < 1 or number != int(number):
            raise LoraError(f"{self.source} says that its rank is {shown(value)}")
        return int(number)

    def flag(self, name: str) -> bool:
        value = self.settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise LoraError(f"{self.source} says that {name} is {shown(value)}")
        return bool(value)

    def rotation(self) -> dict[str, Tensor]:
        """How a vector becomes a rotation (rotations.peft_oft)."""
        if not self.settings:
            raise LoraError(f"its rotations (oft_R) can be read only with PEFT's {SIDECAR} beside it")
        series: list[float] = []
        if self.flag("use_cayley_neumann"):
            terms = self._number("num_cayley_neumann_terms", self.settings.get("num_cayley_neumann_terms", 5))
            if terms != int(terms) or not 1 <= terms <= 100:
                raise LoraError(f"{self.source} says that its num_cayley_neumann_terms is {shown(terms)}")
            series = _neumann(int(terms), _version(self.settings.get("peft_version")))
        return {"series": torch.tensor(series, dtype=torch.float64), **self.freedom()}

    def freedom(self) -> dict[str, Tensor]:
        """How far rotations may go, where that is limited."""
        if not self.flag("coft"):
            return {}
        return {"freedom": torch.tensor(self._number("eps", self.settings.get("eps", 6e-5)), dtype=torch.float64)}

    def side(self, module: str) -> dict[str, Tensor]:
        """Whether an IA3 vector scales inputs or outputs, where that is said."""
        names = self.settings.get("feedforward_modules")
        if not isinstance(names, list):
            return {}
        return {"scales_input": torch.tensor(float(any(isinstance(name, str) and module.endswith(name) for name in names)))}

    def _by_module(self, name: str, module: str, default: Any) -> Any:
        patterns = self.settings.get(name)
        if not patterns:
            return default
        if not isinstance(patterns, dict):
            raise LoraError(f"{self.source} has a {name} that names no layers")
        if name not in self._patterns:
            self._patterns[name] = _Patterns(patterns, f"{self.source} has a {name}")
        return self._patterns[name].get(module, default)

    def _number(self, what: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise LoraError(f"{self.source} says that its {what} is {shown(value)}")
        return number

    def _refuse_another_base(self) -> None:
        begun = self.settings.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_ON_ANOTHER_BASE):
            raise LoraError(f"it was trained on a changed base model ({printable(begun, 32)}); PEFT can save it as an ordinary LoRA")


_NO_SETTINGS = _Part({}, "")


class _Patterns:
    """Values by modules' names or ends of them, "to_q" or "blocks.0.attn.to_q", or by simple regular expressions; the first counts."""

    def __init__(self, patterns: Mapping[str, Any], owner: str):
        self._names: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for index, (pattern, value) in enumerate(patterns.items()):
            plain = pattern.replace(r"\.", ".").removesuffix("$")
            if re.fullmatch(r"\^?[\w.-]+", plain):
                self._names.setdefault(plain, (index, value))
            else:
                self._expressions.append((index, _expression(pattern, owner), value))
        if len(self._expressions) > 20:
            raise LoraError(f"{owner} with {len(self._expressions)} regular expressions")

    def get(self, module: str, default: Any) -> Any:
        ends = [module, *(module[found.end() :] for found in re.finditer(r"\.", module))]
        found = [self._names[name] for name in (f"^{module}", *ends) if name in self._names]
        found += [(index, value) for index, pattern, value in self._expressions if any(pattern.fullmatch(end) for end in ends)]
        return min(found, key=lambda item: item[0])[1] if found else default


def _expression(pattern: str, owner: str) -> re.Pattern[str]:
    """A regular expression that needs no more than the square of a name's length. Raises LoraError for others."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) <= 500 and repeats <= 2 and not re.search(r"\)[*+?{]|\(\?|\\\d", pattern):
        try:
            return re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            pass
    raise LoraError(f"{owner} that is not understood: {shown(pattern)}")


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if len(text) <= _LONGEST else None
    except (ValueError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, dict):
        raise LoraError(f"{source} cannot be read")
    return value


def _sidecar(path: Path) -> Path | None:
    """PEFT's settings beside a file; where several weights lie in one folder, they belong to adapter_model only."""
    sidecar = path.parent / SIDECAR
    try:
        if not sidecar.is_file():
            return None
        alone = path.stem == "adapter_model" or sum(file.suffix.lower() in ENDINGS for file in path.parent.iterdir()) == 1
    except OSError:
        return None
    return sidecar if alone else None


def has_strength(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a kind's strength is alpha/rank, by the roles of its tensors."""
    return _rank(tensors) is not None


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank of a kind whose strength is alpha/rank, as its tensors tell it; 0 where they do not; None for other kinds."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in tensors:
            return tensors[role].shape[0] if tensors[role].dim() else 0
    return 0 if "lokr_w1" in tensors else None


def _neumann(terms: int, version: tuple[int, int]) -> list[float]:
    """Coefficients of the powers of the skew-symmetric matrix, from the 0th, in PEFT's series for a rotation."""
    if terms < 3:
        return [1.0, 2.0][:terms]
    # Since 0.18 the last power counts once, and the count of terms is off by one below four.
    return [1.0] + [2.0] * (max(terms, 4) - 2) + [1.0] if version >= (0, 18) else [1.0] + [2.0] * (terms - 1)


def _version(text: Any) -> tuple[int, int]:
    """Of PEFT, which writes it since 0.18."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


__all__ = ["METADATA", "SIDECAR", "AdapterConfig", "Alpha", "has_strength"]
