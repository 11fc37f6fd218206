"""Layer names: the keys of LoRA files and the layers of models, brought together.

Files name layers in many dialects, and a kohya name ("lora_unet_down_blocks_1_...") cannot be split into a module path without
the model. So both sides meet in flat names: the layer's path in the file's or the model's own scheme, with "." replaced by "_".
A model's layer has one flat name per scheme that may name it; each is an alias of one or more sites.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Output rows [start, start + length) of a layer, counted in units of total/units rows: q of a fused qkv is Part(0, 1, 3)."""

    start: int
    length: int
    units: int


@dataclass(frozen=True)
class Site:
    """A place where one decision is made: a layer of the model (dotted path), or a part of a fused layer.

    A fused layer (Flux's qkv and linear1) is always several sites, whichever dialect names it, so that the same LoRA gives
    the same image in every dialect and layout.
    """

    layer: str
    part: Part | None = None


@dataclass(frozen=True)
class Alias:
    """One site that a flat name denotes, and the part of the file's tensors that belongs to it (None: all)."""

    site: Site
    source: Part | None = None
