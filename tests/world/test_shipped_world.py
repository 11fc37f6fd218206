"""What the shipped networks draw, made through the product: judged by the judges, and against the formulas in float64."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")

from dynfuse_world import check
from dynfuse_world.benchmark.protocol import TUNING
from dynfuse_world.captions import caption, name_of
from dynfuse_world.check import generated
from dynfuse_world.judges import SUBJECT_NAMES, load_judges, load_second_judges
from dynfuse_world.lora_sets import PLAIN, lora_path
from dynfuse_world.model import WEIGHTS, load_pipeline
from dynfuse_world.oracles import read_oracle
from dynfuse_world.painter import CLASSES, HELD_OUT_STYLES, STYLES, SUBJECTS
from dynfuse_world.shipped import verify
from dynfuse_world.training.pictures import HELD_OUT_PAIRS
from lib_dynfuse import FuseSettings, read_lora
from lib_dynfuse.hosts.diffusers import FusedPipeline

PAIR = TUNING[0]
OVERFIT = (PAIR.subject, PAIR.style)
"""Those of the other sets that are shipped."""
STEPS, CFG_SCALE = 10, 5.0
SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(WEIGHTS)


@pytest.fixture(scope="module")
def judges():
    return load_judges(WEIGHTS / "judges.safetensors")


def floats(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def fused(pipeline, pair, settings, prompt, seeds=SEEDS, trained=PLAIN):
    loras = [read_lora(lora_path(WEIGHTS, name, trained)) for name in pair]
    return FusedPipeline(pipeline, *loras, settings)(prompt, seeds=seeds, steps=STEPS, cfg_scale=CFG_SCALE)


def test_the_base_model_draws_what_it_is_asked_for_also_pairs_that_it_never_saw(pipeline, judges):
    pairs = [*sorted(HELD_OUT_PAIRS), *((what, style) for what in CLASSES for style in STYLES)][::5]
    scores = judges.scores(floats(generated(pipeline, [caption(*pair) for pair in pairs])))
    right = [scores.subject(what)[place] > 0.5 and scores.style(style)[place] > 0.5 for place, (what, style) in enumerate(pairs)]
    assert sum(right) >= 0.9 * len(pairs)


@pytest.mark.parametrize(
    ("name", "trained"), [*((name, PLAIN) for name in (*SUBJECTS, *HELD_OUT_STYLES)), *((name, "overfit") for name in OVERFIT)]
)
def test_a_lora_alone_brings_what_the_base_model_does_not_know(name, trained, pipeline, judges):
    if name in SUBJECTS:
        pair, off, prompt = (name, "blueprint"), "style_weight", caption(name_of(name), "flat")
    else:
        pair, off, prompt = ("zib", name), "subject_weight", caption("fish", name)

    def mean(settings):
        scores = judges.scores(floats(fused(pipeline, pair, settings, prompt, range(6), trained).images))
        return float((scores.subject(name) if name in SUBJECTS else scores.style(name)).mean())

    without = mean(FuseSettings(method="direct", subject_weight=0.0, style_weight=0.0))
    alone = mean(FuseSettings(method="direct", **{off: 0.0}))
    assert without < 0.15
    assert alone > without + 0.2


def test_the_oracle_draws_the_pair_better_than_chance(pipeline, judges):
    oracle = read_oracle(WEIGHTS, PAIR.name)
    other = read_lora(lora_path(WEIGHTS, PAIR.style))
    fusion = FusedPipeline(pipeline, oracle, other, FuseSettings(method="direct", style_weight=0.0))
    scores = judges.scores(floats(fusion(PAIR.prompt, seeds=range(6), steps=STEPS, cfg_scale=CFG_SCALE).images))
    assert scores.subject(PAIR.subject).mean() > 3 / len(SUBJECT_NAMES)
    assert scores.style(PAIR.style).mean() > 0.5


def change(name, layer):
    """alpha / rank up down, in float64."""
    tensors = load_file(lora_path(WEIGHTS, name))
    key = f"lora_unet_{layer.replace('.', '_')}"
    up, down = (tensors[f"{key}.lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
    return tensors[f"{key}.alpha"].double() / len(down) * up @ down


def adapted(unet):
    keys = {key.split(".")[0] for key in load_file(lora_path(WEIGHTS, PAIR.subject))}
    layers = {name: module for name, module in unet.named_modules() if f"lora_unet_{name.replace('.', '_')}" in keys}
    assert len(layers) == len(keys)
    return layers


def plain_pictures(pipeline):
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    return pipeline(
        PAIR.prompt, num_images_per_prompt=len(SEEDS), num_inference_steps=STEPS, guidance_scale=CFG_SCALE, generator=generators
    ).images


def assert_same_pictures(images, expected):
    """Within two of 255: rounding in float32 along the steps."""
    difference = (floats(images) - floats(expected)).abs().amax((1, 2, 3)) * 127.5
    assert (difference <= 2.01).all(), difference


def test_the_direct_sum_is_both_loras_merged(pipeline):
    merged = copy.deepcopy(pipeline)
    for layer, module in adapted(merged.unet).items():
        total = 0.9 * change(PAIR.subject, layer) + 1.1 * change(PAIR.style, layer)
        module.weight.data = (module.weight.double() + total.view_as(module.weight)).float()
    settings = FuseSettings(method="direct", subject_weight=0.9, style_weight=1.1)
    images = fused(pipeline, (PAIR.subject, PAIR.style), settings, PAIR.prompt).images
    assert_same_pictures(images, plain_pictures(merged))
    assert (floats(images) - floats(plain_pictures(pipeline))).abs().mean() > 0.05


def test_the_selection_is_the_papers_formula_written_out(pipeline):
    """Eq. 11 to 13 in float64 in each layer, on features and LoRAs that were trained, through all steps."""
    literal = copy.deepcopy(pipeline)
    divergences = {}
    for layer, module in adapted(literal.unet).items():
        divergences[layer] = []
        module.forward = written_out(module, change(PAIR.subject, layer), change(PAIR.style, layer), divergences[layer])
    expected = plain_pictures(literal)
    made = fused(pipeline, (PAIR.subject, PAIR.style), FuseSettings(method="dynfuse", decide="now", vote_tokens=0), PAIR.prompt)
    assert_same_pictures(made.images, expected)
    subject, style = torch.stack([torch.stack(divergences[site.layer]) for site in made.trace.sites], 1).unbind(2)  # (steps, sites, images)
    chosen = subject >= style
    assert 0.05 < chosen.double().mean() < 0.95  # both have their say
    # float32 and float64 may decide otherwise between equals, some of which are next to nothing, and nowhere else.
    close = (subject - style).abs() < 0.01 * torch.maximum(subject, style) + 1e-9
    assert torch.equal(made.trace.winners | close, chosen | close)
    assert close.double().mean() < 0.05


def written_out(module, subject, style, divergences):
    """A forward that chooses, of a linear layer or a 1 x 1 convolution; rows: the negative prompt's of all images, then the prompt's."""
    weight, bias = module.weight.double().flatten(1), 0 if module.bias is None else module.bias.double()

    def forward(h):
        if h.dim() == 4:
            return tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, h.shape[2:])
        return tokens(h)

    def tokens(h):
        rows = h.double()
        base = rows @ weight.T + bias
        changes = [rows @ delta.T for delta in (subject, style)]
        log_p = base.log_softmax(-1)
        found = []
        for delta in changes:
            log_q = (base + delta).log_softmax(-1)
            found.append((log_q.exp() * (log_q - log_p)).sum(-1).mean(-1).chunk(2)[1])
        divergences.append(torch.stack(found))
        chosen = found[0] >= found[1]
        return (base + torch.where(chosen.repeat(2)[:, None, None], *changes)).to(h.dtype)

    return forward


def test_the_check_tells_each_loras_score_by_both_judges():
    report = check.Report(alone={"zib": 0.81}, second_alone={"zib": 0.72}, halves={"zib": 0.31}, second_halves={"zib": 0.22})
    assert "zib 0.81 (0.72)" in check._as_text(report)
    assert "zib 0.31 (0.22)" in check._as_text(report)


def test_a_lora_alone_is_scored_by_every_judge_that_is_given(pipeline, judges, monkeypatch):
    for name, value in (
        ("SUBJECTS", ("zib",)),
        ("HELD_OUT_STYLES", ("blueprint",)),
        ("SUBJECT_STYLES", ("flat",)),
        ("_STYLE_CLASSES", ()),
        ("STEPS", 3),
    ):
        monkeypatch.setattr(check, name, value)
    second = load_second_judges()
    files = {name: lora_path(WEIGHTS, name) for name in ("zib", "blueprint")}
    (first_alone, second_alone), shown = check._alone(pipeline, (judges, second), files)
    assert list(first_alone) == list(second_alone) == ["zib", "blueprint"]
    assert first_alone["zib"] != second_alone["zib"]
    (first_half, _), _ = check._alone(pipeline, (judges, second), files, half=True)
    assert all(first_half[name] != first_alone[name] for name in files)
    assert shown.width > 0


def test_half_of_a_lora_is_half_of_its_layers_as_they_were():
    whole, half = read_lora(lora_path(WEIGHTS, "zib")), check.half_of(lora_path(WEIGHTS, "zib"), random.Random(5))
    other = check.half_of(lora_path(WEIGHTS, "zib"), random.Random(6))
    assert len(half.denoiser) == len(whole.denoiser) // 2
    assert set(half.denoiser) < set(whole.denoiser)
    assert set(half.denoiser) != set(other.denoiser)
    for name, branch in half.denoiser.items():
        torch.testing.assert_close(branch.delta_weight(), whole.denoiser[name].delta_weight(), rtol=0, atol=0)


def test_all_weights_are_below_thirty_megabytes_and_verified():
    verify()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 30e6


def test_a_set_that_was_not_made_is_told_before_any_picture(capsys):
    assert check.run(WEIGHTS, None, False, "overfit") == 2
    said = capsys.readouterr().err
    assert "toy train loras --set overfit" in said
    assert len(said.splitlines()) == 1
