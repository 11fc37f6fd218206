"""Models of which nothing is known but their layers' names: matched by these, in every dialect that keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_dynfuse import FuseSettings
from lib_dynfuse.fusion.session import FusionError, FusionSession, fuse
from lib_dynfuse.lora import Blocks, is_attention, read_lora
from lib_dynfuse.lora.naming import Site, flat
from lib_dynfuse.lora.report import describe
from tests.fusion.models import Nested

from .writing import kohya, pair, peft, saved

# One block's layers in Forge Neo's backend/nn/wan.py, anima.py and ernie.py and in stable-diffusion-3's mmdit.py.
ATTENTION = {
    "Wan": [f"blocks.0.{kind}.{x}" for kind in ("self_attn", "cross_attn") for x in "qkvo"],
    "Anima": [f"blocks.0.{kind}.{x}_proj" for kind in ("self_attn", "cross_attn") for x in ("q", "k", "v", "output")],
    "ERNIE-Image": [f"layers.0.self_attention.to_{x}" for x in ("q", "k", "v", "out.0")],
    "SD 3.5": [f"joint_blocks.0.{stream}_block.attn.{x}" for stream in ("x", "context") for x in ("qkv", "proj")],
}
OTHER = {
    "Wan": ["blocks.0.ffn.0", "head.head"],
    "Anima": ["blocks.0.mlp.layer1", "blocks.0.adaln_modulation_mlp.1"],
    "ERNIE-Image": ["layers.0.mlp.gate_proj", "layers.0.mlp.linear_fc2"],
    "SD 3.5": ["joint_blocks.0.x_block.mlp.fc1", "joint_blocks.0.x_block.adaLN_modulation.1"],
}
DIALECTS = {
    "ComfyUI": lambda name, down, up: peft(f"diffusion_model.{name}", down, up),
    "diffusers": lambda name, down, up: peft(f"transformer.{name}", down, up),
    "PEFT": lambda name, down, up: peft(f"base_model.model.diffusion_model.{name}", down, up),
    "kohya": lambda name, down, up: kohya(f"lora_unet_{flat(name)}", down, up, 1.0),
    "LyCORIS": lambda name, down, up: kohya(f"lycoris_{flat(name)}", down, up),
}


def small_model(names: list[str]) -> Nested:
    torch.manual_seed(0)
    return Nested({name: nn.Linear(8, 8) for name in names}).eval().requires_grad_(False)


def written(folder, names, dialect, seed=0):
    tensors = {}
    for number, name in enumerate(names):
        tensors |= DIALECTS[dialect](name, *pair(8, 8, seed=10 * number + seed))
    return read_lora(saved(folder, tensors, f"{dialect} {seed}.safetensors"))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("model", ATTENTION)
def test_a_model_of_no_known_family_is_fused_by_its_own_names(tmp_path, model, dialect):
    names = [*ATTENTION[model], *OTHER[model]]
    denoiser, x = small_model(names), torch.randn(1, 5, 8)
    files = [written(tmp_path, names, dialect, seed) for seed in (0, 1)]
    scale = 0.5 if dialect == "kohya" else 1.0
    with fuse(denoiser, *files, FuseSettings(method="direct")) as session:
        outputs = denoiser(x)
    assert session.report.unmatched == {file.name: [] for file in files}
    for number, name in enumerate(names):
        layer = denoiser.get_submodule(name)
        deltas = [scale * up.double() @ down.double() for seed in (0, 1) for down, up in [pair(8, 8, seed=10 * number + seed)]]
        expected = x.double() @ (layer.weight.double() + sum(deltas)).T + layer.bias.double()
        torch.testing.assert_close(outputs[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ATTENTION)
def test_attention_is_known_by_what_it_is_usually_called(model):
    assert [name for name in ATTENTION[model] if not is_attention(Site(name))] == []
    assert [name for name in OTHER[model] if is_attention(Site(name))] == []


def test_the_report_says_that_the_names_are_the_models_own(tmp_path):
    file = written(tmp_path, ATTENTION["Wan"], "ComfyUI")
    assert (file.family, file.unmatched) == (None, [])
    lines = [" ".join(line.split()) for line in describe(file)]
    assert "Format PEFT, names of its own" in lines
    assert "Base model unknown (it fits a model with layers of its own names, such as blocks_0_cross_attn_k)" in lines
    assert "Denoiser 8 layers" in lines
    assert "Unmatched none" in lines


def test_on_a_model_without_these_layers_one_sentence_says_what_it_was_made_for(tmp_path):
    files = [written(tmp_path, ATTENTION["Wan"], "ComfyUI", seed) for seed in (0, 1)]
    with pytest.raises(FusionError, match="made for a base model with layers such as blocks_0_cross_attn_k"):
        FusionSession(small_model(["input_blocks.1.1.proj_in"]), files[0], files[1], FuseSettings(method="dynfuse"))


def test_blocks_have_the_names_of_the_models_own_lists():
    assert Blocks.of_model([*ATTENTION["Wan"], *OTHER["Wan"]]).names == ("blocks0", "head")
