"""The demo: pictures and a selection map from a model made on the spot, without a network."""

from __future__ import annotations

import socket

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from lib_dynfuse import cli, demo, read_lora  # noqa: E402 (needs diffusers)
from lib_dynfuse.fusion.selection_map import STYLE, SUBJECT  # noqa: E402


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_no_network")
def test_the_demo_writes_five_different_pictures_a_map_a_curve_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 3)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    pictures = {name: Image.open(tmp_path / "demo" / f"{name}.png") for name in ("subject", "style", "direct", "fused", "guided")}
    assert all(picture.size == (256, 256) for picture in pictures.values())
    assert len({picture.tobytes() for picture in pictures.values()}) == 5
    for picture in pictures.values():
        # Not a flat field: the spread of each colour channel, of 255.
        assert all(low + 60 < high for low, high in picture.getextrema())
    selection_map = Image.open(tmp_path / "demo" / "selection-map.png")
    counts = {colour: count for count, colour in selection_map.getcolors(selection_map.width * selection_map.height)}
    assert min(counts[SUBJECT], counts[STYLE]) > 0.1 * max(counts[SUBJECT], counts[STYLE])
    sheet = Image.open(tmp_path / "demo" / "demo.png")
    curve = Image.open(tmp_path / "demo" / "curve.png")
    assert sheet.width >= 5 * 256
    assert sheet.height > selection_map.height + curve.height + 256
    output = capsys.readouterr()
    assert "random" in output.out
    assert "Subject LoRA alone" in output.err
    assert "Fused and guided" in output.err
    assert (tmp_path / "demo" / "subject.png").read_bytes() == alone(tmp_path / "demo", "subject").read_bytes()


def alone(folder, side):
    """The picture of one LoRA alone, by itself, under another name."""
    from lib_dynfuse.hosts.diffusers import FusedPipeline

    pair = [read_lora(folder / f"demo-{name}.safetensors") for name in ("subject", "style")]
    settings = demo.FuseSettings(method="direct", subject_weight=float(side == "subject"), style_weight=float(side == "style"))
    with demo.one_thread():
        made = FusedPipeline(demo.tiny_pipeline(), *pair, settings)(
            demo.PROMPT, seeds=[demo.SEED], steps=demo.STEPS, cfg_scale=demo.CFG_SCALE
        )
    made.images[0].save(folder / "alone.png")
    return folder / "alone.png"


@pytest.mark.usefixtures("_no_network")
def test_the_same_seed_makes_the_same_model_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = demo.tiny_pipeline(3), demo.tiny_pipeline(3)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.unet.conv_in.weight, demo.tiny_pipeline(4).unet.conv_in.weight)


def test_its_loras_are_ordinary_files(tmp_path):
    pipeline = demo.tiny_pipeline()
    demo.write_random_lora(tmp_path / "dog.safetensors", pipeline, rank=4, strength=0.7, seed=1)
    lora = read_lora(tmp_path / "dog.safetensors")
    assert lora.ranks == {4: len(lora.denoiser) + len(lora.text["te1"])}
    assert not lora.unmatched
