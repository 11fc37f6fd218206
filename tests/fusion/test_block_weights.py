"""Factors on blocks are in the sum, in the choice and in the record, whichever scheme names the model's layers."""

import pytest
import torch

from lib_dynfuse import FuseSettings, FusionError, Rows
from lib_dynfuse.fusion import FusionSession, Step

from .models import delta_weights, kl, lora_file, tokens_model

LDM = [
    f"{block}.1.transformer_blocks.0.attn1.to_{q}"
    for block in ("input_blocks.1", "input_blocks.4", "middle_block", "output_blocks.5")
    for q in "qv"
]
FACTORS = {"input_blocks.1": 0.5, "input_blocks.4": 1.0, "middle_block": 0.0, "output_blocks.5": 2.0}
TEXT = "in1=0.5,mid=0,out5=2"


def factor(name):
    return next(value for block, value in FACTORS.items() if name.startswith(f"{block}."))


@pytest.fixture
def model():
    return tokens_model(LDM)


@pytest.fixture
def pair(tmp_path, model):
    return [lora_file(tmp_path / f"{n}.safetensors", model, LDM, seed=n, scale=0.3) for n in (1, 2)]


@pytest.fixture
def deltas(tmp_path, pair):
    return [delta_weights(tmp_path / f"{n}.safetensors", LDM) for n in (1, 2)]


def run(session, model, steps):
    outputs = []
    for number, x in enumerate(steps):
        session.begin(Step.of(number, len(steps)))
        with torch.no_grad(), session.attached(Rows((0,), (True,), 1)):
            outputs.append(model(x))
        session.end_step()
    return outputs


def steps_of(count):
    return torch.randn(count, 1, 10, 16, generator=torch.Generator().manual_seed(4))


def expected(model, name, x, *changes):
    layer = model.get_submodule(name)
    x = x.double()
    return x @ layer.weight.double().t() + layer.bias.double(), *(x @ change.t() for change in changes)


def test_in_the_sum(model, pair, deltas):
    steps = steps_of(3)
    session = FusionSession(model, *pair, FuseSettings(method="direct", subject_blocks=TEXT, style_weight=0.7))
    for x, outputs in zip(steps, run(session, model, steps), strict=True):
        for name in LDM:
            y0, d_c, d_s = expected(model, name, x, factor(name) * deltas[0][name], 0.7 * deltas[1][name])
            torch.testing.assert_close(outputs[name].double(), y0 + d_c + d_s, rtol=1e-4, atol=1e-5)
    weights = session.trace.weights[0, :, 0]
    assert weights[:, 0].tolist() == [factor(site.layer) for site in session.trace.sites]


@pytest.mark.parametrize("decide", ["now", "next"])
def test_in_the_choice(model, pair, deltas, decide):
    steps = steps_of(3)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", decide=decide, vote_tokens=0, style_blocks=TEXT))
    for number, (x, outputs) in enumerate(zip(steps, run(session, model, steps), strict=True)):
        measured = steps[max(0, number - 1)] if decide == "next" else x
        for name in LDM:
            y0, d_c, d_s = expected(model, name, measured, deltas[0][name], factor(name) * deltas[1][name])
            wins = bool(kl(y0, d_c) >= kl(y0, d_s))
            y0, d_c, d_s = expected(model, name, x, deltas[0][name], factor(name) * deltas[1][name])
            torch.testing.assert_close(outputs[name].double(), y0 + (d_c if wins else d_s), rtol=1e-4, atol=1e-5)


def test_each_of_several_loras_has_its_own(tmp_path, model, pair, deltas):
    settings = FuseSettings(method="direct", subject="a+b", style="c", subject_blocks="mid=0+in1=0.5")
    third = lora_file(tmp_path / "3.safetensors", model, LDM, seed=3, scale=0.3)
    more = delta_weights(tmp_path / "3.safetensors", LDM)
    session = FusionSession(model, pair, third, settings)
    x = steps_of(1)
    outputs = run(session, model, x)[0]
    for name in LDM:
        first, second = 0.0 if "middle" in name else 1.0, 0.5 if "input_blocks.1." in name else 1.0
        y0, change = expected(model, name, x[0], first * deltas[0][name] + second * deltas[1][name] + more[name])
        torch.testing.assert_close(outputs[name].double(), y0 + change, rtol=1e-4, atol=1e-5)


def test_a_block_that_this_model_lacks_is_refused_with_those_it_has(model, pair):
    with pytest.raises(FusionError, match=r"no block 'in7' in this model.*in1, in4, mid, out5"):
        FusionSession(model, *pair, FuseSettings(method="dynfuse", subject_blocks="in7=0.5"))
    with pytest.raises(FusionError, match="no form of numbers"):
        FusionSession(model, *pair, FuseSettings(method="dynfuse", style_blocks=",".join(["1"] * 17)))
