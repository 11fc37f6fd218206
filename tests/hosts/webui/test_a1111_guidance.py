"""What only A1111 has: samplers that hand over the noise in VP units, at timesteps, and put the kept part of a picture in first."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.references import Reference
from lib_dynfuse.hosts.webui.a1111 import A1111Samplers
from lib_dynfuse.hosts.webui.facts import Sampling
from lib_dynfuse.hosts.webui.guided import Decoders, GuidedPass
from lib_dynfuse.settings import FuseSettings
from tests.fakes import webui as fakes
from tests.fakes.a1111 import FakeA1111
from tests.fakes.encoders import small_encoders

# Stable Diffusion's schedule.
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
TIMESTEPS = torch.arange(0, 1000, 100) + 1


@pytest.fixture
def samplers(loras):
    with FakeA1111(loras):
        yield A1111Samplers()


def ddim(model, x, timesteps, eta=0.0):
    raise AssertionError


def toy_eps(x, t):
    """A denoiser of its own kind: noise in x, (B, 4, h, w) in VP units."""
    return torch.tanh(x) * 0.7 + 0.1 * x.roll(1, -1) + 0.01 * t.reshape(-1, 1, 1, 1) / 1000


def denoiser(**more):
    sampler = types.SimpleNamespace(func=ddim, eta=0.0, p=types.SimpleNamespace(), last_latent=None)
    return types.SimpleNamespace(**{"alphas": ALPHAS, "sampler": sampler, "p": types.SimpleNamespace(), "mask": None, "step": 0, **more})


def guided_pass(samplers, settings, encoders):
    generator = torch.Generator().manual_seed(0)

    def reference(side):
        embedding = Embeddings(*(F.normalize(torch.randn(1, 32, generator=generator), dim=-1) for _ in range(2)))
        return Reference(side, None, embedding, "")

    guided = GuidedPass(samplers, settings, encoders, [reference("subject"), reference("style")], Decoders())
    sampling = Sampling(samplers)
    sampling.begin(TIMESTEPS)
    return guided, sampling


def score(encoders, references, denoised):
    pictures = fakes.decoder()(denoised / fakes.SCALE)
    subject, style = (reference.embeddings for reference in references)
    clip, dino = encoders.clip(pictures), encoders.dino(pictures)
    return 1 - ((clip @ subject.clip[0]) + (clip @ style.clip[0]) + (dino @ style.dino[0])) / 3


@pytest.mark.parametrize("place", [9, 5, 1])
def test_an_exact_ddim_step_is_the_plain_one_followed_by_eq_20(samplers, place):
    encoders = small_encoders()
    guided, sampling = guided_pass(samplers, FuseSettings(method="dynfuse", guidance=True, gradient="exact", m=0.3, limit=0.0), encoders)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(place))
    t = TIMESTEPS[place].expand(2).float()
    a, a_next = ALPHAS[TIMESTEPS[place]], ALPHAS[TIMESTEPS[place - 1]]

    def step(x, eps):
        """Song et al. 2021, Eq. 12 with eta = 0."""
        predicted = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return a_next.sqrt() * predicted + (1 - a_next).sqrt() * eps, predicted

    leaf = x.double().requires_grad_()
    plain, predicted = step(leaf, toy_eps(leaf, t))
    (gradient,) = torch.autograd.grad(score(encoders, guided.references, predicted.float()).sum(), leaf)
    expected = plain.detach() - 0.3 * 50 / len(TIMESTEPS) * gradient

    with torch.no_grad():
        cfg_denoiser = denoiser()
        facts = sampling.facts(cfg_denoiser, (x, t), {})
        eps = guided.denoise(facts, cfg_denoiser, toy_eps, (x, t), {}, lambda: None)
    corrected, _ = step(x.double(), eps.double())
    moved = (expected - plain).abs().max()
    assert moved > 1e-5
    assert (corrected - expected).abs().max() < 2e-3 * moved + 2e-6


def test_levels_are_those_of_the_timesteps_and_between_them(samplers):
    levels = samplers.noise_levels(denoiser(), torch.tensor([0.0, 1.0, 500.0, 500.5, 999.0]))
    sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()
    assert torch.allclose(levels[[0, 1, 2, 4]], sigmas[[0, 1, 500, 999]])
    assert sigmas[500] < levels[3] < sigmas[501]


def test_a_k_diffusion_samplers_levels_are_its_sigmas(samplers):
    sigmas = torch.tensor([14.6, 0.03])
    plain = types.SimpleNamespace()
    assert torch.equal(samplers.noise_levels(plain, sigmas), sigmas)
    assert not samplers.works_on_eps(plain)


def test_the_kept_part_is_in_the_picture_that_is_scored(samplers):
    x, initial = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    mask = torch.zeros(4, 4, 4)
    mask[:, 2:] = 1.0
    eps = torch.randn(1, 4, 4, 4)
    s = 1.7
    masked = denoiser(mask=mask, nmask=1.0 - mask, init_latent=initial)
    found = samplers.denoised(masked, x, s, eps)
    whole = (x * (1 + s**2) ** 0.5 - s * eps)[:, :, :2]
    assert torch.allclose(found[:, :, :2], whole)
    assert torch.allclose(found[:, :, 2:], (initial * (1 + s**2) ** 0.5 - s * eps)[:, :, 2:])
