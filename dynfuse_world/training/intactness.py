"""Training of the judge of intactness: whole pictures against painted flaws, and against latents that went wrong.

Generated pictures go wrong in their latents: they stay between two pictures, or noise is left in them. A judge that has seen painted flaws
only takes most of these for intact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..judges import STYLE_NAMES, SUBJECT_NAMES, Judges, load_judges
from ..model import load_vae, save_network
from .base import latents_of
from .flawed import batch, example, softened
from .loop import TrainingLoop
from .pictures import as_bytes, as_floats, decoded, kept

STEPS = 9000
BATCH = 64
RATE = 3e-3
_SEED = 8_001
_PAINTED = 9000
_LATENTS = 2500  # good pictures, each of which is decoded in every way of LATENT_FLAWS
_CALIBRATED = 1500

_KINDS = {
    "good": 0.42,
    "one part": 0.02,
    "incomplete": 0.08,
    "displaced": 0.08,
    "warped": 0.08,
    "cut": 0.03,
    "blurry": 0.04,
    "erased": 0.05,
    "shuffled": 0.03,
    "ghosts": 0.06,
    "halves": 0.06,
    "junk": 0.03,
    "nothing": 0.02,
}
"""Of the painted pictures, as often as they are met. Kinds whose intactness nobody can say are left out."""

Flawed = tuple[Tensor, Tensor]
"""(latents, how far they are intact)."""


def train_intactness(work: Path, weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains one network of judges.safetensors anew; needs vae.safetensors. Returns what is worth recording."""
    vae = load_vae(weights / "vae.safetensors")
    pictures, intact = kept(work / "intactness.pt", lambda: _examples(vae, _SEED, _PAINTED, _LATENTS))
    judges = load_judges(weights / "judges.safetensors")
    torch.manual_seed(_SEED)
    network = Judges().of_intactness.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = TrainingLoop(
        "intactness", {"network": network}, steps=steps, rate=RATE, checkpoint=work / "intactness-net.pt", seed=_SEED, decay=0.02
    )
    generator = torch.Generator()
    for step in loop:
        generator.manual_seed(_SEED + step)
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        shown = softened(_varied(as_floats(pictures[chosen]), generator), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(shown)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits.float(), intact[chosen])
        loop.descend(loss)
    loop.finish()
    judges.of_intactness.load_state_dict(network.to(memory_format=torch.contiguous_format).state_dict())
    pictures, intact = _examples(vae, _SEED - 1, _CALIBRATED, _CALIBRATED // len(LATENT_FLAWS))
    judges.temperatures[2] = _temperature(judges, as_floats(pictures), intact)
    save_network(judges, weights / "judges.safetensors")
    return {
        "steps": loop.step,
        "seconds": round(loop.seconds),
        "batch": BATCH,
        "temperature": float(judges.temperatures[2]),
        **loop.figures,
    }


def _examples(vae: Any, seed: int, painted: int, latents: int) -> Flawed:
    """uint8 pictures and how far they are intact: painted ones (half of them through the autoencoder), and latents gone wrong."""
    rng = random.Random(seed)
    drawn = [example(rng.choices(list(_KINDS), list(_KINDS.values()))[0], rng) for _ in range(painted)]
    pictures, _, _, intact = batch(drawn, SUBJECT_NAMES, STYLE_NAMES)
    half = painted // 2
    parts, truths = [as_bytes(pictures[:half]), decoded(vae, latents_of(as_bytes(pictures[half:]), vae))], [intact.float()]
    good, *_ = batch([example("good", rng) for _ in range(latents)], SUBJECT_NAMES, STYLE_NAMES)
    generator = torch.Generator().manual_seed(seed)
    encoded = latents_of(as_bytes(good), vae)
    for flaw in LATENT_FLAWS.values():
        wrong, truth = flaw(encoded, generator)
        parts.append(decoded(vae, wrong))
        truths.append(truth)
    return torch.cat(parts), torch.cat(truths)


def _varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, a little elsewhere, in other colours: none of which makes a picture less intact."""
    pictures = torch.where(torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5, pictures.flip(3), pictures)
    colours = torch.stack([torch.randperm(3, generator=generator) for _ in pictures])
    pictures = pictures.gather(1, colours[:, :, None, None].expand_as(pictures))
    down, right = torch.randint(0, 7, (2,), generator=generator).tolist()
    height, width = pictures.shape[2:]
    return F.pad(pictures, (3, 3, 3, 3), mode="replicate")[:, :, down : down + height, right : right + width]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _falling(value: Tensor, start: float, end: float) -> Tensor:
    """1 up to start, 0 from end on."""
    return ((end - value) / (end - start)).clamp(0, 1)


def _noisy(latents: Tensor, generator: torch.Generator) -> Flawed:
    """With noise left in, up to twice the latents' own spread (which is 1)."""
    amount = _uniform(len(latents), 0.0, 2.0, generator)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + amount.view(-1, 1, 1, 1) * noise, _falling(amount, 0.4, 1.1)


def _between(latents: Tensor, generator: torch.Generator) -> Flawed:
    """Between two pictures everywhere."""
    share = _uniform(len(latents), 0.0, 0.5, generator)
    others = latents.roll(1, 0)
    weight = share.view(-1, 1, 1, 1)
    # A mean of two has less spread than either.
    mixed = (latents * (1 - weight) + others * weight) / ((1 - weight) ** 2 + weight**2).sqrt()
    return mixed, _falling(share, 0.1, 0.3)


def _patched(latents: Tensor, generator: torch.Generator) -> Flawed:
    """With a part of another picture, whose border is soft."""
    count, _, height, width = latents.shape
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    level = _uniform(count, -1.0, 1.5, generator).view(-1, 1, 1, 1)
    mask = torch.sigmoid(4 * (field - level))
    part = mask.mean((1, 2, 3))
    return latents * (1 - mask) + latents.roll(2, 0) * mask, _falling(torch.minimum(part, 1 - part), 0.05, 0.2)


def _scrambled(latents: Tensor, generator: torch.Generator) -> Flawed:
    """Some places of the latent exchanged for their neighbours."""
    amount = _uniform(len(latents), 0.0, 1.0, generator)
    steps = torch.randint(0, 4, (len(latents), 1, *latents.shape[2:]), generator=generator)
    moved = [latents.roll(1, 2), latents.roll(-1, 2), latents.roll(1, 3), latents.roll(-1, 3)]
    neighbours = sum(torch.where(steps == number, each, 0.0) for number, each in enumerate(moved))
    exchanged = torch.rand(steps.shape, generator=generator) < amount.view(-1, 1, 1, 1)
    return torch.where(exchanged, neighbours, latents), _falling(amount, 0.05, 0.3)


LATENT_FLAWS: Mapping[str, Callable[[Tensor, torch.Generator], Flawed]] = {
    "noisy": _noisy,
    "between": _between,
    "patched": _patched,
    "scrambled": _scrambled,
}


@torch.no_grad()
def _temperature(judges: Judges, pictures: Tensor, intact: Tensor) -> Tensor:
    """By which the answers are to be divided, on pictures that nothing was trained on."""
    logits = torch.cat([judges.of_intactness(part)[:, 0] for part in softened(pictures, torch.Generator()).split(250)])
    candidates = torch.linspace(0.5, 3.0, 101)
    errors = torch.stack([F.binary_cross_entropy_with_logits(logits / t, intact) for t in candidates])
    return candidates[errors.argmin()]


__all__ = ["LATENT_FLAWS", "STEPS", "train_intactness"]
