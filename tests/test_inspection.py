"""`inspect`: the report, the pair, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest

from lib_dynfuse.inspection import inspect_files

from .lora.writing import kohya, pair, peft, random, saved

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
    verdict, loudness = out.splitlines()[-2:]
    assert verdict == "dog.safetensors and ink.safetensors go together on SD 1.x: both change 1 layer, only the first 1, only the second 0."
    change = {name: up.double() @ down.double() for name, (down, up) in (("k4", pair(640, 768, 4)), ("v8", pair(640, 768, 8)))}
    dog_norm = sum(matrix.square().sum().item() for matrix in change.values()) ** 0.5
    ink_norm = (lambda down, up: (up.double() @ down.double()).norm().item())(*pair(640, 768))
    assert loudness == (
        f"dog.safetensors is {dog_norm / ink_norm:.1f} times as loud as ink.safetensors ({dog_norm:.3g} and {ink_norm:.3g}); the method "
        "balanced evens out what is beyond twice."
    )


def seeded(tmp_path, name, seed, up_seed, scale=1.0):
    down, up = random(4, 768, seed=seed), scale * random(640, 4, seed=up_seed)
    return saved(tmp_path, kohya(K, down, up, 4.0) | kohya(V, random(4, 768, seed=seed + 50), up, 4.0), name)


def test_loras_of_one_seed_are_told(tmp_path):
    same = inspect(seeded(tmp_path, "a.safetensors", 1, 2), seeded(tmp_path, "b.safetensors", 1, 3, 1.1))[1]
    assert "They are about equally loud" in same
    assert "They listen to the same directions (100%; strangers' files have 1% in common)" in same
    other = inspect(seeded(tmp_path, "a.safetensors", 1, 2), seeded(tmp_path, "c.safetensors", 4, 3))[1]
    assert "same directions" not in other


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


def rows_of(out: str) -> dict[str, str]:
    return dict(re.split("  +", line.strip(), maxsplit=1) for line in out.splitlines()[1:])


PEFT = "transformer.transformer_blocks.0.attn.to_"


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        (kohya(K, *pair(640, 768, 4), 2.0), {}, "2 from the file's tensors"),
        (kohya(K, *pair(640, 768, 4), 2.0) | kohya(V, *pair(640, 768, 4), 4.0), {}, "2 to 4 from the file's tensors"),
        (
            kohya(K, *pair(640, 768, 4), 2.0) | kohya(V, *pair(640, 768, 4)),
            {},
            "2 from the file's tensors (1 layer); none, so that the strength is 1 (1 layer)",
        ),
        (peft(PEFT + "q", *pair(6, 4, 4)), {"r": 4, "lora_alpha": 16}, "16 from its metadata (lora_adapter_metadata)"),
        (
            peft(PEFT + "q", *pair(6, 4, 4)) | peft(PEFT + "k", *pair(6, 4, 8)),
            {"r": 4, "lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"to_k": 0.5}, "rank_pattern": {"to_k": 8}},
            "0.5 to 16 with rslora, from its metadata (lora_adapter_metadata)",
        ),
        (peft(PEFT + "q", *pair(6, 4, 4)), {}, "none, so that the strength is 1 (PEFT keeps it in adapter_config.json, which is not here)"),
    ],
)
def test_the_report_says_where_the_strength_comes_from(tmp_path, tensors, settings, text):
    metadata = (
        {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})} if settings else None
    )
    assert rows_of(inspect(saved(tmp_path, tensors, metadata=metadata))[1])["Alpha"] == text


def test_the_report_names_the_settings_beside_the_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    path = saved(tmp_path, peft(PEFT + "q", *pair(6, 4, 4)), "adapter_model.safetensors")
    assert rows_of(inspect(path)[1])["Alpha"] == "8 from adapter_config.json"


TAGS = {
    "infinite": '{"a": {"dog": Infinity, "cat": 3}}',
    "deep": "[" * 100_000,
    "deep inside": '{"a": {"dog": ' + "[" * 100_000,
    "huge": '{"a": {"dog": 1' + "0" * 5000 + "}}",
    "large": '{"a": {"dog": 1' + "0" * 400 + ', "cat": 3}}',
    "long": '{"a": {"' + "x" * 3_000_000 + '": 1}}',
    "of another shape": '{"a": [1, 2], "b": {"dog": {}}}',
    "no counts": '{"a": {"dog": null, "bird": true, "fish": "3", "cat": 3}}',
}


@pytest.mark.parametrize("case", TAGS)
def test_tags_of_any_shape_are_left_out(tmp_path, case):
    code, out, err = inspect(saved(tmp_path, kohya(K, *pair(640, 768)), metadata={"ss_tag_frequency": TAGS[case]}))
    assert (code, err) == (0, "")
    assert rows_of(out).get("Frequent tags") in (None, "cat (3)")


def test_nothing_of_a_file_reaches_the_console_raw_or_at_length(tmp_path):
    evil = "\x1b]0;owned\x07\x9b2J\u202e" + "long " * 200_000
    metadata = {"modelspec.title": evil, "ss_output_name": "\x1b[31m\n red", "modelspec.author": "\x00\x7f"}
    metadata["ss_tag_frequency"] = json.dumps({"a": {"\x1b[2J" + "t" * 1000: 7}})
    tensors = kohya(K, *pair(640, 768)) | {"\x1b[2J" + "k" * 100_000: random(1), "bundle_emb.\x07bell" + "e" * 500 + ".x": random(1)}
    code, out, err = inspect(saved(tmp_path, tensors, metadata=metadata))
    assert (code, err) == (0, "")
    assert re.fullmatch(r"[\x20-\x7e\n]*", out)
    assert max(map(len, out.splitlines())) < 400
    rows = rows_of(out)
    assert rows["Trained as"] == "[31m red"
    assert rows["Title"].startswith("]0;owned2Jlong long")
    assert "Author" not in rows


@pytest.mark.parametrize("length", [10, 900, 100_000])
def test_a_refusal_quotes_no_more_than_a_line_of_a_file(tmp_path, length):
    for tensors in ({"\x1b" + "k" * length: random(1)}, kohya("\x1b" + "k" * length, *pair(6, 4))):
        code, out, err = inspect(saved(tmp_path, tensors))
        assert (code, out) == (2, "")
        assert err.isascii()
        assert err[:-1].isprintable()
        assert len(err) < 500


@pytest.mark.parametrize("name", ["水彩.safetensors", "été \u202e.safetensors"])
def test_a_console_without_the_letters_of_a_name_shows_question_marks(tmp_path, name):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2))
    path = saved(tmp_path, kohya(K, *pair(640, 768)), name)
    assert inspect_files([str(path), str(path)], out, err) == 0
    assert inspect_files([str(tmp_path / f"no {name}")], out, err) == 2
    out.flush()
    assert out.buffer.getvalue().count(b"??.safetensors" if name[0] == "水" else b"\xe9t\xe9 .safetensors") == 4


def test_the_program_prints_on_a_western_console(tmp_path):
    path = saved(tmp_path, kohya(K, *pair(640, 768)), "水彩.safetensors", {"modelspec.title": "水彩"})
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-m", "lib_dynfuse", "inspect", str(path)], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"??.safetensors")
