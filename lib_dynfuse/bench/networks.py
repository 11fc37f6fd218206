"""Networks of real size with random weights: what the guidance runs beside the U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..guidance.encoders import Encoders, ImageEncoder

# The published configurations of the VAEs (their model cards' vae/config.json); TAESD's is AutoencoderTiny's own default.
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# CLIP ViT-B/32 (open_clip's table of architectures) and DINO ViT-S/16 (facebook/dino-vits16's config.json).
_CLIP = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
_CLIP_WIDTH = 512
_DINO = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 16}
_HALF = (0.5, 0.5, 0.5)


def vae_decoder(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """AutoencoderKL's decoding part, from its own units to pictures."""
    from diffusers import AutoencoderKL

    with torch.device(device):
        vae = AutoencoderKL(**_VAE)
    return _ready(nn.Sequential(vae.post_quant_conv, vae.decoder), dtype)


def taesd_decoder(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderTiny

    with torch.device(device):
        return _ready(AutoencoderTiny().decoder, dtype)


def encoders(device: torch.device) -> Encoders:
    """CLIP ViT-B/32 and DINO ViT-S/16, float32."""
    from open_clip.model import _build_vision_tower
    from transformers import ViTConfig, ViTModel

    with torch.device(device):
        clip = _build_vision_tower(_CLIP_WIDTH, dict(_CLIP), True)
        dino = ClassToken(ViTModel(ViTConfig(**_DINO), add_pooling_layer=False))
    networks = (_ready(network, torch.float32) for network in (clip, dino))
    clip_encoder, dino_encoder = (ImageEncoder(network, 224, _HALF, _HALF) for network in networks)
    return Encoders(clip_encoder, dino_encoder, "random")


class ClassToken(nn.Module):
    """A ViT's class token, DINO's feature of a picture."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vit(pixel_values=pictures).last_hidden_state[:, 0]


def _ready(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    return network.to(dtype).eval().requires_grad_(False)


__all__ = ["SCALING", "ClassToken", "encoders", "taesd_decoder", "vae_decoder"]
