"""The autoencoder, in two stages: both halves together, then the decoder alone on a frozen encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..model import load_vae, new_vae, save_network
from .loop import TrainingLoop
from .pictures import as_floats, as_tensor, autoencoder_scene, kept

STEPS = 12_000
DECODER_STEPS = 2200
BATCH = 12
PICTURES = 40_000
_SEED = 3
_COLOUR = 0.15  # of the loss's colour part in the end


def train_autoencoder(work: Path, weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Writes vae.safetensors. Returns what is worth recording."""
    pictures = _pictures(work / "pictures.pt")
    torch.manual_seed(_SEED)
    vae = new_vae().train()
    loop = TrainingLoop("autoencoder", {"vae": vae}, steps=steps, rate=2e-3, checkpoint=work / "autoencoder.pt", seed=_SEED, decay=1e-4)
    for _ in loop:
        picture = _batch(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(picture).latent_dist
        mean, log_variance = latent.mean.float(), latent.logvar.float().clamp(-20, 10)
        with torch.autocast("cpu", torch.bfloat16):
            again = vae.decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).sample
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = again.float() - picture
        colour_weight = max(_COLOUR, 1 - loop.step / (0.3 * steps))
        loop.descend(reconstruction_loss(error, colour_weight) + 1e-4 * divergence, difference=error.abs().mean(), divergence=divergence)
    loop.finish()
    with torch.no_grad():
        means = torch.cat([vae.encode(as_floats(part)).latent_dist.mean for part in pictures[:2048].split(64)])
    save_network(vae, weights / "vae.safetensors", {"scaling_factor": f"{1 / means.std():.5f}"})
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": BATCH, "difference": loop.figures["difference"]}


def train_decoder(work: Path, weights: Path, steps: int = DECODER_STEPS) -> dict[str, Any]:
    """Sharpens the decoder of vae.safetensors; its encoder, and with it every latent, stays as it is."""
    vae = load_vae(weights / "vae.safetensors")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    vae.post_quant_conv.train()
    vae.decoder.train()
    pictures = _pictures(work / "pictures.pt")
    loop = TrainingLoop("decoder", {"vae": vae}, steps=steps, rate=1e-3, checkpoint=work / "decoder.pt", seed=_SEED + 1, decay=1e-4)
    for _ in loop:
        picture = _batch(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latent = vae.encode(picture).latent_dist.mean
            # The denoiser's latents are never quite those of a picture.
            again = vae.decode(latent.float() + 0.05 / vae.config.scaling_factor * torch.randn(latent.shape)).sample
        error = again.float() - picture
        loop.descend(reconstruction_loss(error, _COLOUR), difference=error.abs().mean())
    loop.finish()
    save_network(vae, weights / "vae.safetensors", {"scaling_factor": str(vae.config.scaling_factor)})
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": BATCH, "difference": loop.figures["difference"]}


def reconstruction_loss(error: Tensor, colour_weight: float) -> Tensor:
    """error: (B, 3, H, W), reconstruction minus picture. colour_weight: 1 at first, less once the pictures have colours.

    Group norms make colour hard to learn: without that part the pictures stay grey for long; with it, outlines stay soft for long.
    """
    colour = error - error.mean(1, keepdim=True)
    coarse = F.avg_pool2d(error, 8)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    in_colour = 3 * (colour.abs().mean() + colour.square().mean()) + 2 * coarse.abs().mean() + 4 * coarse.square().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.7 * edges + colour_weight * in_colour


def _batch(pictures: Tensor) -> Tensor:
    batch = as_floats(pictures[torch.randint(len(pictures), (BATCH,))])
    return torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(3), batch)


def _pictures(path: Path) -> Tensor:
    """(PICTURES, 3, 64, 64) uint8."""

    def painted() -> Tensor:
        rng = random.Random(_SEED)
        starts = tqdm(range(0, PICTURES, 500), desc="pictures", unit="x500")
        return torch.cat([as_tensor([autoencoder_scene(rng) for _ in range(min(500, PICTURES - start))], rng) for start in starts])

    return kept(path, painted)


__all__ = ["BATCH", "DECODER_STEPS", "STEPS", "reconstruction_loss", "train_autoencoder", "train_decoder"]
