"""cloneofsimo's numbered tensors: which layers they are for."""

from __future__ import annotations

import json

import pytest
import torch

from lib_dynfuse.lora import LoraError, branches_by_site, denoiser_aliases, read_lora
from lib_dynfuse.lora.families import SD1, SD2, reference_layers

from .writing import random, saved

ATTENTION = [f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")]
# As diffusers 0.9 registers them, written out; the levels' widths.
WIDTHS = [320, 320, 640, 640, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3, 1280]
CLASSES = {"unet": json.dumps(["GEGLU", "CrossAttention", "Attention"]), "text_encoder": json.dumps(["CLIPAttention"])}


def unet(context: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for width in WIDTHS:
        for layer in [*ATTENTION[:4], "ff", *ATTENTION[4:]]:
            rows = width * 8 if layer == "ff" else width
            columns = context if layer in ("attn2.to_k", "attn2.to_v") else width
            number = len(tensors) // 2
            tensors |= {f"unet:{number}:up": random(rows, 1, seed=number), f"unet:{number}:down": random(1, columns, seed=number)}
    return tensors


def text(blocks: int, width: int) -> dict[str, torch.Tensor]:
    numbers = range(blocks * 4)
    return {
        f"text_encoder:{n}:{half}": t for n in numbers for half, t in (("up", random(width, 1, seed=n)), ("down", random(1, width, seed=n)))
    }


@pytest.mark.parametrize(("family", "context", "blocks", "width"), [(SD1, 768, 12, 768), (SD2, 1024, 23, 1024)])
def test_layers_are_counted_as_the_trainer_met_them(tmp_path, family, context, blocks, width):
    tensors = unet(context) | text(blocks, width) | {"<s1>": random(768)}
    file = read_lora(saved(tmp_path, tensors, metadata={**CLASSES, "<s1>": "<embed>", "unet:0:rank": "1"}))
    assert file.family == family.name
    assert (len(file.denoiser), len(file.text["te1"]), file.embeddings, file.unmatched) == (144, blocks * 4, ["<s1>"], [])
    found, unmatched = branches_by_site(file, denoiser_aliases(reference_layers(family.name)))
    assert unmatched == []
    numbers = {
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": 0,
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj": 4,
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k": 9 + 6,
        "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0": 5 * 9 + 8,
        "output_blocks.3.1.transformer_blocks.0.attn1.to_v": 6 * 9 + 2,
        "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0": 14 * 9 + 3,
        "middle_block.1.transformer_blocks.0.attn2.to_q": 15 * 9 + 5,
    }
    changes = {site.layer: binding.branch.delta_weight() for site, binding in found.items()}
    for layer, number in numbers.items():
        torch.testing.assert_close(changes[layer], tensors[f"unet:{number}:up"] @ tensors[f"unet:{number}:down"])
    order = ("k_proj", "v_proj", "q_proj", "out_proj")  # as transformers registers them
    for number, layer in enumerate(order):
        branch = file.text["te1"][f"text_model_encoder_layers_3_self_attn_{layer}"]
        torch.testing.assert_close(branch.up, tensors[f"text_encoder:{12 + number}:up"])


def swapped(tensors, a: str, b: str):
    return {**tensors, a: tensors[b], b: tensors[a]}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (unet(768), {"unet": json.dumps(["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"])}, "other layers of the U-Net"),
        (unet(768), {"unet": "[" * 2000}, "other layers of the U-Net"),
        (swapped(unet(768), "unet:4:up", "unet:5:up"), CLASSES, "have not the shapes"),
        (unet(2048), CLASSES, "have not the shapes"),
        ({key: t for key, t in unet(768).items() if not key.startswith("unet:7:")}, CLASSES, "143 layers of the U-Net"),
        (text(13, 768), CLASSES, "52 layers of the text encoder"),
        ({"unet:3:up": random(3, 1)}, CLASSES, "1 layers of the U-Net"),
    ],
)
def test_another_order_is_refused_by_a_sentence_that_names_the_kind(tmp_path, tensors, metadata, words):
    with pytest.raises(LoraError, match=f"it is of cloneofsimo's kind, and .*{words}"):
        read_lora(saved(tmp_path, tensors, metadata=metadata))


def test_the_unnamed_list_of_its_first_version_is_named(tmp_path):
    torch.save([random(320, 4), random(4, 320)], tmp_path / "lora_weight.pt")
    with pytest.raises(LoraError, match="no named tensors, but a list, as cloneofsimo's first LoRAs do"):
        read_lora(tmp_path / "lora_weight.pt")
