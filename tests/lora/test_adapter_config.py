"""PEFT's settings in the metadata and beside the file: the strength is PEFT's, alpha/r or alpha/sqrt(r) for each layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lib_dynfuse.lora import LoraError, read_lora
from lib_dynfuse.lora.adapter_config import Alpha

from .writing import kohya, pair, peft, random, saved

BLOCK = "transformer_blocks.{}.attn.{}"
Q0, K0, Q1 = BLOCK.format(0, "to_q"), BLOCK.format(0, "to_k"), BLOCK.format(1, "to_q")
CLIP, T5 = "text_model.encoder.layers.0.self_attn.q_proj", "encoder.block.3.layer.1.DenseReluDense.wi_0"
METADATA = "its metadata (lora_adapter_metadata)"


def in_metadata(settings: Mapping[str, Any], part: str = "transformer") -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in settings.items()})}


def tensors_of(ranks: Mapping[str, int], prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    return {key: t for name, rank in ranks.items() for key, t in peft(prefix + name, *pair(6, 4, rank)).items()}


def scales(file, *names: str) -> tuple[float, ...]:
    """In the order of the names, of those that the file has."""
    layers = [name.replace(".", "_") for name in names or (Q0, K0, Q1)]
    return tuple(file.denoiser[layer].scale for layer in layers if layer in file.denoiser)


SETTINGS = {
    "alpha over r": ({"r": 4, "lora_alpha": 16}, (4.0, 4.0, 4.0)),
    "rslora": ({"r": 4, "lora_alpha": 16, "use_rslora": True}, (8.0, 8.0, 8.0)),
    "alpha of a kind of layer": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_k": 2}}, (4.0, 0.5, 4.0)),
    "alpha of one layer": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"0.attn.to_q": 1}}, (0.25, 4.0, 4.0)),
    "alpha of a whole name": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {f"^{Q1}": 8, "^attn.to_k": 1}}, (4.0, 4.0, 2.0)),
    "the end of a name is no name": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"q": 1, "o_k": 1}}, (4.0, 4.0, 4.0)),
    "the first pattern": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"0.attn.to_q": 8, "to_q": 2}}, (2.0, 4.0, 0.5)),
    "expressions": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {r".*\.[1-9]\d*\.attn\.to_q": 8, "to_(k|v)": 2}}, (4.0, 0.5, 2.0)),
    "a fraction": ({"r": 4, "lora_alpha": 0.5}, (0.125, 0.125, 0.125)),
    "no alpha": ({"r": 4}, (1.0, 1.0, 1.0)),
    "nothing": ({}, (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("where", ["metadata", "sidecar", "both"])
@pytest.mark.parametrize("case", SETTINGS)
def test_the_strength_is_alpha_over_rank_as_peft_says(tmp_path, case, where):
    settings, expected = SETTINGS[case]
    if where != "metadata":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 99} if where == "both" else settings))
    metadata = None if where == "sidecar" else in_metadata(settings) if settings else {}
    if where == "both" and not settings:
        expected = (24.75,) * 3
    file = read_lora(saved(tmp_path, tensors_of({Q0: 4, K0: 4, Q1: 4}), "adapter_model.safetensors", metadata))
    assert scales(file) == pytest.approx(expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_may_differ_by_layer(tmp_path, rslora):
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 16, "1.attn.to_q": 1}, "use_rslora": rslora}
    file = read_lora(saved(tmp_path, tensors_of({Q0: 4, K0: 16, Q1: 1}), metadata=in_metadata(settings)))
    expected = tuple(8 / (math.sqrt(rank) if rslora else rank) for rank in (4, 16, 1))
    assert scales(file) == pytest.approx(expected)
    assert file.alphas == {Alpha(8.0, METADATA, rslora): 3}


def test_every_part_of_the_model_has_its_own_settings(tmp_path):
    tensors = tensors_of({Q0: 4}) | tensors_of({CLIP: 2}, "text_encoder.") | tensors_of({T5: 2}, "text_encoder_2.")
    metadata = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 6}
    metadata |= {"text_encoder_2.r": 2, "text_encoder_2.lora_alpha": 1}
    file = read_lora(saved(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(metadata)}))
    assert scales(file) == (2.0,)
    assert [branch.scale for layers in file.text.values() for branch in layers.values()] == [3.0, 0.5]


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer._orig_mod.", "module.", "transformer.base_model.model.", ""])
def test_settings_hold_whatever_is_before_the_names(tmp_path, prefix):
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{Q0}": 2}}
    file = read_lora(saved(tmp_path, tensors_of({Q0: 4, K0: 4}, prefix), metadata=in_metadata(settings)))
    assert scales(file) == (0.5, 2.0)


def test_what_the_tensors_say_goes_before(tmp_path):
    tensors = kohya("lora_unet_double_blocks_0_img_attn_proj", *pair(6, 4, 4), 2.0) | tensors_of({Q0: 4})
    file = read_lora(saved(tmp_path, tensors, metadata=in_metadata({"r": 4, "lora_alpha": 16})))
    assert scales(file, "double_blocks.0.img_attn.proj", Q0) == (0.5, 4.0)
    assert file.alphas == {Alpha(2.0, "the file's tensors"): 1, Alpha(16.0, METADATA): 1}


def test_broken_settings_do_not_matter_where_they_are_not_needed(tmp_path):
    tensors = kohya("lora_unet_double_blocks_0_img_attn_proj", *pair(6, 4, 4), 2.0)
    file = read_lora(saved(tmp_path, tensors, metadata={"lora_adapter_metadata": "["}))
    assert scales(file, "double_blocks.0.img_attn.proj") == (0.5,)


def test_pefts_loha_and_lokr_take_their_rank_from_the_settings(tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    a, b = random(6, 2), random(2, 4)
    tensors = {f"{layer}to_q.hada_w{n}_{half}": t for n in (1, 2) for half, t in (("a", a), ("b", b))}
    tensors |= {f"{layer}to_k.lokr_w1": random(2, 2), f"{layer}to_k.lokr_w2": random(3, 2)}
    settings = {"peft_type": "LOKR", "r": 2, "alpha": 3, "alpha_pattern": {"to_k": 5}}
    file = read_lora(saved(tmp_path, tensors, metadata=in_metadata(settings, "unet")))
    k, q = (branch for _, branch in sorted(file.denoiser.items()))
    torch.testing.assert_close(q.delta_weight().double(), 1.5 * (a.double() @ b.double()) ** 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        k.delta_weight().double(), 2.5 * torch.kron(random(2, 2).double(), random(3, 2).double()), rtol=1e-5, atol=1e-6
    )


def test_a_dora_of_peft_scales_what_is_added_before_the_length_is_set(tmp_path):
    down, up = pair(6, 4, 2)
    tensors = peft(f"transformer.{Q0}", down, up) | {f"transformer.{Q0}.lora_magnitude_vector": random(6, seed=3).abs()}
    (branch,) = read_lora(saved(tmp_path, tensors, metadata=in_metadata({"r": 2, "lora_alpha": 8, "use_dora": True}))).denoiser.values()
    weight = random(6, 4, seed=9)
    moved = weight.double() + 4 * up.double() @ down.double()
    expected = moved / moved.norm(dim=1, keepdim=True) * random(6, seed=3).abs().double()[:, None] - weight.double()
    torch.testing.assert_close(branch.bind(weight).delta_weight().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "renamed.safetensors"])
def test_a_sidecar_belongs_to_the_file_it_was_written_with(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    if name.endswith(".bin"):
        torch.save(tensors_of({Q0: 4}), tmp_path / name)
    else:
        saved(tmp_path, tensors_of({Q0: 4}), name)
    assert scales(read_lora(tmp_path / name)) == (4.0,)
    saved(tmp_path, tensors_of({Q0: 4}), "another.safetensors")
    assert scales(read_lora(tmp_path / name)) == ((4.0,) if name.startswith("adapter_model") else (1.0,))
    assert scales(read_lora(tmp_path / "another.safetensors")) == (1.0,)


NESTED = "[" * 100_000 + "]" * 100_000
UNUSABLE = {
    "no JSON": ("[", "cannot be read"),
    "no object": ("5", "cannot be read"),
    "deep": (NESTED, "cannot be read"),
    "long": ('{"transformer.r": "' + "x" * 3_000_000 + '"}', "cannot be read"),
    "infinite": ('{"transformer.r": 4, "transformer.lora_alpha": Infinity}', "says that its alpha is inf"),
    "no number": ('{"transformer.r": 4, "transformer.lora_alpha": "16"}', "says that its alpha is '16'"),
    "truth": ('{"transformer.r": 4, "transformer.lora_alpha": true}', "says that its alpha is True"),
    "huge": ('{"transformer.r": 4, "transformer.lora_alpha": 1' + "0" * 400 + "}", "says that its alpha is 1000"),
    "endless": ('{"transformer.r": 4, "transformer.lora_alpha": 1' + "0" * 9000 + "}", "cannot be read"),
    "no rank": ('{"transformer.r": 0, "transformer.lora_alpha": 4}', "says that its rank is 0"),
    "half a rank": ('{"transformer.r": 1.5, "transformer.lora_alpha": 4}', "says that its rank is 1.5"),
    "another rank": (
        '{"transformer.r": 8, "transformer.lora_alpha": 4}',
        "its rank is 4, where its metadata (lora_adapter_metadata) says 8",
    ),
    "rslora of what": (
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.use_rslora": "yes"}',
        "says that use_rslora is 'yes'",
    ),
    "no patterns": ('{"transformer.lora_alpha": 4, "transformer.alpha_pattern": [1]}', "alpha_pattern that names no layers"),
    "slow pattern": ('{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(a+)+b": 1}}', "not understood: '(a+)+b'"),
    "broken pattern": ('{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(": 1}}', "not understood: '('"),
    "another base": (
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.init_lora_weights": "pissa_niter_4"}',
        "pissa_niter_4",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_settings_that_cannot_be_used_are_named(tmp_path, case):
    text, words = UNUSABLE[case]
    with pytest.raises(LoraError) as raised:
        read_lora(saved(tmp_path, tensors_of({Q0: 4}), metadata={"lora_adapter_metadata": text}))
    assert words in str(raised.value)
    assert str(raised.value).startswith("test.safetensors cannot be used: at layer transformer_blocks_0_attn_to_q, ")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"{", b"[]", b'{"r": 4, "lora_alpha": 1e999}'])
def test_a_sidecar_that_cannot_be_used_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(LoraError, match=r"adapter_config\.json"):
        read_lora(saved(tmp_path, tensors_of({Q0: 4})))


def test_names_of_a_thousand_layers_are_found_at_once(tmp_path):
    patterns = {f"transformer_blocks.{n}.attn.to_q": n + 1 for n in range(5000)}
    file = read_lora(saved(tmp_path, tensors_of({Q0: 4, Q1: 4}), metadata=in_metadata({"lora_alpha": 9, "alpha_pattern": patterns})))
    assert scales(file) == (0.25, 0.5)
