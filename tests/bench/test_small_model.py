"""The benchmarks' small model and its LoRAs."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import pytest
import torch

pytest.importorskip("diffusers", reason="the small model is a diffusers pipeline")

from lib_dynfuse import read_lora
from lib_dynfuse.bench.small_model import small_pipeline, write_random_lora


def test_the_same_seed_makes_the_same_model_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = small_pipeline(seed=3), small_pipeline(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.unet.conv_in.weight, small_pipeline(seed=4).unet.conv_in.weight)


def test_its_loras_are_ordinary_files(tmp_path):
    write_random_lora(tmp_path / "dog.safetensors", small_pipeline(), rank=4, strength=0.7, seed=1)
    lora = read_lora(tmp_path / "dog.safetensors")
    assert lora.ranks == {4: len(lora.denoiser) + len(lora.text["te1"])}
    assert not lora.unmatched
