"""The button under the result: which names it takes, what it writes, what it says, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lib_dynfuse import FuseSettings, Rows, read_lora
from lib_dynfuse.fusion import FusionSession, Step
from lib_dynfuse.hosts.webui.lora_files import FileVersion
from lib_dynfuse.hosts.webui.passes import Recipe
from lib_dynfuse.webui import saving
from tests.fusion.models import lora_file, tokens_model

LAYERS = [f"{block}.1.transformer_blocks.0.attn1.to_{q}" for block in ("input_blocks.1", "middle_block") for q in "qv"]


@pytest.fixture
def recipe(tmp_path):
    """Of a picture of three steps with a direct sum."""
    model = tokens_model(LAYERS)
    files = [lora_file(tmp_path / f"{name}.safetensors", model, LAYERS, seed=seed) for seed, name in enumerate(("dog", "ink"))]
    settings = FuseSettings(subject="dog", style="ink", method="direct", style_weight=0.5)
    session = FusionSession(model, *files, settings)
    for number in range(3):
        session.begin(Step.of(number, 3))
        with torch.no_grad(), session.attached(Rows((0,), (True,), 1)):
            model(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(number)))
        session.end_step()
    versions = [(FileVersion.of(str(file.path)),) for file in files]
    return Recipe(settings, *versions, session.trace, session.shapes)


def written(host):
    return sorted(path.name for path in host.lora_folder.iterdir())


def test_the_file_is_written_among_the_webuis_loras_and_found_at_once(recipe, host):
    said = saving.save(recipe, " dog-ink ", 0, host)
    assert written(host) == ["dog-ink.safetensors"]
    assert host.refreshed == 1
    for words in (
        "Saved as <b>dog-ink.safetensors</b>",
        "&lt;lora:dog-ink:1&gt;",
        "dog 1, ink 0.5; the same at every step",
        "4 layers of rank 8",
    ):
        assert words in said
    file = read_lora(host.lora_folder / "dog-ink.safetensors")
    assert file.ranks == {8: 4}
    dog, ink = (load_file(recipe_file[0].path) for recipe_file in (recipe.subjects, recipe.styles))
    tensors = load_file(host.lora_folder / "dog-ink.safetensors")
    key = next(key for key in tensors if key.endswith("to_q.lora_up.weight") and "mid" in key)
    ours = tensors[key].double() @ tensors[key.replace("lora_up", "lora_down")].double()
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    parts = [factor * t[f"{name}.lora_up.weight"].double() @ t[f"{name}.lora_down.weight"].double() for t, factor in ((dog, 1), (ink, 0.5))]
    torch.testing.assert_close(ours, sum(parts), rtol=5e-3, atol=5e-3)


def test_a_rank_reduces_the_file_and_the_loss_is_told(recipe, host):
    assert "of the change is lost to the reduction to rank 3" in saving.save(recipe, "dog-ink.safetensors", 3.0, host)
    assert read_lora(host.lora_folder / "dog-ink.safetensors").ranks == {3: 4}


def refused(host, said, words):
    assert said.startswith('<p class="dynfuse-problem">')
    assert words in said
    assert written(host) == []
    assert host.refreshed == 0


@pytest.mark.parametrize(
    "name",
    [
        "../dog-ink",
        "..",
        "a/b",
        r"a\b",
        r"..\..\x",
        "/etc/x",
        "C:x",
        "a\0b",
        "a\nb",
        "<b>",
        "x:1",
        "?",
        ".hidden",
        "x.",
        "con",
        "NUL.x",
        "y" * 101,
    ],
)
def test_a_name_that_is_a_path_or_no_name_is_refused(recipe, host, name):
    refused(host, saving.save(recipe, name, 0, host), "name")
    assert not list(host.lora_folder.parent.glob("*dog-ink*"))


def test_a_name_is_shown_as_text_and_not_as_markup(recipe, host):
    assert "<img" not in saving.save(recipe, "<img src=x>", 0, host)
    assert "<b>R&amp;D" in saving.save(recipe, "R&D", 0, host)


@pytest.mark.parametrize("name", ["", "  ", ".safetensors"])
def test_without_a_name_nothing_is_written(recipe, host, name):
    refused(host, saving.save(recipe, name, 0, host), "Give the new LoRA a name")


@pytest.mark.parametrize("rank", [-1, 2.5, "many", None, True])
def test_a_rank_that_is_none_is_refused(recipe, host, rank):
    refused(host, saving.save(recipe, "dog-ink", rank, host), "whole number")


def test_no_lora_is_ever_overwritten(recipe, host):
    refused(host, saving.save(recipe, "watercolor", 0, host), "There is a LoRA named &#x27;watercolor&#x27; already")
    (host.lora_folder / "mine.safetensors").write_bytes(b"mine")
    assert "already" in saving.save(recipe, "mine", 0, host)
    assert (host.lora_folder / "mine.safetensors").read_bytes() == b"mine"


def test_without_a_picture_or_a_folder_it_says_so(recipe, host):
    refused(host, saving.save(None, "dog-ink", 0, host), "Make a picture")
    host.lora_folder, folder = None, host.lora_folder
    said = saving.save(recipe, "dog-ink", 0, host)
    host.lora_folder = folder
    refused(host, said, "does not tell")


def test_files_that_changed_since_the_picture_are_not_used(recipe, host, tmp_path):
    (tmp_path / "ink.safetensors").write_bytes((tmp_path / "dog.safetensors").read_bytes() + b" ")
    refused(host, saving.save(recipe, "dog-ink", 0, host), "ink.safetensors is not the file any more")
    (tmp_path / "ink.safetensors").unlink()
    refused(host, saving.save(recipe, "dog-ink", 0, host), "ink.safetensors cannot be read: No such file")


def test_a_full_disk_leaves_nothing_and_is_said(recipe, host, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib_dynfuse.lora.export.save_file", full)
    refused(host, saving.save(recipe, "dog-ink", 0, host), "No space left on device")


def test_a_mistake_of_ours_ends_in_a_sentence_and_the_button_works_again(recipe, host, monkeypatch):
    monkeypatch.setattr(saving, "merge_pictures", lambda *arguments, **options: 1 / 0)
    refused(host, saving.save(recipe, "dog-ink", 0, host), "ZeroDivisionError")
    monkeypatch.undo()
    assert "Saved as" in saving.save(recipe, "dog-ink", 0, host)


def test_a_second_click_does_not_begin_again(recipe, host, monkeypatch):
    inner = []
    write = saving._write

    def while_writing(*arguments):
        inner.append(saving.save(recipe, "dog-ink", 0, host))
        return write(*arguments)

    monkeypatch.setattr(saving, "_write", while_writing)
    assert "Saved as" in saving.save(recipe, "dog-ink", 0, host)
    assert "still being written" in inner[0]


def test_a_name_is_proposed_that_no_lora_has(host):
    settings = FuseSettings.from_mapping({"subject": ["dog", "big/hat"], "style": ["ink"]})
    assert saving.proposed_name(settings, host) == "dog-big-hat-ink"
    (host.lora_folder / "dog-big-hat-ink.safetensors").touch()
    host.loras["dog-big-hat-ink-2"] = "11"
    assert saving.proposed_name(settings, host) == "dog-big-hat-ink-3"
    long = FuseSettings(subject="d" * 300, style="..")
    assert saving.save(None, saving.proposed_name(long, host), 0, host).count("picture") == 1
