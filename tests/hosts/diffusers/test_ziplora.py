"""ZipLoRA: the merged model against dense matrices in float64, the loss's gradient, the training, the file, and what is refused."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from lib_dynfuse import FuseSettings, FusionSession, cli, read_lora
from lib_dynfuse.fusion.ziplora import Mergers
from lib_dynfuse.hosts.diffusers import FusedPipeline
from lib_dynfuse.hosts.diffusers.ziplora import Loss, Recipe, lessons, train
from lib_dynfuse.ziplora import write
from tests.fakes.small_model import small_pipeline, write_random_lora
from tests.fusion.models import ATTENTION, CONVOLUTION, WIDTH, Nested, delta_weights, lora_file
from tests.test_cli import refused

SETTINGS = FuseSettings(method="direct", contrast=0.0, subject_weight=1.5, style_weight=0.8)
STRENGTHS = 1.5, 0.8
NAMES = [*ATTENTION[:2], CONVOLUTION]


class Sequential(Nested):
    """The linear layers one after the other; the convolution beside them."""

    def forward(self, x):
        for name in NAMES[:2]:
            x = torch.tanh(self.get_submodule(name)(x))
        return x.mean() + self.get_submodule(CONVOLUTION)(x[:, None]).square().mean()


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(WIDTH, WIDTH) for name in NAMES[:2]}
    return Sequential({**layers, CONVOLUTION: torch.nn.Conv2d(1, 3, 3, padding=1)}).eval().requires_grad_(False)


@pytest.fixture
def loras(tmp_path, model):
    return [lora_file(tmp_path / f"{n}.safetensors", model, NAMES, rank=r, seed=r, alpha=3) for n, r in (("dog", 4), ("ink", 2))]


@pytest.fixture
def mergers(model, loras):
    made = Mergers(FusionSession(model, *loras, SETTINGS))
    generator = torch.Generator().manual_seed(3)
    for columns in made.columns.values():
        columns.data = torch.randn(columns.shape, generator=generator)
    return made


def dense(model, loras, columns):
    """The layers with W0 + s_c dW_c diag(m_c) + s_s dW_s diag(m_s), and the model's output, in float64. columns: by layer."""
    deltas = [delta_weights(lora.path, NAMES) for lora in loras]
    weights = {}
    for name in NAMES:
        weights[name] = model.get_submodule(name).weight.double()
        for delta, strength, own in zip(deltas, STRENGTHS, columns[name], strict=True):
            weights[name] = weights[name] + strength * delta[name] * own.view(1, -1, *[1] * (delta[name].dim() - 2))

    def output(x):
        x = x.double()
        for name in NAMES[:2]:
            x = torch.tanh(torch.nn.functional.linear(x, weights[name], model.get_submodule(name).bias.double()))
        y = torch.nn.functional.conv2d(x[:, None], weights[CONVOLUTION], model.get_submodule(CONVOLUTION).bias.double(), padding=1)
        return x.mean() + y.square().mean()

    return output


def test_the_model_and_the_gradient_are_those_of_the_dense_formula(model, loras, mergers):
    x = torch.randn(2, 5, WIDTH)
    with mergers.attached():
        loss = (model(x) - 0.3).square() + 0.01 * mergers.similarity()
        loss.backward()
    columns = {site.layer: own.detach().double().requires_grad_() for site, own in mergers.columns.items()}
    assert set(columns) == set(NAMES)
    cosines = [(m[0] @ m[1]).abs() / (m[0].norm() * m[1].norm()) for m in columns.values()]
    expected = (dense(model, loras, columns)(x) - 0.3).square() + 0.01 * sum(cosines)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    for site, own in mergers.columns.items():
        torch.testing.assert_close(own.grad.double(), columns[site.layer].grad, rtol=1e-3, atol=1e-6)


def test_they_begin_as_the_sum_and_leave_nothing_behind(model, loras):
    x = torch.randn(2, 5, WIDTH)
    plain = model(x)
    mergers = Mergers(FusionSession(model, *loras, SETTINGS))
    with mergers.attached():
        begun = model(x)
    ones = {name: torch.ones(2, model.get_submodule(name).weight.shape[1], dtype=torch.float64) for name in NAMES}
    assert float(begun) == pytest.approx(float(dense(model, loras, ones)(x)), rel=1e-5)
    assert torch.equal(model(x), plain)


def test_the_file_holds_the_dense_formula(tmp_path, model, loras, mergers):
    path = tmp_path / "both.safetensors"
    write(path, FusionSession(model, *loras, SETTINGS), tuple(loras), mergers, {"steps": 7}, dtype=torch.float32)
    deltas = [delta_weights(lora.path, NAMES) for lora in loras]
    session = FusionSession(model, read_lora(path), (), FuseSettings(method="direct", contrast=0.0))
    for site, own in mergers.columns.items():
        m = own.detach().double()
        delta = [change[site.layer] for change in deltas]
        expected = sum(s * d * c.view(1, -1, *[1] * (d.dim() - 2)) for s, d, c in zip(STRENGTHS, delta, m, strict=True))
        layer = next(found for found in session.layers if found.name == site.layer)
        (change,) = layer.sites[0].bind(lambda: None)
        torch.testing.assert_close(change.delta_weight().double(), expected, rtol=1e-4, atol=1e-5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["dynfuse_ziplora"]) == {"steps": 7}
    assert [entry["name"] for entry in json.loads(metadata["dynfuse_loras"])] == ["dog", "ink"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = small_pipeline("epsilon")
    pipeline.save_pretrained(folder / "model")
    for name, seed in (("dog", 1), ("ink", 3)):
        write_random_lora(folder / f"{name}.safetensors", pipeline, rank=4, strength=0.3, seed=seed)
    return folder, pipeline


RECIPE = Recipe(steps=12, rate=0.1, pictures=2, batch=2, picture_steps=3, size=(64, 64), weight=0.0)


@pytest.mark.parametrize("low_memory", [False, True])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, low_memory):
    folder, pipeline = tiny
    settings = FuseSettings(method="direct", contrast=0.0)
    fused = FusedPipeline(pipeline, read_lora(folder / "dog.safetensors"), read_lora(folder / "ink.safetensors"), settings)
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    made = lessons(fused, {"subject": "a dog", "style": "ink"}, RECIPE)
    assert [len(own) for own in made.values()] == [3, 3]
    seen: list[Loss] = []
    recipe = Recipe(**{**RECIPE.__dict__, "low_memory": low_memory, "steps": 2 if low_memory else RECIPE.steps})
    mergers = train(fused, made, recipe, seen.append)
    assert len(seen) == recipe.steps
    if not low_memory:
        first, last = (sum(loss.total(0) for loss in some) for some in (seen[:3], seen[-3:]))
        assert last < 0.7 * first
    assert all(bool((own != 1).any()) for own in mergers.columns.values())
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not pipeline.unet.training
    assert not any("forward" in module.__dict__ for module in pipeline.unet.modules())


def test_the_similarity_pushes_them_apart(tiny):
    folder, pipeline = tiny
    fused = FusedPipeline(
        pipeline,
        read_lora(folder / "dog.safetensors"),
        read_lora(folder / "ink.safetensors"),
        FuseSettings(method="direct", contrast=0.0),
    )
    made = lessons(fused, {"subject": "a dog", "style": "ink"}, RECIPE)
    seen: list[Loss] = []
    train(fused, made, Recipe(**{**RECIPE.__dict__, "weight": 0.1, "steps": 6}), seen.append)
    assert seen[-1].similarity < 0.9 * seen[0].similarity


def command(folder, *more, out="both.safetensors"):
    paths = [folder / "dog.safetensors", folder / "ink.safetensors", "--base", folder / "model", "--out", folder / out]
    options = ["--subject-prompt", "a dog", "--style-prompt", "ink", "--device", "cpu", "--size", "64x64", "--steps", "2"]
    return ["ziplora", *map(str, (*paths, *options, "--picture-steps", 2, "--pictures", 1, *more))]


def test_the_command_writes_a_file_that_loads_and_says_what_is_in_it(tiny, capsys):
    folder, _ = tiny
    assert cli.main(command(folder)) == 0
    output = capsys.readouterr().out
    for words in ("both.safetensors", "Mergers:", "Loss, first and last 1 of 2 steps", "rounding to float16"):
        assert words in output
    assert read_lora(folder / "both.safetensors").ranks
    with safe_open(folder / "both.safetensors", "pt") as file:
        about = json.loads(file.metadata()["dynfuse_ziplora"])
    assert about["steps"] == 2
    assert about["prompts"] == {"subject": "a dog", "style": "ink"}
    assert "never overwritten" in refused(capsys, *command(folder))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--subject-prompt", ""], "--subject-prompt"),
        (["--weights", "0@0,1@1", "1"], "--weights must be numbers"),
        (["--learning-rate", "0"], "not above 0"),
        (["--out", "both.pt"], ".safetensors"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(tiny, capsys, more, words):
    folder, _ = tiny
    assert words in refused(capsys, *command(folder, "--base", folder / "no model", *more, out="other.safetensors"))


def test_an_interrupt_leaves_no_file(tiny, capsys, monkeypatch):
    from lib_dynfuse.hosts.diffusers import ziplora

    folder, _ = tiny
    monkeypatch.setattr(ziplora, "_difference", lambda lesson: (_ for _ in ()).throw(KeyboardInterrupt))
    before = set(folder.iterdir())
    assert cli.main(command(folder, out="third.safetensors")) == 130
    assert set(folder.iterdir()) == before
