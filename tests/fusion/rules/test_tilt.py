"""The slider between subject and style under every method: the weights against formulas in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lib_dynfuse import FuseSettings
from lib_dynfuse.fusion import FusionSession, Step
from lib_dynfuse.fusion.rules import RULES, Member, Places, Votes
from lib_dynfuse.lora import text_strengths
from lib_dynfuse.settings import METHODS, SettingsError

from ..models import WIDTH, delta_weights, lora_file, tokens_model
from .test_dynfuse import chosen
from .test_of_weights import NAMES, ROWS, STEPS, assert_close, run, wanted

TILTS = (-1.0, -0.6, 0.0, 0.25, 1.0)
ANYWHERE = [name for name in METHODS if name not in ("blora", "craft")]  # which are made for SDXL


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


def factors(tilt):
    """Of the subject and of the style, in words: the side that the slider leaves loses evenly, the other keeps all."""
    return (1.0, 1.0 - abs(tilt)) if tilt < 0 else (1.0 - abs(tilt), 1.0)


@pytest.mark.parametrize("tilt", TILTS)
def test_it_multiplies_the_weights_of_a_sum(model, loras, deltas, tilt):
    """Two subjects of which one follows the steps."""
    settings = FuseSettings(method="direct", subject_weight="0.8+0@0,1.5@1", style_weight=0.9, tilt=tilt)
    out, inputs = run(FusionSession(model, [loras[0], loras[2]], loras[1], settings), model)
    subject, style = factors(tilt)
    given = [deltas[0], deltas[2], deltas[1]]
    assert_close(out, wanted(model, inputs, given, lambda n, _: (0.8 * subject, 1.5 * n / (STEPS - 1) * subject, 0.9 * style)))


@pytest.mark.parametrize("tilt", TILTS)
def test_it_acts_beside_the_balance(model, loras, deltas, tilt):
    """Which is that of the LoRAs as they are, up to the very end of the slider."""
    out, inputs = run(FusionSession(model, *loras[:2], FuseSettings(method="balanced", style_weight=0.7, tilt=tilt)), model)
    norms = [math.sqrt(sum(float(delta[name].square().sum()) for name in NAMES)) for delta in deltas[:2]]
    mean = math.sqrt(norms[0] * norms[1])
    own = [mean * min(max(norm / mean, 0.5**0.5), 2**0.5) / norm for norm in norms]
    subject, style = factors(tilt)
    assert_close(out, wanted(model, inputs, deltas, lambda n, _: (own[0] * subject, 0.7 * own[1] * style)))


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("method", ["klora", "klora-s", "est-lora"])
def test_methods_that_choose_by_matrices_have_their_sizes_multiplied(model, loras, deltas, method, tilt):
    out, inputs = run(FusionSession(model, *loras[:2], FuseSettings(method=method, tilt=tilt)), model)
    subject, style = factors(tilt)

    def sizes(delta):
        flat = delta.abs().flatten()
        return (float(flat.square().sum()),) * 2 if method == "est-lora" else (float(flat.sort().values[-24:].sum()), float(flat.sum()))

    size = [{name: sizes(delta[name]) for name in NAMES} for delta in deltas[:2]]
    gamma = sum(one for _, one in size[0].values()) / sum(one for _, one in size[1].values())

    def weights(number, name):
        tau = number / STEPS
        scale = {"klora": 1.5 * tau + 0.5, "klora-s": (1.5 * tau + 1.3) % 1.5, "est-lora": 1.5 * tau + 1.0}[method]
        wins = subject * size[0][name][0] >= gamma * style * size[1][name][0] * scale
        return (subject, 0) if wins else (0, style)

    assert_close(out, wanted(model, inputs, deltas, weights))


@pytest.mark.parametrize(
    ("tilt", "turns"), [(0.0, "ddddiiiidd"), (-0.5, "ddddiidddd"), (0.75, "diiiidiiii"), (-1.0, "d" * 10), (1.0, "i" * 10)]
)
def test_turns_are_shorter(model, loras, deltas, tilt, turns):
    out, inputs = run(FusionSession(model, *loras[:2], FuseSettings(method="switch", switch_every=4, tilt=tilt)), model)
    subject, style = factors(tilt)
    assert_close(out, wanted(model, inputs, deltas, lambda n, _: (subject, 0) if turns[n] == "d" else (0, style)))


@pytest.mark.parametrize("tilt", [0.9, -0.7, 0.3])
def test_turns_have_their_share_of_many_steps(tilt):
    """Whatever a binary fraction makes of 0.1."""
    switch = RULES["switch"]()
    members = (Member("dog", True), Member("ink", False))
    settings = FuseSettings(method="switch", switch_every=10, tilt=tilt)
    switch.prepare(Places((), members, torch.ones(1, 2, dtype=torch.bool), settings, None))
    turns = ["di"[int(switch.weights(Step.of(n, 1000), None)[0, 0].argmax())] for n in range(1000)]
    subject, style = (round(10 * factor) for factor in factors(tilt))
    assert turns == list(itertools.islice(itertools.cycle("d" * subject + "i" * style), 1000))


@pytest.mark.parametrize("tilt", TILTS)
def test_a_mean_of_predictions_is_weighted(model, loras, deltas, tilt):
    """The layers are linear, so that the mean of predictions is one with the mean of the changes."""
    session = FusionSession(model, *loras[:2], FuseSettings(method="composite", tilt=tilt))
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    session.begin(Step.of(0, 1))
    with torch.no_grad():
        out = session.predict(lambda positions: torch.stack([model(x)[name] for name in NAMES]), ROWS)
    subject, style = factors(tilt)
    own = (subject * subject / (subject + style), style * style / (subject + style))
    assert_close(out.unsqueeze(0), wanted(model, x.unsqueeze(0), deltas, lambda n, _: own))


@pytest.mark.parametrize("tilt", [-0.5, 0.5])
def test_np_lora_keeps_the_subject_out_of_a_quieter_style_by_less(model, loras, deltas, tilt):
    out, inputs = run(FusionSession(model, *loras[:2], FuseSettings(method="np-lora", tilt=tilt)), model)
    subject, style = factors(tilt)
    moved = {}
    for name in NAMES:
        projector = torch.linalg.pinv(deltas[1][name], rtol=1e-6) @ deltas[1][name]
        moved[name] = deltas[0][name] @ (torch.eye(WIDTH, dtype=torch.float64) - 0.5 * style / (1 + 0.5 * style) * projector)
    assert_close(out, wanted(model, inputs, [moved, deltas[1]], lambda n, _: (subject, style)))


@pytest.mark.parametrize("method", ANYWHERE)
@pytest.mark.parametrize("tilt", [-1.0, 1.0])
def test_at_the_ends_there_is_one_side(model, loras, method, tilt):
    settings = FuseSettings(method=method, one_sided="skip", tilt=tilt)
    session = FusionSession(model, *loras[:2], settings)
    run(session, model)
    heard, silent = (0, 1) if tilt < 0 else (1, 0)
    weights = session.trace.weights
    assert not weights[..., silent].any()
    assert weights[..., heard].all()


@pytest.mark.parametrize("criterion", ["kl", "js", "cosine", "dot"])
@pytest.mark.parametrize("balance", ["none", "gamma"])
def test_a_side_that_is_not_there_wins_nothing(criterion, balance):
    """Also where the other's divergence is below none: a dot product may rise."""
    for tilt, winner in ((-1.0, 0), (1.0, 1)):
        settings = FuseSettings(method="dynfuse", criterion=criterion, balance=balance, tilt=tilt)
        assert chosen([[-0.5, 0.0], [0.0, -0.5], [0.0, 0.0], [math.nan, 1.0]], settings) == [winner] * 4


def test_a_balance_does_not_take_it_back():
    """Both as loud over the first step, whatever their strengths: the tilt then is a factor on the divergences."""
    made = RULES["dynfuse"]()
    settings = FuseSettings(method="dynfuse", balance="gamma", tilt=0.5)
    members = (Member("dog", True), Member("ink", False))
    made.prepare(Places((), members, torch.ones(0, 2, dtype=torch.bool), settings, None))
    made.observe(Step.of(0, 2), Votes(torch.tensor([[[3.0, 10.0]], [[1.0, 10.0]]])))
    votes = torch.tensor([[[4.1, 10.0]], [[1.9, 10.0]], [[2.1, 5.0]]])
    # gamma = 4 / 20: 0.5 x 4.1 against 2, 0.5 x 1.9 against 2, 0.5 x 2.1 against 1
    assert made.weights(Step.of(1, 2), Votes(votes)).argmax(-1).flatten().tolist() == [0, 1, 0]


def test_text_encoders_and_guidance_follow(loras):
    settings = FuseSettings(subject_weight=0.8, style_weight=0.5, te_weight=0.5, content_weight=0.4, style_dino_weight=0.0, tilt=0.25)
    subject, style = text_strengths(settings, [loras[0]], [loras[1]])
    assert subject["te1"] == pytest.approx(0.5 * 0.8 * 0.75)
    assert style["te1"] == pytest.approx(0.5 * 0.5)
    assert settings.guidance_weights == pytest.approx((0.3, 1 / 3, 0.0))


@pytest.mark.parametrize("value", [-1.01, 1.01, math.nan, "much"])
def test_it_lies_between_the_two(value):
    with pytest.raises(SettingsError, match="tilt must be"):
        FuseSettings(tilt=value)
