"""The command line: what it makes, what it writes into the pictures, and how it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_dynfuse import FuseSettings, SettingsError, cli
from lib_dynfuse.settings import METHODS, field_metadata, field_types, format_value
from lib_dynfuse.text import infotext
from tests.text.host_infotext import parse_infotext_line

ROOT = Path(__file__).parents[1]
NEEDS_DIFFUSERS = "the standalone part needs diffusers, which A1111 does not have"


def refused(capsys, *arguments):
    """The sentence with which a command line is refused, on standard error alone."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def generate(model="model", subject="dog.safetensors", style="watercolor.safetensors", out="out", **more):
    options = [item for name, value in more.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    return ["generate", "--model", model, "--subject", subject, "--style", style, "--prompt", "a dog", "--out", out, *options]


def settings_of(*options):
    return cli.settings_of(cli._parser().parse_args([*generate(), *options]))


def another_value(name):
    if name in TEXTS:
        return TEXTS[name]
    if choices := field_metadata(name)["choices"]:
        return choices[-1]
    return {bool: True, int: 3, float: 0.25, str: "a small dog"}[field_types()[name]]


# In their shortest form, as the settings keep them.
TEXTS = {
    "subject_weight": "-0.5@0,1@5",
    "style_weight": "1+0.5",
    "hr": "0.7/1",
    "subject_blocks": "in4-in8=0.5,out3=0",
    "style_blocks": "1,0,0,0,0,0,0,0,0,0,0,1",
}


@pytest.mark.parametrize(
    "name", [name for name in field_types() if name not in ("subject", "style") and not field_metadata(name)["picture"]]
)
def test_every_setting_is_an_option_of_its_name(name):
    value = another_value(name)
    given = [cli.option_of(name)] if value is True else [cli.option_of(name), format_value(value)]
    assert settings_of(*given) == FuseSettings(**{name: value})


def test_the_last_of_an_option_and_its_opposite_counts():
    assert settings_of("--guidance", "--no-guidance") == FuseSettings()
    assert settings_of("--no-guidance", "--guidance") == FuseSettings(guidance=True)


def test_options_by_name_change_what_a_preset_sets():
    settings = settings_of("--preset", "paper", "--criterion", "js", "--weights", "0.5", "0.75")
    assert (settings.criterion, settings.gradient, settings.limit, settings.scope) == ("js", "exact", 0, "attention")
    assert (settings.subject_weight, settings.style_weight) == (0.5, 0.75)


def test_without_options_the_settings_are_the_defaults():
    assert settings_of() == FuseSettings()


def test_weights_are_the_subjects_and_the_styles():
    assert settings_of("--weights", "0.9", "-1") == FuseSettings(subject_weight=0.9, style_weight=-1.0)


def test_weights_may_be_points_over_the_steps_or_one_each():
    assert settings_of("--weights", "-1@0,1@0.5", "1+0.5") == FuseSettings(subject_weight="-1@0,1@0.5", style_weight="1+0.5")


def test_a_method_that_is_registered_later_is_an_option(capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "halves", "each LoRA at half its weight")
    assert settings_of("--method", "halves").method == "halves"
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    assert "halves: each LoRA at half its weight." in " ".join(capsys.readouterr().out.split())


def test_several_files_may_be_given_on_each_side():
    options = cli._parser().parse_args(["generate", "--model", "m", "--prompt", "p", "--out", "o", "--style", "c", "--subject", "a", "b"])
    assert (options.subject, options.style) == ([Path("a"), Path("b")], [Path("c")])


def test_the_help_explains_every_setting_and_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for name in field_types():
        assert f"--{name.replace('_', '-')}" in text
    assert " ".join(field_metadata("bias")["tooltip"].split()) in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in ("generate", "demo", "inspect", "cache", "bench"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--criterion", "mse"], ["--criterion", "kl, js, cosine, dot", "'mse'"]),
        (["--bias", "-1"], ["--bias", "at least 0"]),
        (["--weights", "1", "much"], ["--weights", "number", "'much'"]),
        (["--weights", "1@2.5,0@0", "1"], ["--weights", "whole number of a step"]),
        (["--style-blocks", "1,2,3"], ["--style-blocks", "12, 17, 20, 26 or 61 numbers", "not 3"]),
        (["--hr", "1/1/1"], ["--hr", "SUBJECT/STYLE"]),
        (["--decide", "later"], ["--decide", "next, now"]),
        (["--vote-tokens", "-1"], ["--vote-tokens", "at least 0"]),
        (["--te-weight", "nan"], ["--te-weight", "finite"]),
        (["--size", "big"], ["--size", "768x512"]),
        (["--size", "513x512"], ["--size", "multiples of 8"]),
        (["--steps", "0"], ["--steps", "less than 1"]),
        (["--images", "many"], ["--images", "whole number"]),
        (["--cfg", "inf"], ["--cfg", "finite"]),
        (["--dtype", "int8"], ["--dtype", "float16"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_a_wrong_option_is_named_with_what_it_takes(capsys, options, words):
    sentence = refused(capsys, *generate(), *options)
    assert all(word in sentence for word in words)


def test_no_command_is_refused(capsys):
    assert "COMMAND" in refused(capsys)


@pytest.mark.parametrize("content", [None, b"", b"not a LoRA at all"])
def test_a_file_that_is_no_lora_is_named(capsys, tmp_path, content):
    path = tmp_path / "dog.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert "dog.safetensors" in refused(capsys, *generate(subject=path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_loras_of_different_base_models_are_refused_before_the_model_is_loaded(capsys, tmp_path):
    key = "lora_unet_{}_1_1_transformer_blocks_0_attn2_to_k"
    for name, layer, width in (("sd", "input_blocks", 768), ("sdxl", "output_blocks", 2048)):
        out = 320 if width == 768 else 1280
        tensors = {
            f"{key.format(layer)}.lora_down.weight": torch.zeros(4, width),
            f"{key.format(layer)}.lora_up.weight": torch.zeros(out, 4),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    sentence = refused(capsys, *generate(subject=tmp_path / "sd.safetensors", style=tmp_path / "sdxl.safetensors"))
    assert "SDXL" in sentence


def write_lora(path, layer="input_blocks_1_1"):
    key = f"lora_unet_{layer}_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.lora_down.weight": torch.ones(4, 768), f"{key}.lora_up.weight": torch.ones(320, 4)}, path)
    return str(path)


def test_a_file_given_twice_and_weights_for_other_numbers_of_files_are_refused_before_the_model_is_loaded(capsys, tmp_path):
    dog, hat, ink = (write_lora(tmp_path / f"{name}.safetensors") for name in ("dog", "hat", "ink"))
    base = ["generate", "--model", "nowhere", "--prompt", "p", "--out", str(tmp_path / "out")]
    assert "dog.safetensors is given twice" in refused(capsys, *base, "--subject", dog, hat, "--style", dog)
    sentence = refused(capsys, *base, "--subject", dog, hat, "--style", ink, "--weights", "1+1+1", "1")
    assert sentence == "Subject_weight has 3 parts for 2 LoRAs; give one for all of them, or one each with + between.\n"
    assert not (tmp_path / "out").exists()


def test_inspect_prints_a_report_and_refuses_in_a_sentence(capsys, tmp_path):
    path = tmp_path / "dog.safetensors"
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.lora_down.weight": torch.zeros(4, 768), f"{key}.lora_up.weight": torch.zeros(320, 4)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    assert "SD 1" in capsys.readouterr().out
    assert "nowhere.safetensors" in refused(capsys, "inspect", tmp_path / "nowhere.safetensors")


def test_bench_is_handed_its_own_options(monkeypatch):
    from lib_dynfuse import bench

    seen = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 0)
    assert cli.main(["bench", "fusion", "--rank", "4"]) == 0
    assert seen == [["fusion", "--rank", "4"]]


@pytest.mark.parametrize(
    ("error", "code", "words"), [(KeyboardInterrupt(), 130, "Interrupted"), (PermissionError(13, "denied", "x"), 2, "x")]
)
def test_an_interrupt_and_a_file_error_end_without_a_traceback(capsys, monkeypatch, error, code, words):
    def stop(options):
        raise error

    monkeypatch.setattr(cli, "_demo", stop)
    assert cli.main(["demo"]) == code
    assert words in capsys.readouterr().err


def test_without_diffusers_the_sentence_says_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from lib_dynfuse import cli\n"
        f"sys.exit(cli.main(['demo', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install diffusers" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_package_imports_neither_diffusers_nor_gradio_nor_transformers():
    script = (
        "import sys, lib_dynfuse, lib_dynfuse.cli, lib_dynfuse.fusion.selection_map\n"
        "print([name for name in ('diffusers', 'transformers', 'gradio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_in_the_program_itself_is_not_hidden(monkeypatch):
    def fail(options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(cli, "_demo", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main(["demo"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a pipeline "model" and two LoRAs."""
    pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    from tests.fakes.small_model import small_pipeline, write_random_lora

    folder = tmp_path_factory.mktemp("tiny")
    pipeline = small_pipeline()
    pipeline.save_pretrained(folder / "model")
    for name, seed in (("dog, big", 1), ("watercolor", 3)):
        write_random_lora(folder / f"{name}.safetensors", pipeline, rank=4, strength=0.7, seed=seed)
    return folder


def run(tiny, out, **more):
    options = {"size": "64x64", "steps": 2, "seed": 7, "device": "cpu", **more}
    arguments = generate(tiny / "model", tiny / "dog, big.safetensors", tiny / "watercolor.safetensors", out, **options)
    return cli.main([str(argument) for argument in arguments])


def test_generate_writes_images_that_carry_their_settings_with_their_maps_beside(tiny, tmp_path, capsys):
    assert (
        run(tiny, tmp_path / "new" / "out", images=3, batch_size=2, negative_prompt="rain, snow", criterion="js", subject_weight=0.9) == 0
    )
    names = ["00001-7", "00002-8", "00003-9"]
    images = [tmp_path / "new" / "out" / f"{name}.png" for name in names]
    assert capsys.readouterr().out.split() == [str(path) for path in images]
    for path, seed in zip(images, "789", strict=True):
        image = Image.open(path)
        assert image.size == (64, 64)
        prompt, negative, line = image.text["parameters"].split("\n")
        assert (prompt, negative) == ("a dog", "Negative prompt: rain, snow")
        entries = parse_infotext_line(line)
        assert entries["Seed"] == seed
        assert (entries["Size-1"], entries["Size-2"]) == ("64", "64")
        assert (entries["Steps"], entries["Sampler"], entries["Model"]) == ("2", "DDIM", "model")
        restored = infotext.read_settings(entries)
        assert restored == FuseSettings("dog, big", "watercolor", criterion="js", subject_weight=0.9)
        assert Image.open(path.with_name(f"{path.stem}-dynfuse.png")).width > 500


def test_the_same_seed_gives_the_same_picture_alone_or_in_a_batch_and_nothing_is_overwritten(tiny, tmp_path):
    run(tiny, tmp_path, images=2, batch_size=2)
    run(tiny, tmp_path, seed=8)
    # A batched product rounds differently in the last digit; a picture has 256 levels.
    first, second = (torch.tensor(list(Image.open(tmp_path / name).tobytes())) for name in ("00002-8.png", "00003-8.png"))
    assert (first - second).abs().max() <= 1
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_every_method_has_a_map(tiny, tmp_path):
    assert run(tiny, tmp_path, method="direct") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001-7-dynfuse.png", "00001-7.png"]


def test_several_files_on_a_side_are_fused_and_named_in_the_infotext(tiny, tmp_path):
    shutil.copy(tiny / "watercolor.safetensors", tmp_path / "c++.safetensors")
    arguments = generate(tiny / "model", tiny / "dog, big.safetensors", tiny / "watercolor.safetensors", tmp_path / "out")
    at = arguments.index("--prompt")
    options = ["--size", "64x64", "--steps", "2", "--seed", "7", "--device", "cpu", "--style-weight", "0.5+0@0,1@1"]
    assert cli.main([str(item) for item in (*arguments[:at], tmp_path / "c++.safetensors", *arguments[at:], *options)]) == 0
    settings = infotext.read_settings(entries_of(tmp_path / "out" / "00001-7.png"))
    assert (settings.subjects, settings.styles) == (("dog, big",), ("watercolor", "c++"))
    assert settings.style_weight == "0.5+0@0,1@1"


def test_a_random_seed_is_written_into_the_image(tiny, tmp_path):
    run(tiny, tmp_path, seed=-1, method="direct")
    (path,) = (path for path in tmp_path.iterdir() if not path.stem.endswith("-dynfuse"))
    assert f"Seed: {path.stem.removeprefix('00001-')}," in Image.open(path).text["parameters"]


def test_the_infotext_names_the_loras_by_the_hash_that_webuis_know(tiny):
    import hashlib

    from lib_dynfuse.generate import lora_hash

    content = (tiny / "watercolor.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert lora_hash(tiny / "watercolor.safetensors") == hashlib.sha256(content[8 + header :]).hexdigest()[:12]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Options that name two small encoders."""
    from tests.fakes.encoders import write_clip, write_dino

    folder = tmp_path_factory.mktemp("encoders")
    return {"clip_model": write_clip(folder / "clip"), "dino_model": write_dino(folder / "dino")}


def run_guided(tiny, out, *flags, **more):
    options = {"size": "64x64", "steps": 2, "seed": 7, "device": "cpu", "cache": out / "kept", **more}
    arguments = generate(tiny / "model", tiny / "dog, big.safetensors", tiny / "watercolor.safetensors", out, **options)
    return cli.main([*map(str, arguments), "--guidance", *flags])


def entries_of(path):
    return parse_infotext_line(Image.open(path).text["parameters"].split("\n")[-1])


def test_a_guided_run_shows_its_references_and_its_curves_and_can_be_made_again(tiny, encoders, tmp_path, capsys):
    assert run_guided(tiny, tmp_path, images=2, m=3, **encoders) == 0
    names = ["00001-7", "00002-8"]
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.png") for name in names]
    made = {path.name for path in tmp_path.glob("*.png")}
    images = {f"{name}{what}.png" for name in names for what in ("", "-dynfuse", "-dynfuse-curve")}
    assert made == images | {"00001-7-dynfuse-subject.png", "00001-7-dynfuse-style.png"}
    assert Image.open(tmp_path / "00001-7-dynfuse-style.png").size == (64, 64)
    restored = infotext.read_settings(entries_of(tmp_path / "00002-8.png"))
    assert restored == FuseSettings("dog, big", "watercolor", guidance=True, m=3.0, reference_seed=7)
    before = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(before) == 2
    assert run_guided(tiny, tmp_path, m=3, **{**encoders, "seed": 8, "reference_seed": 7}) == 0
    assert Image.open(tmp_path / "00003-8.png").tobytes() == Image.open(tmp_path / "00002-8.png").tobytes()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == before


def test_a_picture_file_becomes_the_reference_and_the_infotext_names_it_by_digits(tiny, encoders, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "dog.jpg")
    assert run_guided(tiny, tmp_path / "out", subject_image=tmp_path / "dog.jpg", content_weight=1, **encoders) == 0
    settings = infotext.read_settings(entries_of(tmp_path / "out" / "00001-7.png"))
    assert len(settings.subject_image) == 16
    assert set(settings.subject_image) <= set("0123456789abcdef")
    shown = Image.open(tmp_path / "out" / "00001-7-dynfuse-subject.png")
    assert shown.size == (256, 256)
    assert abs(shown.getpixel((5, 200))[0] - 200) < 8


@pytest.mark.parametrize(("content", "words"), [(None, "no file"), (b"hello", "no picture")])
def test_a_reference_that_is_no_picture_is_refused_in_a_sentence(capsys, tmp_path, content, words):
    path = tmp_path / "dog.png"
    if content is not None:
        path.write_bytes(content)
    sentence = refused(capsys, *generate(), "--style-image", path, "--cache", tmp_path / "kept")
    assert all(word in sentence for word in ("--style-image", "dog.png", words))


def test_missing_encoders_stop_the_run_before_anything_is_made_or_leave_the_guidance_out(tiny, tmp_path, capsys):
    nowhere = {"encoders": tmp_path / "nowhere"}
    assert run_guided(tiny, tmp_path / "out", "--offline", **nowhere) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "nowhere" in sentence
    assert not (tmp_path / "out").exists()
    assert run_guided(tiny, tmp_path / "out", "--offline", without_encoders="go-on", **nowhere) == 0
    assert "without guidance" in capsys.readouterr().err
    assert not infotext.read_settings(entries_of(tmp_path / "out" / "00001-7.png")).guidance
    run(tiny, tmp_path / "plain")
    guided, plain = (Image.open(tmp_path / folder / "00001-7.png") for folder in ("out", "plain"))
    assert guided.tobytes() == plain.tobytes()


def test_start_after_end_is_refused(capsys):
    assert "must not be after" in refused(capsys, *generate(), "--start", "0.6", "--end", "0.5")


def test_the_cache_is_listed_and_cleared(tmp_path, capsys):
    from lib_dynfuse.guidance.references import ReferenceCache

    ReferenceCache(tmp_path).keep_picture(Image.new("RGB", (8, 8), "red"))
    assert cli.main(["cache", "--cache", str(tmp_path)]) == 0
    assert ": 1 picture (" in capsys.readouterr().out
    assert cli.main(["cache", "--cache", str(tmp_path), "--clear"]) == 0
    assert ": 1 picture (" in capsys.readouterr().out
    assert cli.main(["cache", "--cache", str(tmp_path)]) == 0
    assert ": 0 pictures (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/dynfuse"),
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/dynfuse"),
        ("darwin", {"HOME": "/Users/me"}, "/Users/me/Library/Caches/dynfuse"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/dynfuse"),
        ("linux", {"DYNFUSE_HOME": "/mine", "XDG_CACHE_HOME": "/caches"}, "/mine"),
    ],
)
def test_files_are_kept_where_the_platform_keeps_caches_or_where_one_says(monkeypatch, platform, variables, expected):
    from lib_dynfuse import home

    for name in ("DYNFUSE_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert home.home() == Path(expected)
    assert home.encoders_folder().parent == home.references_folder().parent == Path(expected)


@pytest.mark.parametrize("model", ["nowhere", "watercolor.safetensors"])
def test_a_model_that_cannot_be_loaded_is_refused_in_a_sentence(tiny, tmp_path, capsys, model):
    arguments = generate(tiny / model, tiny / "dog, big.safetensors", tiny / "watercolor.safetensors", tmp_path)
    assert Path(model).name in refused(capsys, *arguments)


def test_a_bad_setting_is_refused_before_files_are_read():
    with pytest.raises(SettingsError):
        settings_of("--method", "magic")


def test_a_reader_who_has_seen_enough_of_the_output_is_told_nothing():
    lora = ROOT / "dynfuse_world/weights/loras/zib.safetensors"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lib_dynfuse", "inspect", lora], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "lib_dynfuse", "generate"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--model" in done.stderr
