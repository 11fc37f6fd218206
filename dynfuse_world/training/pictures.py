"""Painted pictures as tensors, and the choice of scenes that the base model and the autoencoder see."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..painter import CLASSES, JUNK, STYLES, Scene, paint

Kept = TypeVar("Kept", Tensor, tuple[Tensor, ...])

HELD_OUT_PAIRS = frozenset(
    {
        ("house", "neon"),
        ("fish", "pixel"),
        ("tree", "dotted"),
        ("car", "watercolor"),
        ("cup", "sketch"),
        ("star", "sepia"),
        ("cat", "striped"),
        ("boat", "flat"),
        ("mushroom", "neon"),
        ("rocket", "sepia"),
        ("creature", "sketch"),
    }
)
"""A tenth of the pairs of class and style. The base model never sees one: whether it draws them shows that it composes."""


def as_tensor(scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """(B, 3, 64, 64) uint8."""
    pixels = np.stack([np.asarray(paint(scene, rng)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


def as_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return (pictures.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """(B, *LATENT), scaled to unit variance -> (B, 3, 64, 64) uint8."""
    return torch.cat([as_bytes(vae.decode(part / vae.config.scaling_factor).sample) for part in latents.split(64)])


def base_scene(rng: random.Random) -> Scene:
    """What the base model sees: every class in every style but HELD_OUT_PAIRS, characters more often, and nameless styles."""
    while True:
        what = rng.choice((*CLASSES, "creature", "robot"))
        style = rng.choice(list(STYLES)) if rng.random() < 0.68 else None
        if (what, style) not in HELD_OUT_PAIRS:
            return Scene(what, style)


def autoencoder_scene(rng: random.Random) -> Scene:
    """Nameless styles more often, and shapes without an object, so that what is held out is nothing new to the autoencoder."""
    if rng.random() < 0.06:
        return Scene(JUNK)
    what = rng.choice(CLASSES) if rng.random() < 0.5 else rng.choice(("creature", "robot"))
    return Scene(what, None if rng.random() < 0.5 else rng.choice(list(STYLES)))


def kept(path: Path, make: Callable[[], Kept]) -> Kept:
    """What make() gives: made once and kept in the file, which is whole or not there."""
    if path.is_file():
        found: Kept = torch.load(path, weights_only=True)
        return found
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(made, unfinished)
    unfinished.replace(path)
    return made


__all__ = ["HELD_OUT_PAIRS", "as_bytes", "as_floats", "as_tensor", "autoencoder_scene", "base_scene", "decoded", "kept"]
