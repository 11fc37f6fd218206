"""The miniature world's weights as one Stable Diffusion 1.x checkpoint in the layout of LDM, which is what WebUIs read.

The U-Net's names are LoRA names too, so lora.families knows them; the autoencoder's are here. Its group norms have 8 groups, and LDM's code
has 32 written into it: every channel count is multiplied by four with zeros, which makes the 8 groups the first of 32 and
leaves the outputs as they are. (That is no way for the U-Net, whose layer norms would take their mean over the zeros.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_dynfuse.lora.families.unet import diffusers_to_ldm

from .model import HEADS, LATENT, TEXT_WIDTH, UNET_CHANNELS, VAE_CHANNELS, VAE_GROUPS

_LDM_GROUPS = 32
_PADDING = _LDM_GROUPS // VAE_GROUPS
_LEVELS = len(VAE_CHANNELS)

# diffusers -> LDM, one after the other. Decoders count their levels from the smallest picture here and from the largest there.
_VAE_RENAMINGS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    *((rf"\.up_blocks\.{level}\.", f".up.{_LEVELS - 1 - level}.") for level in range(_LEVELS)),
    (r"\.down_blocks\.", ".down."),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
)


def checkpoint(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a single file, from those of diffusers' U-Net and autoencoder and of transformers' CLIPTextModel."""
    layers = diffusers_to_ldm([name.rpartition(".")[0] for name in unet])
    parts = {
        "model.diffusion_model": {f"{layers[layer]}.{kind}": tensor for (layer, _, kind), tensor in _split(unet)},
        "first_stage_model": {_vae_name(name): _padded(name, tensor) for name, tensor in vae.items()},
        "cond_stage_model.transformer": text_encoder,
    }
    return {f"{part}.{name}": tensor.contiguous() for part, tensors in parts.items() for name, tensor in tensors.items()}


def _split(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, str, str], Tensor]]:
    return [(name.rpartition("."), tensor) for name, tensor in tensors.items()]


def _vae_name(name: str) -> str:
    for pattern, replacement in _VAE_RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _padded(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the autoencoder with four times the channels, and an attention's matrices as the 1 x 1 convolutions that LDM has."""
    if ".attentions." in name and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    if ".to_q." in name:
        tensor = tensor * _PADDING**0.5  # attention divides by the root of the channels, now four times as many
    layer = name.split(".")[-2]
    if layer in ("quant_conv", "post_quant_conv"):
        return tensor
    grown = [1 if layer == "conv_out" else _PADDING, 1 if layer == "conv_in" else _PADDING]  # pictures and latents keep their channels
    shape = [size * factor for size, factor in zip(tensor.shape, grown)] + list(tensor.shape[2:])
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def configuration(scaling_factor: float, text_encoder: str) -> str:
    """The .yaml that a WebUI looks for beside the checkpoint.

    scaling_factor: of the latents. text_encoder: folder with the tokenizer and the text encoder's config.json.
    """
    folder = text_encoder.replace("'", "''")
    return f"""\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: {LATENT[1]}
    channels: {LATENT[0]}
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {scaling_factor}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: {LATENT[1]}
        in_channels: {LATENT[0]}
        out_channels: {LATENT[0]}
        model_channels: {UNET_CHANNELS[0]}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: {[channels // UNET_CHANNELS[0] for channels in UNET_CHANNELS]}
        num_heads: {HEADS}
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {TEXT_WIDTH}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {LATENT[0]}
        ddconfig:
          double_z: true
          z_channels: {LATENT[0]}
          resolution: 64
          in_channels: 3
          out_ch: 3
          ch: {_PADDING * VAE_CHANNELS[0]}
          ch_mult: {[channels // VAE_CHANNELS[0] for channels in VAE_CHANNELS]}
          num_res_blocks: 1
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: '{folder}'
"""


__all__ = ["checkpoint", "configuration"]
