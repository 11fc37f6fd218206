"""A model on which the score can move: Stable Diffusion's parts at their smallest, made on the spot without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..demo import letter_tokenizer, write_random_lora
from ..lora import LoraFile, read_lora

_TEXT_WIDTH = 24


def small_pipeline(prediction_type: str = "v_prediction", seed: int = 0) -> Any:
    """A StableDiffusionPipeline with two levels, 2 pixels per latent pixel, and random weights. Same seed, same weights.

    With "v_prediction" it is a denoiser, though nothing was trained: of velocity v, D = x / (1 + s^2) - v s / sqrt(1 + s^2), whose first
    part is the exact denoiser of data without structure. The network bends it a little. So what is steered at one step is
    still there at the next.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = letter_tokenizer()
        words = len(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=_TEXT_WIDTH,
            norm_num_groups=8,
        )
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        )
        with torch.no_grad():
            autoencoder.decoder.conv_out.weight.mul_(3.0)  # over the whole range of colours
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=_TEXT_WIDTH,
                intermediate_size=2 * _TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=2,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_loras(folder: Path, pipeline: Any) -> tuple[LoraFile, LoraFile]:
    """A subject and a style LoRA for it, random, written into the folder."""
    files = folder / "subject.safetensors", folder / "style.safetensors"
    for file, rank, seed in zip(files, (8, 4), (1, 3)):
        write_random_lora(file, pipeline, rank=rank, strength=0.7, seed=seed)
    return read_lora(files[0]), read_lora(files[1])


__all__ = ["small_loras", "small_pipeline"]
