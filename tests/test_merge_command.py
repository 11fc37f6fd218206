"""merge, and generate --save-lora: what is written and said, and how it is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_dynfuse import FuseSettings, cli, read_lora
from lib_dynfuse.fusion.merging import GUIDANCE_FIELDS
from lib_dynfuse.lora.families import SD1, reference_layers
from lib_dynfuse.settings import field_types
from tests.test_cli import generate, refused

LAYERS = [
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "middle_block.1.transformer_blocks.0.ff.net.2",
]


def write(path, seed, layers=LAYERS):
    """A file for SD 1.x as published, of rank 4."""
    shapes, generator, tensors = reference_layers(SD1.name), torch.Generator().manual_seed(seed), {}
    for layer in layers:
        key = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, shapes[layer][1], generator=generator) / 30
        tensors[f"{key}.lora_up.weight"] = torch.randn(shapes[layer][0], 4, generator=generator)
    save_file(tensors, str(path))


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("dog", "hat", "ink")):
        write(tmp_path / f"{name}.safetensors", seed)
    return tmp_path


def merge(folder, *arguments, out="both.safetensors"):
    return [
        "merge",
        *(str(folder / item) if str(item).endswith(".safetensors") else str(item) for item in arguments),
        "--out",
        str(folder / out),
    ]


def change(path, layer=LAYERS[0]):
    """dW of a layer in float64, by the definition."""
    tensors = load_file(path)
    key = next(key.removesuffix(".lora_down.weight") for key in tensors if key.endswith("lora_down.weight") and key in names(layer))
    alpha = tensors.get(f"{key}.alpha")
    scale = 1.0 if alpha is None else alpha.item() / len(tensors[f"{key}.lora_down.weight"])
    return scale * tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()


def names(layer):
    diffusers = {LAYERS[0]: "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"}
    return {f"lora_unet_{name}.lora_down.weight" for name in (layer.replace(".", "_"), diffusers.get(layer))}


def test_two_files_are_a_subject_and_a_style_and_their_sum(folder, capsys):
    assert cli.main(merge(folder, "dog.safetensors", "ink.safetensors", "--weights", "0.5", "-1", "--dtype", "float32")) == 0
    dog, ink, both = (change(folder / f"{name}.safetensors") for name in ("dog", "ink", "both"))
    torch.testing.assert_close(both, 0.5 * dog - ink, rtol=1e-5, atol=1e-6)
    output = capsys.readouterr().out
    assert output.startswith("both.safetensors\n")
    for words in ("SD 1.x", "dog 0.5, ink -1; the same at every step", "3 layers of rank 8", "none but rounding to float32"):
        assert words in output


def test_several_on_a_side(folder):
    arguments = merge(
        folder,
        "--subject",
        "dog.safetensors",
        "hat.safetensors",
        "--style",
        "ink.safetensors",
        "--dtype",
        "float32",
        "--subject-weight",
        "1+0.5",
    )
    assert cli.main(arguments) == 0
    dog, hat, ink, both = (change(folder / f"{name}.safetensors") for name in ("dog", "hat", "ink", "both"))
    torch.testing.assert_close(both, dog + 0.5 * hat + ink, rtol=1e-5, atol=1e-6)
    assert read_lora(folder / "both.safetensors").ranks == {12: 3}


def test_blocks_of_both_at_once(folder):
    assert cli.main(merge(folder, "dog.safetensors", "ink.safetensors", "--blocks", "in1=0", "", "--dtype", "float32")) == 0
    torch.testing.assert_close(change(folder / "both.safetensors"), change(folder / "ink.safetensors"), rtol=1e-5, atol=1e-6)
    settings = cli.settings_of(cli._parser().parse_args([*generate(), "--blocks", "in1=0", "NONE"]))
    assert settings == FuseSettings(subject_blocks="in1=0", style_blocks="NONE")


def test_a_rank_reduces_and_says_what_is_lost(folder, capsys):
    assert cli.main(merge(folder, "dog.safetensors", "ink.safetensors", "--rank", "2")) == 0
    assert "of the change is lost to the reduction to rank 2" in capsys.readouterr().out
    assert read_lora(folder / "both.safetensors").ranks == {2: 3}


def test_weights_over_the_steps_become_their_mean_over_as_many_as_are_given(folder, capsys):
    assert cli.main(merge(folder, "dog.safetensors", "ink.safetensors", "--subject-weight", "0@0,1@1", "--steps", "4")) == 0
    output = capsys.readouterr().out
    assert "dog 0.5, ink 1; means over 4 steps" in output


def test_every_setting_that_matters_to_a_file_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("method", "subject_weight", "style_weight", "subject_blocks", "style_blocks", "te_weight", "scope", "one_sided"):
        assert cli.option_of(name) in text
    assert "(default: direct)" in text
    for name in field_types():
        if name in (*GUIDANCE_FIELDS, "hr", "criterion"):
            assert f"{cli.option_of(name)} " not in text, name


def test_a_method_that_measures_is_refused_with_the_ways_to_have_it(folder, capsys):
    for options in (["--method", "dynfuse"], ["--preset", "paper"]):
        sentence = refused(capsys, *merge(folder, "dog.safetensors", "ink.safetensors", *options))
        assert all(words in sentence for words in ("dynfuse", "generate --save-lora", "panel", "--method direct"))
    assert cli.main(merge(folder, "dog.safetensors", "ink.safetensors", "--preset", "paper", "--method", "direct")) == 0
    assert read_lora(folder / "both.safetensors").ranks == {8: 2}, "attention layers only"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dog.safetensors"], "Give two files"),
        (["dog.safetensors", "hat.safetensors", "ink.safetensors"], "Give two files"),
        ([], "Give two files"),
        (["--subject", "dog.safetensors"], "Give two files"),
        (["dog.safetensors", "ink.safetensors", "--style", "hat.safetensors"], "Give two files"),
        (["dog.safetensors", "none.safetensors"], "none.safetensors"),
        (["dog.safetensors", "dog.safetensors"], "given twice"),
        (["dog.safetensors", "ink.safetensors", "--rank", "0"], "less than 1"),
        (["dog.safetensors", "ink.safetensors", "--weights", "1", "much"], "--weights"),
        (["dog.safetensors", "ink.safetensors", "--blocks", "in1=x", ""], "--blocks"),
        (["dog.safetensors", "ink.safetensors", "--blocks", "in99=0", ""], "in99"),
        (["dog.safetensors", "ink.safetensors", "--subject-weight", "1+2"], "2 parts for 1 LoRA"),
        (["dog.safetensors", "ink.safetensors", "--weights", "0", "0"], "Nothing is left"),
        (["dog.safetensors", "ink.safetensors", "--criterion", "kl"], "--criterion"),
    ],
)
def test_what_cannot_be_merged_is_said_in_a_sentence(folder, capsys, arguments, words):
    assert words in refused(capsys, *merge(folder, *arguments))
    assert not (folder / "both.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "words"), [("dog.safetensors", "never overwritten"), ("both.pt", ".safetensors"), ("no/b.safetensors", "no folder")]
)
def test_where_it_cannot_be_written_is_said_before_anything_is_read(folder, capsys, out, words):
    before = (folder / "dog.safetensors").read_bytes()
    assert words in refused(capsys, *merge(folder, "missing.safetensors", "ink.safetensors", out=out))
    assert (folder / "dog.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a pipeline and two LoRAs, whose text encoder parts matter too."""
    pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")
    from tests.fakes.small_model import small_pipeline, write_random_lora

    folder = tmp_path_factory.mktemp("tiny")
    pipeline = small_pipeline("epsilon")
    pipeline.save_pretrained(folder / "model")
    for name, seed in (("dog", 1), ("ink", 3)):
        write_random_lora(folder / f"{name}.safetensors", pipeline, rank=4, strength=0.3, seed=seed)
    return folder


def picture(tiny, out, *more):
    options = {"size": "64x64", "steps": 3, "seed": 7, "device": "cpu", "cfg": 3}
    arguments = generate(tiny / "model", tiny / "dog.safetensors", tiny / "ink.safetensors", out, **options)
    return cli.main([*map(str, arguments), *map(str, more)])


def merged_pipeline(tiny, path):
    """The pipeline with W0 + (alpha / rank) B A in float64, rounded once, in every layer that a file names."""
    from lib_dynfuse.hosts.diffusers import load_pipeline

    pipeline, tensors = load_pipeline(tiny / "model", device="cpu"), load_file(path)
    done = 0
    for network, prefixes in ((pipeline.unet, ("lora_unet",)), (pipeline.text_encoder, ("lora_te", "lora_te1"))):
        for name, module in network.named_modules():
            for prefix in prefixes:
                key = f"{prefix}_{name.replace('.', '_')}"
                if f"{key}.lora_down.weight" not in tensors:
                    continue
                down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
                delta = tensors[f"{key}.alpha"].item() / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
                module.weight.data = (module.weight.double() + delta).float()
                done += 1
    assert 3 * done == len(tensors), "every tensor of the file is for a layer of this pipeline"
    return pipeline


def pixels(image):
    return np.asarray(image).astype(int)


def plain_picture(pipeline):
    return pipeline(
        "a dog", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(7), width=64, height=64
    ).images[0]


def test_the_file_of_a_sum_makes_the_same_picture_without_dynfuse(tiny, tmp_path, capsys):
    path = tmp_path / "both.safetensors"
    options = ["--method", "direct", "--weights", "0.8", "0.5", "--te-weight", "0.6", "--save-lora", path]
    assert picture(tiny, tmp_path / "out", *options, "--blocks", "base=0.5", "") == 0
    output = capsys.readouterr().out
    assert "dog 0.8, ink 0.5; the same at every step" in output
    fused = pixels(Image.open(tmp_path / "out" / "00001-7.png"))
    alone = pixels(plain_picture(merged_pipeline(tiny, path)))
    assert abs(fused - alone).max() <= 2
    from lib_dynfuse.hosts.diffusers import load_pipeline

    unmerged = pixels(plain_picture(load_pipeline(tiny / "model", device="cpu")))
    assert abs(fused - unmerged).max() > 20, "or the test shows nothing"


def test_a_selection_is_saved_as_its_mean_over_steps_and_pictures(tiny, tmp_path, capsys):
    path = tmp_path / "both.safetensors"
    assert picture(tiny, tmp_path / "out", "--method", "dynfuse", "--images", 3, "--batch-size", 2, "--save-lora", path, "--rank", 3) == 0
    output = capsys.readouterr().out
    assert "means over 3 steps and 3 images" in output
    assert "of the change is lost to the reduction to rank 3" in output
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["dynfuse_settings"]) == {"subject": "dog", "style": "ink", "method": "dynfuse"}
    merged_pipeline(tiny, path)


def test_the_file_is_as_exact_as_the_fusion_with_these_means(tiny, tmp_path):
    """Against a fusion whose rule gives every layer the means of the selection's trace."""
    from lib_dynfuse.fusion import FusionSession
    from lib_dynfuse.fusion.merging import Means, merge_pictures
    from lib_dynfuse.fusion.rules import Rule
    from lib_dynfuse.hosts.diffusers import FusedPipeline, denoiser, load_pipeline

    pipeline = load_pipeline(tiny / "model", device="cpu")
    files = [read_lora(tiny / f"{name}.safetensors") for name in ("dog", "ink")]
    settings = FuseSettings(subject="dog", style="ink")
    fused = FusedPipeline(pipeline, *files, settings)
    made = fused("a dog", seeds=[7, 8], steps=3, cfg_scale=3.0, width=64, height=64)
    path = tmp_path / "both.safetensors"
    merge_pictures(path, [files[0]], [files[1]], settings, [made.trace], fused.layer_shapes, dtype=torch.float32)
    means = Means.of([made.trace])

    class Mean(Rule):
        name = summary = "mean"

        def weights(self, step, votes):
            return means.weights.float().unsqueeze(1).to(self.device)

    fused._new_session = lambda: FusionSession(denoiser(pipeline), *files, settings, rule=Mean())
    expected = fused("a dog", seeds=[7], steps=3, cfg_scale=3.0, width=64, height=64).images[0]
    assert abs(pixels(expected) - pixels(plain_picture(merged_pipeline(tiny, path)))).max() <= 2
    assert abs(pixels(expected) - pixels(made.images[0])).max() > 2, "a mean is not the selection"


def test_a_file_that_cannot_be_written_stops_generate_before_the_model_is_loaded(tiny, tmp_path, capsys):
    shutil.copy(tiny / "dog.safetensors", tmp_path / "taken.safetensors")
    arguments = generate(tmp_path / "no model", tiny / "dog.safetensors", tiny / "ink.safetensors", tmp_path / "out")
    assert "never overwritten" in refused(capsys, *arguments, "--save-lora", tmp_path / "taken.safetensors")
    assert "--save-lora" in refused(capsys, *arguments, "--rank", 4)
    assert not (tmp_path / "out").exists()
