"""The miniature world's model: Stable Diffusion 1.5's parts in their places, narrow, for pictures of 64 x 64 pixels."""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib_dynfuse.guidance.weights import imported

from .captions import words

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped weights."""

LATENT = (4, 8, 8)
"""Channels, height and width of a picture's latent."""
TEXT_WIDTH = 64
VAE_CHANNELS = (32, 64, 64, 64)
VAE_GROUPS = 8
"""Of the autoencoder's group norms. Hosts know 32 only, which would be one channel each: export.py pads."""
UNET_CHANNELS = (64, 128, 64, 64)
HEADS = 4

_TABLE = "text_model.embeddings.token_embedding.weight"


def new_vae() -> Any:
    """An AutoencoderKL with random weights: (B, 3, 64, 64) in [-1, 1] <-> (B, *LATENT)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=VAE_GROUPS,
        sample_size=64,
    )


def new_unet() -> Any:
    """A UNet2DConditionModel with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT[1],
        block_out_channels=UNET_CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,  # diffusers' name for their number
    )


def new_text_encoder() -> Any:
    """A CLIPTextModel with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


@functools.cache
def tokenizer() -> Any:
    """CLIP's own tokenizer, made from the merges that open_clip brings along: nothing to download."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer(str(Path(folder, "vocab.json")), str(Path(folder, "merges.txt")), model_max_length=77)


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP's tokenizer, in transformers' form."""
    open_clip = imported("open_clip_torch", "open_clip.tokenizer")
    encoder = open_clip.SimpleTokenizer().encoder
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    with gzip.open(open_clip.default_bpe()) as file:
        merges = file.read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


def new_scheduler() -> Any:
    """DDIM on Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def load_pipeline(weights: Path = WEIGHTS) -> Any:
    """A StableDiffusionPipeline on the CPU in float32, with the weights of that folder. Raises OSError where one is missing."""
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        pipeline = StableDiffusionPipeline(
            vae=load_vae(weights / "vae.safetensors"),
            text_encoder=load_text_encoder(weights / "text_encoder.safetensors"),
            tokenizer=tokenizer(),
            unet=load_network(new_unet(), weights / "unet.safetensors"),
            scheduler=new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_network(network: nn.Module, path: Path) -> nn.Module:
    """The network with the file's weights, float32, ready to use. Raises OSError."""
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network.eval()


def save_network(network: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """In float16, under a temporary name first."""
    save_weights(network.state_dict(), path, metadata)


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    halves = {name: tensor.detach().half().contiguous() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(halves, str(unfinished), metadata)
    unfinished.replace(path)


def load_vae(path: Path) -> Any:
    """The file's metadata names the factor by which latents are scaled to unit variance."""
    vae = load_network(new_vae(), path)
    with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
        vae.register_to_config(scaling_factor=float(file.metadata()["scaling_factor"]))
    return vae


def load_text_encoder(path: Path) -> Any:
    """The file holds the embeddings of the world's own words; those of all others are zero."""
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    table = torch.zeros(49408, TEXT_WIDTH)
    table[known_tokens()] = state[_TABLE]
    encoder = new_text_encoder()
    encoder.load_state_dict({**state, _TABLE: table}, strict=False)
    return encoder.eval()


def save_text_encoder(encoder: nn.Module, path: Path) -> None:
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith("position_ids")}
    save_weights({**state, _TABLE: state[_TABLE][known_tokens()]}, path)


@functools.cache
def known_tokens() -> Tensor:
    """The tokens of the world's words, with those that begin and end a caption, ascending."""
    return torch.tensor(sorted(set(tokenizer()(" ".join(words())).input_ids)))


__all__ = [
    "HEADS",
    "LATENT",
    "TEXT_WIDTH",
    "UNET_CHANNELS",
    "VAE_CHANNELS",
    "VAE_GROUPS",
    "WEIGHTS",
    "known_tokens",
    "load_network",
    "load_pipeline",
    "load_text_encoder",
    "load_vae",
    "new_scheduler",
    "new_text_encoder",
    "new_unet",
    "new_vae",
    "save_network",
    "save_text_encoder",
    "save_weights",
    "tokenizer",
    "write_tokenizer",
]
