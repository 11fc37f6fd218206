"""The methods whose weights follow from the LoRAs and the step: against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.fusion import FusionError, FusionSession, Step
from lib_dynfuse.lora import read_lora

from ..models import ATTENTION, FEED_FORWARD, WIDTH, delta_weights, lora_file, tokens_model

NAMES = [*ATTENTION, *FEED_FORWARD]
STEPS = 10
ROWS = Rows((0, 0), (True, False), 1)


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def loras(tmp_path, model):
    made = [("dog", 4, 0.3), ("ink", 6, 0.9), ("hat", 3, 0.1)]
    return [lora_file(tmp_path / f"{n}.safetensors", model, NAMES, rank=r, scale=s, seed=k + 1) for k, (n, r, s) in enumerate(made)]


@pytest.fixture
def deltas(tmp_path, loras):
    return [delta_weights(tmp_path / f"{lora.name}.safetensors", NAMES) for lora in loras]


def run(session, model, steps=STEPS):
    """(steps, layers, N, T, WIDTH), and the inputs."""
    inputs = torch.randn(steps, 2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    outputs = []
    for number, x in enumerate(inputs):
        session.begin(Step.of(number, steps))
        with torch.no_grad(), session.attached(ROWS):
            out = model(x)
            outputs.append(torch.stack([out[name] for name in NAMES]))
        session.end_step()
    return torch.stack(outputs), inputs


def wanted(model, inputs, deltas, weights):
    """weights: (step, name) -> of each LoRA."""
    out = []
    for number, x in enumerate(inputs.double()):
        rows = []
        for name in NAMES:
            layer = model.get_submodule(name)
            change = sum(w * delta[name] for w, delta in zip(weights(number, name), deltas, strict=False))
            rows.append(x @ (layer.weight.double() + change).t() + layer.bias.double())
        out.append(torch.stack(rows))
    return torch.stack(out)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


class TestBalanced:
    """dog, ink and hat differ by 2.5 to 12 times here."""

    @staticmethod
    def norm(delta, names=NAMES):
        return math.sqrt(sum(float(delta[name].square().sum()) for name in names))

    def factors(self, norms):
        """Each norm's distance from their geometric mean is cut at sqrt 2, either way."""
        mean = math.prod(norms) ** (1 / len(norms))
        return [mean * min(max(norm / mean, 0.5**0.5), 2**0.5) / norm for norm in norms]

    @pytest.mark.parametrize("count", [2, 3])
    def test_none_is_more_than_twice_as_loud_as_another(self, model, loras, deltas, count):
        settings = FuseSettings(method="balanced", subject_weight=0.8)
        session = FusionSession(model, loras[:1], loras[1:count], settings)
        out, inputs = run(session, model)
        norms = [self.norm(delta) for delta in deltas[:count]]
        factors = self.factors(norms)
        assert_close(out, wanted(model, inputs, deltas, lambda step, name: [0.8 * factors[0], *factors[1:]]))
        afterwards = [factor * norm for factor, norm in zip(factors, norms)]
        assert max(norms) > 2.4 * min(norms)
        assert max(afterwards) == pytest.approx(2 * min(afterwards))

    def test_what_is_about_as_loud_is_left_alone(self, tmp_path, model, loras, deltas):
        alike = lora_file(tmp_path / "alike.safetensors", model, NAMES, rank=4, scale=0.5, seed=9)
        other = delta_weights(tmp_path / "alike.safetensors", NAMES)
        assert 1.3 < self.norm(other) / self.norm(deltas[0]) < 1.9
        out, inputs = run(FusionSession(model, loras[0], alike, FuseSettings(method="balanced")), model)
        assert_close(out, wanted(model, inputs, [deltas[0], other], lambda step, name: (1, 1)))

    def test_a_file_that_is_three_times_louder_still_makes_no_difference_but_to_the_whole(self, tmp_path, model, loras, deltas):
        tensors = {key: value * (3.0 if "lora_up" in key else 1.0) for key, value in load_file(str(tmp_path / "ink.safetensors")).items()}
        save_file(tensors, str(tmp_path / "loud.safetensors"))
        session = FusionSession(model, loras[0], read_lora(tmp_path / "loud.safetensors"), FuseSettings(method="balanced"))
        out, inputs = run(session, model)
        given = [factor * math.sqrt(3.0) for factor in self.factors([self.norm(delta) for delta in deltas[:2]])]
        assert_close(out, wanted(model, inputs, deltas, lambda step, name: given))

    def test_only_layers_in_common_count(self, tmp_path, model, loras, deltas):
        part = lora_file(tmp_path / "part.safetensors", model, NAMES[:2], scale=1.7, seed=9)
        own = delta_weights(tmp_path / "part.safetensors", NAMES[:2])
        session = FusionSession(model, loras[0], part, FuseSettings(method="balanced"))
        out, inputs = run(session, model)
        factors = self.factors([self.norm(delta, NAMES[:2]) for delta in (deltas[0], own)])
        padded = {name: own.get(name, torch.zeros(WIDTH, WIDTH, dtype=torch.float64)) for name in NAMES}
        assert_close(out, wanted(model, inputs, [deltas[0], padded], lambda step, name: factors))


class TestKLora:
    @pytest.mark.parametrize("method", ["klora", "klora-s"])
    def test_the_choice_of_every_step_by_brute_force(self, model, loras, deltas, method):
        session = FusionSession(model, *loras[:2], FuseSettings(method=method))
        out, inputs = run(session, model)
        gamma = sum(float(deltas[0][n].abs().sum()) for n in NAMES) / sum(float(deltas[1][n].abs().sum()) for n in NAMES)
        chosen = {}
        for number in range(STEPS):
            tau = number / STEPS
            scale = 1.5 * tau + 0.5 if method == "klora" else (1.5 * tau + 1.3) % 1.5
            for name in NAMES:
                subject, style = (sum(sorted(map(float, d[name].abs().flatten()), reverse=True)[: 4 * 6]) for d in deltas[:2])
                chosen[number, name] = subject >= gamma * style * scale
        assert_close(out, wanted(model, inputs, deltas, lambda step, name: (1, 0) if chosen[step, name] else (0, 1)))
        assert len(set(chosen.values())) == 2  # both had their say

    def test_a_layer_of_one_lora_has_that_one(self, tmp_path, model, loras):
        part = lora_file(tmp_path / "part.safetensors", model, NAMES[:2], seed=9)
        for method in ("klora", "klora-s"):
            for pair, own in (((loras[0], part), 0), ((part, loras[0]), 1)):
                session = FusionSession(model, *pair, FuseSettings(method=method))
                run(session, model, steps=15)  # at the third of which the second scale is 0
                assert (session.trace.weights[:, 2:, :, own] == 1).all()

    def test_it_is_defined_for_two(self, model, loras):
        with pytest.raises(FusionError, match="The method klora is defined for one subject LoRA and one style LoRA, not for 3 LoRAs."):
            FusionSession(model, loras[:1], loras[1:], FuseSettings(method="klora"))


class TestEstLora:
    @pytest.mark.parametrize("cosine", [0.0, 0.9])
    def test_the_choice_of_every_step_by_brute_force(self, model, loras, deltas, cosine):
        session = FusionSession(model, *loras[:2], FuseSettings(method="est-lora"))
        assert session.compares
        session.tell_similarity(cosine)
        out, inputs = run(session, model)
        energies = [{name: float(delta[name].square().sum()) for name in NAMES} for delta in deltas[:2]]
        gamma = sum(energies[0].values()) / sum(energies[1].values())
        chosen = {
            (number, name): energies[0][name] / gamma >= energies[1][name] * (1.5 * number / STEPS + 1 - cosine)
            for number in range(STEPS)
            for name in NAMES
        }
        assert_close(out, wanted(model, inputs, deltas, lambda step, name: (1, 0) if chosen[step, name] else (0, 1)))
        assert len(set(chosen.values())) == 2

    def test_what_is_left_of_the_losers_knows_it_too(self, model, loras):
        soft, hard = (FusionSession(model, *loras[:2], FuseSettings(method="est-lora", loser=loser)) for loser in (0.5, 0.0))
        for session in (soft, hard):
            session.tell_similarity(0.9)
            run(session, model)
        assert torch.equal(soft.trace.weights, torch.where(hard.trace.weights > 0, 1.0, 0.5))


class TestSwitch:
    @pytest.mark.parametrize(("every", "count"), [(5, 2), (2, 3), (1, 2)])
    def test_they_take_turns(self, model, loras, deltas, every, count):
        session = FusionSession(model, loras[:1], loras[1:count], FuseSettings(method="switch", switch_every=every))
        out, inputs = run(session, model)
        assert_close(out, wanted(model, inputs, deltas, lambda step, name: [float(step // every % count == b) for b in range(count)]))


class TestLoser:
    @pytest.mark.parametrize("method", ["dynfuse", "klora", "switch"])
    def test_those_not_chosen_have_this_weight(self, model, loras, deltas, method):
        """The choices themselves are those without it: these layers see the same input whatever is added."""
        hard = FusionSession(model, *loras[:2], FuseSettings(method=method))
        run(hard, model)
        session = FusionSession(model, *loras[:2], FuseSettings(method=method, loser=0.5))
        out, inputs = run(session, model)
        choices = hard.trace.weights[:, :, 0]
        expected = wanted(model, inputs, deltas, lambda step, name: [1.0 if float(w) else 0.5 for w in choices[step, NAMES.index(name)]])
        assert_close(out, expected)
        assert len(choices.unique()) == 2

    def test_at_1_it_is_the_sum(self, model, loras):
        one, _ = run(FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", loser=1.0)), model)
        both, _ = run(FusionSession(model, *loras[:2], FuseSettings(method="direct")), model)
        torch.testing.assert_close(one, both)


SDXL = {
    "in1 res": "input_blocks.1.0.in_layers.2",
    "in4": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "in5": "input_blocks.5.1.transformer_blocks.0.attn1.to_q",
    "in7": "input_blocks.7.1.transformer_blocks.0.attn1.to_q",
    "mid": "middle_block.1.transformer_blocks.0.attn1.to_q",
    "out0": "output_blocks.0.1.transformer_blocks.0.attn1.to_q",
    "out0 res": "output_blocks.0.0.out_layers.3",
    "out1": "output_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "out2": "output_blocks.2.1.transformer_blocks.0.attn1.to_q",
    "out3": "output_blocks.3.1.transformer_blocks.0.attn1.to_q",
    "out5": "output_blocks.5.1.transformer_blocks.0.attn1.to_q",
}


class TestByBlock:
    @pytest.mark.parametrize(
        ("method", "subject", "style"),
        [("blora", {"out0"}, {"out1"}), ("craft", {"in4", "in5", "mid", "out0"}, {"out1", "out3", "out5"})],
    )
    def test_each_side_has_its_blocks(self, tmp_path, method, subject, style):
        model = tokens_model(list(SDXL.values()))
        files = [lora_file(tmp_path / f"{n}.safetensors", model, list(SDXL.values()), seed=n) for n in (1, 2)]
        session = FusionSession(model, *files, FuseSettings(method=method))
        with torch.no_grad(), session.attached(ROWS):
            model(torch.randn(2, 5, WIDTH))
        trace = session.trace
        for label, name in SDXL.items():
            row = [site.layer for site in trace.sites].index(name)
            assert trace.weights[0, row, 0].tolist() == [float(label in subject), float(label in style)], label

    def test_a_base_model_without_such_blocks(self, model, loras):
        with pytest.raises(FusionError, match=r"The method blora is made for SDXL: this base model has no attention in output_blocks\.0\."):
            FusionSession(model, *loras[:2], FuseSettings(method="blora"))
