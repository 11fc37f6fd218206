"""What is known of one denoiser call: its noise level, and which step of the pass it is."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from lib_dynfuse.hosts.webui.a1111 import A1111Samplers
from lib_dynfuse.hosts.webui.facts import Sampling
from lib_dynfuse.hosts.webui.forge import ForgeSamplers
from tests.fakes.webui import sample_euler

LEVELS = torch.tensor([14.6, 7.2, 3.1, 1.2, 0.4, 0.0])


def euler_with_churn(x, s_churn=0.0):
    raise AssertionError


def cfg_denoiser(function=sample_euler, **attributes):
    p = types.SimpleNamespace(**{"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "steps": 5, **attributes.pop("p", {})})
    sampler = types.SimpleNamespace(func=function, eta=0.0, p=p, last_latent=None)
    return types.SimpleNamespace(**{"sampler": sampler, "p": p, "mask": None, "step": 0, "total_steps": 5, **attributes})


@pytest.fixture(autouse=True)
def opts(monkeypatch):
    """The WebUI's settings."""
    found = types.SimpleNamespace(skip_early_cond=0.0, s_min_uncond_all=False)
    monkeypatch.setitem(sys.modules, "modules", types.ModuleType("modules"))
    monkeypatch.setattr(sys.modules["modules"], "shared", types.SimpleNamespace(opts=found), raising=False)
    return found


@pytest.fixture(params=[A1111Samplers, ForgeSamplers])
def sampling(request, monkeypatch):
    """A sampling of each WebUI, whose model is no flow model."""
    samplers = request.param()
    monkeypatch.setattr(samplers, "kind", lambda denoiser: "vp")
    monkeypatch.setattr(samplers, "rectified_ancestral", lambda denoiser: False)
    return Sampling(samplers)


def steps(sampling, denoiser, levels):
    """(index, count) of the calls at these levels, in order."""
    facts = [sampling.facts(denoiser, (torch.zeros(1, 4, 2, 2), torch.tensor([level])), {}) for level in levels]
    assert all(fact.step.sigma == pytest.approx(fact.sigma) for fact in facts)
    return [(fact.step.index, fact.step.count) for fact in facts]


def test_a_call_at_each_level_is_each_step(sampling):
    sampling.begin(LEVELS)
    assert steps(sampling, cfg_denoiser(), LEVELS[:-1]) == [(i, 5) for i in range(5)]


def test_progress_goes_from_none_to_all(sampling):
    sampling.begin(LEVELS)
    arguments = [(torch.zeros(1, 4, 2, 2), torch.tensor([level])) for level in LEVELS[:-1]]
    assert [sampling.facts(cfg_denoiser(), args, {}).step.progress for args in arguments] == [0, 0.25, 0.5, 0.75, 1]


def test_of_a_schedule_that_is_entered_in_the_middle_only_the_steps_that_are_run_count(sampling):
    sampling.begin(LEVELS)
    assert steps(sampling, cfg_denoiser(), LEVELS[2:-1]) == [(0, 3), (1, 3), (2, 3)]


def test_inner_calls_belong_to_the_step_around_them(sampling):
    sampling.begin(LEVELS)
    assert steps(sampling, cfg_denoiser(), [14.6, 10.0, 7.2, 5.0, 3.1]) == [(0, 5), (0, 5), (1, 5), (1, 5), (2, 5)]


def test_a_churned_call_belongs_to_the_step_that_it_begins(sampling):
    sampling.begin(LEVELS)
    churned = 1 + min(1.0 / 5, math.sqrt(2) - 1)
    denoiser = cfg_denoiser(euler_with_churn, p={"s_churn": 1.0})
    assert steps(sampling, denoiser, [14.6 * churned, 7.2 * churned, 3.1 * churned]) == [(0, 5), (1, 5), (2, 5)]


def test_the_next_sampling_begins_anew(sampling):
    sampling.begin(LEVELS)
    assert steps(sampling, cfg_denoiser(), LEVELS[3:-1]) == [(0, 2), (1, 2)]
    sampling.begin(LEVELS[1:])
    assert steps(sampling, cfg_denoiser(), LEVELS[1:3]) == [(0, 4), (1, 4)]


@pytest.mark.parametrize("levels", [None, torch.zeros(3)])
def test_without_a_schedule_the_hosts_own_count_is_taken(sampling, levels):
    if levels is not None:
        sampling.begin(levels)
    denoiser = cfg_denoiser(step=3, total_steps=8)
    fact = sampling.facts(denoiser, (torch.zeros(1, 4, 2, 2), torch.tensor([2.5])), {})
    assert (fact.step.index, fact.step.count, fact.step.sigma) == (3, 8, 2.5)
    assert fact.schedule is None
    assert fact.level is None
    del denoiser.total_steps
    assert steps(sampling, denoiser, [2.5]) == [(3, 5)]


def test_timesteps_are_known_as_noise_levels():
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    timesteps = torch.arange(0, 1000, 100) + 1
    sampling = Sampling(A1111Samplers())
    sampling.begin(timesteps)
    denoiser = cfg_denoiser(alphas=alphas)
    facts = [sampling.facts(denoiser, (torch.zeros(1, 4, 2, 2), t[None]), {}) for t in timesteps.flip(0)]
    assert [(fact.step.index, fact.step.count) for fact in facts] == [(i, 10) for i in range(10)]
    sigmas = ((1 - alphas) / alphas).sqrt()[timesteps].flip(0)
    assert [fact.sigma for fact in facts] == pytest.approx(sigmas.tolist())
    assert [fact.level.s_next for fact in facts] == pytest.approx([*sigmas[1:].tolist(), 0.0])
    assert all(fact.on_eps for fact in facts)


def test_arguments_may_come_by_name(sampling):
    sampling.begin(LEVELS)
    latent = torch.ones(2, 4, 2, 2)
    fact = sampling.facts(cfg_denoiser(), (), {"x": latent, "sigma": torch.tensor([3.1, 3.1])})
    assert fact.latent is latent
    assert fact.step.index == 0
    assert fact.sigma == pytest.approx(3.1)


class TestScaleInA1111:
    """sd_samplers_cfg_denoiser.py:218: steps that are made without the negative prompt have none."""

    def scale(self, denoiser, s_min_uncond=0.0, level=1.0):
        sigma = torch.tensor([level])
        return A1111Samplers().cfg_scale(denoiser, sigma, 7.0, s_min_uncond)

    def test_of_a_usual_step_it_is_the_jobs(self):
        assert self.scale(cfg_denoiser(step=1)) == 7.0

    def test_early_steps_may_skip_it(self, opts):
        opts.skip_early_cond = 0.4
        assert [self.scale(cfg_denoiser(step=step)) for step in range(5)] == [1.0, 1.0, 1.0, 7.0, 7.0]

    def test_every_second_step_below_a_level_may_skip_it(self, opts):
        assert [self.scale(cfg_denoiser(step=step), s_min_uncond=2.0) for step in range(4)] == [7.0, 1.0, 7.0, 1.0]
        assert self.scale(cfg_denoiser(step=1), s_min_uncond=0.5) == 7.0
        opts.s_min_uncond_all = True
        assert self.scale(cfg_denoiser(step=2), s_min_uncond=2.0) == 1.0

    def test_samplers_may_have_a_factor_of_their_own(self):
        """DDIM CFG++ (sd_samplers_timesteps_impl.py:55)."""
        assert self.scale(cfg_denoiser(step=1, cond_scale_miltiplier=1 / 12.5)) == pytest.approx(0.56)
