"""The export is the model: other programs' readers rebuild it from the files alone, and what was in the folder before stays."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

diffusers = pytest.importorskip("diffusers", reason="the model is made by diffusers, which A1111 does not have")

from dynfuse_world import model
from dynfuse_world.export import LORAS, export, instructions
from dynfuse_world.shipped import WeightsError, write_checksums

PROMPTS = ["A zib creature in blueprint style", "", "don't (panic): 12 ünï"]
SCALING_FACTOR = 0.3125


def shaken(network):
    """With norms that are not the identity, as training leaves them."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.save_network(shaken(model.new_unet()), folder / "unet.safetensors")
        model.save_network(shaken(model.new_vae()), folder / "vae.safetensors", {"scaling_factor": str(SCALING_FACTOR)})
        model.save_text_encoder(shaken(model.new_text_encoder()), folder / "text_encoder.safetensors")
    copied = [f"loras/{name}.safetensors" for name in LORAS]
    copied += ["clip/open_clip_config.json", "clip/open_clip_model.safetensors"]
    copied += ["dino/config.json", "dino/model.safetensors", "dino/preprocessor_config.json"]
    for name in copied:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    write_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """In a folder whose name means something in a .yaml, and by a Python that has no diffusers, as a WebUI's may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        return export(tmp_path_factory.mktemp("web") / "it's: a #ünï folder", weights)


@pytest.fixture(scope="module")
def checkpoint(exported):
    return exported.checkpoints / "dynfuse-toy.safetensors"


@pytest.fixture(scope="module")
def configuration(checkpoint):
    return yaml.safe_load(checkpoint.with_suffix(".yaml").read_text("utf-8"))["model"]["params"]


def read_by_diffusers(kind, checkpoint):
    """Through diffusers' own conversion, which takes the architecture from the .yaml."""
    return kind.from_single_file(str(checkpoint), original_config=str(checkpoint.with_suffix(".yaml"))).double().eval()


@torch.no_grad()
def test_the_autoencoder_padded_to_32_groups_gives_the_same_latents_and_pictures(checkpoint, weights):
    ours, theirs = model.load_vae(weights / "vae.safetensors").double(), read_by_diffusers(diffusers.AutoencoderKL, checkpoint)
    assert theirs.config.norm_num_groups == 32
    assert theirs.config.scaling_factor == SCALING_FACTOR
    pictures, latents = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1, torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(theirs.encode(pictures).latent_dist.parameters, ours.encode(pictures).latent_dist.parameters)
    torch.testing.assert_close(theirs.decode(latents).sample, ours.decode(latents).sample)


@torch.no_grad()
def test_the_unet_gives_the_same_noise(checkpoint, weights):
    ours = model.load_network(model.new_unet(), weights / "unet.safetensors").double()
    theirs = read_by_diffusers(diffusers.UNet2DConditionModel, checkpoint)
    inputs = torch.randn(2, 4, 8, 8, dtype=torch.float64), 500, torch.randn(2, 77, model.TEXT_WIDTH, dtype=torch.float64)
    torch.testing.assert_close(theirs(*inputs).sample, ours(*inputs).sample)


@torch.no_grad()
def test_the_text_encoder_reads_prompts_from_its_folder_alone(checkpoint, configuration, weights):
    folder = configuration["cond_stage_config"]["params"]["version"]
    assert Path(folder).is_absolute()
    theirs, tokenizer = CLIPTextModel(CLIPTextConfig.from_pretrained(folder)).eval(), CLIPTokenizer.from_pretrained(folder)
    prefix = "cond_stage_model.transformer."
    state = {name.removeprefix(prefix): tensor.float() for name, tensor in load_file(checkpoint).items() if name.startswith(prefix)}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert tokens.equal(model.tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids)
    torch.testing.assert_close(theirs(tokens)[0], model.load_text_encoder(weights / "text_encoder.safetensors")(tokens)[0])


def test_every_tensor_belongs_to_a_part_that_a_webui_knows(checkpoint):
    parts = {name.partition(".")[0] for name in load_file(checkpoint)}
    assert parts == {"model", "first_stage_model", "cond_stage_model"}


def test_the_schedule_is_the_one_of_the_pipeline(configuration):
    scheduler = model.new_scheduler().config
    names = ("beta_start", "beta_end", "num_train_timesteps")
    assert [configuration[name] for name in ("linear_start", "linear_end", "timesteps")] == [scheduler[name] for name in names]


def test_loras_and_encoders_are_copied(exported, weights):
    for name in LORAS:
        copy = exported.loras / "dynfuse-toy" / f"{name}.safetensors"
        assert copy.read_bytes() == (weights / "loras" / copy.name).read_bytes()
    for folder in (exported.clip, exported.dino):
        originals = sorted((weights / folder.name).iterdir())
        assert [path.read_bytes() for path in sorted(folder.iterdir())] == [path.read_bytes() for path in originals]


def test_a_lora_brings_its_picture_and_the_prompt_of_its_reference(exported):
    for name in LORAS:
        with Image.open(exported.loras / "dynfuse-toy" / f"{name}.png") as picture:
            assert picture.size == (64, 64)
    texts = [json.loads((exported.loras / "dynfuse-toy" / f"{name}.json").read_text())["activation text"] for name in ("zib", "chalk")]
    assert texts == ["a zib creature", "a house in chalk style"]


def test_all_that_is_said_to_be_written_is_there_and_nothing_else(exported):
    assert sorted(exported.files) == sorted(path for path in exported.folder.rglob("*") if path.is_file())
    text = instructions(exported)
    for needed in (exported.checkpoints, exported.loras, exported.clip, exported.dino, "<dynfuse:zib:blueprint>", "Forge"):
        assert str(needed) in text


def test_exporting_again_changes_nothing(exported, weights):
    before = {path: path.stat().st_size for path in exported.files}
    assert set(export(exported.folder, weights).files) == set(before)
    assert {path: path.stat().st_size for path in exported.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "mine",
    [
        "Stable-diffusion/dynfuse-toy.yaml",
        "Lora/dynfuse-toy/zib.json",
        "dynfuse/toy/clip/open_clip_config.json",
        "Lora/pets/mok.safetensors",
    ],
)
def test_a_file_of_ones_own_is_never_replaced_nor_hidden(mine, weights, tmp_path):
    own = tmp_path / "models" / mine
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(FileExistsError) as error:
        export(tmp_path, weights)
    assert error.value.filename == str(own)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    assert own.read_text() == "mine"


@pytest.mark.parametrize("name", ["vae.safetensors", "loras/chalk.safetensors", "dino/model.safetensors"])
def test_missing_weights_are_named_before_anything_is_written(name, weights, tmp_path):
    incomplete = shutil.copytree(weights, tmp_path / "weights")
    (incomplete / name).unlink()
    with pytest.raises(WeightsError, match=re.escape(name)):
        export(tmp_path / "web", incomplete)
    assert not (tmp_path / "web").exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        export(tmp_path / "file", weights)
