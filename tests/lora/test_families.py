"""The layer tables and the names in other schemes, against diffusers' models and its converters of checkpoints."""

from __future__ import annotations

import re

import pytest
import torch

from lib_dynfuse.lora import (
    Alias,
    Blocks,
    Part,
    Share,
    Site,
    block_factors,
    block_label,
    branches_by_site,
    denoiser_aliases,
    families,
    is_attention,
    layer_label,
    read_lora,
    write_merged,
)
from lib_dynfuse.lora.families import (
    CHROMA,
    FAMILIES,
    FLUX,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    KREA2,
    LUMINA2,
    QWEN_IMAGE,
    SD1,
    SD2,
    SDXL,
    Z_IMAGE,
    Family,
    layout_of,
    reference_aliases,
    reference_layers,
)
from lib_dynfuse.lora.naming import flat
from lib_dynfuse.strength import BlockText

from .writing import kohya, pair, peft, saved

UNETS = {
    SD1.name: {"cross_attention_dim": 768},
    SD2.name: {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]},
    SDXL.name: {
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

TRANSFORMERS = {
    FLUX.name: ("FluxTransformer2DModel", {"guidance_embeds": True}),
    CHROMA.name: ("ChromaTransformer2DModel", {}),
    FLUX2_KLEIN_4B.name: (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
    ),
    FLUX2_KLEIN_9B.name: (
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
    ),
    FLUX2_DEV.name: ("Flux2Transformer2DModel", {}),
    QWEN_IMAGE.name: ("QwenImageTransformer2DModel", {}),
    Z_IMAGE.name: ("ZImageTransformer2DModel", {}),
    LUMINA2.name: ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    KREA2.name: ("Krea2Transformer2DModel", {}),
}


def diffusers_layers(family: str) -> dict[str, tuple[int, ...]]:
    """Layers of diffusers' own model with the shapes of their weights, without memory for them."""
    diffusers = pytest.importorskip("diffusers")
    name, settings = TRANSFORMERS.get(family) or ("UNet2DConditionModel", UNETS[family])
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**settings)
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if getattr(m, "weight", None) is not None}


def rows(layer: tuple[int, ...], part: Part | None) -> int:
    return layer[0] if part is None else part.rows(layer[0])[1]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_the_tables_hold_exactly_diffusers_layers_under_their_own_names(family):
    ours, theirs = reference_layers(family), diffusers_layers(family)
    forth, back = reference_aliases(family), denoiser_aliases(theirs)
    for name, shape in theirs.items():
        sites = [alias.site for alias in forth[flat(name)]]
        assert (sum(rows(ours[site.layer], site.part) for site in sites), *ours[sites[0].layer][1:]) == shape, name
    for name, shape in ours.items():
        sites = [alias.site for alias in back[flat(name)]]
        assert (sum(rows(theirs[site.layer], site.part) for site in sites), *theirs[sites[0].layer][1:]) == shape, name
    assert {alias.site.layer for targets in back.values() for alias in targets} == theirs.keys()


@pytest.mark.parametrize("residuals", [1, 2, 3])
def test_unet_names_agree_with_diffusers_converter_of_checkpoints(residuals):
    """Three levels, attention in the last two, any number of residual blocks per level."""
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    inner = ["norm", "proj_in", "proj_out", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"]
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    names, block = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"], 1
    for level in range(3):
        for _ in range(residuals):
            names += [f"input_blocks.{block}.0.{name}" for name in residual]
            names += [f"input_blocks.{block}.1.{name}" for name in inner] if level else []
            block += 1
        if level < 2:
            names.append(f"input_blocks.{block}.0.op")
            block += 1
    names += [f"middle_block.{n}.{name}" for n in (0, 2) for name in residual] + [f"middle_block.1.{name}" for name in inner]
    for block in range(3 * (residuals + 1)):
        level = 2 - block // (residuals + 1)
        names += [f"output_blocks.{block}.0.{name}" for name in residual]
        names += [f"output_blocks.{block}.1.{name}" for name in inner] if level else []
        names += [f"output_blocks.{block}.2.conv"] if level and block % (residuals + 1) == residuals else []
    checkpoint = {f"model.diffusion_model.{name}.{end}": torch.tensor(n) for n, name in enumerate(names) for end in ("weight", "bias")}
    theirs = converters.convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": residuals})
    aliases = denoiser_aliases(names)
    converted = {name.removesuffix(".weight"): names[int(value)] for name, value in theirs.items() if name.endswith(".weight")}
    assert len(converted) == len(names)
    for new, old in converted.items():
        assert [alias.site.layer for alias in aliases[flat(new)]] == [old], new
    back = denoiser_aliases(list(converted))
    for new, old in converted.items():
        assert [alias.site.layer for alias in back[flat(old)]] == [new], old


CONVERTERS = {
    FLUX.name: "convert_flux_transformer_checkpoint_to_diffusers",
    CHROMA.name: "convert_chroma_transformer_checkpoint_to_diffusers",
    FLUX2_KLEIN_4B.name: "convert_flux2_transformer_checkpoint_to_diffusers",
    Z_IMAGE.name: "convert_z_image_transformer_checkpoint_to_diffusers",
    LUMINA2.name: "convert_lumina2_to_diffusers",
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_parts_agree_with_diffusers_converter_of_checkpoints(family):
    """Every row of every converted weight is found where the aliases of both layouts say. Weights have one column of row numbers."""
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    if not hasattr(converters, CONVERTERS[family]):
        pytest.skip(f"this version of diffusers has no {CONVERTERS[family]}")
    layers = {n: s for n, s in reference_layers(family).items() if not re.match(r"(?:(?:double|single)_blocks|layers)\.[1-9]", n)}
    weights, first = {}, 0
    for name, shape in layers.items():
        weights[name] = torch.arange(first, first + shape[0])
        first += shape[0]
    scales = family not in (Z_IMAGE.name, LUMINA2.name)
    checkpoint = {
        f"{name}.{'scale' if scales and 'norm' in name and end == 'weight' else end}": w
        for name, w in weights.items()
        for end in (("weight",) if len(layers[name]) == 1 else ("weight", "bias"))
        if end == "weight" or ".attention.qkv" not in name
    }
    theirs = getattr(converters, CONVERTERS[family])(dict(checkpoint))
    theirs = {name.removesuffix(".weight"): value for name, value in theirs.items() if name.endswith(".weight")}
    forth, back = denoiser_aliases(layers), denoiser_aliases({name: (len(value), 1) for name, value in theirs.items()})

    def gathered(aliases, model, flat_name):
        """The rows that a file's layer of this name changes in the model, in the file's order."""
        pieces = []
        for alias in sorted(aliases[flat_name], key=lambda alias: alias.source.start if alias.source else 0):
            whole = model[alias.site.layer]
            start, length = (0, len(whole)) if alias.site.part is None else alias.site.part.rows(len(whole))
            pieces.append(whole[start : start + length])
        return torch.cat(pieces)

    for name, value in theirs.items():
        torch.testing.assert_close(gathered(forth, weights, flat(name)), value)
    for name, value in weights.items():
        torch.testing.assert_close(gathered(back, theirs, flat(name)), value)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_layer_has_a_label_of_its_own(family):
    aliases = reference_aliases(family)
    sites = {alias.site for targets in aliases.values() for alias in targets}
    assert len({layer_label(site) for site in sites}) == len(sites)
    assert all(layer_label(site).startswith(block_label(site)) for site in sites)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_alias_is_a_name_of_a_known_scheme(family):
    assert [name for name in reference_aliases(family) if layout_of(name) is None] == []
    strange = [
        "down_blocks_0_attentions_7_nonsense",
        "blocks_0_self_attn_q",
        "input_blocks_1_1_attn1_to_q",
        "joint_blocks_0_x_block_attn_qkv",
    ]
    assert [name for name in strange if layout_of(name) is not None] == []


class Lattice(Family):
    """A family of its own: "cells.N.mixing.qkv" is fused, and diffusers splits it."""

    name = "Lattice"
    kind = "a Lattice model"
    unrecognised = "a transformer named as Lattice"
    layouts = {  # noqa: RUF012
        "Lattice names": re.compile(r"cells_\d+_mixing_(?:qkv|out)"),
        "Lattice diffusers names": re.compile(r"cells_\d+_mixing_to_(?:[qkv]|out_0)"),
    }
    labels = ((re.compile(r"cells\.(\d+)(?:\.|$)"), "layer {}"),)
    flow = ("layer",)
    kohya_layout = "Lattice names"

    def layers(self):
        for index in range(3):
            yield f"cells.{index}.mixing.qkv", (24, 8)
            yield f"cells.{index}.mixing.out", (8, 8)

    def certainty(self, evidence):
        return 4 if evidence.layouts else 0

    def aliases(self, names):
        return self.pairs(names) if any(name.startswith("cells.") for name in names) else None

    def pairs(self, names):
        for name in names:
            if name.endswith(".qkv"):
                parts = [Part(index, 1, 3) for index in range(3)]
                yield flat(name), [Alias(Site(name, part), part) for part in parts]
                for part, letter in zip(parts, "qkv"):
                    yield flat(name.replace("qkv", f"to_{letter}")), [Alias(Site(name, part))]
            else:
                yield flat(name), [Alias(Site(name))]
                yield flat(name.replace(".out", ".to_out.0")), [Alias(Site(name))]

    def is_attention(self, site):
        return ".mixing." in site.layer


def test_a_new_family_is_one_object_in_the_registry(tmp_path, monkeypatch):
    """Files of both dialects are recognised, matched, labelled, weighted by block and merged; without it, they are of no known one."""
    split = peft("transformer.cells.1.mixing.to_k", *pair(8, 8)) | peft("transformer.cells.2.mixing.to_out.0", *pair(8, 8))
    fused = kohya("lora_unet_cells_1_mixing_qkv", *pair(24, 8))
    paths = saved(tmp_path, split, "split.safetensors"), saved(tmp_path, fused, "fused.safetensors")
    assert [read_lora(path).family for path in paths] == [None, None]
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, Lattice()))
    files = [read_lora(path) for path in paths]
    assert [(file.family, file.unmatched) for file in files] == [("Lattice", []), ("Lattice", [])]
    assert files[0].dialects == ("PEFT, Lattice diffusers names",)
    layers = reference_layers("Lattice")
    site = Site("cells.1.mixing.qkv", Part(1, 1, 3))
    assert is_attention(site)
    assert layer_label(site) == "layer 1 cells.1.mixing.qkv.1:2/3"
    blocks = Blocks.of_model(layers)
    assert blocks.names == ("layer0", "layer1", "layer2")
    factors = block_factors(BlockText((("layer2", "layer2", 0.0),)), blocks)
    write_merged(tmp_path / "one.safetensors", [Share(file, lambda site: factors[blocks.of(site)]) for file in files])
    merged = read_lora(tmp_path / "one.safetensors")
    assert merged.denoiser.keys() == {"cells_1_mixing_qkv"}
    assert len(branches_by_site(merged, denoiser_aliases(layers))[0]) == 3


def test_attention_of_sdxl_is_the_560_layers_of_the_paper():
    """Its LoRAs, trained as K-LoRA's, change query, key, value and output of 70 blocks with two attentions each."""
    sites = {alias.site for aliases in reference_aliases(SDXL.name).values() for alias in aliases}
    assert sum(is_attention(site) for site in sites) == 70 * 2 * 4
