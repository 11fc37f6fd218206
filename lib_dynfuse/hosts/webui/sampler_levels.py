"""How far a WebUI's sampler goes from one noise level with the D it is handed.

The part of a step that depends on D is x' = (d/s) x + (1 - d/s) D, plus noise; d is the "down level". It is the next level of the
schedule for deterministic samplers, lower for those that add fresh noise. Read off k_diffusion/sampling.py and, for the samplers that
the WebUIs add, modules/sd_samplers_*.py of A1111 1.10.1 and backend/modules/k_diffusion_extra.py of Forge (dfdcbab).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from ...guidance.correction import Form, Level, Schedule

# D itself with fresh noise on it; CFG++ (also any ..._cfg_pp of ComfyUI's) takes the direction from the unconditional noise, which a
# shift of D does not touch.
_JUMPING = ("sample_lcm", "ddim_cfgpp")
_EXPONENTIAL = ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")
# Ancestral without a parameter for it.
_ALWAYS_ANCESTRAL = ("sample_ddpm",)
# Those of the ancestral ones that have a form for rectified flows.
_RECTIFIED = ("sample_euler_ancestral", "sample_dpm_2_ancestral")


def level_of(sampler: Any, schedule: Schedule, s: float, *, rectified: bool = False) -> Level:
    """The level of a denoiser call at s and the down level of the step that it is for.

    sampler: the WebUI's, with func, eta and p. rectified: its ancestral samplers take the form for rectified flows.
    """
    name = getattr(sampler.func, "__name__", str(sampler.func))
    # The host sets eta on every sampler; it means something only where the function takes it.
    eta = 1.0 if name in _ALWAYS_ANCESTRAL else float(sampler.eta or 0.0) if "eta" in _parameters(sampler.func) else 0.0
    return schedule.level(s, start=start_of(sampler, schedule, s), eta=eta, form=_form(name, schedule, rectified))


def start_of(sampler: Any, schedule: Schedule, s: float) -> float:
    """The level of the schedule at which the step of a call at s begins: below s by the sampler's churn."""
    return s / (1.0 + _churn(sampler, _parameters(sampler.func), schedule, s))


def _form(name: str, schedule: Schedule, rectified: bool) -> Form:
    if name in _JUMPING or "_cfg_pp" in name:
        return "jump"
    if name in _EXPONENTIAL:
        return "exponential"
    return "rectified" if schedule.kind == "flow" and rectified and name in _RECTIFIED else "ancestral"


def _parameters(function: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _churn(sampler: Any, parameters: frozenset[str], schedule: Schedule, s: float) -> float:
    """gamma of Karras et al. 2022, algorithm 2: the call is made at (1 + gamma) times the schedule's level."""
    if "s_churn" not in parameters:
        return 0.0
    p = sampler.p
    churn = float(getattr(p, "s_churn", None) or 0.0)
    gamma = min(churn / max(schedule.steps, 1), math.sqrt(2.0) - 1.0)
    lowest, highest = float(getattr(p, "s_tmin", None) or 0.0), float(getattr(p, "s_tmax", None) or math.inf)
    # Heun's second call is at the next level itself, without churn; it is told by lying on the schedule.
    on_schedule = any(math.isclose(s, level, rel_tol=1e-4) for level in schedule.levels)
    return 0.0 if on_schedule or not lowest <= s / (1.0 + gamma) <= highest else gamma


__all__ = ["level_of", "start_of"]
