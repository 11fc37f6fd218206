"""The benchmark measures what it says: its literal form makes the same choices as the fusion, and leaves nothing behind."""

import pytest
import torch

from lib_dynfuse import FuseSettings
from lib_dynfuse.bench import fusion, main
from lib_dynfuse.bench.literal import literally_fused
from lib_dynfuse.fusion import FusionSession

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
    session = FusionSession(model, *pair, FuseSettings(granularity="row"))
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


def test_every_way_is_timed_in_every_turn(model, pair):
    result = fusion.measure(OneInput(model), {"sample": torch.randn(2, 4, WIDTH)}, *pair, rounds=2, progress=lambda text: None)
    assert {way: len(seconds) for way, seconds in result["seconds"].items()} == {"plain": 2, "direct": 2, "fused": 2, "literal": 2}
    assert all(value > 0 for seconds in result["seconds"].values() for value in seconds)
    assert result["ratio_to_plain"]["plain"] == 1
    assert result["layers"] == len(ATTENTION)


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--rank", "0"], ["--rounds", "0"]])
def test_impossible_sizes_are_refused(arguments, capsys):
    pytest.importorskip("diffusers", reason="the benchmark builds its U-Net with diffusers")
    assert main(["fusion", *arguments]) == 2
    assert "must be" in capsys.readouterr().err
