"""SDXL and Flux pipelines in miniature with random weights, made without a download, and LoRA files for them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.fakes.small_model import letter_tokenizer, small_pipeline


def clip_config(words, width, projection):
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )


def autoencoder(latent_channels=4):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
    )


def ready(pipeline):
    """As from_pretrained leaves it: without dropout."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd():
    """Stable Diffusion 1.x with two levels: 2 pixels per latent pixel."""
    return small_pipeline("epsilon")


def sdxl():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letter_tokenizer()
        words = len(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=24 + 32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            use_linear_projection=True,
            norm_num_groups=8,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=CLIPTextModel(clip_config(words, 24, 24)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(words, 32, 32)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        )
    return ready(pipeline)


def flux():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letter_tokenizer()
        words = Tokenizer(WordLevel({"</s>": 0, "<unk>": 1, "a": 2, "dog": 3, "in": 4, "park": 5}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(latent_channels=4),
            text_encoder=CLIPTextModel(clip_config(len(tokenizer), 24, 24)),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
            tokenizer_2=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="</s>", model_max_length=16),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=24,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    return ready(pipeline)


def write_lora(path, pipeline, networks, *, rank=4, strength=0.3, seed=0):
    """A file on the attention layers of the networks, (component, prefix of its keys) each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for component, prefix in networks:
        for name, module in getattr(pipeline, component).named_modules():
            if isinstance(module, nn.Linear) and ("attn" in name or "SelfAttention" in name):
                out, width = module.weight.shape
                key = f"{prefix}_{name.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
                tensors[f"{key}.lora_up.weight"] = strength * torch.randn(out, rank, generator=generator)
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path
