"""The base model: U-Net and text tower together, on latents that are encoded once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..captions import training_caption
from ..model import load_vae, new_text_encoder, new_unet, save_network, save_text_encoder, tokenizer
from ..painter import Scene
from .loop import TrainingLoop
from .pictures import as_floats, as_tensor, base_scene, kept

STEPS = 4400
BATCH = 64
PICTURES = 30_000
RATE = 1.5e-3
_SEED = 11
_MIN_SNR = 5.0


def train_base(work: Path, weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Writes unet.safetensors and text_encoder.safetensors; needs vae.safetensors. Returns what is worth recording."""
    latents, scenes = _dataset(work / "latents.pt", weights / "vae.safetensors")
    torch.manual_seed(_SEED)
    unet, text = new_unet().train(), new_text_encoder().train()
    loop = TrainingLoop("base", {"unet": unet, "text": text}, steps=steps, rate=RATE, checkpoint=work / "base.pt", seed=_SEED)
    noises = alphas()
    rng = random.Random(_SEED + loop.step)
    for _ in loop:
        chosen = torch.randint(len(latents), (BATCH,))
        context = encoded([training_caption(scenes[index], rng) for index in chosen.tolist()], text)
        loss, error = denoising_loss(unet, latents[chosen], context, noises)
        loop.descend(loss, error=error)
    loop.finish()
    save_network(unet, weights / "unet.safetensors")
    save_text_encoder(text, weights / "text_encoder.safetensors")
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": BATCH, "error": loop.figures["error"]}


def denoising_loss(unet: nn.Module, latents: Tensor, context: Tensor, alphas_cumprod: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss, weighted by min(SNR, 5)^power / SNR, and the plain mean squared error of the predicted noise.

    power: 1 for min-SNR (arXiv 2303.09556); less gives more weight to the noisiest times, which decide on colours and places.
    latents: (B, *LATENT), scaled. context: (B, 77, TEXT_WIDTH). alphas_cumprod: (1000,).
    """
    times = torch.randint(len(alphas_cumprod), (len(latents),))
    alpha = alphas_cumprod[times]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt().view(-1, 1, 1, 1) * latents + (1 - alpha).sqrt().view(-1, 1, 1, 1) * noise
    errors = (unet(noisy, times, context).sample - noise).pow(2).mean((1, 2, 3))
    ratio = alpha / (1 - alpha)
    return (errors * ratio.clamp(max=_MIN_SNR) ** power / ratio).mean(), errors.detach().mean()


def alphas() -> Tensor:
    """(1000,): Stable Diffusion's cumulative alphas."""
    from ..model import new_scheduler

    return new_scheduler().alphas_cumprod.clone()


_tokens: dict[str, Tensor] = {}


def encoded(captions: list[str], text: nn.Module) -> Tensor:
    """(B, 77, TEXT_WIDTH); each caption goes through the text tower once."""
    distinct = sorted(set(captions))
    for caption in distinct:
        if caption not in _tokens:
            _tokens[caption] = torch.tensor(tokenizer()(caption, padding="max_length", max_length=77).input_ids)
    states = text(torch.stack([_tokens[caption] for caption in distinct])).last_hidden_state
    place = {caption: index for index, caption in enumerate(distinct)}
    return states[torch.tensor([place[caption] for caption in captions])]


@torch.no_grad()
def latents_of(pictures: Tensor, vae: Any) -> Tensor:
    """(B, 3, 64, 64) uint8 -> (B, *LATENT), scaled to unit variance; the means, without the autoencoder's noise."""
    return torch.cat([vae.encode(as_floats(part)).latent_dist.mean for part in pictures.split(64)]) * vae.config.scaling_factor


def _dataset(path: Path, vae_path: Path) -> tuple[Tensor, list[Scene]]:
    """The latents of PICTURES painted scenes, and the scenes."""
    rng = random.Random(_SEED)
    scenes = [base_scene(rng) for _ in range(PICTURES)]

    def latents() -> Tensor:
        vae = load_vae(vae_path)
        starts = tqdm(range(0, PICTURES, 500), desc="latents", unit="x500")
        return torch.cat([latents_of(as_tensor(scenes[start : start + 500], random.Random(_SEED + 1 + start)), vae) for start in starts])

    return kept(path, latents), scenes


__all__ = ["BATCH", "STEPS", "alphas", "denoising_loss", "encoded", "latents_of", "train_base"]
