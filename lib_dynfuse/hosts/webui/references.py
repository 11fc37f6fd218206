"""Pictures that a job needs before its own, in a WebUI: its two references, and the small pictures of tuning.

A reference comes from the cache, from the user, or is generated now with one LoRA alone. What is generated, the WebUI itself makes, as a
job inside the job: same checkpoint, sampler and other LoRAs, but with settings of its own and without any script. It shows in the WebUI's
progress bar and console, and stops with the job.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from ...fusion.calibration import Correlations, SeenEnough
from ...guidance.encoders import Encoders
from ...guidance.references import Reference, ReferenceCache, ReferenceKey, reference_of_given, sides_needed
from ...settings import FuseSettings
from ...tuning.plan import Frame
from ..references import alone, full_weight, shown
from .lora_files import FileVersion
from .picture_options import digest_of_options

log = logging.getLogger(__name__)

_FIELDS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "tiling", "subseed_strength")

# What a reference's job takes over from the picture's, and what it says itself: arguments of StableDiffusionProcessingTxt2Img.
_TAKEN_OVER = (
    *("outpath_samples", "outpath_grids", "sampler_name", "steps", "cfg_scale", "width", "height", "tiling"),
    *("eta", "s_churn", "s_tmin", "s_tmax", "s_noise"),
)
_OF_ITS_OWN: Mapping[str, Any] = {
    **{"styles": [], "subseed": -1, "subseed_strength": 0, "batch_size": 1, "n_iter": 1, "restore_faces": False},
    **{
        "do_not_save_samples": True,
        "do_not_save_grid": True,
        "do_not_reload_embeddings": True,
        "override_settings": {},
        "enable_hr": False,
    },
}
JOB_ARGUMENTS = ("sd_model", "prompt", "negative_prompt", "seed", *_TAKEN_OVER, *_OF_ITS_OWN)


class ReferenceFailed(RuntimeError):
    """A reference that could not be made. One sentence."""


class Interrupted(Exception):
    """The user stopped or skipped the job while its references were made."""


@dataclass(frozen=True)
class BaseIdentity:
    """What the references are made with beside the LoRAs: hashes, or what else tells files apart."""

    checkpoint: str
    vae: str


@dataclass(frozen=True)
class Jobs:
    """Jobs inside a job, fused otherwise than it is.

    p: the WebUI's processing object of the job. tags: every other extra network of its prompt, as it is written there.
    more: arguments of the WebUI's processing objects that only it has. prepare: see roles.Checkpoints. frame: of the pictures, None for
    the job's own.
    """

    p: Any
    settings: FuseSettings
    activation_texts: Mapping[str, str | None]
    tags: str
    more: Mapping[str, Any]
    prepare: Callable[[Any], None]
    frame: Frame | None = None

    def own_prompt(self, side: str) -> str | None:
        """The side's own words; None where it has none, and gets the picture's."""
        return getattr(self.settings, f"{side}_prompt").strip() or (self.activation_texts[side] or "").strip() or None

    def prompt_of(self, side: str) -> str:
        return self.own_prompt(side) or self.prompt

    @property
    def prompt(self) -> str:
        """Of the batch's first picture, without its tags."""
        from modules import extra_networks

        return extra_networks.parse_prompt(self.p.all_prompts[self.first_image])[0].strip()

    @property
    def first_image(self) -> int:
        """The batch's first image; prompts may differ between the batches of a job."""
        return getattr(self.p, "iteration", 0) * self.p.batch_size

    @property
    def seed(self) -> int:
        return self.settings.reference_seed if self.settings.reference_seed >= 0 else int(self.p.all_seeds[0])

    @property
    def own_frame(self) -> Frame:
        return self.frame or Frame(int(self.p.width), int(self.p.height), int(self.p.steps))

    def made(self, prompt: str, settings: FuseSettings, what: str, number: int, total: int) -> Image.Image:
        """Raises ReferenceFailed or Interrupted."""
        told = f"DynFuse: {what} ({number} of {total})"
        print(told)
        with _labelled(told):
            return _generate(self._job(prompt, settings), what)

    def seen(self, side: str) -> Correlations:
        """What the layers are given with one side alone in the first step, which is all that is made. Raises as made does."""
        job, what = self._job(self.prompt_of(side), shown(self.settings)), f"step with the {side} LoRA alone"
        job.dynfuse_shows = side
        with _labelled(f"DynFuse: {what}"):
            try:
                _generate(job, what)
            except SeenEnough as enough:
                return enough.correlations
        raise Interrupted  # before its first step

    def _job(self, prompt: str, settings: FuseSettings) -> Any:
        """A job of its own for one picture. Nothing of the outer job's objects is in it but the checkpoint."""
        from modules.processing import StableDiffusionProcessingTxt2Img

        p = self.p
        job = StableDiffusionProcessingTxt2Img(
            sd_model=p.sd_model,
            prompt=f"{prompt} {self.tags}".strip(),
            negative_prompt=p.all_negative_prompts[self.first_image],
            seed=self.seed,
            # Forge Classic has none: there it is part of the sampler's name.
            **({"scheduler": p.scheduler} if hasattr(p, "scheduler") else {}),
            **{**{name: getattr(p, name) for name in _TAKEN_OVER}, **asdict(self.own_frame)},
            **copy.deepcopy(dict(_OF_ITS_OWN)),
            **self.more,
        )
        # Conditionings of its own: those of the class are shared by all jobs.
        job.cached_c, job.cached_uc = [None, None], [None, None]
        self.prepare(job)
        job.dynfuse_settings = settings
        return job


@dataclass(frozen=True)
class ReferenceMaker:
    """Makes the references of one job. hashes: of the pair, by side."""

    jobs: Jobs
    encoders: Encoders
    cache: ReferenceCache
    base: BaseIdentity
    hashes: Mapping[str, str]
    tags_identity: str

    @property
    def settings(self) -> FuseSettings:
        return self.jobs.settings

    def references(self) -> list[Reference]:
        """The references that count, the subject's first. Raises SettingsError (a given picture), ReferenceFailed or Interrupted."""
        sides = sides_needed(self.settings)
        found: dict[str, Reference] = {}
        missing: list[str] = []
        for side in sides:
            given = getattr(self.settings, f"{side}_image")
            reference = reference_of_given(side, given, self.cache, self.encoders) if given else self.cache.get(self.key(side))
            if reference is None:
                missing.append(side)
            else:
                found[side] = reference
        with announced(len(missing)):
            for number, side in enumerate(missing, 1):
                found[side] = self._generated(side, number, len(missing))
        return [found[side] for side in sides]

    def _generated(self, side: str, number: int, total: int) -> Reference:
        prompt = self.jobs.prompt_of(side)
        picture = self.jobs.made(prompt, alone(self.settings, side), f"reference picture of the {side} LoRA", number, total)
        return self.cache.put(self.key(side), picture, self.encoders.embed_picture(picture), prompt)

    def picture(self, settings: FuseSettings, number: int, total: int) -> Image.Image:
        """A picture of the job's own prompt, fused so. number, total: of such pictures. Raises ReferenceFailed or Interrupted."""
        return self.jobs.made(self.jobs.prompt, settings, "small picture for tuning", number, total)

    def key(self, side: str) -> ReferenceKey:
        """Everything that the side's reference depends on."""
        from modules.shared import opts

        p = self.jobs.p
        blocks = getattr(self.settings, f"{side}_blocks")
        own = [(name, str(getattr(p, name, None))) for name in _FIELDS]
        return ReferenceKey(
            side=side,
            checkpoint=self.base.checkpoint,
            vae=self.base.vae,
            lora=self.hashes[side],
            strength=full_weight(self.settings, side),
            te_strength=self.settings.te_weight,
            others=self.tags_identity,
            prompt=self.jobs.prompt_of(side),
            negative_prompt=p.all_negative_prompts[self.jobs.first_image],
            seed=self.jobs.seed,
            sampler=str(p.sampler_name),
            scheduler=str(getattr(p, "scheduler", None)),
            cfg_scale=float(p.cfg_scale),
            **asdict(self.jobs.own_frame),
            clip_skip=int(getattr(opts, "CLIP_stop_at_last_layers", 1)),
            encoders=self.encoders.identity,
            more=(
                ("options", digest_of_options(opts)),
                # A1111 has it on the model during the whole job.
                ("token merging", str(p.get_token_merging_ratio()) if hasattr(p, "get_token_merging_ratio") else ""),
                *own,
                *[("blocks", blocks)] * bool(blocks),
                *((name, str(value)) for name, value in sorted(self.jobs.more.items())),
            ),
        )


def other_tags(data: Mapping[str, Sequence[Any]], own_tag: str, is_claimed: Any) -> list[tuple[str, list[str]]]:
    """(kind, items) of every extra network of a prompt but ours. data: the WebUI's parsed tags. is_claimed: a LoRA's name -> bool."""
    return [
        (kind, list(params.items))
        for kind, tags in data.items()
        if kind != own_tag
        for params in tags
        if not (kind in ("lora", "lyco") and params.items and is_claimed(params.items[0]))
    ]


def file_identity(path: str | None) -> str:
    """What tells a file's contents apart without reading it: name, size and time of change."""
    if path is None:
        return "none"
    try:
        version = FileVersion.of(path)
    except OSError:
        return os.path.basename(path)
    beside = f" {version.sidecar}" if version.sidecar else ""
    return f"{os.path.basename(path)} {version.size} {version.time}{beside}"


def _generate(job: Any, what: str) -> Image.Image:
    from modules import processing
    from modules.shared import state

    try:
        with own_random_state():
            # Not process_images: that may load another checkpoint, which the outer job has done already.
            processed = processing.process_images_inner(job)
    except SeenEnough:
        raise
    except Exception as error:
        log.exception("DynFuse could not make a %s", what)
        reason = str(error).strip().removeprefix("DynFuse: ") or type(error).__name__
        raise ReferenceFailed(f"the {what} could not be made: {reason}") from None
    finally:
        job.close()
    if state.interrupted or state.skipped or not processed.images:
        raise Interrupted
    return processed.images[0]


@contextlib.contextmanager
def announced(count: int) -> Iterator[None]:
    """The WebUI's progress bar counts the pictures that are made inside as further images of the job."""
    from modules.shared import state, total_tqdm

    if count and state.job_count > 0:
        state.job_count += count
        with contextlib.suppress(Exception):  # the console's total is off, or the user has switched it off
            total_tqdm.updateTotal(total_tqdm._tqdm.total + count * state.sampling_steps)
    yield


@contextlib.contextmanager
def _labelled(what: str) -> Iterator[None]:
    """What the WebUI says that it is doing: in its title and beside the progress bar."""
    from modules.shared import state

    job, text = state.job, state.textinfo
    state.job = state.textinfo = what
    try:
        yield
    finally:
        state.job, state.textinfo = job, text


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """The outer job draws the same random numbers whether its references were made or found."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


__all__ = [
    "JOB_ARGUMENTS",
    "BaseIdentity",
    "Interrupted",
    "Jobs",
    "ReferenceFailed",
    "ReferenceMaker",
    "announced",
    "file_identity",
    "other_tags",
    "own_random_state",
]
