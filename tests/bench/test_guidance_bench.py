"""The benchmark of the guidance measures what a guided step does."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the benchmark builds its networks with diffusers")

from lib_dynfuse import FuseSettings, read_lora
from lib_dynfuse.bench import guidance, main, networks, operations
from lib_dynfuse.fusion import FusionSession
from lib_dynfuse.guidance.decode import VaeDecoder
from tests.fakes.encoders import small_encoders
from tests.hosts.diffusers import tiny_pipelines
from tests.hosts.diffusers.test_pipeline import SD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipelines.sd()
    for network in (pipeline.unet, pipeline.vae):
        network.requires_grad_(False)
    return pipeline


@pytest.fixture
def work(pipeline, tmp_path):
    pair = [
        read_lora(tiny_pipelines.write_lora(tmp_path / f"{name}.safetensors", pipeline, SD, seed=seed))
        for seed, name in enumerate(("a", "b"))
    ]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 16, 16, generator=generator)
    inputs = {
        "sample": torch.cat([sample, sample]),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
    }
    return guidance.GuidedStep(pipeline.unet, inputs, FusionSession(pipeline.unet, *pair, FuseSettings()), small_encoders())


def decoder(pipeline, name="vae-small"):
    return VaeDecoder(torch.nn.Sequential(pipeline.vae.post_quant_conv, pipeline.vae.decoder), scale=0.18215, name=name)


def test_every_way_is_timed_in_every_turn_and_its_stages_are_told(pipeline, work):
    result = guidance.measure(work, [decoder(pipeline), decoder(pipeline, "vae")], 2, lambda text: None)
    assert {way: len(seconds) for way, seconds in result["seconds"].items()} == dict.fromkeys(
        ("unguided", "fast/vae-small", "fast/vae", "exact"), 2
    )
    assert set(result["added_share"]) == {"fast/vae-small", "fast/vae", "exact"}
    assert result["added_share"]["fast/vae"] > 0
    assert list(result["stages_seconds"]["vae"]) == [
        "decode forward",
        "CLIP forward",
        "DINO forward",
        "encoders backward",
        "decode backward",
    ]
    assert sum(result["stages_seconds"]["vae"].values()) < 10 * result["median_seconds"]["fast/vae"]
    assert set(result["exact_stages_seconds"]) == {"denoiser forward with graph", "denoiser backward"}
    assert "forward" not in vars(work.unet.conv_in)


def test_its_exact_step_is_a_way_through_the_denoiser(pipeline, work):
    shift = work.exact(guide := work.guide(decoder(pipeline), "exact"))
    assert guide.gradient == "exact"
    assert not guide.record.notes
    fast = work.guide(decoder(pipeline), "fast").fast_shift(work.unguided(), guide.schedule.level(guidance._SIGMA))
    assert shift.shape == fast.shape
    assert shift.abs().max() > 0
    assert not torch.allclose(shift, fast, rtol=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_peak_memory_is_what_is_in_use_at_the_worst_moment():
    # In a process of its own: what other tests left to be freed would be counted.
    script = (
        "import torch\n"
        "from lib_dynfuse.bench.memory import peak_above_before\n"
        "def work():\n"
        "    torch.ones(64 << 20, dtype=torch.uint8)\n"
        "    torch.ones(128 << 20, dtype=torch.uint8)\n"
        "print(peak_above_before(work, torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("this system lets no process set its peak back")
    assert 110 << 20 < int(done.stdout) < 170 << 20


def test_the_encoders_are_of_the_published_size():
    with torch.device("meta"):
        parameters = networks.encoders(torch.device("meta")).memory / 4
    assert parameters == pytest.approx(87.8e6 + 21.6e6, rel=0.01)


def test_operations_are_those_of_the_products_there_and_back():
    layer = torch.nn.Linear(8, 16, device="meta").requires_grad_(False)
    assert operations.operations(lambda: layer(torch.empty(4, 8, device="meta"))) == 2 * 4 * 8 * 16
    assert operations.there_and_back(layer, 4, 8) == 2 * 2 * 4 * 8 * 16
    kernel = torch.nn.Conv2d(3, 5, 3, padding=1, device="meta").requires_grad_(False)
    assert operations.there_and_back(kernel, 1, 3, 6, 6) == 2 * 2 * 36 * 3 * 5 * 9


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--rank", "0"], ["--rounds", "0"]])
def test_impossible_sizes_are_refused(arguments, capsys):
    assert main(["guidance", *arguments]) == 2
    assert "must be" in capsys.readouterr().err
