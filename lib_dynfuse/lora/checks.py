"""What the kinds ask of a layer's tensors. Reasons are completed by the reader, which knows the file and the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .branch import LoraError

Tensors = Mapping[str, Tensor]


def scale_of(tensors: Tensors, rank: int) -> float:
    """alpha / rank; 1 without alpha; `scale`, which a few old files have, overrides both."""
    need(rank > 0, "its rank is 0")
    if "scale" in tensors:
        return number_of(tensors["scale"])
    return number_of(tensors["alpha"]) / rank if "alpha" in tensors else 1.0


def number_of(tensor: Tensor) -> float:
    need(tensor.numel() == 1, f"a tensor that should be one number is {size_text(tensor)}")
    number = float(tensor.item())
    need(math.isfinite(number), f"its alpha is {number}")
    return number


def checked_bias(bias: Tensor | None, out: int | None) -> Tensor | None:
    if bias is not None:
        need(bias.dim() == 1 and out in (None, bias.shape[0]), f"its bias is {size_text(bias)} for {out} rows")
    return bias


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise LoraError(reason)


def size_text(tensor: Tensor) -> str:
    return times(tensor.shape)


def times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape else "a single number"


def listing(roles: frozenset[str] | set[str]) -> str:
    names = {"down": "lora_down", "up": "lora_up", "mid": "lora_mid"}
    return ", ".join(sorted(names.get(role, role) for role in roles))


__all__ = ["Tensors", "checked_bias", "listing", "need", "number_of", "scale_of", "size_text", "times"]
