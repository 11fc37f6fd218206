"""How far the predicted picture moves per step: the factors of latent-level refinement (paper, section 4.2, Eq. 20), and their limit.

The paper moves the latent after a step, x_{t-1} = x_{t-1}^ori - m grad_{x_t} R. A host hands over the denoised prediction D before
the step. A step from noise level s to s' is

    x' = (s'/s) x + (1 - s'/s) D

for Euler and DDIM in VE coordinates (x = x0 + s noise) and for Euler on flow models (x = (1 - s) x0 + s noise, s the flow time), so
a shift of x' is a shift of D divided by 1 - s'/s. All other samplers are linear in D as well, and a shift that is the same at all of
their inner calls is one shift of D.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["vp", "flow"]
Form = Literal["ancestral", "rectified", "exponential", "jump"]

# The number of steps that the paper's m is meant for (its Fig. 5).
PAPER_STEPS = 50

# Two neighbouring levels of a long schedule, or a level just below which the next one lies, would make the divisor vanish.
_SMALLEST_STEP = 0.02

# How far, relatively, a host's float16 copy of a level may lie from the level.
_LEVEL_NOISE = 1e-3


@dataclass(frozen=True)
class Level:
    """Where in the noise a call of the denoiser is, and where the sampler's step goes.

    kind: "vp" (epsilon and v models) or "flow". s: sigma in VE units, or the flow time. s_next: level after the step's deterministic
    part, 0 after the last. renoised: level once the sampler has added fresh noise on top; None where it adds none.
    """

    kind: Kind
    s: float
    s_next: float
    renoised: float | None = None


def fast_factor(level: Level) -> float:
    """What m grad_D R is multiplied by to shift D: s / (s - s').

    That is the exact factor of a VP model whose denoiser has the Jacobian of unit-variance data, 1 / (1 + s^2), but for a factor between
    1 and s/s'. With a Jacobian of 1 in its place the exact factor would overshoot about 1 + s^2 times.
    """
    if level.s <= 0:
        return 0.0
    return level.s / max(level.s - level.s_next, _SMALLEST_STEP * level.s)


def exact_factor(level: Level) -> float:
    """What m grad_x R is multiplied by to shift D, with x in the host's units: VE for a VP model, the latent itself for a flow model.

    VP: s sqrt(1 + s^2) sqrt(1 + s'^2) / (s - s'), because Eq. 20 holds in the coordinates x / sqrt(1 + s^2). Flow: s / (s - s').
    A sampler that adds noise to s'' after the step: Eq. 20 acts on the latent with that noise, so sqrt(1 + s''^2) stands for
    sqrt(1 + s'^2); on flow models the sampler then scales the latent by (1 - s'') / (1 - s'), which is taken out here.
    """
    after = level.s_next if level.renoised is None else level.renoised
    if level.kind == "vp":
        return fast_factor(level) * math.sqrt(1 + level.s**2) * math.sqrt(1 + after**2)
    if after in (level.s_next, 1.0):
        return fast_factor(level)
    return fast_factor(level) * (1 - level.s_next) / (1 - after)


def effective_m(m: float, steps: int) -> float:
    """m of one step of a schedule of `steps`: Eq. 20 acts once per step, so its sum would grow with their number."""
    return m * PAPER_STEPS / max(1, steps)


def down_level(s: float, s_next: float, eta: float, kind: Kind) -> float:
    """Where the deterministic part of an ancestral step from s to s_next goes, before noise brings it up to s_next.

    VP: s_down^2 = s'^2 (1 - eta^2 (1 - s'^2 / s^2)) (k-diffusion sampling.py, get_ancestral_step; DDIM with eta). Flow:
    s' (1 + eta (s'/s - 1)) (Forge k_diffusion/sampling.py:176). eta 0: s_next.
    """
    if s <= 0 or eta <= 0:
        return s_next
    if kind == "flow":
        return max(0.0, s_next * (1 + eta * (s_next / s - 1)))
    return s_next * math.sqrt(max(0.0, 1 - eta**2 * (1 - min(1.0, s_next / s) ** 2)))


def exponential_down_level(s: float, s_next: float, eta: float) -> float:
    """down_level of the exponential integrators (DPM++ 2M SDE and 3M SDE): s (s'/s)^(1 + eta), for both kinds.

    At eta 1 the same as down_level of a VP model.
    """
    if s <= 0 or s_next <= 0:
        return s_next
    return s * (s_next / s) ** (1 + max(0.0, eta))


def step_level(kind: Kind, s: float, reached: float, *, start: float | None = None, eta: float = 0.0, form: Form = "ancestral") -> Level:
    """The level of a call at s whose step ends at `reached`.

    start: level at which the step begins, if not at s (a sampler that churns calls at a level of its own). eta: how much fresh noise the
    sampler adds, 0 for none. form: how it does. ancestral: k-diffusion's; on flow models nothing is scaled after it. rectified: that of
    samplers made for flow models. exponential: see exponential_down_level. jump: it goes to D itself and adds noise to `reached`
    (LCM, CFG++), whatever eta is.
    """
    start = s if start is None else start
    if form == "jump":
        return Level(kind, s, 0.0, reached)
    if eta <= 0 or reached <= 0:
        return Level(kind, s, reached)
    if form == "rectified":
        return Level(kind, s, down_level(start, reached, eta, "flow"), reached)
    down = exponential_down_level(start, reached, eta) if form == "exponential" else down_level(start, reached, eta, "vp")
    return Level(kind, s, down, reached if kind == "vp" else None)


def limited(shift: Tensor, denoised: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The shift, scaled down for the images in which its RMS is over `limit` times that of the denoised prediction.

    shift: (B, ...) float32. denoised: (B, ...), any dtype. limit: 0 switches it off. Returns the shift and (B,) bool, True where it
    was scaled down, both on the shift's device: nothing waits for it.
    """
    if limit <= 0:
        return shift, torch.zeros(shift.shape[0], dtype=torch.bool, device=shift.device)
    allowed = limit * _rms(denoised)
    size = _rms(shift)
    bites = size > allowed
    scale = torch.where(bites, allowed / size, torch.ones_like(size))
    return shift * scale.reshape(-1, *[1] * (shift.dim() - 1)), bites


def _rms(values: Tensor) -> Tensor:
    """Root mean square per image, (B,), at least float32."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.flatten(1).square().mean(1).sqrt()


class Schedule:
    """The noise levels of a whole sampling, and where in it a call is.

    kind: see Level. levels: noisy to clean, with or without a final 0; repeated ones (samplers that list a level twice, restarts)
    count once. For image to image: the whole schedule, of which the first steps are not taken. Raises ValueError without any level
    above 0.
    """

    def __init__(self, kind: Kind, levels: Sequence[float]):
        self.kind: Kind = kind
        self.levels = tuple(sorted({float(s) for s in levels if s > 0}, reverse=True))
        if not self.levels:
            raise ValueError("a schedule needs a noise level above 0")
        gaps = [1 - lower / upper for upper, lower in zip(self.levels, self.levels[1:], strict=False)]
        self._tolerance = min([_LEVEL_NOISE, *(gap / 4 for gap in gaps)])
        self._rising = [-s for s in self.levels]

    @property
    def steps(self) -> int:
        """Number of steps from the first level to 0."""
        return len(self.levels)

    def step_of(self, s: float) -> int:
        """The step whose interval holds s, from 0: levels[step] >= s > levels[step + 1], but for the host's rounding of s."""
        return max(0, self._levels_not_below(s) - 1)

    def next_level(self, s: float) -> float:
        """The largest level below s; 0 after the last."""
        place = self._levels_not_below(s)
        return self.levels[place] if place < len(self.levels) else 0.0

    def level(self, s: float, *, start: float | None = None, eta: float = 0.0, form: Form = "ancestral") -> Level:
        """The step of a call at s, which may lie off the schedule (inner calls of Heun, DPM-2, DPM++ SDE).

        start: where the step begins, if not at s. Else as step_level.
        """
        start = s if start is None else start
        return step_level(self.kind, s, self.next_level(start), start=start, eta=eta, form=form)

    def _levels_not_below(self, s: float) -> int:
        return bisect_right(self._rising, -s * (1 - self._tolerance))


__all__ = [
    "PAPER_STEPS",
    "Form",
    "Kind",
    "Level",
    "Schedule",
    "down_level",
    "effective_m",
    "exact_factor",
    "exponential_down_level",
    "fast_factor",
    "limited",
    "step_level",
]
