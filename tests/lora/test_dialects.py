"""One LoRA, written in every dialect, changes the same layers of every model layout by the same amount."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_dynfuse.lora import Part, branches_by_site, denoiser_aliases, read_lora
from lib_dynfuse.lora.naming import parse_key

from .writing import kohya, pair, peft, random, saved

# An SD 1.x U-Net has two residual blocks per level; input_blocks.3, 6 and 9 are its downsamplers.
LDM_TO_DIFFUSERS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k": "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
    "input_blocks.11.0.emb_layers.1": "down_blocks.3.resnets.1.time_emb_proj",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.attn1.to_out.0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.11.1.transformer_blocks.0.ff.net.2": "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
    "out.2": "conv_out",
}


def unet_layers(scheme: str) -> list[str]:
    """Layers of an SD 1.x U-Net in either scheme, as far as its structure shows."""
    if scheme == "LDM":
        blocks = [f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5, 7, 8, 10, 11)]
        blocks += [f"input_blocks.{n}.0.op" for n in (3, 6, 9)] + [f"output_blocks.{n}.0.in_layers.2" for n in range(12)]
        blocks += ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]
        blocks += [f"middle_block.{n}.in_layers.2" for n in (0, 2)]
        return [*blocks, *LDM_TO_DIFFUSERS]
    blocks = [f"down_blocks.{level}.resnets.{n}.conv1" for level in range(4) for n in range(2)]
    blocks += [f"up_blocks.{level}.resnets.{n}.conv1" for level in range(4) for n in range(3)]
    blocks += [f"down_blocks.{level}.downsamplers.0.conv" for level in range(3)]
    blocks += [f"up_blocks.{level}.upsamplers.0.conv" for level in range(3)]
    return [*blocks, *LDM_TO_DIFFUSERS.values()]


def unet_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """A small LoRA for the layers above, by LDM name; convolutions with their kernels."""
    convolutions = {"op", "conv", "in_layers.2", "out_layers.3", "input_blocks.0.0", "out.2"}
    return {
        name: pair(
            6, 4, kernel=3 if name.endswith(tuple(convolutions)) else 1 if name.endswith(("proj_in", "skip_connection")) else None, seed=n
        )
        for n, name in enumerate(LDM_TO_DIFFUSERS)
    }


def old_diffusers(path: str, down: Tensor, up: Tensor, prefix: str = "unet.") -> dict[str, Tensor]:
    """Before PEFT: attention layers live in a processor, whose output layer has no index."""
    if ".attn" in path:
        block, layer = path.split(".to_")
        key = f"{prefix}{block}.processor.to_{layer.removesuffix('.0')}_lora"
    else:
        key = f"{prefix}{path}.lora"
    return {f"{key}.down.weight": down, f"{key}.up.weight": up}


UNET_DIALECTS = {
    "kohya, LDM names": lambda ldm, diffusers, down, up: kohya("lora_unet_" + ldm.replace(".", "_"), down, up),
    "kohya, diffusers names": lambda ldm, diffusers, down, up: kohya("lora_unet_" + diffusers.replace(".", "_"), down, up),
    "kohya with dots": lambda ldm, diffusers, down, up: kohya("diffusion_model." + ldm, down, up),
    "LyCORIS": lambda ldm, diffusers, down, up: kohya("lycoris_" + diffusers.replace(".", "_"), down, up),
    "PEFT": lambda ldm, diffusers, down, up: peft("unet." + diffusers, down, up),
    "PEFT, wrapped": lambda ldm, diffusers, down, up: peft("base_model.model." + diffusers, down, up),
    "PEFT, wrapped in a U-Net": lambda ldm, diffusers, down, up: peft("unet.base_model.model." + diffusers, down, up),
    "PEFT, adapter named": lambda ldm, diffusers, down, up: {
        f"unet.{diffusers}.lora_A.default.weight": down,
        f"unet.{diffusers}.lora_B.default.weight": up,
    },
    "compiled": lambda ldm, diffusers, down, up: peft("unet._orig_mod." + diffusers, down, up),
    "compiled block by block": lambda ldm, diffusers, down, up: peft("unet." + diffusers.replace(".0.", ".0._orig_mod.", 1), down, up),
    "compiled, kohya": lambda ldm, diffusers, down, up: kohya("lora_unet__orig_mod_" + diffusers.replace(".", "_"), down, up),
    "wrapped for several GPUs": lambda ldm, diffusers, down, up: peft("module.unet." + diffusers, down, up),
    "wrapped inside": lambda ldm, diffusers, down, up: peft("unet.module._fsdp_wrapped_module." + diffusers, down, up),
    "of a model": lambda ldm, diffusers, down, up: peft("model." + ldm, down, up),
    "of a pipeline": lambda ldm, diffusers, down, up: peft("pipe.unet." + diffusers, down, up),
    "kohya with an underscore": lambda ldm, diffusers, down, up: kohya(f"lora_unet_{diffusers.replace('.', '_')}_", down, up),
    "old diffusers": lambda ldm, diffusers, down, up: old_diffusers(diffusers, down, up),
    "old diffusers, no prefix": lambda ldm, diffusers, down, up: old_diffusers(diffusers, down, up, ""),
    "doubled prefix": lambda ldm, diffusers, down, up: {
        f"unet.unet.{diffusers}.lora.down.weight": down,
        f"unet.unet.{diffusers}.lora.up.weight": up,
    },
}


@pytest.mark.parametrize("model", ["LDM", "diffusers"])
@pytest.mark.parametrize("dialect", UNET_DIALECTS)
def test_a_unet_lora_means_the_same_in_every_dialect(tmp_path, dialect, model):
    write, tensors = UNET_DIALECTS[dialect], {}
    for ldm, (down, up) in unet_pairs().items():
        tensors |= write(ldm, LDM_TO_DIFFUSERS[ldm], down, up)
    found, unmatched = branches_by_site(read_lora(saved(tmp_path, tensors)), denoiser_aliases(unet_layers(model)))
    assert unmatched == []
    deltas = {site.layer: binding.bind(site, torch.Tensor).delta_weight() for site, binding in found.items()}
    expected = {
        ldm if model == "LDM" else LDM_TO_DIFFUSERS[ldm]: (up.double().flatten(1) @ down.double().flatten(1)).reshape(6, *down.shape[1:])
        for ldm, (down, up) in unet_pairs().items()
    }
    assert deltas.keys() == expected.keys()
    for layer, delta in deltas.items():
        torch.testing.assert_close(delta.double(), expected[layer], rtol=1e-5, atol=1e-5)


def test_levels_with_one_residual_block_are_counted_from_the_names():
    """As diffusers numbers a U-Net with layers_per_block=1: input_blocks.2 and 4 are downsamplers there."""
    names = ["input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "input_blocks.2.0.op", "input_blocks.3.0.in_layers.2"]
    names += ["input_blocks.3.1.proj_in", "input_blocks.4.0.op", "input_blocks.5.0.in_layers.2", "middle_block.1.proj_in"]
    names += [f"output_blocks.{n}.0.in_layers.2" for n in range(6)] + ["output_blocks.1.1.conv", "output_blocks.2.1.proj_in"]
    names += ["output_blocks.3.1.proj_in", "output_blocks.3.2.conv", "output_blocks.4.1.proj_in"]
    aliases = {flat: targets[0].site.layer for flat, targets in denoiser_aliases(names).items()}
    assert aliases["down_blocks_1_attentions_0_proj_in"] == "input_blocks.3.1.proj_in"
    assert aliases["down_blocks_1_downsamplers_0_conv"] == "input_blocks.4.0.op"
    assert aliases["down_blocks_2_resnets_0_conv1"] == "input_blocks.5.0.in_layers.2"
    assert aliases["up_blocks_0_upsamplers_0_conv"] == "output_blocks.1.1.conv"
    assert aliases["up_blocks_1_attentions_1_proj_in"] == "output_blocks.3.1.proj_in"
    assert aliases["up_blocks_1_upsamplers_0_conv"] == "output_blocks.3.2.conv"
    assert aliases["up_blocks_2_attentions_0_proj_in"] == "output_blocks.4.1.proj_in"
    back = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv1"]
    back += ["down_blocks.1.attentions.0.proj_in", "up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.1.conv1"]
    back += ["up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.conv1", "up_blocks.1.attentions.0.proj_in"]
    aliases = {flat: targets[0].site.layer for flat, targets in denoiser_aliases(back).items()}
    assert aliases["input_blocks_2_0_op"] == "down_blocks.0.downsamplers.0.conv"
    assert aliases["input_blocks_3_1_proj_in"] == "down_blocks.1.attentions.0.proj_in"
    assert aliases["output_blocks_1_1_conv"] == "up_blocks.0.upsamplers.0.conv"
    assert aliases["output_blocks_2_1_proj_in"] == "up_blocks.1.attentions.0.proj_in"


WIDTH = 8
# BFL layer -> (its output rows and input width in units of WIDTH, diffusers layers that share its rows in order)
FLUX = {
    "double_blocks.0.img_attn.qkv": (3, 1, [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    "double_blocks.1.txt_attn.qkv": (3, 1, [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"]),
    "double_blocks.0.img_attn.proj": (1, 1, ["transformer_blocks.0.attn.to_out.0"]),
    "double_blocks.1.txt_attn.proj": (1, 1, ["transformer_blocks.1.attn.to_add_out"]),
    "double_blocks.0.img_mlp.0": (4, 1, ["transformer_blocks.0.ff.net.0.proj"]),
    "double_blocks.0.txt_mlp.2": (1, 4, ["transformer_blocks.0.ff_context.net.2"]),
    "double_blocks.0.img_mod.lin": (6, 1, ["transformer_blocks.0.norm1.linear"]),
    "single_blocks.2.linear1": (
        7,
        1,
        [*(f"single_transformer_blocks.2.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.2.proj_mlp"],
    ),
    "single_blocks.2.linear2": (1, 5, ["single_transformer_blocks.2.proj_out"]),
    "single_blocks.2.modulation.lin": (3, 1, ["single_transformer_blocks.2.norm.linear"]),
    "img_in": (1, 2, ["x_embedder"]),
    "vector_in.out_layer": (1, 1, ["time_text_embed.text_embedder.linear_2"]),
    "final_layer.linear": (2, 1, ["proj_out"]),
    "final_layer.adaLN_modulation.1": (2, 1, ["norm_out.linear"]),
}


def flux_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: pair(out * WIDTH, into * WIDTH, seed=n) for n, (name, (out, into, _)) in enumerate(FLUX.items())}


def split(name: str, up: Tensor) -> dict[str, Tensor]:
    """A BFL layer's rows, shared out to diffusers' layers."""
    layers = FLUX[name][2]
    if name == "final_layer.adaLN_modulation.1":  # (shift, scale) there, (scale, shift) in diffusers
        return {layers[0]: torch.cat([up[WIDTH:], up[:WIDTH]])}
    sizes = [WIDTH] * (len(layers) - 1) + [up.shape[0] - WIDTH * (len(layers) - 1)]
    return dict(zip(layers, up.split(sizes), strict=True))


def in_bfl_names(write):
    return {key: tensor for name, (down, up) in flux_pairs().items() for key, tensor in write(name, down, up).items()}


def in_diffusers_names(write):
    return {
        key: tensor
        for name, (down, up) in flux_pairs().items()
        for layer, rows in split(name, up).items()
        for key, tensor in write(layer, down, rows).items()
    }


FLUX_DIALECTS = {
    "kohya": lambda: in_bfl_names(lambda name, down, up: kohya("lora_unet_" + name.replace(".", "_"), down, up)),
    "BFL": lambda: in_bfl_names(peft),
    "BFL with prefix": lambda: in_bfl_names(lambda name, down, up: peft("diffusion_model." + name, down, up)),
    "diffusers": lambda: in_diffusers_names(lambda name, down, up: peft("transformer." + name, down, up)),
    "compiled": lambda: in_diffusers_names(lambda name, down, up: peft("transformer._orig_mod." + name, down, up)),
    "DiffSynth": lambda: in_bfl_names(lambda name, down, up: peft("pipe.dit." + name, down, up)),
    "compiled, kohya": lambda: in_bfl_names(lambda name, down, up: kohya("lora_unet__orig_mod_" + name.replace(".", "_"), down, up)),
    "PEFT": lambda: in_diffusers_names(lambda name, down, up: peft("base_model.model." + name, down, up)),
    "OneTrainer": lambda: in_diffusers_names(lambda name, down, up: kohya("lora_transformer_" + name.replace(".", "_"), down, up)),
    "LyCORIS": lambda: in_diffusers_names(lambda name, down, up: kohya("lycoris_" + name.replace(".", "_"), down, up)),
}


def flux_layers(scheme: str) -> list[str]:
    return list(FLUX) if scheme == "BFL" else [layer for *_, layers in FLUX.values() for layer in layers]


def flux_deltas(file, scheme: str) -> tuple[dict[str, Tensor], list[str]]:
    """Whole-layer changes, put together from the sites' parts."""
    found, unmatched = branches_by_site(file, denoiser_aliases(flux_layers(scheme)))
    rows = {
        layer: up.shape[0]
        for name, (_, up) in flux_pairs().items()
        for layer, up in ({name: up} if scheme == "BFL" else split(name, up)).items()
    }
    deltas: dict[str, Tensor] = {}
    for site, binding in found.items():
        change = binding.bind(site, torch.Tensor).delta_weight()
        whole = deltas.setdefault(site.layer, torch.full((rows[site.layer], change.shape[1]), float("nan")))
        start, length = (0, rows[site.layer]) if site.part is None else site.part.rows(rows[site.layer])
        assert change.shape[0] == length
        whole[start : start + length] = change
    return deltas, unmatched


@pytest.mark.parametrize("model", ["BFL", "diffusers"])
@pytest.mark.parametrize("dialect", FLUX_DIALECTS)
def test_a_flux_lora_means_the_same_in_every_dialect(tmp_path, dialect, model):
    file = read_lora(saved(tmp_path, FLUX_DIALECTS[dialect]()))
    assert file.family == "Flux"
    deltas, unmatched = flux_deltas(file, model)
    assert unmatched == []
    expected = {}
    for name, (down, up) in flux_pairs().items():
        for layer, rows in ({name: up} if model == "BFL" else split(name, up)).items():
            expected[layer] = rows.double() @ down.double()
    assert deltas.keys() == expected.keys()
    for layer, delta in deltas.items():
        torch.testing.assert_close(delta.double(), expected[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", FLUX_DIALECTS)
def test_fused_layers_are_decided_part_by_part_in_every_dialect(tmp_path, dialect):
    file = read_lora(saved(tmp_path, FLUX_DIALECTS[dialect]()))
    sites = branches_by_site(file, denoiser_aliases(flux_layers("BFL")))[0]
    parts = [site.part for site in sites if site.layer == "single_blocks.2.linear1"]
    assert sorted(parts, key=lambda part: part.start) == [Part(0, 1, 7), Part(1, 1, 7), Part(2, 1, 7), Part(3, 4, 7)]
    assert len([site for site in sites if site.layer == "double_blocks.0.img_attn.qkv"]) == 3
    assert [site.part for site in sites if site.layer == "double_blocks.0.img_attn.proj"] == [None]


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("model", ["BFL", "diffusers"])
def test_xlabs_processors_change_the_attention_of_both_streams(tmp_path, model, prefix):
    pairs = flux_pairs()
    layers = {
        "double_blocks.0.processor.qkv_lora1": pairs["double_blocks.0.img_attn.qkv"],
        "double_blocks.1.processor.qkv_lora2": pairs["double_blocks.1.txt_attn.qkv"],
        "double_blocks.0.processor.proj_lora1": pairs["double_blocks.0.img_attn.proj"],
        "double_blocks.1.processor.proj_lora2": pairs["double_blocks.1.txt_attn.proj"],
        "single_blocks.2.processor.proj_lora": pairs["single_blocks.2.linear2"],
        "single_blocks.2.processor.qkv_lora": pair(3 * WIDTH, WIDTH, seed=77),
    }
    tensors = {f"{prefix}{name}.{half}.weight": t for name, (down, up) in layers.items() for half, t in (("down", down), ("up", up))}
    file = read_lora(saved(tmp_path, tensors))
    assert file.dialects == ("XLabs, Flux BFL names",)
    assert file.unmatched == []
    deltas, unmatched = flux_deltas(file, model)
    assert unmatched == []
    for name in (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_attn.qkv",
        "double_blocks.0.img_attn.proj",
        "single_blocks.2.linear2",
    ):
        down, up = pairs[name]
        for layer, rows in ({name: up} if model == "BFL" else split(name, up)).items():
            torch.testing.assert_close(deltas[layer], rows @ down)
    down, up = layers["single_blocks.2.processor.qkv_lora"]
    if model == "BFL":
        torch.testing.assert_close(deltas["single_blocks.2.linear1"][: 3 * WIDTH], up @ down)
        assert deltas["single_blocks.2.linear1"][3 * WIDTH :].isnan().all(), "the MLP's part of linear1 is not touched"
    else:
        torch.testing.assert_close(deltas["single_transformer_blocks.2.attn.to_v"], up[2 * WIDTH :] @ down)
        assert "single_transformer_blocks.2.proj_mlp" not in deltas


CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.3.layer.1.DenseReluDense.wi_0"
TEXT = {
    "lora_te_" + CLIP.replace(".", "_"): "te1",
    "lora_te1_" + CLIP.replace(".", "_"): "te1",
    "lora_te2_" + CLIP.replace(".", "_"): "te2",
    "lora_te3_" + T5.replace(".", "_"): "t5",
    "lora_te2_" + T5.replace(".", "_"): "t5",  # OneTrainer for Flux, where the second encoder is T5
    "oft_te_" + CLIP.replace(".", "_"): "te1",
    "text_encoder." + CLIP: "te1",
    "text_encoder_2." + CLIP: "te2",
    "text_encoder_2." + T5: "t5",
    "text_encoder.base_model.model." + CLIP: "te1",
    "base_model.model." + CLIP: "te1",
    "text_encoder.module." + CLIP: "te1",
    "module.text_encoder_2._orig_mod." + CLIP: "te2",
    "pipe.text_encoder." + CLIP: "te1",
}


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders_are_told_apart(tmp_path, name):
    down, up = pair(6, 4)
    for number, tensors in enumerate((kohya(name, down, up), peft(name, down, up))):
        file = read_lora(saved(tmp_path, tensors, f"{number}.safetensors"))
        assert file.denoiser == {}
        assert file.unmatched == []
        (encoder, layers), *rest = file.text.items()
        assert encoder == TEXT[name]
        assert rest == []
        assert list(layers) == [T5.replace(".", "_") if TEXT[name] == "t5" else CLIP.replace(".", "_")]


@pytest.mark.parametrize(
    "ending", [".q_proj.lora_linear_layer.down.weight", ".to_q_lora.down.weight", ".q_proj.lora.down.weight", ".q_proj.lora_A.weight"]
)
def test_old_diffusers_text_layers_get_their_present_names(ending):
    name = parse_key(f"text_encoder.text_model.encoder.layers.0.self_attn{ending}")
    assert (name.component, name.layer, name.role) == ("te1", "text_model_encoder_layers_0_self_attn_q_proj", "down")


def test_bundled_embeddings_are_no_weights(tmp_path):
    tensors = kohya("lora_unet_mid_block_attentions_0_proj_in", *pair(6, 4)) | {
        "bundle_emb.dog.string_to_param.*": random(2, 8),
        "bundle_emb.cat.clip_g": random(2, 8),
        "bundle_emb.cat.clip_l": random(2, 8),
    }
    file = read_lora(saved(tmp_path, tensors))
    assert sorted(file.embeddings) == ["cat", "dog"]
    assert len(file.denoiser) == 1
    assert file.unmatched == []


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.out.2.bias", "logit_scale", "lora_unet_x.bias_values", "", ".", "a" * 1000 + ".lora_up.weight"]
)
def test_other_keys_mean_nothing(key):
    assert parse_key(key) is None
