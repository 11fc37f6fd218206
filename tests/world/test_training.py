"""The training's parts against what they must be: formulas in float64, an uninterrupted run, the product's own LoRA reader."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import copy
import itertools
import random

import pytest
import torch

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")

from safetensors.torch import save_file

from dynfuse_world.model import LATENT, TEXT_WIDTH, WEIGHTS, known_tokens, new_scheduler, new_unet, tokenizer
from dynfuse_world.training import loras
from dynfuse_world.training.base import alphas, denoising_loss
from dynfuse_world.training.loop import TrainingLoop
from lib_dynfuse import FuseSettings, fuse, read_lora


class Toward(torch.nn.Module):
    """A point that is drawn to others."""

    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.zeros(3))


def trained(path, stops, momentum, steps=12):
    """The averaged point after a run that is killed and begun again at these steps."""
    for stop in (*stops, steps):
        network = Toward()
        loop = TrainingLoop("t", {"toward": network}, steps=steps, rate=0.1, checkpoint=path, warm_up=2, average=0.9, momentum=momentum)
        for step in loop:
            if step == stop:
                loop.save()
                break
            loop.descend((network.point - torch.tensor([1.0, -2.0, step])).square().sum())
    loop.finish()
    return network.point.detach()


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(tmp_path, momentum):
    killed, whole = trained(tmp_path / "a.pt", (4, 9), momentum), trained(tmp_path / "b.pt", (), momentum)
    torch.testing.assert_close(killed, whole, rtol=0, atol=0)


def test_the_noise_schedule_is_stable_diffusions():
    """Betas whose roots lie evenly between those of 0.00085 and 0.012, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(alphas().double(), (1 - betas).cumprod(0), rtol=2e-5, atol=0)
    assert new_scheduler().config.prediction_type == "epsilon"


def test_the_loss_is_min_snrs():
    """A network that predicts zero is wrong by the noise itself: the weighted mean of its squares, min(SNR, 5) / SNR, in float64."""

    class Zero(torch.nn.Module):
        def forward(self, noisy, times, context):
            self.times, self.noisy = times, noisy
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    network, latents = Zero(), torch.randn(32, *LATENT)
    loss, error = denoising_loss(network, latents, torch.zeros(32, 77, TEXT_WIDTH), alphas())
    alpha = alphas().double()[network.times]
    noise = (network.noisy.double() - alpha.sqrt().view(-1, 1, 1, 1) * latents) / (1 - alpha).sqrt().view(-1, 1, 1, 1)
    ratio = alpha / (1 - alpha)
    squares = noise.square().mean((1, 2, 3))
    assert float(loss) == pytest.approx(float((squares * ratio.clamp(max=5) / ratio).mean()), rel=1e-3)
    assert float(error) == pytest.approx(float(squares.mean()), rel=1e-3)


def test_a_trained_adapter_is_the_lora_that_the_product_reads(tmp_path):
    """The U-Net with its parametrized weights, and the U-Net with the file fused alone, predict the same."""
    torch.manual_seed(0)
    unet = new_unet().eval()
    plain = copy.deepcopy(unet)
    branches = loras.attach(unet, 4)
    assert len(branches) == 16 * (2 * 4 + 4)  # SD's sixteen transformers: self and cross, q k v out; ff, and the two projections around
    for branch in branches.values():
        torch.nn.init.normal_(branch.up, std=0.1)
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in loras.kohya(branches).items()}, str(path))
    inputs = torch.randn(2, *LATENT), torch.tensor(500), torch.randn(2, 77, TEXT_WIDTH)
    lora = read_lora(path)
    with torch.no_grad():
        wanted = unet(*inputs).sample
        with fuse(plain, lora, lora, FuseSettings(method="direct", style_weight=0.0)):
            got = plain(*inputs).sample
        assert (plain(*inputs).sample - wanted).abs().max() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_lesson_is_five_pictures_that_never_change():
    for lesson in loras.single_lessons():
        pictures = lesson.pictures()
        assert pictures.shape == (5, 3, 64, 64)
        assert len(lesson.captions) == 5
        assert all(lesson.name in text for text in lesson.captions)
        assert (pictures == lesson.pictures()).all()


def test_no_lesson_but_an_oracles_shows_a_subject_in_a_held_out_style():
    from dynfuse_world.painter import HELD_OUT_STYLES, SUBJECTS

    for lesson in loras.single_lessons():
        assert not any(scene.what in SUBJECTS and scene.style in HELD_OUT_STYLES for scene in lesson.scenes)


def test_no_two_loras_listen_to_the_same_directions(monkeypatch, tmp_path):
    """Before the first step their first matrices are as unlike as random ones: of 8 of 64 directions they share about an eighth."""
    begun = {}

    class Stop(Exception):
        pass

    def stop(name, networks, **rest):
        begun[name] = next(iter(networks.values())).down.detach().flatten(1)
        raise Stop

    monkeypatch.setattr(loras, "TrainingLoop", stop)
    monkeypatch.setattr(loras, "_material", lambda lesson, vae: (torch.zeros(1, *LATENT), ["a cat"]))
    for lesson in loras.single_lessons():
        with pytest.raises(Stop):
            loras.train_lora(lesson, tmp_path, WEIGHTS)
    bases = [torch.linalg.qr(down.double().t())[0] for down in begun.values()]
    shared = [(a.t() @ b).square().sum() / 8 for a, b in itertools.combinations(bases, 2)]
    assert len(shared) == 28
    assert max(shared) < 0.35


def test_the_prior_never_says_what_the_lesson_teaches():
    rng = random.Random(5)
    for words in (["zib"], ["candy"], ["mok", "chalk"]):
        assert not any(set(words) & set(loras._without(words, rng)[1].split()) for _ in range(1500))


def test_the_tokenizer_is_clips():
    """Numbers that anyone's copy of CLIP's tokenizer gives."""
    assert tokenizer()("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert {49406, 49407} <= set(known_tokens().tolist())


def test_an_absent_branch_changes_nothing_and_as_many_are_absent_as_asked_for():
    torch.manual_seed(0)
    unet = new_unet().eval()
    plain = copy.deepcopy(unet)
    branches = loras.attach(unet, 2)
    for branch in branches.values():
        torch.nn.init.normal_(branch.up, std=0.1)
    absent = []
    for step in range(20):
        loras._drop(branches, 0.25, random.Random(step))
        absent.append([branch.absent for branch in branches.values()])
    assert 0.2 < sum(map(sum, absent)) / (20 * len(branches)) < 0.3
    assert absent[0] != absent[1]
    for name, branch in branches.items():
        changed = not torch.equal(unet.get_submodule(name).weight, plain.get_submodule(name).weight)
        assert changed != branch.absent
