"""Stable Diffusion's parts at their smallest, with random weights, and LoRAs for them: where the numbers matter and not the picture."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

_TEXT_WIDTH = 24
_START, _END = "<|startoftext|>", "<|endoftext|>"


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


def write_random_lora(path: Path, pipeline: Any, *, rank: int, strength: float, seed: int, text: bool = True) -> None:
    """A kohya-style LoRA file on all linear layers and residual convolutions of the U-Net and, if wanted, of the text encoder.

    strength: standard deviation of each branch's output on inputs of unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    networks = [("lora_unet", pipeline.unet)] + ([("lora_te", pipeline.text_encoder)] if text else [])
    for prefix, network in networks:
        for name, module in network.named_modules():
            if not _carries_lora(name, module):
                continue
            weight = module.weight
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) / math.sqrt(weight[0].numel())
            ones = (1,) * (weight.dim() - 2)
            tensors[f"{key}.lora_up.weight"] = strength * torch.randn(weight.shape[0], rank, *ones, generator=generator) / math.sqrt(rank)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, str(path))


def letter_tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of single letters: nothing to download."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), "utf-8")
        merges.write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def _carries_lora(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and name.rsplit(".", 1)[-1] in ("conv1", "conv2", "proj_in", "proj_out")
