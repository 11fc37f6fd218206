"""The benchmark measures what it says: its literal form makes the same choices as the fusion, and leaves nothing behind."""

import json
import sys

import pytest
import torch

from lib_dynfuse import FuseSettings
from lib_dynfuse.bench import fusion, main, methods, sweep
from lib_dynfuse.bench.denoisers import Denoiser, Loras
from lib_dynfuse.bench.dispatched import Dispatched, added
from lib_dynfuse.bench.host_time import host_microseconds, stack_and_loras
from lib_dynfuse.bench.literal import literally_fused
from lib_dynfuse.fusion import FusionSession, folding
from lib_dynfuse.fusion.rules import RULES

from ..fusion.models import ATTENTION, WIDTH, lora_file, tokens_model


@pytest.fixture
def model():
    return tokens_model(ATTENTION)


@pytest.fixture
def pair(tmp_path, model):
    return tuple(lora_file(tmp_path / f"{seed}.safetensors", model, ATTENTION, seed=seed) for seed in (1, 2))


def test_the_literal_form_is_the_fusion_in_which_every_row_chooses(model, pair):
    x = torch.randn(3, 10, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", granularity="row"))
    with session.attached():
        expected = model(x)
    with literally_fused(session) as seconds_of_merging:
        literal = model(x)
    assert len(seconds_of_merging) == len(ATTENTION)
    for name in ATTENTION:
        torch.testing.assert_close(literal[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(literal[name], plain[name], atol=1e-3)
        assert model(x)[name].equal(plain[name])


class OneInput(torch.nn.Module):
    """Takes the U-Net's arguments."""

    def __init__(self, model):
        super().__init__()
        self.input_blocks = model.input_blocks
        self.model = model

    def forward(self, sample):
        return self.model(sample)


@pytest.fixture
def denoiser(model):
    return Denoiser("small", 64, OneInput(model), {"sample": torch.randn(2, 4, WIDTH)})


@pytest.mark.parametrize("same", ["now", "next", None])
def test_every_way_is_timed_in_every_turn(denoiser, pair, same):
    fused = FuseSettings(method="dynfuse", decide=same) if same else FuseSettings()
    result = fusion.measure(denoiser, Loras.split(pair), fused, rounds=2)
    ways = ("plain", "one LoRA", "direct", "fused", "now", "next", "literal")
    assert {way: len(seconds) for way, seconds in result["seconds"].items()} == dict.fromkeys(ways, 2)
    assert all(value > 0 for seconds in result["seconds"].values() for value in seconds)
    assert set(result["ratio_to_plain"]) == set(ways)
    assert result["ratio_to_plain"]["plain"] == 1
    assert same is None or result["seconds"]["fused"] == result["seconds"][same]
    assert result["layers"] == len(ATTENTION)


def test_a_contrast_costs_its_share_of_every_step(monkeypatch, denoiser, pair):
    """Every fifth step makes the direction: 10 seconds, and 2 for each of the four that keep it."""
    stack, branches = stack_and_loras()
    session = FusionSession(stack, *branches, FuseSettings(contrast=1, contrast_every=5))
    small = Denoiser("small", 64, stack, {"x": torch.randn(2, 4, stack.run[0].in_features)})
    ticks = iter((0.0, 10.0, 20.0, 22.0))
    monkeypatch.setattr(fusion.time, "perf_counter", lambda: next(ticks))
    assert fusion.way(small, session)() == pytest.approx((10 + 4 * 2) / 5)
    assert session.predicted_rows == (4, 1)


def test_loras_are_split_between_subjects_and_styles(pair):
    for count, (subjects, styles) in {1: (1, 0), 2: (1, 1), 3: (2, 1), 4: (2, 2)}.items():
        branches = Loras.split([pair[0]] * count)
        assert (len(branches.subjects), len(branches.styles)) == (subjects, styles)


def test_one_lora_alone_costs_nothing_in_the_weights_and_two_products_a_layer_beside_them(denoiser, pair, monkeypatch):
    one = Loras.split(pair).first
    count = added(denoiser, one.session(denoiser, FuseSettings(method="direct")))
    assert count.per_layer == count.per_step == 0
    monkeypatch.setattr(folding, "free_memory", lambda device: 0)
    count = added(denoiser, one.session(denoiser, FuseSettings(method="direct")))
    assert count.in_layers == {"mm": len(ATTENTION), "addmm_": len(ATTENTION)}
    assert count.per_layer == 2
    assert count.per_step == 0


def test_operations_that_run_nothing_are_not_counted():
    x = torch.ones(2, 3)
    with Dispatched() as counted:
        torch.empty(4)
        (x.view(3, 2).t().unsqueeze(0) + 1).mul_(2)
    assert counted.operations == {"add": 1, "mul_": 1}


@pytest.mark.parametrize("axis", sweep.AXES)
def test_a_sweep_gives_a_row_for_every_value(axis, monkeypatch):
    monkeypatch.setattr(sweep, "unet_inputs", lambda model, size, device, dtype: {"x": torch.randn(2, size // 16, WIDTH)})
    monkeypatch.setitem(sweep._SIZES, "small", (64, 128))
    monkeypatch.setattr(sweep, "_RANKS", (4, 8))
    stack, _ = stack_and_loras()
    denoiser = Denoiser("small", 64, stack, {"x": torch.randn(2, 4, WIDTH)})
    rows = sweep.measure(axis, denoiser, 2, 4, FuseSettings(), lambda own, ways: fusion.timed(own, ways, 1), fusion.way)
    layers = len(stack.run)
    expected = {"rank": [4, 8], "loras": [1, 2, 3, 4], "size": [64, 128], "layers": [layers * n // 4 for n in (1, 2, 3, 4)]}[axis]
    assert [row["value"] for row in rows] == expected
    assert all(set(row["ratio_to_plain"]) == {"plain", "direct", "fused"} for row in rows)
    assert len(sweep.table(axis, rows)) == 1 + len(rows)


def test_host_time_is_told_for_the_layer_and_for_what_is_added():
    host = host_microseconds({"direct": FuseSettings(method="direct"), "next": FuseSettings(method="dynfuse")}, rounds=3)
    assert set(host) == {"plain", "direct", "next"}
    assert host["plain"] > 0


@pytest.mark.parametrize(
    "arguments",
    [["--size", "100"], ["--rank", "0"], ["--rounds", "0"], ["--threads", "0"], ["--loras", "5"], ["--loras", "0"]],
)
def test_impossible_sizes_are_refused(arguments, capsys):
    assert main(["fusion", *arguments]) == 2
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rank", "8"], ["--sweep", "rank"], ["--sweep", "layers"]])
def test_the_miniature_worlds_loras_are_what_they_are(arguments, capsys):
    assert main(["fusion", "--model", "world", *arguments]) == 2
    assert "LoRAs of its own" in capsys.readouterr().err


def test_without_the_miniature_world_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dynfuse_world.model", None)
    assert main(["fusion", "--model", "world", "--operations"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_counting_needs_no_weights(capsys):
    pytest.importorskip("diffusers", reason="the benchmark builds its U-Net with diffusers")
    assert main(["fusion", "--model", "world", "--operations", "--json"]) == 0
    operations = json.loads(capsys.readouterr().out)["operations"]
    assert operations["direct"]["added_per_layer"] == 0
    assert operations["next"]["added_per_layer"] <= 4
    assert operations["next"]["added_per_step"] <= 250


def test_every_method_there_is_is_measured_or_says_why_not():
    stack, branches = stack_and_loras()
    small = Denoiser("small", 64, stack, {"x": torch.randn(2, 4, stack.run[0].in_features)})
    result = methods.measure(small, Loras.split(branches), tuple(RULES), rounds=1)
    assert set(result) == set(RULES)
    for name, own in result.items():
        if name in ("blora", "craft"):
            assert "SDXL" in own["refused"]
        else:
            assert own["ratio"] == pytest.approx(own["seconds"] / own["plain_seconds"]), name
    assert {name: own.get("before") for name, own in result.items() if own.get("before")} == {
        "est-lora": "a picture with each side alone",
        "ssr": "a step with each side alone",
    }
    text = methods._text({"setup": dict.fromkeys("model size rank device threads dtype torch python rounds".split()), "methods": result})
    assert text.count("\n| `") == 1 + len(RULES)
