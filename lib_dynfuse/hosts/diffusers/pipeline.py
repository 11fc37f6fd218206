"""Fused images from a diffusers pipeline, for programs without a WebUI.

    pipeline = load_pipeline("stable-diffusion-v1-5/")
    fused = FusedPipeline(pipeline, read_lora("dog.safetensors"), read_lora("watercolor.safetensors"), FuseSettings())
    result = fused("a dog in a park", seeds=[1])
    result.images[0].save("dog.png")

The pipeline keeps its own loop, scheduler and classifier-free guidance. Our forwards lie on its denoiser and its
text encoders only while these run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...fusion import FusionSession, Report, Rows, Trace
from ...fusion.batches import ModelCall
from ...fusion.calibration import Correlations, SeenEnough
from ...fusion.patching import is_compiled, uncompiled
from ...guidance.encoders import Encoders, load_encoders
from ...guidance.guide import GuidanceRecord, wants_guidance
from ...guidance.references import Reference, reference_of_given, sides_needed
from ...guidance.score import Targets
from ...guidance.weights import EncoderError
from ...lora import LoraFile, smallest_side
from ...reasons import first_line
from ...settings import FuseSettings
from ...tuning.kept import digest_of, keep, known
from ...tuning.plan import small_frame, untuned, wants_tuning
from ...tuning.search import Tuned, search
from ..references import SAME_PROMPT, alone, shown, similarity
from ..sides import SIDES, Loras, as_tuple
from ..wrapping import wrapped
from .guidance import GuidanceSources, GuidedCall, NoDecoderError, guidance_decoders
from .loading import PipelineError
from .references import Job, influential, pixels_of, reference_key, reference_prompt
from .schedulers import SchedulerError, SchedulerSteps, StepsOfCalls
from .text import SummedTextParts, text_encoders


@dataclass(frozen=True)
class FusedImages:
    """images: PIL, in the order of the seeds. trace, report: as a session's. notes: sentences that the user should see.

    guidance: what the guidance saw and did, None where there was none. references: what it steered towards. tuned: what was found
    where the settings were searched for.
    """

    images: list[Image.Image]
    trace: Trace
    report: Report
    notes: list[str]
    guidance: GuidanceRecord | None = None
    references: list[Reference] = field(default_factory=list)
    tuned: Tuned | None = None


Progress = Callable[[int, int], None]
"""(steps done, steps in all)"""
ReferenceProgress = Callable[[str, int, int], None]
"""(side: "subject" or "style", steps done, steps in all)"""


class FusedPipeline:
    """A pipeline and its LoRAs. Nothing is changed on the pipeline between calls."""

    def __init__(
        self,
        pipeline: Any,
        subject: Loras,
        style: Loras,
        settings: FuseSettings | None = None,
        guidance: GuidanceSources | None = None,
    ):
        """pipeline: a diffusers pipeline of PIPELINES. subject, style: one LoRA or several. guidance: where a guided call takes its
        encoders from and keeps its references, None for the user's own folders. Raises FusionError when the LoRAs do not fit the pipeline
        or each other.
        """
        self.pipeline = pipeline
        self.subjects, self.styles = as_tuple(subject), as_tuple(style)
        self.settings = settings or FuseSettings()
        self.guidance = guidance or GuidanceSources()
        self._text = SummedTextParts(text_encoders(pipeline), self.subjects, self.styles, self.settings)
        self._new_session()  # tells now whether the pair fits, not after the prompt was encoded

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seeds: Sequence[int] = (0,),
        steps: int = 30,
        cfg_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        progress: Progress | None = None,
        reference_progress: ReferenceProgress | None = None,
        tuning_progress: Progress | None = None,
        **more: Any,
    ) -> FusedImages:
        """One image per seed, as one batch; an image does not depend on the others of its batch.

        cfg_scale: the CFG scale (Flux: the distilled guidance), None for the pipeline's default. width, height: pixels, None for the
        model's own size. progress: called with (steps done, steps) after each. reference_progress: the same while a reference is made.
        tuning_progress: called with (small pictures made, small pictures) where the settings are searched for.
        more: passed on to the pipeline.
        Raises PipelineError for arguments that the pipeline refuses, and where the guidance cannot follow its scheduler; EncoderError
        and SettingsError where an encoder or a reference picture cannot be had.
        """
        job = Job(negative_prompt, seeds[0], steps, cfg_scale, width, height, more)
        if wants_tuning(self.settings):
            found, notes = self._tuned(prompt, job, tuning_progress)
            settings = untuned(self.settings) if found is None else found.settings(self.settings)
            fused = FusedPipeline(self.pipeline, self.subjects, self.styles, settings, self.guidance)
            made = fused(
                prompt,
                negative_prompt=negative_prompt,
                seeds=seeds,
                steps=steps,
                cfg_scale=cfg_scale,
                width=width,
                height=height,
                progress=progress,
                reference_progress=reference_progress,
                **more,
            )
            return replace(made, tuned=found, notes=notes + made.notes)
        session = self._new_session()
        notes = list(self._text.notes)
        # Under a caller's inference mode no gradient could be taken.
        with torch.inference_mode(False):
            call, references = self._guided(prompt, job, notes, reference_progress)
            if session.compares:
                session.tell_similarity(self._similarity(prompt, job, reference_progress))
            if session.calibrates:
                session.learn(*(self._shown(side, prompt, job) for side in SIDES))
                notes += self._notes_on_prompts(prompt)
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "num_images_per_prompt": len(seeds),
            "num_inference_steps": steps,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "width": width,
            "height": height,
            **more,
        }
        if cfg_scale is not None:
            arguments["guidance_scale"] = cfg_scale
        if negative_prompt and _takes_negative_prompt(self.pipeline):
            arguments["negative_prompt"] = negative_prompt
        elif negative_prompt:
            notes.append("The negative prompt was not used: Flux has none.")
        if progress is not None:
            arguments["callback_on_step_end"] = _step_callback(progress)
        try:
            with (
                torch.inference_mode(False) if call else nullcontext(),
                self._text.during_encoding(self.pipeline),
                self._during_denoising(session, call),
            ):
                images = list(self.pipeline(**arguments).images)
        except ValueError as error:  # what the pipelines' own checks of arguments raise
            raise PipelineError(first_line(error)) from error
        finally:
            session.release()
        record = call.record if call else None
        return FusedImages(
            images, session.trace, session.report, notes + session.notes() + (record.notes if record else []), record, references
        )

    def tuned(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int = 30,
        cfg_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        progress: Progress | None = None,
        **more: Any,
    ) -> Tuned:
        """The search that `tune=auto` asks for, whatever the settings say of it: see tuning. Arguments as for a picture; of its references
        and small pictures the seed is settings.reference_seed where that is given. progress: (small pictures made, small pictures).

        Raises EncoderError or SettingsError where an encoder or a reference picture cannot be had.
        """
        with torch.inference_mode(False):
            return self._search(prompt, Job(negative_prompt, seed, steps, cfg_scale, width, height, more), progress)

    def _tuned(self, prompt: str, job: Job, progress: Progress | None) -> tuple[Tuned | None, list[str]]:
        """What was found, or why nothing was: without encoders the settings stay."""
        try:
            with torch.inference_mode(False):
                return self._search(prompt, job, progress), []
        except EncoderError as error:
            return None, [f"The pair was not tuned: {error}"]

    def _search(self, prompt: str, job: Job, progress: Progress | None) -> Tuned:
        settings, cache, encoders = untuned(self.settings), self.guidance.cache, self._encoders()
        full = pixels_of(self.pipeline)
        frame = small_frame(job.width or full, job.height or full, job.steps, smallest_side(self.subjects[0].family))
        seed = settings.reference_seed if settings.reference_seed >= 0 else job.seed
        job = replace(job, seed=seed, width=frame.width, height=frame.height, steps=frame.steps)
        prompts = {side: reference_prompt(side, settings, self._side(side), prompt) for side in SIDES}
        keys = [reference_key(side, settings, self._side(side), prompts[side], job, self.pipeline, encoders.identity) for side in SIDES]
        digest = digest_of(keys, settings, prompt)
        if (found := known(cache, digest)) is not None:
            return found
        references = [self._reference(side, prompt, job, encoders, None) for side in SIDES]

        def picture(tried: FuseSettings, number: int, count: int) -> Image.Image:
            made = FusedPipeline(self.pipeline, self.subjects, self.styles, tried, replace(self.guidance, encoders=encoders))
            if progress is not None:
                progress(number - 1, count)
            image: Image.Image = made._picture(prompt, job)
            if progress is not None:
                progress(number, count)
            return image

        found = search(settings, frame, references, encoders, picture)
        keep(cache, digest, found, prompt)
        return found

    def _picture(self, prompt: str, job: Job, progress: Progress | None = None) -> Image.Image:
        """One picture of a job of its own."""
        return self(
            prompt,
            negative_prompt=job.negative_prompt,
            seeds=[job.seed],
            steps=job.steps,
            cfg_scale=job.cfg_scale,
            width=job.width,
            height=job.height,
            progress=progress,
            **influential(job.more),
        ).images[0]

    def _side(self, side: str) -> tuple[LoraFile, ...]:
        return self.subjects if side == "subject" else self.styles

    def _encoders(self) -> Encoders:
        """Raises EncoderError."""
        sources = self.guidance.encoders
        return sources if isinstance(sources, Encoders) else load_encoders(sources, self.guidance.progress)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """FusionSession.shapes of the denoiser."""
        return self._new_session().shapes

    def layer_weight(self, name: str) -> Tensor:
        """The weight of one of the denoiser's layers, on the CPU. name: dotted."""
        weight: Tensor = denoiser(self.pipeline).get_submodule(name).weight
        return weight.detach().cpu()

    def _new_session(self) -> FusionSession:
        return FusionSession(denoiser(self.pipeline), self.subjects, self.styles, self.settings)

    @contextmanager
    def _during_denoising(self, session: FusionSession, call: GuidedCall | None) -> Iterator[None]:
        """Each call of the denoiser is a step, in the session's hands; the guidance, if any, takes over behind it."""

        steps = StepsOfCalls(self.pipeline.scheduler)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            name = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
            latent = kwargs[name] if name else args[0]
            rows = rows_of(self.pipeline, latent.shape[0])
            session.begin(steps.next())

            def run(latent: torch.Tensor) -> Any:
                given = ((*args,), {**kwargs, name: latent}) if name else ((latent, *args[1:]), kwargs)
                model_call = ModelCall(forward, *given, latent.shape[0])
                return model_call.of(session.predict(model_call, rows, scale_of(self.pipeline)))

            result = call.denoise(run, latent, kwargs, rows.count) if call else run(latent)
            session.end_step()
            return result

        with ExitStack() as stack:
            stack.enter_context(uncompiled(_part(self.pipeline)))
            stack.enter_context(wrapped(denoiser(self.pipeline), "forward", around))
            if call:
                stack.enter_context(call.during_denoising())
            yield

    def _guided(
        self, prompt: str, job: Job, notes: list[str], progress: ReferenceProgress | None
    ) -> tuple[GuidedCall | None, list[Reference]]:
        """The guidance of a call and its references; none where the settings or missing encoders leave it out."""
        settings = self.settings
        if not wants_guidance(settings):
            return None, []
        sides = sides_needed(settings)
        try:
            SchedulerSteps(self.pipeline.scheduler)
            decoders = guidance_decoders(self.pipeline, settings.decoder, self.guidance.taesd)
        except (SchedulerError, NoDecoderError) as error:
            raise PipelineError(str(error)) from None
        try:
            encoders = self._encoders()
        except EncoderError as error:
            if not self.guidance.go_on:
                raise
            notes.append(f"Made without guidance: {error}")
            return None, []
        seed = settings.reference_seed if settings.reference_seed >= 0 else job.seed
        found = {side: self._reference(side, prompt, replace(job, seed=seed), encoders, progress) for side in sides}
        # A side that does not count is never compared with: the other's embeddings only stand in its place.
        subject, style = (found.get(side, found[sides[0]]).embeddings for side in ("subject", "style"))
        targets = Targets.of(subject, style)
        return GuidedCall(self.pipeline, denoiser(self.pipeline), settings, targets, encoders, decoders), list(found.values())

    def _similarity(self, prompt: str, job: Job, progress: ReferenceProgress | None) -> float:
        """Of the two pictures of one side alone that the method compares. Raises EncoderError."""
        encoders = self._encoders()
        own = self.settings.reference_seed
        job = replace(job, seed=own if own >= 0 else job.seed)
        return similarity([self._generated(side, prompt, job, encoders, progress) for side in SIDES])

    def _shown(self, side: str, prompt: str, job: Job) -> Correlations:
        """What the layers are given with one side alone, in the first step under its own prompt."""
        own = self.settings.reference_seed
        showing = _Showing(self, side)
        try:
            showing(
                reference_prompt(side, self.settings, self._side(side), prompt),
                negative_prompt=job.negative_prompt,
                seeds=[own if own >= 0 else job.seed],
                steps=job.steps,
                cfg_scale=job.cfg_scale,
                width=job.width,
                height=job.height,
                progress=showing.stop,
                **influential(job.more),
            )
        except SeenEnough as enough:
            return enough.correlations
        return showing.session.shown

    def _notes_on_prompts(self, prompt: str) -> list[str]:
        prompts = {reference_prompt(side, self.settings, self._side(side), prompt) for side in SIDES}
        return [SAME_PROMPT.format(method=self.settings.method)] if prompts == {prompt} else []

    def _reference(self, side: str, prompt: str, job: Job, encoders: Encoders, progress: ReferenceProgress | None) -> Reference:
        """The side's reference: the user's picture, the cached one, or a new one."""
        settings = self.settings
        if given := getattr(settings, f"{side}_image"):
            return reference_of_given(side, given, self.guidance.cache, encoders)
        return self._generated(side, reference_prompt(side, settings, self._side(side), prompt), job, encoders, progress)

    def _generated(self, side: str, prompt: str, job: Job, encoders: Encoders, progress: ReferenceProgress | None) -> Reference:
        """The picture of one side's LoRAs alone, from the cache or new. prompt: its own."""
        settings, cache = self.settings, self.guidance.cache
        key = reference_key(side, settings, self._side(side), prompt, job, self.pipeline, encoders.identity)
        if (kept := cache.get(key)) is not None:
            return kept
        alone_ = FusedPipeline(self.pipeline, self.subjects, self.styles, alone(settings, side))
        picture = alone_._picture(prompt, job, partial(progress, side) if progress else None)
        return cache.put(key, picture, encoders.embed_picture(picture), prompt)


class _Showing(FusedPipeline):
    """The pipeline with one side alone, in a session that sees what its layers are given."""

    def __init__(self, fused: FusedPipeline, side: str):
        self.session = FusionSession(denoiser(fused.pipeline), fused.subjects, fused.styles, shown(fused.settings))
        self.session.show(side)
        super().__init__(fused.pipeline, fused.subjects, fused.styles, alone(fused.settings, side))

    def stop(self, done: int, steps: int) -> None:
        raise SeenEnough(self.session.shown)

    def _new_session(self) -> FusionSession:
        return self.session


def denoiser(pipeline: Any) -> nn.Module:
    """The pipeline's U-Net or transformer, without what torch.compile puts around it. Raises PipelineError."""
    found = _part(pipeline)
    return found._orig_mod if is_compiled(found) else found


def _part(pipeline: Any) -> nn.Module:
    found = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if not isinstance(found, nn.Module):
        raise PipelineError(f"{type(pipeline).__name__} has no U-Net or transformer to fuse on.")
    return found


def rows_of(pipeline: Any, batch: int) -> Rows:
    """The rows of a denoiser call: diffusers puts the negative prompt's rows first, and has none without CFG."""
    if not getattr(pipeline, "do_classifier_free_guidance", False):
        return Rows.separate(batch)
    images = batch // 2
    return Rows((*range(images), *range(images)), (False,) * images + (True,) * images, images)


def scale_of(pipeline: Any) -> float:
    """The CFG scale that the rows of a denoiser call are combined with; 1 without CFG."""
    return float(pipeline.guidance_scale) if getattr(pipeline, "do_classifier_free_guidance", False) else 1.0


def _takes_negative_prompt(pipeline: Any) -> bool:
    return getattr(pipeline, "transformer", None) is None and "negative_prompt" in inspect.signature(pipeline.__call__).parameters


def _step_callback(progress: Callable[[int, int], None]) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1, pipeline.num_timesteps)
        return tensors

    return on_step_end


__all__ = ["FusedImages", "FusedPipeline", "denoiser", "rows_of", "scale_of"]
