"""All steps of the training on two steps each: what they leave is a world that the other commands can use."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import functools
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")
pytest.importorskip("open_clip")

from dynfuse_world import cli
from dynfuse_world.judges import load_judges, load_second_judges
from dynfuse_world.model import load_pipeline
from dynfuse_world.oracles import read_oracle
from dynfuse_world.shipped import WeightsError, verify
from dynfuse_world.training import autoencoder, base, judges, loras, second_judges, steps
from lib_dynfuse import FuseSettings, read_lora
from lib_dynfuse.guidance.encoders import EncoderSources, load_encoders
from lib_dynfuse.hosts.diffusers import FusedPipeline

ORACLE = "zib-candy"


class Killed(Exception):
    pass


@pytest.fixture
def train(monkeypatch, tmp_path):
    """The command, with the steps made small: little to look at, two steps down each loss, and two LoRAs and an oracle."""
    for module, name, value in (
        (autoencoder, "PICTURES", 80),
        (base, "PICTURES", 80),
        (judges, "_POOL", 64),
        (judges, "_DECODED", 64),
        (judges, "_CALIBRATED", 64),
        (second_judges, "_PAINTED", 64),
        (second_judges, "_DECODED", 64),
        (loras, "_PRIOR_PICTURES", 16),
    ):
        monkeypatch.setattr(module, name, value)
    recipe = loras.Recipe(steps=2, prior=2, moved=True)
    lessons = [loras.Lesson(each.name, each.scenes, each.captions, recipe) for each in loras.single_lessons()]
    monkeypatch.setattr(loras, "single_lessons", lambda: [each for each in lessons if each.name in ("zib", "candy")])
    pair = loras.pair_lesson(*ORACLE.split("-"))
    monkeypatch.setattr(loras, "pair_lessons", lambda: [loras.Lesson(pair.name, pair.scenes, pair.captions, recipe)])
    for name, step in steps.STEPS.items():
        if name not in ("loras", "oracles"):
            monkeypatch.setitem(steps.STEPS, name, functools.partial(step, steps=2))
    return lambda *names: cli.main(["train", *names, "--work", str(tmp_path / "work"), "--weights", str(tmp_path / "weights")])


def test_a_training_that_is_killed_goes_on_to_a_whole_world(train, tmp_path, monkeypatch, capsys):
    def killed(work, weights):
        raise Killed

    dino = steps.STEPS["dino"]
    monkeypatch.setitem(steps.STEPS, "dino", killed)
    with pytest.raises(Killed):
        train()
    monkeypatch.setitem(steps.STEPS, "dino", dino)
    weights = tmp_path / "weights"
    written = (weights / "unet.safetensors").stat().st_mtime_ns
    assert train() == 0
    assert "base is done" in capsys.readouterr().err
    assert (weights / "unet.safetensors").stat().st_mtime_ns == written
    records = json.loads((tmp_path / "work" / "records.json").read_text("utf-8"))
    assert list(records) == list(steps.STEPS)
    assert records["base"]["steps"] == 2

    verify(weights)
    pipeline = load_pipeline(weights)
    loras_read = [read_lora(weights / "loras" / f"{name}.safetensors") for name in ("zib", "candy")]
    images = FusedPipeline(pipeline, *loras_read, FuseSettings())(
        "a zib creature in candy style", seeds=(0,), steps=1, cfg_scale=5.0
    ).images
    assert images[0].size == (64, 64)
    read_oracle(weights, ORACLE)
    for made in (load_judges(weights / "judges.safetensors"), load_second_judges(weights / "judges2.safetensors")):
        torch.testing.assert_close(made.scores(torch.zeros(2, 3, 64, 64)).subject_probabilities.sum(1), torch.ones(2))
    encoders = load_encoders(EncoderSources(tmp_path, str(weights / "clip"), str(weights / "dino"), download=False))
    assert len(encoders.embed(torch.zeros(2, 3, 64, 64)).clip) == 2


def test_a_weight_file_that_is_missing_or_damaged_is_named(train, tmp_path):
    weights = tmp_path / "weights"
    assert train("clip") == 0
    verify(weights)
    path = weights / "clip" / "open_clip_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="open_clip_model.safetensors is damaged"):
        verify(weights)
    path.unlink()
    with pytest.raises(WeightsError, match="missing"):
        verify(weights)
    with pytest.raises(WeightsError, match="no readable"):
        verify(tmp_path / "none")


def test_an_unknown_step_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "paint"])
    assert "oracles" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--set", "dropout"], ["loras", "clip", "--set", "dropout"]])
def test_another_set_is_for_the_loras_alone(wrong, capsys):
    assert cli.main(["train", *wrong, "--weights", "w"]) == 2
    assert "toy train loras --set dropout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "loras", "--set", "paint", "--weights", "w"])


def test_another_set_has_a_folder_of_its_own(train, tmp_path, capsys):
    assert train("autoencoder", "base", "loras") == 0
    weights = tmp_path / "weights"
    plain = {path.name: path.read_bytes() for path in (weights / "loras").glob("*.safetensors")}
    for _ in range(2):
        assert train("loras", "--set", "dropout") == 0
    assert "loras dropout is done" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (weights / "loras").glob("*.safetensors")} == plain
    others = {path.name: path.read_bytes() for path in (weights / "loras" / "dropout").glob("*.safetensors")}
    assert set(others) == set(plain) == {"zib.safetensors", "candy.safetensors"}
    assert all(others[name] != plain[name] for name in plain)
    verify(weights)


def test_what_is_made_once_is_whole_or_not_there(tmp_path):
    from dynfuse_world.training.pictures import kept

    path = tmp_path / "new" / "numbers.pt"

    def fail():
        raise Killed

    with pytest.raises(Killed):
        kept(path, fail)
    assert not path.exists()
    assert torch.equal(kept(path, lambda: torch.arange(3)), torch.arange(3))
    assert torch.equal(kept(path, fail), torch.arange(3))
    assert [each.name for each in path.parent.iterdir()] == ["numbers.pt"]
