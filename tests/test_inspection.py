"""`inspect`: the report, the pair, and the exit codes."""

from __future__ import annotations

import io
import json
import re

import pytest

from lib_dynfuse.inspection import inspect_files

from .lora.writing import kohya, pair, random, saved

K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
V = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def inspect(*paths) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    return inspect_files([str(path) for path in paths], out, err), out.getvalue(), err.getvalue()


@pytest.fixture
def dog(tmp_path):
    tensors = kohya(K, *pair(640, 768, 4)) | kohya(V, *pair(640, 768, 8)) | kohya(TEXT, *pair(768, 768, 4))
    tensors |= {f"stray_{n}": random(1) for n in range(5)}
    tags = json.dumps({"10_dog": {"dog": 12, "grass": 3}})
    return saved(tmp_path, tensors, "dog.safetensors", {"ss_output_name": "my\ndog", "ss_tag_frequency": tags})


def test_the_report_says_what_a_file_holds(dog):
    code, out, err = inspect(dog)
    assert (code, err) == (0, "")
    name, *lines = out.splitlines()
    rows = dict(re.split("  +", line.strip(), maxsplit=1) for line in lines)
    assert name == "dog.safetensors"
    assert rows == {
        "Format": "kohya, LDM names; kohya, text encoder",
        "Base model": "SD 1.x",
        "Kinds": "LoRA (3 layers)",
        "Ranks": "4 to 8",
        "Denoiser": "2 of 2 layers matched",
        "Text encoders": "CLIP-L (1 layer)",
        "Unmatched": "5 keys: stray_0, stray_1, stray_2 and 2 more",
        "Trained as": "my dog",
        "Frequent tags": "dog (12), grass (3)",
    }


def test_two_files_for_one_base_model_go_together(dog, tmp_path):
    diffusers_names = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    ink = saved(tmp_path, kohya(diffusers_names, *pair(640, 768)), "ink.safetensors")
    code, out, err = inspect(dog, ink)
    assert (code, err) == (0, "")
    verdict = out.splitlines()[-1]
    assert verdict == "dog.safetensors and ink.safetensors go together on SD 1.x: both change 1 layer, only the first 1, only the second 0."


def test_two_files_for_different_base_models_do_not(dog, tmp_path):
    code, out, err = inspect(dog, saved(tmp_path, kohya(K, *pair(640, 2048)), "ink.safetensors"))
    assert code == 2
    assert "SDXL" in out
    assert err == "dog.safetensors was made for SD 1.x and ink.safetensors for SDXL: both must be for the same base model.\n"


def test_a_file_that_cannot_be_used_prints_one_sentence_and_nothing_else(dog, tmp_path):
    code, out, err = inspect(dog, tmp_path / "missing.safetensors")
    assert (code, out) == (2, "")
    assert err == "missing.safetensors cannot be read: there is no such file.\n"


def test_an_unknown_base_model_is_said_to_be_unknown(tmp_path):
    code, out, _ = inspect(saved(tmp_path, kohya(K, *pair(32, 48)), "small.safetensors"))
    assert code == 0
    assert "unknown (a U-Net" in out
    assert "1 of 1 layers matched" in out
