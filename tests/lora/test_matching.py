"""Branches brought to a model's layers: parts of fused layers, forms of convolutions, and files that do not fit."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse.lora import (
    LoraError,
    Part,
    Site,
    block_label,
    branches_by_site,
    compatible,
    denoiser_aliases,
    is_attention,
    layer_label,
    read_lora,
)

from .writing import kohya, pair, peft, random, saved

Q = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
LDM = ["input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "input_blocks.1.1.transformer_blocks.0.attn1.to_q"]
BFL = ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"]
SPLIT = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"] + ["transformer_blocks.0.attn.add_q_proj"]


def at(tmp_path, tensors, layers, name="test.safetensors"):
    return branches_by_site(read_lora(saved(tmp_path, tensors, name)), denoiser_aliases(layers))


@pytest.mark.parametrize("stored", [None, 1])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_a_one_by_one_convolution_may_be_written_as_a_matrix_and_the_other_way_round(tmp_path, stored, shape):
    down, up = pair(6, 4, kernel=stored)
    ((site, binding),) = at(tmp_path, kohya("lora_unet_input_blocks_1_1_proj_in", down, up), LDM)[0].items()
    delta = binding.fitted(site, shape).bind(site, torch.Tensor).delta_weight()
    torch.testing.assert_close(delta, (up.flatten(1) @ down.flatten(1)).reshape(shape))


def test_a_flattened_kernel_takes_the_layers_form(tmp_path):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {f"{name}.hada_w{n}_{x}": random(*s, seed=n) for n in (1, 2) for x, s in (("a", (6, 2)), ("b", (2, 4 * 9)))}
    ((site, binding),) = at(tmp_path, tensors, LDM)[0].items()
    a, b = ([tensors[f"{name}.hada_w{n}_{x}"] for n in (1, 2)] for x in "ab")
    for made in (binding, binding.fitted(site, (6, 4, 3, 3))):
        delta = made.bind(site, torch.Tensor).delta_weight()
        torch.testing.assert_close(delta, ((a[0] @ b[0]) * (a[1] @ b[1])).reshape(6, 4, 3, 3))


@pytest.mark.parametrize("size", [3, 40])  # put together; two small products
def test_a_flattened_kernel_of_a_lokr_takes_the_layers_form(tmp_path, size):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    first, a, b = random(2, 2), random(size, 2), random(2, size * 9)
    tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    ((site, binding),) = at(tmp_path, tensors, LDM)[0].items()
    kernel = torch.kron(first, a @ b).reshape(2 * size, 2 * size, 3, 3)
    torch.testing.assert_close(binding.bind(site, torch.Tensor).delta_weight(), kernel)


def test_an_inpainting_models_first_convolution_is_changed_in_its_first_channels(tmp_path):
    down, up = pair(6, 4, kernel=3)
    ((site, binding),) = at(tmp_path, kohya("lora_unet_conv_in", down, up), LDM)[0].items()
    delta = binding.fitted(site, (6, 9, 3, 3)).bind(site, torch.Tensor).delta_weight()
    torch.testing.assert_close(delta[:, :4], (up.flatten(1) @ down.flatten(1)).reshape(6, 4, 3, 3))
    assert not delta[:, 4:].any()


def test_a_branch_of_other_size_is_refused_by_file_and_layer(tmp_path):
    ((site, binding),) = at(tmp_path, kohya(Q, *pair(6, 4)), LDM, "dog.safetensors")[0].items()
    for wrong in ((6, 5), (8, 4), (6, 4, 3, 3)):
        with pytest.raises(LoraError, match=r"dog\.safetensors was made for another base model: .*attn1_to_q.* 6 × 4, where"):
            binding.fitted(site, wrong)
    tensors = kohya(Q, *pair(6, 4)) | {f"{Q}.dora_scale": random(6, 1)}
    ((site, binding),) = at(tmp_path, tensors, LDM, "dora.safetensors")[0].items()
    with pytest.raises(LoraError, match=r"dora\.safetensors"):
        binding.bind(site, lambda: random(6, 5))


def test_the_weight_is_asked_for_only_by_kinds_that_depend_on_it(tmp_path):
    def refuse() -> torch.Tensor:
        raise AssertionError("the weight was dequantised")

    lokr = {f"{Q}.lokr_w1": random(2, 2), f"{Q}.lokr_w2": random(3, 2)}
    for tensors in (kohya(Q, *pair(6, 4)), lokr, {f"{Q}.diff": random(6, 4)}):
        ((site, binding),) = at(tmp_path, tensors, LDM)[0].items()
        assert binding.bind(site, refuse).shape == (6, 4)


def test_weight_dependent_kinds_see_the_rows_that_they_were_trained_on(tmp_path):
    """DoRA per input column: its norms run over all rows of what the file names, the fused layer or one of its parts."""
    weight, width = random(24, 8), 8

    def dora(rows, down, up, magnitude):
        moved = rows + up @ down
        return moved / moved.norm(dim=0, keepdim=True) * magnitude - rows

    down, up = pair(24, 8)
    magnitude = random(1, 8).abs()
    fused = kohya("lora_unet_double_blocks_0_img_attn_qkv", down, up) | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": magnitude}
    found, _ = at(tmp_path, fused, BFL)
    for site, binding in found.items():
        start = site.part.start * width
        torch.testing.assert_close(
            binding.bind(site, lambda: weight).weight, dora(weight, down, up, magnitude)[start : start + width], rtol=1e-4, atol=1e-5
        )
    split = peft("transformer.transformer_blocks.0.attn.to_k", down, up[:8]) | {
        "transformer.transformer_blocks.0.attn.to_k.dora_scale": magnitude
    }
    ((site, binding),) = at(tmp_path, split, BFL)[0].items()
    assert site == Site("double_blocks.0.img_attn.qkv", Part(1, 1, 3))
    torch.testing.assert_close(binding.bind(site, lambda: weight).weight, dora(weight[8:16], down, up[:8], magnitude), rtol=1e-4, atol=1e-5)
    found, unmatched = at(tmp_path, fused, SPLIT)
    assert (found, len(unmatched)) == ({}, 3), "a fused layer's norms cannot be had from its parts alone"


def test_swapped_halves_stay_swapped_for_weight_dependent_kinds(tmp_path):
    """diffusers' norm_out.linear holds (scale, shift), BFL's layer (shift, scale)."""
    weight, factors = random(8, 4), random(8)
    name = "transformer.norm_out.linear"
    found, _ = at(tmp_path, {f"{name}.weight": factors, f"{name}.on_input": torch.tensor(0)}, BFL)
    whole = torch.full((8, 4), float("nan"))
    for site, binding in found.items():
        start, length = site.part.rows(8)
        whole[start : start + length] = binding.bind(site, lambda: weight).weight
    torch.testing.assert_close(whole, weight * torch.cat([factors[4:], factors[:4]])[:, None])


def test_rows_that_cannot_be_shared_out_are_refused(tmp_path):
    found, _ = at(tmp_path, kohya("lora_unet_double_blocks_0_img_attn_qkv", *pair(25, 8)), BFL)
    site, binding = next(iter(found.items()))
    with pytest.raises(LoraError, match="25 rows cannot be divided into 3 equal units"):
        binding.bind(site, torch.Tensor)


def test_a_layer_named_twice_counts_as_first_named(tmp_path):
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", *pair(24, 8)) | peft(
        "transformer.transformer_blocks.0.attn.to_q", *pair(8, 8)
    )
    found, unmatched = at(tmp_path, tensors, BFL)
    assert len(found) == 3
    assert len({binding.name for binding in found.values()}) == 1
    assert len(unmatched) == 2


def test_a_model_of_an_unknown_scheme_is_matched_by_its_own_names():
    aliases = denoiser_aliases(["blocks.0.attn.to_q", "head"])
    assert {name: [alias.site for alias in targets] for name, targets in aliases.items()} == {
        "blocks_0_attn_to_q": [Site("blocks.0.attn.to_q")],
        "head": [Site("head")],
    }


def test_two_files_go_together_unless_their_base_models_differ(tmp_path):
    def file(name, layer, size):
        return read_lora(saved(tmp_path, kohya(f"lora_unet_{layer}", *pair(*size)), f"{name}.safetensors"))

    k = "input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    sd15, sdxl = file("dog", k, (640, 768)), file("ink", k, (640, 2048))
    flux = file("flux", "double_blocks_0_img_attn_qkv", (24, 8))
    small, other = file("small", k, (32, 64)), file("other", "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", (32, 64))
    wide = file("wide", k, (32, 96))
    assert compatible(sd15, sd15) is None
    assert compatible(small, other) is None, "unknown base models whose layouts agree"
    reason = compatible(sd15, sdxl)
    assert reason == "dog.safetensors was made for SD 1.x and ink.safetensors for SDXL: both must be for the same base model."
    assert "a Flux model" in compatible(small, flux)
    assert "32 × 64 weights in one and 32 × 96 in the other" in compatible(small, wide)


@pytest.mark.parametrize(
    ("site", "attention", "block", "label"),
    [
        (Site("input_blocks.4.1.transformer_blocks.0.attn2.to_k"), True, "in 4", "in 4.1 attn2.k"),
        (Site("input_blocks.7.1.transformer_blocks.3.attn1.to_out.0"), True, "in 7", "in 7.1 #3 attn1.out"),
        (Site("input_blocks.4.0.in_layers.2"), False, "in 4", "in 4.0 in_layers.2"),
        (Site("middle_block.1.transformer_blocks.0.ff.net.2"), False, "mid", "mid 1 ff.net.2"),
        (Site("output_blocks.5.2.conv"), False, "out 5", "out 5.2 conv"),
        (Site("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"), True, "down 1", "down 1 attentions.0 attn2.k"),
        (Site("up_blocks.2.resnets.1.conv1"), False, "up 2", "up 2 resnets.1.conv1"),
        (Site("mid_block.attentions.0.proj_in"), False, "mid", "mid attentions.0.proj_in"),
        (Site("time_embed.0"), False, "embed", "embed time_embed.0"),
        (Site("out.2"), False, "last", "last out.2"),
        (Site("double_blocks.0.img_attn.qkv", Part(0, 1, 3)), True, "double 0", "double 0 img.q"),
        (Site("double_blocks.3.txt_attn.proj"), True, "double 3", "double 3 txt.proj"),
        (Site("double_blocks.3.img_mlp.0"), False, "double 3", "double 3 img.mlp.0"),
        (Site("single_blocks.3.linear1", Part(1, 1, 7)), True, "single 3", "single 3 k"),
        (Site("single_blocks.3.linear1", Part(3, 4, 7)), False, "single 3", "single 3 mlp"),
        (Site("single_blocks.3.linear2"), False, "single 3", "single 3 linear2"),
        (Site("transformer_blocks.0.attn.to_q"), True, "double 0", "double 0 img.q"),
        (Site("transformer_blocks.0.attn.add_v_proj"), True, "double 0", "double 0 txt.v"),
        (Site("transformer_blocks.0.attn.to_add_out"), True, "double 0", "double 0 txt.proj"),
        (Site("transformer_blocks.0.ff_context.net.2"), False, "double 0", "double 0 txt.mlp.2"),
        (Site("single_transformer_blocks.3.attn.to_k"), True, "single 3", "single 3 k"),
        (Site("single_transformer_blocks.3.proj_mlp"), False, "single 3", "single 3 mlp"),
        (Site("single_transformer_blocks.3.proj_out"), False, "single 3", "single 3 linear2"),
        (Site("final_layer.adaLN_modulation.1", Part(0, 1, 2)), False, "last", "last final_layer.adaLN_modulation.1.shift"),
    ],
)
def test_sites_have_short_names_and_attention_is_known(site, attention, block, label):
    assert (is_attention(site), block_label(site), layer_label(site)) == (attention, block, label)
