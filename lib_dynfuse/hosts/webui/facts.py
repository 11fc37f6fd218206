"""What is known of one denoiser call: made once per call, for the rules and for the guidance alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...fusion import Step
from ...guidance.correction import Level, Schedule
from .roles import Samplers
from .sampler_levels import level_of, start_of
from .seams import argument


@dataclass(frozen=True)
class SamplingFacts:
    """One call of CFGDenoiser.forward.

    latent: (B, C, h, w), its x. scale: the CFG scale. sigma: its noise level, in VE units or the flow time. step: where in the pass it
    is. schedule, level: of the whole sampling, and where this step goes; None where the sampler's levels are not known. on_eps: x is
    VP-scaled and the prediction is the noise; else x is VE or flow and the prediction D. mask: 0 where the picture is kept, None without
    inpainting.
    denoised: (x, prediction) -> D, once the call has returned.
    """

    latent: Tensor
    sigma: float
    step: Step
    schedule: Schedule | None
    level: Level | None
    on_eps: bool
    mask: Tensor | None
    denoised: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0

    @property
    def unit(self) -> float:
        """x is the latent in the host's VE or flow units times this."""
        return 1.0 / math.sqrt(1.0 + self.sigma**2) if self.on_eps else 1.0

    def shifted(self, prediction: Tensor, shift: Tensor) -> Tensor:
        """The prediction whose D is moved by shift."""
        if self.on_eps:
            return prediction - (shift / self.sigma).to(prediction.dtype)  # eps = (x - D) / s in VE units
        return prediction + shift.to(prediction.dtype)


class Sampling:
    """The sampling of one pass: its schedule, and which step a call is."""

    def __init__(self, samplers: Samplers):
        self._samplers = samplers
        self._levels: Sequence[float] | Tensor | None = None
        self._schedule: Schedule | None = None
        self._first: int | None = None

    def begin(self, levels: Sequence[float] | Tensor) -> None:
        """The sampler has worked out its noise levels. levels: as it returned them, sigmas or timesteps."""
        self._levels, self._schedule, self._first = levels, None, None

    def facts(self, cfg_denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SamplingFacts:
        """Of the call CFGDenoiser.forward(*args, **kwargs), before it is made."""
        samplers = self._samplers
        latent, sigma = argument(args, kwargs, 0, "x"), argument(args, kwargs, 1, "sigma")
        s = float(samplers.noise_levels(cfg_denoiser, sigma[:1]))
        schedule = self._schedule_of(cfg_denoiser)
        level = None
        if schedule is not None:
            level = level_of(cfg_denoiser.sampler, schedule, s, rectified=samplers.rectified_ancestral(cfg_denoiser))
        return SamplingFacts(
            latent=latent,
            sigma=s,
            step=self._step(cfg_denoiser, schedule, s),
            schedule=schedule,
            level=level,
            on_eps=samplers.works_on_eps(cfg_denoiser),
            mask=cfg_denoiser.nmask if getattr(cfg_denoiser, "mask", None) is not None else None,
            denoised=lambda x, prediction: samplers.denoised(cfg_denoiser, x, s, prediction),
            scale=self._scale(cfg_denoiser, sigma, args, kwargs),
        )

    def _scale(self, cfg_denoiser: Any, sigma: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        # forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, ...)
        scale = args[4] if len(args) > 4 else kwargs.get("cond_scale", 1.0)
        s_min_uncond = args[5] if len(args) > 5 else kwargs.get("s_min_uncond", 0.0)
        return float(self._samplers.cfg_scale(cfg_denoiser, sigma, scale, s_min_uncond))

    def _schedule_of(self, cfg_denoiser: Any) -> Schedule | None:
        if self._schedule is None and self._levels is not None:
            values = torch.as_tensor(self._levels).flatten()
            try:
                self._schedule = Schedule(self._samplers.kind(cfg_denoiser), self._samplers.noise_levels(cfg_denoiser, values).tolist())
            except ValueError:  # no level above 0
                self._levels = None
        return self._schedule

    def _step(self, cfg_denoiser: Any, schedule: Schedule | None, s: float) -> Step:
        """By the noise level: a sampler may make several calls for a step. Of a schedule that is entered in the middle (image to
        image) only the steps that are run count; the first call tells which.
        """
        if schedule is None:
            count = getattr(cfg_denoiser, "total_steps", None) or getattr(cfg_denoiser.p, "steps", 1)
            return Step.of(int(getattr(cfg_denoiser, "step", 0)), int(count or 1), s)
        index = schedule.step_of(start_of(cfg_denoiser.sampler, schedule, s))
        if self._first is None:
            self._first = index
        return Step.of(index - self._first, schedule.steps - self._first, s)


__all__ = ["Sampling", "SamplingFacts"]
