"""What the step of a diffusers scheduler works on: its noise level, and the denoised prediction D behind a model output.

A scheduler takes the model's output, which stands for noise, velocity or the picture itself, and a sample in coordinates of its own.
In all of them D is a linear combination of the two, so a shift of D is a shift of the output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...fusion import Step
from ...guidance.correction import Kind, Level, Schedule, step_level

# Euler's own stand-in for the infinite level of a schedule with zero terminal signal (scheduling_euler_discrete.py, 2**-24).
_LEAST_SIGNAL = 2.0**-24

# Schedulers by the table they look their levels up in, and the coordinates of the sample that step() takes.
_BY_TIMESTEP = ("DDIMScheduler", "PNDMScheduler", "LCMScheduler")
_BY_INDEX_VP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
_BY_INDEX_VE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)
SCHEDULERS = (*_BY_TIMESTEP, *_BY_INDEX_VP, *_BY_INDEX_VE, *_FLOW)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class SchedulerError(RuntimeError):
    """A scheduler whose levels are not known. One sentence for the user."""


@dataclass(frozen=True)
class SchedulerStep:
    """A scheduler's step to be: D = of_sample * sample + of_output * output.

    input_scale: the denoiser's input is the sample times this.
    """

    level: Level
    of_sample: float
    of_output: float
    input_scale: float

    def denoised(self, sample: Tensor, output: Tensor) -> Tensor:
        """D in float32 (float64 where the sample is)."""
        return self.of_sample * _wide(sample) + self.of_output * _wide(output)

    def output(self, output: Tensor, shift: Tensor) -> Tensor:
        """The model output whose D is shifted by that much; in the output's own type."""
        return (_wide(output) + shift.to(output.device) / self.of_output).to(output.dtype)


class SchedulerSteps:
    """The levels of a pipeline's scheduler. Raises SchedulerError for one that is not known."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.name = next((base.__name__ for base in type(scheduler).__mro__ if base.__name__ in SCHEDULERS), "")
        if not self.name:
            raise SchedulerError(
                f"The guidance does not know the noise levels of {type(scheduler).__name__}: use one of {', '.join(SCHEDULERS)}."
            )
        self.kind: Kind = "flow" if self.name in _FLOW else "vp"
        config = scheduler.config
        self.prediction = "flow" if self.name in _FLOW else str(config.prediction_type)
        if self.prediction not in (*PREDICTIONS, "flow") or getattr(config, "use_flow_sigmas", False):
            raise SchedulerError(
                f"The guidance cannot follow {type(scheduler).__name__} with the prediction type {self.prediction}: it knows "
                f"{', '.join(PREDICTIONS)}."
            )

    def schedule(self) -> Schedule:
        """The whole schedule, once the pipeline has set the timesteps."""
        if self.name in _BY_TIMESTEP:
            # PNDM asks twice at its second timestep.
            timesteps = dict.fromkeys(int(t) for t in self.scheduler.timesteps)
            levels = [self._level_of(t) for t in timesteps]
        else:
            levels = [float(sigma) for sigma in self.scheduler.sigmas[:-1]]
        return Schedule(self.kind, levels)

    def level(self, timestep: Any) -> float:
        """The noise level of the coming step: sigma in VE units, or the flow's time."""
        if self.name in _BY_TIMESTEP:
            return self._level_of(int(timestep))
        return float(self.scheduler.sigmas[self._index(timestep)])

    def step(self, timestep: Any, eta: float = 0.0) -> SchedulerStep:
        """The coming step. eta: DDIM's, which the pipelines hand to step()."""
        s = self.level(timestep)
        level = self._towards(s, timestep, eta)
        if self.kind == "flow":
            return SchedulerStep(level, 1.0, -s, 1.0)
        alpha = (1 + s * s) ** -0.5
        own = alpha if self.name in _BY_INDEX_VE else 1.0  # the sample's coordinates times this are VP's
        of_sample, of_output = {"epsilon": (own / alpha, -s), "v_prediction": (own * alpha, -s * alpha), "sample": (0.0, 1.0)}[
            self.prediction
        ]
        return SchedulerStep(level, of_sample, of_output, own)

    def _towards(self, s: float, timestep: Any, eta: float) -> Level:
        """From s to where this scheduler's step goes."""
        scheduler = self.scheduler
        if self.name == "LCMScheduler":
            return self.schedule().level(s, form="jump")
        if self.name in _BY_TIMESTEP:
            before = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            reached = self._level_of(before) if before >= 0 else _sigma(float(scheduler.final_alpha_cumprod))
            return step_level(self.kind, s, reached, eta=eta)
        reached = float(scheduler.sigmas[self._index(timestep) + 1])
        # At eta 1 the exponential integrators' step and an ancestral one go to the same level.
        sde = self.name == "EulerAncestralDiscreteScheduler" or str(getattr(scheduler.config, "algorithm_type", "")).startswith("sde")
        return step_level(self.kind, s, reached, eta=1.0 if sde else 0.0)

    def _level_of(self, timestep: int) -> float:
        return _sigma(float(self.scheduler.alphas_cumprod[timestep]))

    def _index(self, timestep: Any) -> int:
        if self.scheduler.step_index is None:
            self.scheduler._init_step_index(timestep)  # as step() itself begins
        return int(self.scheduler._step_index)


class StepsOfCalls:
    """Which step each call of a pipeline's denoiser is, from the first on. The pipeline has set its timesteps by then."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._calls = 0
        self._timesteps: list[float] = []
        self._steps: SchedulerSteps | None = None

    def next(self) -> Step:
        """The step of the coming call. Some schedulers ask twice at a timestep; that is one step."""
        if not self._timesteps:
            self._timesteps = self._scheduler.timesteps.tolist()
            with contextlib.suppress(SchedulerError):
                self._steps = SchedulerSteps(self._scheduler)
        place = min(self._calls, len(self._timesteps) - 1)
        self._calls += 1
        distinct = list(dict.fromkeys(self._timesteps))
        sigma = math.nan if self._steps is None else self._steps.level(self._scheduler.timesteps[place])
        return Step.of(distinct.index(self._timesteps[place]), len(distinct), sigma)


def packed(latent: Tensor) -> Tensor:
    """Flux's tokens of a latent: (B, C, h, w) -> (B, h/2 * w/2, 4 C), each token a square of 2 x 2."""
    batch, channels, height, width = latent.shape
    squares = latent.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpacking(rows: int) -> Callable[[Tensor], Tensor]:
    """The inverse of packed. rows: how many rows of tokens there are."""

    def unpacked(tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        squares = tokens.reshape(batch, rows, count // rows, width // 4, 2, 2)
        return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, width // 4, rows * 2, count // rows * 2)

    return unpacked


def _sigma(signal: float) -> float:
    """VE noise level of a cumulative alpha."""
    signal = max(signal, _LEAST_SIGNAL)
    return ((1 - signal) / signal) ** 0.5


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["SCHEDULERS", "SchedulerError", "SchedulerStep", "SchedulerSteps", "StepsOfCalls", "packed", "unpacking"]
