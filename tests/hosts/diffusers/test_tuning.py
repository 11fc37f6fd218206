"""A pair's settings found with a diffusers pipeline, and what the command line makes of them."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from PIL import Image

from lib_dynfuse import FuseSettings, cli, read_lora
from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.guidance.weights import EncoderSources
from lib_dynfuse.hosts.diffusers import FusedPipeline, GuidanceSources
from lib_dynfuse.hosts.references import alone
from lib_dynfuse.text import infotext
from lib_dynfuse.tuning.plan import applied, candidates
from lib_dynfuse.tuning.score import scored
from tests.fakes.encoders import small_encoders, write_clip, write_dino
from tests.fakes.small_model import small_pipeline, write_random_lora
from tests.text.host_infotext import parse_infotext_line

JOB = {"negative_prompt": "rain", "cfg_scale": 3.0, "width": 64, "height": 64}
STEPS = 3


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Few candidates, small pictures of half the size, and whatever is better at all is used."""
    monkeypatch.setattr("lib_dynfuse.tuning.plan.CONTRASTS", (1.0, 2.0))
    monkeypatch.setattr("lib_dynfuse.tuning.plan.TILTS", (0.0, 0.5))
    monkeypatch.setattr("lib_dynfuse.tuning.plan.STEPS", 2)
    monkeypatch.setattr("lib_dynfuse.lora.families.Family.smallest", 32)
    monkeypatch.setattr("lib_dynfuse.lora.families.sd._SD1.smallest", 32)
    monkeypatch.setattr("lib_dynfuse.tuning.plan._GRID", 8)
    monkeypatch.setattr("lib_dynfuse.tuning.search.MARGIN", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline "model", two LoRAs and two encoders."""
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = small_pipeline()
    pipeline.save_pretrained(folder / "model")
    for name, seed in (("dog", 1), ("ink", 3)):
        write_random_lora(folder / f"{name}.safetensors", pipeline, rank=4, strength=0.7, seed=seed)
    write_clip(folder / "clip")
    write_dino(folder / "dino")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def loras(folder):
    return [read_lora(folder / f"{name}.safetensors") for name in ("dog", "ink")]


@pytest.fixture
def sources(tmp_path):
    return GuidanceSources(small_encoders(), ReferenceCache(tmp_path / "cache"))


def test_the_best_of_the_small_pictures_is_what_the_picture_is_made_with(pipeline, loras, sources):
    asked = FuseSettings(tune="auto")
    told = []
    made = FusedPipeline(pipeline, *loras, asked, sources)(
        "a dog", seeds=[5, 6], steps=STEPS, tuning_progress=lambda *done: told.append(done), **JOB
    )
    small = {**JOB, "width": 32, "height": 32}

    def embedded(settings):
        image = FusedPipeline(pipeline, *loras, settings)("a dog", seeds=[5], steps=2, **small).images[0]
        return sources.encoders.embed_picture(image)

    subject, style = (embedded(alone(asked, side)) for side in ("subject", "style"))
    totals = [scored(embedded(applied(asked, changes)), subject, style) for changes in candidates(asked)]
    assert [one.score for one in made.tuned.tried] == totals
    best = candidates(asked)[int(np.argmax([score.total for score in totals]))]
    plain = FusedPipeline(pipeline, *loras, FuseSettings(**best))("a dog", seeds=[5, 6], steps=STEPS, **JOB)
    assert [image.tobytes() for image in made.images] == [image.tobytes() for image in plain.images]
    assert told[-1] == (len(totals), len(totals))
    assert made.tuned.frame.width == 32


def test_it_is_found_again_without_a_picture(pipeline, loras, sources):
    fused = FusedPipeline(pipeline, *loras, FuseSettings(tune="auto"), sources)
    told = []
    first = fused.tuned("a dog", seed=5, steps=STEPS, progress=lambda *done: told.append(done), **JOB)
    count = len(told)
    again = fused.tuned("a dog", seed=5, steps=STEPS, progress=lambda *done: told.append(done), **JOB)
    assert len(told) == count > 0
    assert again.settings(fused.settings) == first.settings(fused.settings)
    fused.tuned("a dog", seed=6, steps=STEPS, progress=lambda *done: told.append(done), **JOB)
    assert len(told) == 2 * count


def test_without_encoders_the_picture_is_as_asked_with_a_note(pipeline, loras, tmp_path):
    nowhere = GuidanceSources(EncoderSources(tmp_path, "ViT-B-32/openai", "facebook/dino-vitb16", download=False), ReferenceCache(tmp_path))
    made = FusedPipeline(pipeline, *loras, FuseSettings(tune="auto"), nowhere)("a dog", seeds=[5], steps=STEPS, **JOB)
    plain = FusedPipeline(pipeline, *loras)("a dog", seeds=[5], steps=STEPS, **JOB)
    assert made.tuned is None
    assert made.images[0].tobytes() == plain.images[0].tobytes()
    assert [note for note in made.notes if note.startswith("The pair was not tuned: ")]


def test_the_command_prints_what_was_tried_and_saves_it(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["generate", "--model", folder / "model", "--subject", folder / "dog.safetensors", "--style", folder / "ink.safetensors"]
    command += ["--prompt", "a dog", "--out", out, "--steps", STEPS, "--size", "64x64", "--seed", 5, "--images", 2, "--tune", "auto"]
    command += ["--clip-model", folder / "clip", "--dino-model", folder / "dino", "--cache", tmp_path / "cache", "--device", "cpu"]
    assert cli.main([str(part) for part in command]) == 0
    printed = capsys.readouterr()
    tuned = next(line for line in printed.out.splitlines() if line.startswith("Tuned: "))
    assert sum("contrast" in line for line in printed.out.splitlines()) == 1 + len(candidates(FuseSettings()))
    assert "Small pictures for tuning" in printed.err
    pictures = sorted(path for path in out.glob("*.png") if "dynfuse" not in path.name)
    assert [path.name for path in out.glob("*-tuned.png")] == [f"{pictures[0].stem}-dynfuse-tuned.png"]
    for path in pictures:
        with Image.open(path) as image:
            entries = parse_infotext_line(image.info["parameters"].splitlines()[-1])
        assert entries["DynFuse tuned"] == tuned.removeprefix("Tuned: ")
        settings = infotext.read_settings(entries)
        assert settings.tune == "off"
        assert settings.contrast in (-1.0, 1.0, 2.0)


def test_the_command_goes_on_without_encoders(folder, tmp_path, capsys):
    command = ["generate", "--model", folder / "model", "--subject", folder / "dog.safetensors", "--style", folder / "ink.safetensors"]
    command += ["--prompt", "a dog", "--out", tmp_path / "out", "--steps", 1, "--size", "64x64", "--tune", "auto", "--offline"]
    command += ["--encoders", tmp_path / "none", "--cache", tmp_path / "cache", "--device", "cpu"]
    assert cli.main([str(part) for part in command]) == 0
    assert "Note: The pair was not tuned: " in capsys.readouterr().err
