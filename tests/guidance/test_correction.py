"""The factors turn Eq. 20, which moves the latent after a step, into a shift of the prediction before it.

Each test writes a sampler's step out in its own coordinates, in float64, and applies Eq. 20 to its result.
"""

from __future__ import annotations

import math

import pytest
import torch

from lib_dynfuse.guidance.correction import (
    Level,
    Schedule,
    down_level,
    effective_m,
    exact_factor,
    exponential_down_level,
    fast_factor,
    limited,
)

M = 3.7
EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = [(14.6, 10.2), (3.0, 1.7), (0.5, 0.2), (0.1, 0.0)]
FLOW_STEPS = [(1.0, 0.9), (0.7, 0.55), (0.3, 0.1), (0.1, 0.0)]


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(latent):
    """A denoiser that is anything but linear. latent: (1, 6)."""
    return torch.tanh(latent @ values(6, 6, seed=1)) + 0.3 * latent.square()


def score(denoised):
    return torch.sin(denoised * values(1, 6, seed=2)).sum() + denoised.square().sum() / 7


def gradient(function, at):
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


class VP:
    """A VP model at s: alpha_bar = 1 / (1 + s^2). The latent of the paper is x, the host's VE latent is x / sqrt(alpha_bar)."""

    def __init__(self, s, s_next):
        self.alpha, self.alpha_next = 1 / (1 + s**2), 1 / (1 + s_next**2)
        self.x = values(1, 6, seed=3)
        self.denoised = predict(self.x)
        self.paper = gradient(lambda x: score(predict(x)), self.x)
        self.x_ve = self.x / self.alpha**0.5
        self.gradient_ve = gradient(lambda x_ve: score(predict(x_ve * self.alpha**0.5)), self.x_ve)

    def corrected(self, level):
        return self.denoised - M * exact_factor(level) * self.gradient_ve


class Flow:
    def __init__(self):
        self.x = values(1, 6, seed=4)
        self.denoised = predict(self.x)
        self.paper = gradient(lambda x: score(predict(x)), self.x)

    def corrected(self, level):
        return self.denoised - M * exact_factor(level) * self.paper


@pytest.mark.parametrize(("s", "s_next"), STEPS)
def test_the_exact_factor_reproduces_a_ddim_step_followed_by_eq_20(s, s_next):
    model = VP(s, s_next)

    def ddim(denoised):
        eps = (model.x - model.alpha**0.5 * denoised) / (1 - model.alpha) ** 0.5
        return model.alpha_next**0.5 * denoised + (1 - model.alpha_next) ** 0.5 * eps

    torch.testing.assert_close(ddim(model.corrected(Level("vp", s, s_next))), ddim(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(("s", "s_next"), STEPS[:3])
def test_the_exact_factor_reproduces_a_ddim_step_with_eta_followed_by_eq_20(s, s_next, eta):
    model, noise = VP(s, s_next), values(1, 6, seed=5)
    a, a_next = model.alpha, model.alpha_next
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5

    def ddim(denoised):
        eps = (model.x - a**0.5 * denoised) / (1 - a) ** 0.5
        return a_next**0.5 * denoised + (1 - a_next - sigma**2) ** 0.5 * eps + sigma * noise

    level = Schedule("vp", [s, s_next]).level(s, eta=eta)
    torch.testing.assert_close(ddim(model.corrected(level)), ddim(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize("eta", [0.6, 1.0])
@pytest.mark.parametrize(("s", "s_next"), STEPS)
def test_the_exact_factor_reproduces_an_euler_ancestral_step_followed_by_eq_20(s, s_next, eta):
    model, noise = VP(s, s_next), values(1, 6, seed=5)
    up = min(s_next, eta * (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
    down = (s_next**2 - up**2) ** 0.5

    def euler_ancestral(denoised):
        x = model.x_ve + (model.x_ve - denoised) / s * (down - s) + up * noise
        return x * model.alpha_next**0.5

    level = Schedule("vp", [s, s_next]).level(s, eta=eta)
    torch.testing.assert_close(euler_ancestral(model.corrected(level)), euler_ancestral(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("s", "s_next"), STEPS[:3])
def test_the_exact_factor_reproduces_a_dpm_pp_2m_sde_step_followed_by_eq_20(s, s_next, eta):
    model, noise = VP(s, s_next), values(1, 6, seed=5)
    h = math.log(s) - math.log(s_next)

    def first_step(denoised):
        x = s_next / s * math.exp(-eta * h) * model.x_ve - math.expm1(-h - eta * h) * denoised
        x = x + noise * s_next * math.sqrt(-math.expm1(-2 * eta * h))
        return x * model.alpha_next**0.5

    level = Schedule("vp", [s, s_next]).level(s, eta=eta, form="exponential")
    torch.testing.assert_close(first_step(model.corrected(level)), first_step(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize(("s", "s_next"), STEPS)
def test_the_exact_factor_reproduces_an_lcm_step_followed_by_eq_20(s, s_next):
    model, noise = VP(s, s_next), values(1, 6, seed=5)

    def lcm(denoised):
        return model.alpha_next**0.5 * denoised + (1 - model.alpha_next) ** 0.5 * noise

    level = Schedule("vp", [s, s_next]).level(s, form="jump")
    torch.testing.assert_close(lcm(model.corrected(level)), lcm(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize(("t", "t_next"), FLOW_STEPS)
def test_the_flow_factor_reproduces_an_euler_step_followed_by_eq_20(t, t_next):
    model = Flow()

    def euler(denoised):
        velocity = (model.x - denoised) / t
        return model.x + (t_next - t) * velocity

    torch.testing.assert_close(euler(model.corrected(Level("flow", t, t_next))), euler(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("t", "t_next"), FLOW_STEPS)
def test_the_flow_factor_reproduces_a_rectified_ancestral_step_followed_by_eq_20(t, t_next, eta):
    model, noise = Flow(), values(1, 6, seed=5)
    down = t_next * (1 + (t_next / t - 1) * eta)
    renoise = (t_next**2 - down**2 * (1 - t_next) ** 2 / (1 - down) ** 2) ** 0.5

    def euler_ancestral(denoised):
        x = down / t * model.x + (1 - down / t) * denoised
        return (1 - t_next) / (1 - down) * x + renoise * noise

    level = Schedule("flow", [t, t_next]).level(t, eta=eta, form="rectified")
    torch.testing.assert_close(euler_ancestral(model.corrected(level)), euler_ancestral(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize(("t", "t_next"), FLOW_STEPS)
def test_the_flow_factor_reproduces_a_consistency_step_followed_by_eq_20(t, t_next):
    model, noise = Flow(), values(1, 6, seed=5)

    def lcm(denoised):
        return (1 - t_next) * denoised + t_next * noise

    level = Schedule("flow", [t, t_next]).level(t, form="jump")
    torch.testing.assert_close(lcm(model.corrected(level)), lcm(model.denoised) - M * model.paper, **EXACT)


@pytest.mark.parametrize(("s", "s_next"), STEPS[:3])
def test_for_unit_variance_data_fast_is_exact_within_the_ratio_of_the_levels(s, s_next):
    # D = x / (1 + s^2), the best denoiser of data with unit variance, turns grad_x R into grad_D R / (1 + s^2).
    exact = exact_factor(Level("vp", s, s_next)) / (1 + s**2)
    assert exact < fast_factor(Level("vp", s, s_next)) < exact * s / s_next


def test_a_shift_that_is_the_same_at_all_inner_calls_shifts_a_heun_step_once():
    s, s_next, shift, x = 2.0, 1.2, values(1, 6, seed=6), values(1, 6, seed=7)

    def heun(denoise):
        slope = (x - denoise(x)) / s
        halfway = x + (s_next - s) * slope
        return x + (s_next - s) * (slope + (halfway - denoise(halfway)) / s_next) / 2

    constant = values(1, 6, seed=8)
    moved = heun(lambda _: constant + shift) - heun(lambda _: constant)
    torch.testing.assert_close(moved, shift / fast_factor(Level("vp", s, s_next)), **EXACT)


def test_a_shift_that_is_the_same_at_all_inner_calls_shifts_a_dpm_pp_sde_step_once():
    s, s_next, shift, x, noise = 2.0, 1.2, values(1, 6, seed=6), values(1, 6, seed=7), values(2, 1, 6, seed=9)

    def ancestral(start, to, at, denoised, fresh):
        up = min(to, (to**2 * (start**2 - to**2) / start**2) ** 0.5)
        ratio = (to**2 - up**2) ** 0.5 / start
        return ratio * at + (1 - ratio) * denoised + up * fresh

    def dpmpp_sde(denoise):
        middle = (s * s_next) ** 0.5
        inner = ancestral(s, middle, x, denoise(x), noise[0])
        return ancestral(s, s_next, x, denoise(inner), noise[1])  # r = 1/2: only the second call counts

    moved = dpmpp_sde(lambda _: x + shift) - dpmpp_sde(lambda _: x)
    torch.testing.assert_close(moved, shift / fast_factor(Schedule("vp", [s, s_next]).level(s, eta=1.0)), **EXACT)


def test_two_levels_nearly_alike_do_not_blow_the_factor_up():
    assert fast_factor(Level("vp", 1.0, 0.999999)) == pytest.approx(50)
    assert fast_factor(Level("vp", 1.0, 1.0)) == pytest.approx(50)
    assert exact_factor(Level("flow", 1.0, 1.0)) == pytest.approx(50)


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_at_a_level_without_noise_there_is_no_step_to_correct(kind):
    assert fast_factor(Level(kind, 0.0, 0.0)) == 0
    assert exact_factor(Level(kind, 0.0, 0.0)) == 0


def test_consistency_samplers_that_start_in_pure_noise_have_a_finite_factor():
    assert math.isfinite(exact_factor(Level("flow", 1.0, 0.0, renoised=1.0)))


@pytest.mark.parametrize("steps", [4, 20, 50, 150])
def test_the_sum_of_the_steps_is_that_of_fifty(steps):
    assert steps * effective_m(10, steps) == pytest.approx(50 * 10)


def test_exponential_integrators_go_where_ancestral_ones_do_at_eta_one():
    assert exponential_down_level(3.0, 2.0, 1.0) == pytest.approx(down_level(3.0, 2.0, 1.0, "vp"))


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_without_eta_nothing_goes_below_the_next_level(kind):
    assert down_level(0.8, 0.5, 0.0, kind) == 0.5
    assert exponential_down_level(0.8, 0.5, 0.0) == pytest.approx(0.5)
    assert down_level(0.8, 0.0, 1.0, kind) == 0.0
    assert exponential_down_level(0.8, 0.0, 1.0) == 0.0


def test_an_eta_above_one_never_goes_below_zero():
    # k-diffusion: no more noise is added than the next level holds.
    assert down_level(10.0, 1.0, 5.0, "vp") == 0.0
    assert down_level(0.9, 0.1, 5.0, "flow") == 0.0


class TestLimit:
    def test_an_image_over_the_limit_is_scaled_down_to_it_and_the_others_are_left_alone(self):
        denoised = torch.stack([torch.full((4, 8, 8), 2.0), torch.full((4, 8, 8), -2.0)])
        shift = torch.stack([values(4, 8, 8).float(), 0.01 * values(4, 8, 8).float()])
        result, bites = limited(shift, denoised, 0.05)
        assert bites.tolist() == [True, False]
        assert result[0].square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
        torch.testing.assert_close(result[0] / result[0].norm(), shift[0] / shift[0].norm())
        assert torch.equal(result[1], shift[1])

    def test_zero_switches_it_off(self):
        shift = 1e6 * values(2, 4, 8, 8).float()
        result, bites = limited(shift, torch.ones(2, 4, 8, 8), 0.0)
        assert torch.equal(result, shift)
        assert bites.tolist() == [False, False]

    def test_half_precision_predictions_are_measured_in_float32(self):
        denoised = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)  # its square is beyond float16
        result, bites = limited(torch.full((1, 4, 64, 64), 30.0), denoised, 0.05)
        assert bites.tolist() == [True]
        assert result.square().mean().sqrt().item() == pytest.approx(15, rel=1e-3)

    def test_no_shift_of_no_prediction_is_no_division_by_zero(self):
        result, bites = limited(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), 0.05)
        assert torch.equal(result, torch.zeros(1, 4, 8, 8))
        assert bites.tolist() == [False]


class TestSchedule:
    LEVELS = (14.6, 7.0, 3.0, 1.0, 0.2)

    def test_a_final_zero_makes_no_difference(self):
        assert Schedule("vp", [*self.LEVELS, 0.0]).levels == Schedule("vp", self.LEVELS).levels == self.LEVELS
        assert Schedule("vp", [*self.LEVELS, 0.0]).steps == 5

    def test_levels_that_a_sampler_lists_twice_count_once(self):
        assert Schedule("vp", [14.6, 7.0, 7.0, 3.0, 3.0, 1.0, 1.0, 0.2, 0.0]).levels == (14.6, 7.0, 3.0, 1.0, 0.2)

    def test_a_schedule_without_noise_is_refused(self):
        with pytest.raises(ValueError, match="noise level"):
            Schedule("vp", [0.0])

    def test_the_next_level_is_the_largest_below_on_and_off_the_schedule(self):
        schedule = Schedule("vp", self.LEVELS)
        assert [schedule.level(s).s_next for s in self.LEVELS] == [7.0, 3.0, 1.0, 0.2, 0.0]
        assert [schedule.level(s).s_next for s in (10.0, 6.9, 0.5, 0.1)] == [7.0, 3.0, 0.2, 0.0]

    def test_a_level_off_the_schedule_belongs_to_the_step_around_it(self):
        schedule = Schedule("vp", self.LEVELS)
        assert [schedule.step_of(s) for s in self.LEVELS] == [0, 1, 2, 3, 4]
        assert [schedule.step_of(s) for s in (20.0, 10.0, 6.9, 0.5, 0.1, 0.0)] == [0, 0, 1, 3, 4, 4]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("steps", [10, 50, 150])
    def test_a_level_that_a_host_has_rounded_is_still_that_level(self, dtype, steps):
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (14.6146 ** (1 / 7) + ramp * (0.0292 ** (1 / 7) - 14.6146 ** (1 / 7))) ** 7
        schedule = Schedule("vp", levels.tolist())
        rounded = [float(s) for s in levels.to(dtype)]
        assert [schedule.step_of(s) for s in rounded] == list(range(steps))
        assert [schedule.next_level(s) for s in rounded] == [*levels[1:].tolist(), 0.0]

    def test_levels_closer_than_rounding_are_told_apart(self):
        levels = [1.0, 0.9995, 0.999, 0.5]
        schedule = Schedule("flow", levels)
        assert [schedule.step_of(s) for s in levels] == [0, 1, 2, 3]

    def test_an_ancestral_step_goes_to_the_down_level_and_is_noised_back(self):
        level = Schedule("vp", self.LEVELS).level(3.0, eta=1.0)
        assert (level.s_next, level.renoised) == (pytest.approx(1 / 3), 1.0)
        assert Schedule("vp", self.LEVELS).level(0.2, eta=1.0) == Level("vp", 0.2, 0.0)

    def test_a_jump_goes_all_the_way(self):
        assert Schedule("vp", self.LEVELS).level(3.0, form="jump") == Level("vp", 3.0, 0.0, 1.0)
