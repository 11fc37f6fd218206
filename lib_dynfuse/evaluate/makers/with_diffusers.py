"""Pictures by a diffusers pipeline in this process: one GPU, the one that `accelerate launch` gives it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...fusion import FusionError
from ...fusion.rules import RULES
from ...generate import Request, format_infotext, infotext_fields
from ...given_files import read_sides
from ...guidance.guide import wants_guidance
from ...guidance.references import ReferenceCache
from ...guidance.weights import EncoderSources
from ...lora import LoraError
from ...settings import SettingsError
from ..folder import EvaluationError
from ..plan import Making, Plan
from .maker import Job, Made, OnStep

if TYPE_CHECKING:  # imports diffusers, which is not everywhere
    from ...hosts.diffusers import FusedPipeline

# What people call the samplers of a WebUI; schedulers' own names are taken as they are.
_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "EulerDiscrete",
    "euler a": "EulerAncestralDiscrete",
    "dpm++ 2m": "DPMSolverMultistep",
    "unipc": "UniPCMultistep",
    "lcm": "LCM",
    "flow euler": "FlowMatchEulerDiscrete",
}


class DiffusersMaker:
    def __init__(self, make: Making, encoders: EncoderSources, references: Path) -> None:
        """references: folder where the guidance keeps its references. Raises PipelineError and EvaluationError."""
        from ...hosts.diffusers import GuidanceSources, load_pipeline, load_taesd

        assert make.model is not None
        self._making = make
        device = device_of(make)
        dtype: torch.dtype | None = getattr(torch, make.dtype) if make.dtype else None
        self._pipeline = load_pipeline(make.model, device=device, dtype=dtype, config=make.config)
        self.name = f"{make.model.name} on {self._pipeline.device}"
        if make.sampler:
            self._pipeline.scheduler = _scheduler(make.sampler, self._pipeline.scheduler)
        taesd = load_taesd(make.taesd) if make.taesd else None
        self._guidance = GuidanceSources(encoders, ReferenceCache(references, limit_bytes=4 << 30), taesd)
        # A fusion prepares the LoRAs' matrices; the next seed's needs the same.
        self._fused = functools.lru_cache(maxsize=1)(self._new_fused)

    def problems(self, plan: Plan) -> list[str]:
        """What of the plan does not go with the model, a sentence each: its methods on the first pair, its pairs by the first method."""
        tried = [(f"methods.{method.name}", plan.pairs[0], method) for method in plan.methods]
        tried += [(pair.name, pair, plan.methods[0]) for pair in plan.pairs[1:]]
        found = []
        for what, pair, method in tried:
            try:
                self._new_fused(method.of(pair), method.settings_for(pair))
            except (LoraError, FusionError, SettingsError) as error:
                found.append(f"{what}: {error}")
        return found

    def make(self, jobs: Sequence[Job], on_step: OnStep) -> list[Made]:
        """Raises as FusedPipeline does."""
        making, first = self._making, jobs[0]
        fused, files, settings = self._fused(first.pair, first.settings)
        width, height = making.size or (None, None)
        made = fused(
            first.prompt,
            negative_prompt=making.negative_prompt,
            seeds=[job.picture.seed for job in jobs],
            steps=making.steps,
            cfg_scale=making.cfg_scale,
            width=width,
            height=height,
            progress=on_step,
            reference_progress=lambda side, done, total: on_step(done, total),
        )
        request = self._request(first, settings)
        results = []
        for job, image in zip(jobs, made.images, strict=True):
            fields = infotext_fields(request, settings, self._pipeline, job.picture.seed, image.size, files)
            results.append(Made(image, format_infotext(job.prompt, making.negative_prompt, fields), made.notes))
        return results

    def together(self, job: Job) -> int:
        """How many pictures of these settings may be one batch: a picture's own references would be the first one's."""
        own = job.settings.reference_seed < 0 and (wants_guidance(job.settings) or RULES[job.settings.method].compares)
        return 1 if own else self._making.batch

    def _new_fused(self, pair: Any, settings: Any) -> tuple[FusedPipeline, list[Any], Any]:
        from ...hosts.diffusers import FusedPipeline

        subjects, styles, named = read_sides(pair.subject.loras, pair.style.loras, settings)
        return FusedPipeline(self._pipeline, subjects, styles, named, self._guidance), [*subjects, *styles], named

    def _request(self, job: Job, settings: Any) -> Request:
        making = self._making
        assert making.model is not None
        return Request(
            *(making.model, job.pair.subject.loras, job.pair.style.loras, job.prompt, settings, Path()),
            negative_prompt=making.negative_prompt,
            steps=making.steps,
        )


def own_device() -> str | None:
    """The GPU of this process, of those that a launcher shares out among the processes of a machine; None for the best there is."""
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdecimal() and torch.cuda.is_available():
        return f"cuda:{int(rank) % torch.cuda.device_count()}"
    return None


def device_of(make: Making) -> str | None:
    """The plan's device; "cuda" without a number is this process's own. None for the best there is."""
    return (own_device() or make.device) if make.device in (None, "cuda") else make.device


def _scheduler(name: str, own: Any) -> Any:
    import diffusers

    kind = _SAMPLERS.get(name.lower(), name.removesuffix("Scheduler"))
    found = getattr(diffusers, f"{kind}Scheduler", None)
    if found is None:
        raise EvaluationError(f"make: {name!r} is no sampler of diffusers; {', '.join(_SAMPLERS.values())} are some of them.")
    return found.from_config(own.config)


__all__ = ["DiffusersMaker", "device_of", "own_device"]
