"""What is read from diffusers' schedulers, against what their own steps do."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from lib_dynfuse.hosts.diffusers.schedulers import SCHEDULERS, SchedulerError, SchedulerSteps, packed, unpacking

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}
TO_ZERO = {"set_alpha_to_one": True, "clip_sample": False}
MORE = {
    "DDIMScheduler": TO_ZERO,
    "PNDMScheduler": {"set_alpha_to_one": True, "skip_prk_steps": True},
    "LCMScheduler": {**TO_ZERO, "timestep_scaling": 1e6},  # no skip: the step goes to D alone
}
KINDS = [
    *((name, {}) for name in SCHEDULERS if not name.startswith("Flow")),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
]
# These do not take every prediction type.
EPSILON_ALONE = {("PNDMScheduler", "sample"), ("EulerAncestralDiscreteScheduler", "sample")}


def made(name, steps=8, **more):
    settings = {"timestep_spacing": "leading", "steps_offset": 1} if name.startswith("LCM") else BETAS
    scheduler = getattr(diffusers, name)(**{**settings, **MORE.get(name, {}), **more})
    scheduler.set_timesteps(steps)
    return scheduler


def signal_and_noise(scheduler, timestep):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at a timestep, between two of the table on a straight line of sigma or its logarithm."""
    alphas = scheduler.alphas_cumprod.double()
    if getattr(scheduler, "sigmas", None) is not None and len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
        sigma = scheduler.sigmas[(scheduler.timesteps == timestep).nonzero()[0, 0]].double()
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    alpha = alphas[int(timestep)]
    return alpha.sqrt(), (1 - alpha).sqrt()


def prediction(kind, noisy, picture, signal, noise_level):
    """What a model that knows the picture would say of `noisy` (VP coordinates)."""
    noise = (noisy - signal * picture) / noise_level
    return {"epsilon": noise, "v_prediction": signal * noise - noise_level * picture, "sample": picture}[kind]


def first_step(name, more, kind, **arguments):
    """(scheduler, steps, timestep, sample, output, picture) at the first step."""
    scheduler = made(name, prediction_type=kind, **more)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64)
    sample = torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64) * float(scheduler.init_noise_sigma)
    timestep = scheduler.timesteps[0]
    noisy = scheduler.scale_model_input(sample, timestep)
    output = prediction(kind, noisy, picture, *signal_and_noise(scheduler, timestep))
    return scheduler, SchedulerSteps(scheduler), timestep, sample, output, picture


def cases(without=()):
    for name, more in [case for case in KINDS if case[0] not in without]:
        for kind in ("epsilon", "v_prediction", "sample"):
            if (name, kind) not in EPSILON_ALONE:
                yield pytest.param(name, more, kind, id="-".join([name, kind, *more]))


@pytest.mark.parametrize(("name", "more", "kind"), cases())
def test_d_is_the_picture_that_the_model_predicts_and_its_shift_moves_the_step_by_as_much_as_the_level_says(name, more, kind):
    results = []
    shift = torch.full((1, 4, 6, 6), 0.01, dtype=torch.float64)
    for move in (False, True):
        scheduler, steps, timestep, sample, output, picture = first_step(name, more, kind)
        step = steps.step(timestep)
        denoised = step.denoised(sample, output)
        torch.testing.assert_close(denoised, picture, atol=3e-5, rtol=1e-5)
        if move:
            output = step.output(output, shift)
            torch.testing.assert_close(step.denoised(sample, output) - denoised, shift, atol=1e-9, rtol=1e-9)
        noise = {"generator": torch.Generator().manual_seed(1)} if "Ancestral" in name or "LCM" in name or more else {}
        if "generator" not in type(scheduler).step.__code__.co_varnames:
            noise = {}
        results.append(scheduler.step(output, timestep, sample, **noise, return_dict=False)[0].double())
    level = step.level
    after = level.s_next if level.renoised is None else level.renoised
    in_ve = 1.0 if name.startswith("Euler") else (1 + after**2) ** 0.5
    moved = (results[1] - results[0]) * in_ve
    torch.testing.assert_close(moved, shift * (1 - level.s_next / level.s), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddims_own_noise_is_known(eta):
    shift = torch.full((1, 4, 6, 6), 0.01, dtype=torch.float64)
    results = []
    for move in (False, True):
        scheduler, steps, timestep, sample, output, _ = first_step("DDIMScheduler", {}, "epsilon")
        step = steps.step(timestep, eta)
        output = step.output(output, shift) if move else output
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(output, timestep, sample, eta=eta, generator=generator, return_dict=False)[0])
    level = step.level
    after = level.s_next if level.renoised is None else level.renoised
    torch.testing.assert_close((results[1] - results[0]) * (1 + after**2) ** 0.5, shift * (1 - level.s_next / level.s), rtol=1e-4, atol=0)


# PNDM and DEIS extrapolate noise, of which a constant shift of D is no constant shift.
@pytest.mark.parametrize(("name", "more", "kind"), cases(without=("PNDMScheduler", "DEISMultistepScheduler")))
def test_a_sampler_whose_every_d_is_shifted_ends_at_the_shifted_picture(name, more, kind):
    scheduler, steps, _, sample, _, picture = first_step(name, more, kind)
    assert steps.schedule().steps == len(scheduler.timesteps)
    for number, timestep in enumerate(scheduler.timesteps):
        signal, noise_level = signal_and_noise(scheduler, timestep)
        output = prediction(kind, scheduler.scale_model_input(sample, timestep), picture, signal, noise_level)
        assert steps.schedule().step_of(steps.level(timestep)) == number
        output = steps.step(timestep).output(output, torch.ones_like(sample) / 4)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample.double(), picture + 0.25, atol=1e-3, rtol=1e-3)


def test_pndm_asks_twice_at_its_second_timestep_and_has_as_many_steps_as_were_asked_for():
    scheduler = made("PNDMScheduler", 8)
    assert len(scheduler.timesteps) == 9
    assert SchedulerSteps(scheduler).schedule().steps == 8


@pytest.mark.parametrize("shifting", [True, False])
def test_a_flow_step_is_an_euler_step_in_the_flows_time(shifting):
    shift = torch.full((1, 9, 8), 0.25, dtype=torch.float64)
    results = []
    for move in (False, True):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), **({"mu": 1.1} if shifting else {}))
        steps = SchedulerSteps(scheduler)
        generator = torch.Generator().manual_seed(0)
        picture, noise = (torch.randn(1, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        timestep = scheduler.timesteps[1]
        scheduler._step_index = 1
        t = float(timestep) / 1000
        step = steps.step(timestep)
        sample, velocity = (1 - t) * picture + t * noise, noise - picture
        torch.testing.assert_close(step.denoised(sample, velocity), picture, atol=1e-6, rtol=0)
        output = step.output(velocity, shift) if move else velocity
        results.append(scheduler.step(output, timestep, sample, return_dict=False)[0].double())
    torch.testing.assert_close(results[1] - results[0], shift * (1 - step.level.s_next / step.level.s), atol=1e-6, rtol=0)
    assert steps.schedule().steps == 4


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lambda: diffusers.HeunDiscreteScheduler(), "HeunDiscreteScheduler"),
        (lambda: diffusers.DDIMScheduler(prediction_type="flow_prediction"), "flow_prediction"),
    ],
)
def test_what_is_not_known_is_refused_in_a_sentence(scheduler, words):
    with pytest.raises(SchedulerError, match=words) as caught:
        SchedulerSteps(scheduler())
    assert "\n" not in str(caught.value)


def test_a_schedule_that_begins_without_any_signal_has_a_finite_level():
    scheduler = made("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    steps = SchedulerSteps(scheduler)
    step = steps.step(scheduler.timesteps[0])
    noise, velocity = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(step.denoised(noise, velocity), -velocity, atol=5e-3, rtol=0)
    assert step.level.s < float("inf")


def test_tokens_are_packed_as_flux_packs_them():
    latent = torch.randn(2, 3, 8, 12)
    tokens = diffusers.FluxPipeline._pack_latents(latent, 2, 3, 8, 12)
    torch.testing.assert_close(packed(latent), tokens, rtol=0, atol=0)
    torch.testing.assert_close(unpacking(4)(tokens), latent, rtol=0, atol=0)
