"""Contrast, methods of several predictions, LoRAs left out of the negative prompt: against the formulas, merged weights in float64."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.fusion import FusionSession, Step
from lib_dynfuse.fusion.batches import ModelCall
from lib_dynfuse.settings import SettingsError

from .models import ATTENTION, WIDTH, Nested, delta_weights, lora_file

NAMES = ATTENTION
STEPS = 6
SCALE = 5.0
CONTRASTS = {"contrast": 1.0, "style_contrast": 0.4, "subject_contrast": 0.7}


class Chain(Nested):
    """Each layer sees what the one before it made; every row is by itself. context: (N, WIDTH)."""

    def forward(self, x, t=None, *, context=None):
        hidden = x if context is None else x + context[:, None]
        for name in self.order:
            hidden = torch.tanh(self.get_submodule(name)(hidden)) + x
        return hidden


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Chain({name: nn.Linear(WIDTH, WIDTH) for name in NAMES}).eval().requires_grad_(False).double()


@pytest.fixture
def loras(tmp_path, model):
    return [lora_file(tmp_path / f"{name}.safetensors", model, NAMES, seed=n + 1) for n, name in enumerate(("dog", "ink", "hat"))]


@pytest.fixture
def merged(tmp_path, model, loras):
    """strengths of dog, ink, hat -> the model's prediction with these merged."""
    deltas = [delta_weights(tmp_path / f"{lora.name}.safetensors", NAMES) for lora in loras]

    def predict(strengths, *args, **kwargs):
        twin = Chain({name: nn.Linear(WIDTH, WIDTH) for name in NAMES}).double().requires_grad_(False)
        for name in NAMES:
            own, copy = model.get_submodule(name), twin.get_submodule(name)
            change = sum(s * delta[name] for s, delta in zip(strengths, deltas, strict=False))
            copy.weight.copy_(own.weight + change)
            copy.bias.copy_(own.bias)
        return twin(*args, **kwargs)

    return predict


def noise(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def splits(rows):
    """All ways to cut a list into stretches that follow each other."""
    for cuts in itertools.product((False, True), repeat=len(rows) - 1):
        parts = [[rows[0]]]
        for row, cut in zip(rows[1:], cuts, strict=True):
            if cut:
                parts.append([])
            parts[-1].append(row)
        yield parts


def predicted(session, model, steps, rows, parts, scale=SCALE, contexts=None):
    """(steps, rows, T, WIDTH): what comes out, the rows run in these parts."""
    out = torch.zeros_like(steps)
    for number, x in enumerate(steps):
        session.begin(Step.of(number, len(steps)))
        for part in parts:
            given = {} if contexts is None else {"context": contexts[part]}
            call = ModelCall(model, (x[part],), given, len(part))
            some = Rows(tuple(rows.images[p] for p in part), tuple(rows.conditional[p] for p in part), rows.count)
            out[number, part] = call.of(session.predict(call, some, scale))
        session.end_step()
    return out


def expected(merged, steps, conditional, settings, scale=SCALE, contexts=None, renewed=lambda step: True, inside=lambda step: True):
    kwargs = {} if contexts is None else {"context": contexts}
    out = []
    direction = None
    for number, x in enumerate(steps):
        both, none, style, subject = (merged(s, x, **kwargs) for s in ((1, 1), (0, 0), (0, 1), (1, 0)))
        own = both.clone()
        if inside(number):
            if direction is None or renewed(number):
                direction = settings.contrast * (both - none) + settings.style_contrast * (both - style)
                direction = direction + settings.subject_contrast * (both - subject)
            own[conditional] += direction[conditional] / scale
        out.append(own)
    return torch.stack(out)


def assert_close(actual, wanted):
    # Kept directions are float32.
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("images", "parts"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
def test_the_formula_whatever_the_cut(model, loras, merged, images, parts):
    """Prompts of each image, then the negative prompts, in one call or in any others."""
    rows = Rows((*(i for i in range(images) for _ in range(parts)), *range(images)), (True,) * images * parts + (False,) * images, images)
    conditional = torch.tensor(rows.conditional)
    settings = FuseSettings(method="direct", contrast_every=1, **CONTRASTS)
    steps, contexts = noise(STEPS, len(rows.images), 5, WIDTH), noise(len(rows.images), WIDTH, seed=8)
    wanted = expected(merged, steps, conditional, settings, contexts=contexts)
    for cut in splits(list(range(len(rows.images)))):
        session = FusionSession(model, *loras[:2], settings)
        assert_close(predicted(session, model, steps, rows, cut, contexts=contexts), wanted)


@pytest.mark.parametrize("parts", [[[0, 1]], [[1, 0]], [[0], [1]], [[1], [0]]], ids=str)
def test_the_negative_prompt_in_any_place(model, loras, merged, parts):
    settings = FuseSettings(method="direct", contrast_every=1, contrast=1.5)
    rows, steps = Rows((0, 0), (False, True), 1), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, *loras[:2], settings)
    wanted = expected(merged, steps, torch.tensor([False, True]), settings)
    assert_close(predicted(session, model, steps, rows, parts), wanted)


def test_at_cfg_1_there_are_prompts_only(model, loras, merged):
    settings = FuseSettings(method="direct", contrast_every=1, contrast=1.5)
    rows, steps = Rows((0, 1), (True, True), 2), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, *loras[:2], settings)
    wanted = expected(merged, steps, torch.tensor([True, True]), settings, scale=1.0)
    assert_close(predicted(session, model, steps, rows, [[0, 1]], scale=1.0), wanted)


@pytest.mark.parametrize("cut", [[[0, 1]], [[0], [1]], [[1], [0]]], ids=str)
@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_direction_is_kept(model, loras, merged, every, cut):
    settings = FuseSettings(method="direct", contrast_every=every, **CONTRASTS)
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, *loras[:2], settings)
    wanted = expected(merged, steps, torch.tensor([True, False]), settings, renewed=lambda step: step % every == 0)
    assert_close(predicted(session, model, steps, rows, cut), wanted)
    made = len(range(0, STEPS, every))
    assert session.predicted_rows == (2 * STEPS, 3 * made)


@pytest.mark.parametrize(("start", "end", "steps_inside"), [(0.0, 0.5, {0, 1, 2}), (0.5, 1.0, {3, 4, 5}), (1 / 3, 2 / 3, {2, 3})])
def test_the_range_of_steps(model, loras, merged, start, end, steps_inside):
    settings = FuseSettings(method="direct", contrast=2.0, contrast_start=start, contrast_end=end, contrast_every=2)
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, *loras[:2], settings)
    first = min(steps_inside)
    wanted = expected(
        merged, steps, torch.tensor([True, False]), settings,
        inside=lambda step: step in steps_inside, renewed=lambda step: (step - first) % 2 == 0,
    )  # fmt: skip
    assert_close(predicted(session, model, steps, rows, [[0, 1]]), wanted)


@pytest.mark.parametrize(("method", "recommended"), [("balanced", 1.5), ("direct", 0.0), ("dynfuse", 0.0)])
def test_below_0_the_method_says_how_much(model, loras, method, recommended):
    steps, rows = noise(3, 2, 5, WIDTH), Rows((0, 0), (False, True), 1)
    for unset in (FuseSettings(method=method), FuseSettings(method=method, contrast=-0.3)):
        sessions = [
            FusionSession(model, *loras[:2], settings, steps=3)
            for settings in (unset, dataclasses.replace(unset, contrast=recommended), dataclasses.replace(unset, contrast=recommended + 1))
        ]
        told, same, other = (predicted(session, model, steps, rows, [[0, 1]]) for session in sessions)
        assert all(a.equal(b) for a, b in zip(told, same, strict=True))
        assert not any(a[1].equal(b[1]) for a, b in zip(told, other, strict=True))


@pytest.mark.parametrize("method", ["direct", "dynfuse"])
def test_without_contrast_nothing_is_predicted_beside(model, loras, method):
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    plain = FusionSession(model, *loras[:2], FuseSettings(method=method))
    outputs = []
    for number, x in enumerate(steps):
        plain.begin(Step.of(number, STEPS))
        with plain.attached(rows):
            outputs.append(model(x))
        plain.end_step()
    for settings in (FuseSettings(method=method), FuseSettings(method=method, contrast=3.0, contrast_start=1.0)):
        session = FusionSession(model, *loras[:2], settings)
        assert torch.equal(predicted(session, model, steps, rows, [[0, 1]]), torch.stack(outputs))
        assert session.predicted_rows == (2 * STEPS, 0)


@pytest.mark.parametrize("decide", ["now", "next"])
def test_other_predictions_have_no_vote(model, loras, decide):
    """The selection decides as it does without the contrast: on the same inputs, the same choices."""
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    traces = []
    for strength in (0.0, 2.0):
        session = FusionSession(
            model, *loras[:2], FuseSettings(method="dynfuse", contrast_every=1, contrast=strength, subject_contrast=strength, decide=decide)
        )
        predicted(session, model, steps, rows, [[0, 1]])
        traces.append(session.trace)
    assert torch.equal(traces[0].weights, traces[1].weights)
    assert 0 < traces[0].weights[..., 0].mean() < 1


def test_under_the_selection_it_is_the_fused_prediction_that_moves(model, loras, merged):
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    alone = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse"))
    fused = predicted(alone, model, steps, rows, [[0, 1]])
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", contrast_every=1, contrast=2.0))
    wanted = fused.clone()
    for number, x in enumerate(steps):
        wanted[number, 0] += 2.0 / SCALE * (fused[number, 0] - merged((0, 0), x)[0])
    assert_close(predicted(session, model, steps, rows, [[0, 1]]), wanted)


def test_three_loras_and_weights_over_the_steps(model, loras, merged):
    settings = FuseSettings(
        subject="dog+hat",
        style="ink",
        method="direct",
        subject_weight="0@0,1@1+0.5",
        style_weight=0.8,
        subject_contrast=1.0,
        style_contrast=0.5,
        contrast_every=1,
    )
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, [loras[0], loras[2]], loras[1], settings)
    out = predicted(session, model, steps, rows, [[0, 1]])
    for number, x in enumerate(steps):
        dog = number / (STEPS - 1)
        both, subject, style = (merged(s, x) for s in ((dog, 0.8, 0.5), (dog, 0, 0.5), (0, 0.8, 0)))
        both[0] += (1.0 * (both - subject)[0] + 0.5 * (both - style)[0]) / SCALE
        assert_close(out[number], both)


def test_a_second_picture_has_directions_of_its_own(model, loras, merged):
    settings = FuseSettings(method="direct", contrast=1.0, contrast_every=5)
    rows = Rows((0, 0), (True, False), 1)
    session = FusionSession(model, *loras[:2], settings)
    predicted(session, model, noise(STEPS, 2, 5, WIDTH), rows, [[0, 1]])
    session.restart()
    steps = noise(STEPS, 2, 5, WIDTH, seed=9)
    wanted = expected(merged, steps, torch.tensor([True, False]), settings, renewed=lambda step: step % 5 == 0)
    assert_close(predicted(session, model, steps, rows, [[0, 1]]), wanted)


def test_tiles_have_a_direction_each(model, loras, merged):
    """Two tiles of an image, one after another in each step, of different sizes."""
    settings = FuseSettings(method="direct", contrast=1.0, contrast_every=3)
    rows = Rows((0, 0), (True, False), 1)
    session = FusionSession(model, *loras[:2], settings)
    tiles = [noise(STEPS, 2, 5, WIDTH), noise(STEPS, 2, 3, WIDTH, seed=9)]
    outputs = [[], []]
    for number in range(STEPS):
        session.begin(Step.of(number, STEPS))
        for tile, out in zip(tiles, outputs, strict=True):
            call = ModelCall(model, (tile[number],), {}, 2)
            out.append(session.predict(call, rows, SCALE))
        session.end_step()
    for tile, out in zip(tiles, outputs, strict=True):
        wanted = expected(merged, tile, torch.tensor([True, False]), settings, renewed=lambda step: step % 3 == 0)
        assert_close(torch.stack(out), wanted)


def test_the_gradient_takes_the_direction_for_a_constant(model, loras):
    settings = FuseSettings(method="direct", contrast_every=1, contrast=1.0)
    rows = Rows((0, 0), (True, False), 1)
    gradients = []
    for given in (settings, FuseSettings(method="direct")):
        session = FusionSession(model, *loras[:2], given)
        session.begin(Step.of(0, 1))
        x = noise(2, 5, WIDTH).requires_grad_()
        call = ModelCall(model, (x,), {}, 2)
        gradients.append(torch.autograd.grad(session.predict(call, rows, SCALE).sum(), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_memory_runs_out(model, loras, merged):
    settings = FuseSettings(method="direct", contrast_every=1, contrast=1.0)
    rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
    session = FusionSession(model, *loras[:2], settings)
    out = []
    for number, x in enumerate(steps):
        session.begin(Step.of(number, STEPS))
        call = ModelCall(model, (x,), {}, 2)

        def short(positions, call=call, number=number):
            if positions is not None and number == 2:
                raise RuntimeError("CUDA out of memory")
            return call(positions)

        out.append(session.predict(short, rows, SCALE))
        session.end_step()
    wanted = expected(merged, steps, torch.tensor([True, False]), settings, inside=lambda step: step < 2)
    assert_close(torch.stack(out), wanted)
    assert session.notes() == ["The contrast was left out from step 3 on: memory ran out."]
    session.restart()
    assert session.notes() == []


def test_another_error_is_not_swallowed(model, loras):
    session = FusionSession(model, *loras[:2], FuseSettings(method="direct", contrast_every=1, contrast=1.0))
    call = ModelCall(model, (noise(2, 5, WIDTH),), {}, 2)

    def broken(positions):
        if positions is not None:
            raise RuntimeError("shapes")
        return call(positions)

    with pytest.raises(RuntimeError, match="shapes"):
        session.predict(broken, Rows((0, 0), (True, False), 1), SCALE)
    assert not any("forward" in vars(layer) for layer in model.modules())


class TestComposite:
    def test_the_mean_of_each_lora_alone(self, model, loras, merged):
        settings = FuseSettings(subject="dog+hat", style="ink", method="composite", style_weight=0.8)
        rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
        session = FusionSession(model, [loras[0], loras[2]], loras[1], settings)
        out = predicted(session, model, steps, rows, [[0], [1]])
        for number, x in enumerate(steps):
            assert_close(out[number], sum(merged(s, x) for s in ((1, 0, 0), (0, 0.8, 0), (0, 0, 1))) / 3)
        assert session.trace.weights.shape == (STEPS, len(NAMES), 1, 3)
        torch.testing.assert_close(session.trace.weights.mean((0, 1, 2)), torch.tensor([1.0, 1.0, 0.8]) / 3)

    def test_with_contrast(self, model, loras, merged):
        settings = FuseSettings(method="composite", contrast_every=1, contrast=1.0)
        rows, x = Rows((0, 0), (True, False), 1), noise(1, 2, 5, WIDTH)
        out = predicted(FusionSession(model, *loras[:2], settings), model, x, rows, [[0, 1]])[0]
        wanted = (merged((1, 0), x[0]) + merged((0, 1), x[0])) / 2
        wanted[0] += (wanted - merged((0, 0), x[0]))[0] / SCALE
        assert_close(out, wanted)

    def test_a_lora_at_weight_0_predicts_nothing(self, model, loras, merged):
        settings = FuseSettings(method="composite", style_weight=0.0)
        x = noise(1, 2, 5, WIDTH)
        out = predicted(FusionSession(model, *loras[:2], settings), model, x, Rows((0, 0), (True, False), 1), [[0, 1]])[0]
        assert_close(out, merged((1, 0), x[0]))


class TestNegativeWeight:
    @pytest.mark.parametrize("factor", [0.0, 0.5])
    @pytest.mark.parametrize("cut", [[[0, 1, 2]], [[0], [1, 2]], [[2], [0, 1]]], ids=str)
    def test_a_factor_on_the_loras_of_the_negative_prompt(self, model, loras, merged, cut, factor):
        settings = FuseSettings(method="direct", negative_weight=factor)
        rows, steps = Rows((0, 0, 0), (True, True, False), 1), noise(STEPS, 3, 5, WIDTH)
        out = predicted(FusionSession(model, *loras[:2], settings), model, steps, rows, cut)
        for number, x in enumerate(steps):
            wanted = merged((1, 1), x)
            wanted[2] = merged((factor, factor), x)[2]
            assert_close(out[number], wanted)

    @pytest.mark.parametrize("decide", ["now", "next"])
    def test_under_the_selection_the_prompt_is_as_ever(self, model, loras, merged, decide):
        rows, steps = Rows((0, 0), (True, False), 1), noise(STEPS, 2, 5, WIDTH)
        plain = predicted(FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide)), model, steps, rows, [[0, 1]])
        session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide, negative_weight=0.0))
        out = predicted(session, model, steps, rows, [[0, 1]])
        assert_close(out[:, 0], plain[:, 0])
        for number, x in enumerate(steps):
            assert_close(out[number, 1], merged((0, 0), x)[1])


class TestModelCall:
    def test_a_host_may_use_up_its_lists(self):
        seen = []

        def forward(x, *, control):
            seen.append(control["middle"].pop())
            return x

        call = ModelCall(forward, (noise(2, 3),), {"control": {"middle": [noise(2, 1), noise(2, 1, seed=2)]}}, 2)
        for positions in (None, None, (1,)):
            call(positions)
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[2], seen[0][1:])

    def test_what_is_not_by_row_is_left(self):
        other = noise(5, 3)
        call = ModelCall(lambda x, other, names: (x, other, names), (noise(2, 3),), {"other": other, "names": ("a", "b")}, 2)
        call(None)
        assert torch.equal(call((1,)), noise(2, 3)[1:])

    @pytest.mark.parametrize("form", ["tensor", "tuple", "sample"])
    def test_the_result_keeps_its_form(self, form):
        made = {"tensor": noise(2), "tuple": (noise(2), "more"), "sample": SimpleNamespace(sample=noise(2), other=1)}[form]
        call = ModelCall(lambda: made, (), {}, 2)
        call(None)
        moved = call.of(noise(2) + 1)
        inner = {"tensor": lambda: moved, "tuple": lambda: moved[0], "sample": lambda: moved.sample}[form]()
        assert torch.equal(inner, noise(2) + 1)

    def test_where_rows_cannot_be_cut_all_are_run(self):
        batches = []

        def forward(x):
            batches.append(len(x))
            return x

        call = ModelCall(forward, (noise(4, 3),), {}, 4, adjust=lambda arguments, positions, batch: None)
        call(None)
        assert torch.equal(call((1, 3)), noise(4, 3)[[1, 3]])
        assert batches == [4, 4]


@pytest.mark.parametrize(
    "values",
    [{"contrast": -1.1}, {"style_contrast": -1.0}, {"subject_contrast": float("inf")}, {"contrast_every": 0}, {"negative_weight": -1.0}],
)
def test_values_out_of_range(values):
    with pytest.raises(SettingsError, match=next(iter(values))):
        FuseSettings(**values)


def test_the_range_must_begin_before_it_ends():
    with pytest.raises(SettingsError, match=r"contrast_start \(0\.6\) must not be after contrast_end \(0\.5\)"):
        FuseSettings(method="dynfuse", contrast_start=0.6, contrast_end=0.5)
