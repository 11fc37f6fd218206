"""Two of the world's LoRAs as one file: what it draws alone, and what it draws with DynFuse, is what the sum of both draws."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")

from dynfuse_world.benchmark.protocol import TUNING
from dynfuse_world.captions import caption, name_of
from dynfuse_world.model import WEIGHTS, load_pipeline
from lib_dynfuse import FuseSettings, read_lora
from lib_dynfuse.fusion.merging import merge_pictures
from lib_dynfuse.hosts.diffusers import FusedPipeline

CALL = {"seeds": (0, 1), "steps": 8, "cfg_scale": 5.0}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(WEIGHTS)


@pytest.fixture(scope="module")
def loras():
    return [read_lora(WEIGHTS / "loras" / f"{name}.safetensors") for name in (TUNING[0].subject, TUNING[0].style)]


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_the_sum_of_two(pipeline, loras, tmp_path):
    settings = FuseSettings(method="direct", subject_weight=0.9, style_weight=0.7, style_blocks="mid=0.5")
    prompt = caption(name_of(loras[0].name), loras[1].name)
    fused = FusedPipeline(pipeline, *loras, settings)
    made = fused(prompt, **CALL)
    path = tmp_path / "both.safetensors"
    merge_pictures(path, loras[:1], loras[1:], settings, [made.trace], fused.layer_shapes)
    expected = pixels(made.images)

    alone = FuseSettings(method="direct", style_weight=0)
    with_dynfuse = FusedPipeline(pipeline, read_lora(path), loras[1], alone)(prompt, **CALL).images
    assert abs(pixels(with_dynfuse) - expected).max() <= 2

    merged, tensors = copy.deepcopy(pipeline), load_file(path)
    for name, module in merged.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
            delta = (tensors[f"{key}.alpha"].item() / len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
            module.weight.data = (module.weight.double() + delta).float()
    plain = merged(
        [prompt] * 2, num_inference_steps=8, guidance_scale=5.0, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]
    ).images
    assert abs(pixels(plain) - expected).max() <= 2
    unmerged = FusedPipeline(pipeline, *loras, FuseSettings(method="direct", subject_weight=0, style_weight=0))(prompt, **CALL).images
    assert abs(pixels(unmerged) - expected).max() > 50, "or the test shows nothing"
