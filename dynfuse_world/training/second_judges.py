"""Training of the second judges: other networks than the first, on other pictures, shown otherwise and learned by another rule."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..judges import STYLE_NAMES, SUBJECT_NAMES, SecondJudges
from ..model import save_network
from .flawed import any_kind, batch, example
from .judges import calibrate, errors, through
from .loop import TrainingLoop
from .pictures import as_bytes, as_floats, kept

STEPS = 4000
BATCH = 64
RATE = 0.05
_SEED = 70_001
_PAINTED = 8000
_DECODED = 5000  # further pictures, which went through the autoencoder
_SHARE_DECODED = 0.65
_DISTURBED = 0.5  # the most noise in their latents, as a share of the latents' spread


def train_second_judges(work: Path, weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Writes judges2.safetensors; needs vae.safetensors. Returns what is worth recording."""
    vae = weights / "vae.safetensors"
    painted = kept(work / "judges2-painted.pt", lambda: _examples(_SEED, _PAINTED))
    decoded = kept(work / "judges2-decoded.pt", lambda: _examples(_SEED - 1, _DECODED, vae))
    torch.manual_seed(_SEED)
    judges = SecondJudges().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = TrainingLoop(
        "second judges",
        {"judges": judges},
        steps=steps,
        rate=RATE,
        checkpoint=work / "judges2.pt",
        seed=_SEED,
        last_rate=0.0,
        decay=5e-4,
        momentum=0.9,
    )
    generator = torch.Generator()
    for step in loop:
        generator.manual_seed(_SEED + step)
        count = round(_SHARE_DECODED * BATCH)
        drawn = [_drawn(decoded, count, generator), _drawn(painted, BATCH - count, generator)]
        pictures, *answers = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        shown = varied(as_floats(pictures), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judges(shown)
        subject, style = errors([each.float() for each in logits], answers)
        loop.descend(subject + style, subject=subject, style=style)
    loop.finish()
    judges.to(memory_format=torch.contiguous_format)
    calibrate(judges, _SEED - 2)
    save_network(judges, weights / "judges2.safetensors")
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": BATCH, "temperatures": judges.temperatures.tolist()}


def _examples(seed: int, count: int, vae: Path | None = None) -> tuple[Tensor, ...]:
    """uint8 pictures of all kinds, and what they show."""
    rng = random.Random(seed)
    pictures, *answers = batch([example(any_kind(rng), rng) for _ in range(count)], SUBJECT_NAMES, STYLE_NAMES)
    return as_bytes(through(vae, pictures, _DISTURBED, seed) if vae is not None else pictures), *answers


def _drawn(examples: tuple[Tensor, ...], count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    chosen = torch.randint(len(examples[0]), (count,), generator=generator)
    return tuple(each[chosen] for each in examples)


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, nearer and elsewhere by a little, brighter or darker, more or less colourful, noisy: as good as before to a person.

    (B, 3, 64, 64) in [-1, 1]. A third keeps its place, so that patterns of single pixels are seen sharp.
    """
    count = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    moved = uniform(0, 1) < 2 / 3
    turn, size = uniform(-0.12, 0.12) * moved, 1 + uniform(-0.08, 0.08) * moved
    cosine, sine = turn.cos() * size, turn.sin() * size
    right, down = (uniform(-0.12, 0.12) * moved for _ in range(2))
    places = torch.stack([torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)], 1)
    grid = F.affine_grid(places, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)

    def each(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * each(uniform(0.85, 1.25))
    light = ((pictures + 1) / 2).clamp(1e-4, 1) ** each(uniform(-math.log(1.2), math.log(1.2)).exp())
    noise = torch.randn(pictures.shape, generator=generator) * each(uniform(0, 0.05))
    return (2 * light - 1 + noise).clamp(-1, 1)


__all__ = ["STEPS", "train_second_judges", "varied"]
