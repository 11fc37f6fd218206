"""level_of: a shift of D by fast_factor times d moves what each sampler makes of it by d. The samplers' steps are written out here."""

from __future__ import annotations

import math
import types

import pytest

from lib_dynfuse.guidance.correction import Schedule, fast_factor
from lib_dynfuse.hosts.webui.sampler_levels import level_of

VP = Schedule("vp", [14.6, 7.2, 3.1, 1.2, 0.4, 0.0])
FLOW = Schedule("flow", [1.0, 0.8, 0.55, 0.3, 0.1, 0.0])


def sample_euler(x, denoised, s, after, s_churn=0.0):
    return x + (x - denoised) / s * (after - s)


def ancestral(s, after, eta):
    up = min(after, eta * math.sqrt(after**2 * (s**2 - after**2) / s**2))
    return math.sqrt(after**2 - up**2)


def sample_euler_ancestral(x, denoised, s, after, eta=1.0):
    return x + (x - denoised) / s * (ancestral(s, after, eta) - s)


def sample_dpmpp_2m_sde(x, denoised, s, after, eta=1.0):
    if after == 0:
        return denoised
    h = math.log(s / after)
    return after / s * math.exp(-h * eta) * x - math.expm1(-h * (1 + eta)) * denoised


def sample_lcm(x, denoised, s, after):
    return denoised


def sample_ddpm(x, denoised, s, after):
    # The posterior mean in VP units (Ho et al. 2020, Eq. 7), then back in VE units.
    alpha, alpha_after = 1 / (1 + s**2), 1 / (1 + after**2)
    ratio = alpha / alpha_after
    mean = (math.sqrt(alpha_after) * (1 - ratio) * denoised + math.sqrt(ratio) * (1 - alpha_after) * x * math.sqrt(alpha)) / (1 - alpha)
    return mean / math.sqrt(alpha_after)


def ddim(x, denoised, s, after, eta=0.0):
    # Song et al. 2021, Eq. 12 in VP units.
    alpha, alpha_after = 1 / (1 + s**2), 1 / (1 + after**2)
    noise = (x - denoised) / s
    sigma = eta * math.sqrt((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after))
    return (math.sqrt(alpha_after) * denoised + math.sqrt(max(0.0, 1 - alpha_after - sigma**2)) * noise) / math.sqrt(alpha_after)


def sampler(function, eta=1.0, **p):
    # The WebUIs set eta on every sampler, whether its function takes it or not.
    return types.SimpleNamespace(func=function, eta=eta, p=types.SimpleNamespace(**p))


SAMPLERS = [
    (sample_euler, 1.0),
    (sample_euler_ancestral, 1.0),
    (sample_euler_ancestral, 0.5),
    (sample_euler_ancestral, 0.0),
    (sample_dpmpp_2m_sde, 1.0),
    (sample_dpmpp_2m_sde, 0.3),
    (sample_lcm, 1.0),
]
# Not made for flow models.
VP_SAMPLERS = [(sample_ddpm, 1.0), (ddim, 0.0), (ddim, 1.0), (ddim, 0.4)]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    ("function", "eta", "schedule"), [(*case, VP) for case in SAMPLERS + VP_SAMPLERS] + [(*case, FLOW) for case in SAMPLERS]
)
def test_a_shift_of_d_moves_the_step_as_it_should(function, eta, schedule, place):
    s, after = [*schedule.levels, 0.0][place : place + 2]
    level = level_of(sampler(function, eta), schedule, s)
    arguments = {"eta": eta} if "eta" in function.__code__.co_varnames else {}
    moved = function(2.0, 0.7 + 0.01 * fast_factor(level), s, after, **arguments) - function(2.0, 0.7, s, after, **arguments)
    assert moved == pytest.approx(0.01, rel=1e-9)
    assert (level.kind, level.s) == (schedule.kind, s)


def ddim_cfgpp(x, eta):
    raise AssertionError


def sample_dpmpp_2s_ancestral_cfg_pp_dyn(x, eta):
    raise AssertionError


@pytest.mark.parametrize("function", [ddim_cfgpp, sample_dpmpp_2s_ancestral_cfg_pp_dyn])
def test_cfg_pp_keeps_its_direction(function):
    assert level_of(sampler(function), VP, 3.1).s_next == 0.0


@pytest.mark.parametrize("place", range(4))
def test_rectified_ancestral_steps_go_to_their_own_down_level(place):
    s, after = FLOW.levels[place : place + 2]
    level = level_of(sampler(sample_euler_ancestral, 0.6), FLOW, s, rectified=True)
    assert level.s_next == pytest.approx(after * (1 + (after / s - 1) * 0.6))
    assert level.renoised == after


def test_a_churned_call_steps_to_the_level_after_its_own():
    churned = sampler(sample_euler, s_churn=1.0, s_tmin=0.0, s_tmax=math.inf)
    gamma = min(1.0 / VP.steps, math.sqrt(2) - 1)
    level = level_of(churned, VP, 3.1 * (1 + gamma))
    assert level.s == pytest.approx(3.1 * (1 + gamma))
    assert level.s_next == 1.2


def test_the_second_call_of_a_churned_heun_step_is_at_a_level_of_its_own():
    churned = sampler(sample_euler, s_churn=1.0, s_tmin=0.0, s_tmax=math.inf)
    assert level_of(churned, VP, 1.2).s_next == 0.4


def test_an_inner_call_off_the_schedule_steps_to_the_next_level_below():
    assert level_of(sampler(sample_euler), VP, 2.0).s_next == 1.2


def test_a_sampler_whose_parameters_cannot_be_looked_at_is_taken_for_a_deterministic_one():
    assert level_of(sampler(min), VP, 3.1).s_next == 1.2
