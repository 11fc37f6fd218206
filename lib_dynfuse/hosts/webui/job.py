"""One job's life, seen through seven wrapped functions of the WebUI.

    processing.process_images_inner     a job: whatever happens inside, its end takes back what is ours
    extra_networks.activate             the tags of a batch's prompt: what is fused in the pass that begins, towards which references
    networks.load_networks              those LoRAs are taken out of what is merged; their text-encoder parts are merged instead
    KDiffusionSampler.get_sigmas,       the noise levels of the pass
    CompVisSampler.get_timesteps        (and Roles.schedules)
    CFGDenoiser.forward                 one denoiser step, fused and guided
    sd_samplers_common.apply_refiner    inside it, the refiner may replace the model

A host's callbacks swallow exceptions, and an image would come out as if nothing had happened; so what must stop an image is
kept as a sentence and raised in CFGDenoiser.forward, from where it reaches the UI and the API. A job that asks for nothing of ours
meets wrappers that look for its tag and pass the call on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ...fusion.rules import RULES
from ...fusion.votes import measuring_memory
from ...lora.branch import applied_size
from ...settings import FuseSettings
from ...text import tag
from .capabilities import Call, Seam, Value
from .catalogue import Catalogue
from .guided import memory_needed
from .passes import FusionPass, Request
from .record import FusionJob, current_pass
from .requests import TAG, Requests, is_reference
from .roles import Roles
from .seams import Wrapping, argument

log = logging.getLogger(__name__)

NOTE = "DynFuse note"

JOB = Seam("modules.processing", "process_images_inner", ("p",))
ACTIVATE = Seam("modules.extra_networks", "activate", ("p", "extra_network_data"))
LOAD_NETWORKS = Seam("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers"))
SIGMAS = Seam("modules.sd_samplers_kdiffusion", "KDiffusionSampler.get_sigmas", ("self", "p", "steps"))
TIMESTEPS = Seam("modules.sd_samplers_timesteps", "CompVisSampler.get_timesteps", ("self", "p", "steps"))
DENOISER = Seam("modules.sd_samplers_cfg_denoiser", "CFGDenoiser.forward", ("self", "x", "sigma", "uncond", "cond", "cond_scale"))
REFINER = Seam("modules.sd_samplers_common", "apply_refiner", ("cfg_denoiser",))

NEEDS = (
    *(JOB, ACTIVATE, LOAD_NETWORKS, SIGMAS, TIMESTEPS, DENOISER, REFINER),
    Call("modules.extra_networks", "register_extra_network", 1),
    Call("modules.processing", "StableDiffusionProcessing.comment", 2),
    *(
        Value("modules.processing", f"StableDiffusionProcessing.{name}")
        for name in ("comments", "extra_generation_params", "disable_extra_networks")
    ),
)


class JobSeams:
    """What the wrapped functions do. There is one of it per WebUI, and one job at a time."""

    def __init__(self, roles: Roles, catalogue: Catalogue, requests: Requests):
        self._roles = roles
        self._catalogue = catalogue
        self._requests = requests
        self._active: FusionPass | None = None
        self._jobs: list[Any] = []  # under way, the innermost last: other extensions make jobs inside a job
        # Begun inside a job and past our wrapper: where ControlNet is, ADetailer puts the function back that ControlNet found.
        self._unseen: list[FusionJob] = []
        self._text_label: str | None = None
        self._text_parts_in = False  # or may be, after an error
        self._text_parts_seen = False  # whether there ever were any

    def wrappings(self) -> list[Wrapping]:
        """Of all seams."""
        return [
            Wrapping(JOB, self._around_job),
            Wrapping(ACTIVATE, self._around_activate, stops=self._asks),
            Wrapping(LOAD_NETWORKS, self._around_load_networks),
            Wrapping(SIGMAS, self._around_schedule),
            Wrapping(TIMESTEPS, self._around_schedule),
            *(Wrapping(seam, self._around_schedule) for seam in self._roles.schedules),
            Wrapping(DENOISER, self._around_denoiser, stops=self._is_fused),
            Wrapping(REFINER, self._around_refiner, stops=self._is_fused),
        ]

    def forget(self) -> None:
        """No pass is under way any more, whatever became of the last."""
        self._active = None
        self._take_text_parts_back()

    def before_sampling(self, p: Any) -> None:
        """A sampling is about to begin, and the host about to decide what stays in the device's memory."""
        current = current_pass(p)
        if current is None or current.request is None:
            return
        elements = sum(applied_size(branch) for file in current.request.files for branch in file.denoiser.values())
        guidance, bytes_ = current.guidance, 0
        measures = RULES[current.request.settings.method].measures or current.request.watched
        if measures or (guidance is not None and guidance.encoders is not None):
            size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if current.hires else (p.width, p.height)
        if measures:
            samples, terms = _measuring(current.request, *size, p.batch_size)
            elements, bytes_ = elements + samples, terms
        if guidance is not None and guidance.encoders is not None:
            bytes_ += memory_needed(guidance.settings, guidance.encoders, *size, p.batch_size)
        self._roles.denoisers.reserve(p, elements, bytes_)

    # Whether an error of ours must stop the job, because a fused picture was asked for.

    def _asks(self, p: Any, extra_network_data: Any = None, *args: Any, **kwargs: Any) -> bool:
        return FusionJob.of(p) is not None or self._requests.asks(p, extra_network_data or {}) or self._inherited(p) is not None

    def is_inner(self, p: Any) -> bool:
        """Whether a job was begun inside another one, as ADetailer's are."""
        return any(outer is not p for outer in self._jobs[:1])

    def _inherited(self, p: Any) -> FuseSettings | None:
        """What the job that p is a part of asks for: a repainted face is drawn by the same LoRAs, whatever prompt and scripts it was given.

        Without guidance: the references are of the whole picture.
        """
        for outer in reversed(self._jobs):
            job = FusionJob.of(outer)
            if outer is p or job is None or job.current is None or job.current.settings is None:
                continue
            return dataclasses.replace(job.current.settings, guidance=False)
        return None

    def _is_fused(self, cfg_denoiser: Any, *args: Any, **kwargs: Any) -> bool:
        return current_pass(getattr(cfg_denoiser, "p", None)) is not None

    # process_images_inner

    def _around_job(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        p = argument(args, kwargs, 0, "p")
        inside = bool(self._jobs) and not is_reference(p)
        self._jobs.append(p)
        try:
            if FusionJob.of(p) is not None:
                del p.dynfuse  # some scripts run the same processing object again and again
            if inside:
                _put_tags_right(p)
            result = original(*args, **kwargs)
        finally:
            try:
                self._end_job(p)
            finally:
                self._jobs.pop()
        self._tell(p, result)
        return result

    def _end_job(self, p: Any) -> None:
        try:
            self.forget()
        finally:
            job = FusionJob.of(p)
            if job is not None:
                job.end()
            self._end_unseen()

    def _end_unseen(self, but: FusionJob | None = None) -> None:
        for job in self._unseen:
            if job is not but:
                job.end()
        self._unseen = [job for job in self._unseen if job is but]

    def _tell(self, p: Any, result: Any) -> None:
        """Put the notes of a finished job where the user (text under the image) and API clients (its parameters) see them."""
        job = FusionJob.of(p)
        if job is None:
            return
        notes = job.notes()
        for note in notes:
            p.comment(note)
        if notes:
            p.extra_generation_params[NOTE] = " ".join(notes)
            result.comments = "".join(f"{comment}\n" for comment in p.comments)
        else:
            p.extra_generation_params.pop(NOTE, None)

    # extra_networks.activate

    def _around_activate(self, original: Callable[..., Any], p: Any, extra_network_data: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_unseen(p) and getattr(p, "all_prompts", None) is None:
            return self._aside(original, p, extra_network_data, *args, **kwargs)
        data = self._read_again(p, extra_network_data or {})
        if self._asks(p, data) or self._active is not None or self._text_parts_in:
            job = FusionJob.of(p)
            # Forge activates the tags again when the refiner takes over in the middle of a pass; A1111 does not.
            if job is None or job.current is None or not job.current.denoising:
                self._begin_pass(p, data)
        self._take_leftovers_back()
        return original(p, extra_network_data, *args, **kwargs)

    def _aside(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What is no job, but a model that is loaded inside one, a refiner or for the hires pass: it encodes the empty prompt, without any
        LoRA (sd_models.py, get_empty_cond). The job's own tags come after it.
        """
        active, self._active = self._active, None
        try:
            return original(*args, **kwargs)
        finally:
            self._active = active

    def _is_unseen(self, p: Any) -> bool:
        return bool(self._jobs) and all(p is not one for one in self._jobs)

    def _read_again(self, p: Any, data: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """The parsed tags of a pass; of an unseen job, whose prompts nobody has put right, those that were meant."""
        if not self._is_unseen(p) or is_reference(p) or getattr(p, "is_hr_pass", False):
            return data
        tags = _tags(p)
        return {**data, TAG: [SimpleNamespace(items=items) for items in tags]} if tags else data

    def _begin_pass(self, p: Any, data: Mapping[str, Sequence[Any]]) -> None:
        """Every activation replaces whatever was asked for before; nothing of it is left, even if its job died."""
        self.forget()
        known = FusionJob.of(p)
        job = known or FusionJob(p)
        self._end_unseen(but=job)
        new = self._requests.requested(p, data, job, self._inherited(p))
        if known is None and new is None:
            return
        p.dynfuse = job
        if self._is_unseen(p) and job not in self._unseen:
            self._unseen.append(job)
        job.over = False
        job.begin(new)
        self._active = new
        if new is None:
            return
        p.extra_generation_params[NOTE] = _when_written(job)
        label = new.request.text.label if new.request and new.request.text else new.error
        if label != self._text_label:
            _forget_conditionings(p)
            self._text_label = label

    # networks.load_networks, and the text-encoder parts

    def _around_load_networks(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = self._active
        if active is None or active.request is None:
            return original(*args, **kwargs)
        try:
            args, kwargs = self._without_ours(active, active.request, args, kwargs)
        except Exception as reason:
            log.exception("DynFuse could not read the prompt's <lora:...> tags")
            active.error = f"DynFuse could not read the prompt's <lora:...> tags: {type(reason).__name__}: {reason}"
        try:
            return original(*args, **kwargs)
        finally:
            # Forge's own function fails on an unknown <lora:...>, and the WebUI goes on without it; the pair must not be lost with it.
            self._merge_text_parts(active)

    def _without_ours(
        self, active: FusionPass, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of load_networks less those LoRAs that are fused; whatever is parallel to the names is cut with them."""
        names = argument(args, kwargs, 0, "names")
        claimed = [self._catalogue.is_among(name, request.paths) for name in names]
        for name in dict.fromkeys(name for name, ours in zip(names, claimed) if ours):
            active.note(f"<lora:{name}> was left out: DynFuse uses this LoRA already, at the weights of its own tag or panel.")

        def kept(values: Any) -> Any:
            if not isinstance(values, (list, tuple)) or len(values) != len(names):
                return values
            return [value for value, ours in zip(values, claimed) if not ours]

        return tuple(kept(values) for values in args), {key: kept(values) for key, values in kwargs.items()}

    def _merge_text_parts(self, active: FusionPass) -> None:
        assert active.request is not None
        if active.request.text is None:
            return
        self._text_parts_in = self._text_parts_seen = True
        try:
            unmatched = self._roles.text_encoders.add(active.request.text)
        except Exception as reason:
            log.exception("DynFuse could not merge the text-encoder parts")
            self._text_label = None  # what is encoded now must not be found again
            active.error = f"DynFuse could not merge the text-encoder parts: {type(reason).__name__}: {reason}"
            return
        if unmatched:
            active.note(f"{len(unmatched)} layers of the LoRAs' text-encoder parts are not in this model (such as {unmatched[0]}).")

    def _take_leftovers_back(self) -> None:
        fused = self._active is not None and self._active.request is not None
        if fused or self._text_parts_seen:
            self._roles.text_encoders.take_leftovers_back(fused)

    def _take_text_parts_back(self) -> None:
        """A WebUI that never merged anything of ours is not even looked at."""
        if self._text_parts_in:
            self._roles.text_encoders.remove()
            self._text_parts_in = False

    # get_sigmas, get_timesteps, forward, apply_refiner

    def _around_schedule(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels = original(*args, **kwargs)
        current = current_pass(argument(args, kwargs, 1, "p"))
        if current is not None:
            current.sampling.begin(levels)
        return levels

    def _around_denoiser(self, original: Callable[..., Any], cfg_denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        current = current_pass(getattr(cfg_denoiser, "p", None))
        if current is None:
            return original(cfg_denoiser, *args, **kwargs)
        try:
            with self._roles.text_encoders.aside():
                return current.denoise(cfg_denoiser, functools.partial(original, cfg_denoiser), args, kwargs)
        except RuntimeError as error:
            outer = next((job for job in reversed(self._jobs) if job is not cfg_denoiser.p), None)
            if outer is not None and not is_reference(cfg_denoiser.p) and str(error).startswith("DynFuse"):
                _note(outer, f"A job inside this one was stopped, and what it should have drawn is not there. {error}")
            raise

    def _around_refiner(self, original: Callable[..., Any], cfg_denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        current = current_pass(getattr(cfg_denoiser, "p", None))
        if current is None:
            return original(cfg_denoiser, *args, **kwargs)
        return current.switch_model(cfg_denoiser, lambda: original(cfg_denoiser, *args, **kwargs))


def _put_tags_right(p: Any) -> None:
    """Our tags in a job's prompts as the WebUI reads them, or one that says what is wrong: what the script does for a job of the panel. In
    a job inside another one it may not be run.
    """

    def change(name: str, changed: Callable[[str], str]) -> None:
        text = getattr(p, name, None)
        if text:
            setattr(p, name, changed(text) if isinstance(text, str) else [changed(one) for one in text])

    for name in ("prompt", "hr_prompt"):
        change(name, tag.put_right)
    negative = [getattr(p, name, None) or "" for name in ("negative_prompt", "hr_negative_prompt")]
    misplaced = tag.misplaced(one for text in negative for one in ([text] if isinstance(text, str) else text))
    if misplaced:
        change("prompt", lambda text: misplaced + text)


def _tags(p: Any) -> list[list[str]]:
    """The items of our tags in the first prompt of a job's batch, or one that says what is wrong: as _put_tags_right, but too late to
    change the prompts.
    """
    first = getattr(p, "iteration", 0) * p.batch_size
    prompts = p.all_prompts[first : first + 1] or p.all_prompts[:1]
    return tag.find_tags(tag.misplaced(p.all_negative_prompts) + "".join(map(tag.put_right, prompts)))


def _note(p: Any, sentence: str) -> None:
    """Tell the user of a running job something."""
    job = FusionJob.of(p)
    if job is not None and job.current is not None:
        job.current.note(sentence)
    else:
        p.comment(sentence)
        p.extra_generation_params[NOTE] = sentence


def _measuring(request: Request, width: int, height: int, images: int) -> tuple[int, int]:
    """See votes.measuring_memory."""
    changed: dict[str, list[tuple[int, ...]]] = {}
    for file in request.files:
        for name, branch in file.denoiser.items():
            if branch.shape is not None:
                changed.setdefault(name, []).append(branch.shape)
    shapes = [(math.prod(found[0][1:]), found[0][0]) for found in changed.values() if len(found) > 1]
    # A latent's pixel is 8 of the picture's, and the most tokens that a layer has.
    tokens = max(1, width // 8) * max(1, height // 8)
    return measuring_memory(request.settings, shapes, len(request.files), tokens, images)


def _when_written(job: FusionJob) -> Callable[..., str | None]:
    """An infotext entry whose value is made when the infotext is: after the pass, when the notes are complete."""

    def note(**_: Mapping[str, Any]) -> str | None:
        return " ".join(job.notes()) or None

    return note


def _forget_conditionings(p: Any) -> None:
    """Have the prompts encoded anew.

    The hosts keep encoded prompts across jobs under the prompt and its tags; a LoRA file that changed under the same name,
    or appeared after a job that could not find it, is not in that key.
    """
    for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
        cache = getattr(p, name, None)
        if cache:
            cache[0] = None


__all__ = ["NEEDS", "JobSeams"]
