"""Small random image encoders, saved by the real libraries in the layouts of the hub's repositories.

`python -m tests.fakes.encoders DIR` writes DIR/clip and DIR/dino, to be named as a WebUI's encoders.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from lib_dynfuse.guidance.encoders import Encoders, load_encoders
from lib_dynfuse.guidance.weights import EncoderSources


def write_clip(folder: Path, *, seed: int = 0, size: int = 32, width: int = 32, layers: int = 2, quick_gelu: bool = False) -> Path:
    """open_clip_config.json and open_clip_model.safetensors of a whole CLIP model, its text tower included. Returns the folder."""
    model, config = clip_model(seed=seed, size=size, width=width, layers=layers, quick_gelu=quick_gelu)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}), "utf-8")
    return folder


def clip_model(*, seed: int = 0, size: int = 32, width: int = 32, layers: int = 2, quick_gelu: bool = False) -> tuple[open_clip.CLIP, dict]:
    """The model that write_clip writes, and its configuration."""
    vision = {"image_size": size, "patch_size": size // 4, "width": width, "layers": layers, "head_width": width // 2}
    text = {"context_length": 8, "vocab_size": 64, "width": width, "heads": 2, "layers": 1}
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config).eval().requires_grad_(False)
        # As it is initialised, so shallow a model is nearly blind to its input.
        for name, weight in model.visual.named_parameters():
            if "proj_weight" in name or "c_fc.weight" in name or "c_proj.weight" in name or "conv1" in name:
                weight *= 3
        return model, config


def write_dino(folder: Path, *, seed: int = 0, size: int = 32, width: int = 32, layers: int = 2) -> Path:
    """config.json and model.safetensors of a ViT. Returns the folder."""
    dino_model(seed=seed, size=size, width=width, layers=layers).save_pretrained(folder, safe_serialization=True)
    return folder


def dino_model(*, seed: int = 0, size: int = 32, width: int = 32, layers: int = 2) -> ViTModel:
    """The model that write_dino writes."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=size // 4,
        initializer_range=0.2,  # the usual 0.02 leaves so shallow a model nearly blind to its input
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTModel(config).eval().requires_grad_(False)


def small_encoders(seed: int = 0) -> Encoders:
    """Both, by way of files, as a host gets them."""
    with tempfile.TemporaryDirectory() as folder:
        clip, dino = write_clip(Path(folder, "clip"), seed=seed), write_dino(Path(folder, "dino"), seed=seed)
        return load_encoders(EncoderSources(Path(folder), str(clip), str(dino), download=False))


if __name__ == "__main__":
    print(write_clip(Path(sys.argv[1], "clip")))
    print(write_dino(Path(sys.argv[1], "dino")))
