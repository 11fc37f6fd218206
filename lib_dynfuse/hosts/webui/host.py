"""What DynFuse asks of a WebUI, and what all of them have in common.

Seven functions of the WebUI are wrapped (_SEAMS); together they are one job's life:

    processing.process_images_inner     a job: whatever happens inside, its end takes back what is ours
    extra_networks.activate             the tags of a batch's prompt: which pair is fused in the pass that begins, towards which references
    networks.load_networks              the pair is taken out of what is merged; its text-encoder parts are merged instead
    KDiffusionSampler.get_sigmas,       the noise levels of the pass
    CompVisSampler.get_timesteps
    CFGDenoiser.forward                 one denoiser step, fused and guided
    sd_samplers_common.apply_refiner    inside it, the refiner may replace the model

A host's callbacks swallow exceptions, and an image would come out as if nothing had happened; so what must stop an image is
kept as a sentence and raised in CFGDenoiser.forward, from where it reaches the UI and the API.

First of all: do no harm. Whatever is needed of the WebUI is looked up before anything is wrapped; if a piece is missing or different,
nothing is (see off). A job that asks for nothing of ours meets wrappers that look for its tag and pass the call on.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...fusion import FusionError
from ...guidance.correction import Kind
from ...guidance.decode import ZeroToOne
from ...guidance.encoders import Encoders, load_encoders
from ...guidance.guide import wants_guidance
from ...guidance.references import ReferenceCache
from ...guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderError, EncoderSources
from ...lora import LoraFile, compatible
from ...lora.branch import LoraError, applied_size
from ...settings import FuseSettings, SettingsError
from ..references import activation_text
from .capabilities import Call, Seam, Value, off_because, why_off
from .guided import GuidedPass, HostVae, memory_needed
from .lora_files import FileVersion, LoraFiles
from .passes import FusionJob, FusionPass, Request, RowLayout
from .references import (
    JOB_ARGUMENTS,
    BaseIdentity,
    Interrupted,
    ReferenceFailed,
    ReferenceMaker,
    file_identity,
    other_tags,
    own_random_state,
)
from .seams import Seams, Wrapping, argument
from .text_parts import TextParts, text_parts

log = logging.getLogger(__name__)

TAG = "dynfuse"
NOTE = "DynFuse note"
PREVIEW_ENDINGS = tuple(f"{middle}.{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif") for middle in ("", ".preview"))

MEBIBYTE = 1 << 20

NOT_INSTALLED = off_because("the WebUI has not told it to begin")

_JOB = Seam("modules.processing", "process_images_inner", ("p",))
_ACTIVATE = Seam("modules.extra_networks", "activate", ("p", "extra_network_data"))
_LOAD_NETWORKS = Seam("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers"))
_SIGMAS = Seam("modules.sd_samplers_kdiffusion", "KDiffusionSampler.get_sigmas", ("self", "p", "steps"))
_TIMESTEPS = Seam("modules.sd_samplers_timesteps", "CompVisSampler.get_timesteps", ("self", "p", "steps"))
_DENOISER = Seam("modules.sd_samplers_cfg_denoiser", "CFGDenoiser.forward", ("self", "x", "sigma", "uncond", "cond", "cond_scale"))
_REFINER = Seam("modules.sd_samplers_common", "apply_refiner", ("cfg_denoiser",))
_SEAMS = (_JOB, _ACTIVATE, _LOAD_NETWORKS, _SIGMAS, _TIMESTEPS, _DENOISER, _REFINER)

_JOB_FIELDS = (
    *("comments", "extra_generation_params", "all_prompts", "all_negative_prompts", "all_seeds", "batch_size"),
    *("disable_extra_networks", "sampler_name", "steps", "cfg_scale", "width", "height"),
)
_NEEDS = (
    *_SEAMS,
    Call("modules.extra_networks", "register_extra_network", 1),
    Call("modules.extra_networks", "parse_prompt", 1),
    Call("networks", "list_available_networks"),
    *(
        Value("networks", name)
        for name in ("available_networks", "available_network_aliases", "forbidden_network_aliases", "available_network_hash_lookup")
    ),
    *(Value("modules.shared", name) for name in ("opts", "state", "sd_model")),
    Value("modules.paths_internal", "models_path"),
    Value("modules.sd_vae", "loaded_vae_file"),
    Call("modules.processing", "StableDiffusionProcessing.comment", 2),
    *(Value("modules.processing", f"StableDiffusionProcessing.{name}") for name in _JOB_FIELDS),
    Call("modules.processing", "StableDiffusionProcessingTxt2Img", keywords=JOB_ARGUMENTS),
)

# The items of every <dynfuse:...> tag of a prompt -> the settings they ask for, None without a tag. Raises SettingsError.
ParseTags = Callable[[Sequence[Sequence[str]]], FuseSettings | None]


class UnknownLora(LookupError):
    """A name that the WebUI's list of LoRAs does not have. One sentence."""


class WebUIHost(ABC):
    """A running WebUI. There is one of it per process: see detect."""

    name: str
    needs: ClassVar[tuple[Value, ...]] = _NEEDS  # what is asked of the WebUI and can be looked up before a model is loaded
    barred: ClassVar[tuple[str, ...]] = ()  # modules of WebUIs that look like this one and are not

    def __init__(self) -> None:
        self.off: str | None = NOT_INSTALLED  # one sentence on why DynFuse does nothing here; None while it is installed
        self._seams = Seams()
        self._files = LoraFiles()
        self._parse_tags: ParseTags = lambda tags: None
        self._active: FusionPass | None = None
        self._text_label: str | None = None
        self._text_parts_in = False  # or may be, after an error

    # The WebUI's LoRAs. All five hosts keep them under the same names in the module `networks`.

    def lora_names(self) -> list[str]:
        """The LoRAs as the WebUI's own list shows them: file names without ending."""
        return sorted(_networks().available_networks, key=str.lower)

    def refresh(self) -> None:
        """Look for LoRA files again."""
        _networks().list_available_networks()

    def lora_path(self, name: str) -> str | None:
        """The file of a LoRA by file name or alias, None if the WebUI does not know it."""
        entry = self._entry(name)
        return entry.filename if entry is not None else None

    def lora_hash(self, name: str) -> str | None:
        """The short hash under which the WebUI knows a LoRA; reads the file the first time."""
        entry = self._entry(name)
        if entry is None:
            return None
        entry.read_hash()
        return entry.shorthash or None

    def lora_name_by_hash(self, value: str) -> str | None:
        """The LoRA of this short hash, as in lora_names."""
        entry = _networks().available_network_hash_lookup.get(value)
        return entry.name if entry is not None else None

    def lora_preview(self, name: str) -> str | None:
        """Path of the picture that the WebUI shows for a LoRA."""
        path = self.lora_path(name)
        if path is None:
            return None
        stem = os.path.splitext(path)[0]
        return next((stem + ending for ending in PREVIEW_ENDINGS if os.path.isfile(stem + ending)), None)

    def activation_text(self, name: str) -> str | None:
        """What the WebUI keeps as a LoRA's activation text; None if there is none."""
        path = self.lora_path(name)
        return activation_text(path) if path is not None else None

    def _entry(self, name: str) -> Any:
        """The WebUI's record of a LoRA. Looks names up as networks.load_networks does."""
        networks = _networks()
        # An alias that two files share stands for neither.
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name) or networks.available_networks.get(name)

    # What the guidance keeps on disk. The options are registered by webui/options.py.

    @property
    def data_folder(self) -> Path:
        """Where encoders and references are kept: models/dynfuse."""
        from modules import paths_internal

        return Path(paths_internal.models_path, "dynfuse")

    @property
    def reference_cache(self) -> ReferenceCache:
        """The references of earlier jobs, and the pictures that the user gave."""
        return ReferenceCache(self.data_folder / "references", int(_option("dynfuse_reference_cache_mb", 256)) * MEBIBYTE)

    def encoder_sources(self) -> EncoderSources:
        """Which encoders the user wants, and where they lie."""
        return EncoderSources(
            Path(_option("dynfuse_encoders_folder", "") or self.data_folder),
            str(_option("dynfuse_clip_model", "") or CLIP_DEFAULT).strip(),
            str(_option("dynfuse_dino_model", "") or DINO_DEFAULT).strip(),
            bool(_option("dynfuse_download_encoders", True)),
        )

    # Installing.

    def install(self, parse_tags: ParseTags) -> None:
        """Wrap the WebUI's functions, or none of them: see off. May be called again at any time, with another parser."""
        self._parse_tags = parse_tags
        try:
            off = why_off(self.needs, self.barred)
            if off is None:
                self._seams.install(self._wrappings())
        except Exception as reason:
            log.exception("DynFuse could not be installed")
            off = off_because(f"it could not be installed ({type(reason).__name__}: {reason})")
        if off is not None:
            self._seams.undo()
            if off != self.off:
                print(off)
        self.off = off

    def uninstall(self) -> None:
        """Take everything back."""
        self.off = NOT_INSTALLED
        self._active = None
        try:
            self._take_text_parts_back()
        except Exception:
            log.exception("DynFuse could not take its text-encoder parts back")
        self._seams.undo()

    def _wrappings(self) -> list[Wrapping]:
        return [
            Wrapping(_JOB, self._around_job),
            Wrapping(_ACTIVATE, self._around_activate, stops=self._asks),
            Wrapping(_LOAD_NETWORKS, self._around_load_networks),
            Wrapping(_SIGMAS, self._around_schedule),
            Wrapping(_TIMESTEPS, self._around_schedule),
            Wrapping(_DENOISER, self._around_denoiser, stops=self._is_fused),
            Wrapping(_REFINER, self._around_refiner, stops=self._is_fused),
        ]

    # Whether an error of ours must stop the job, because a fused picture was asked for.

    @staticmethod
    def _asks(p: Any, extra_network_data: Any = None, *args: Any, **kwargs: Any) -> bool:
        return TAG in (extra_network_data or {}) or getattr(p, "dynfuse_settings", None) is not None or FusionJob.of(p) is not None

    @staticmethod
    def _is_fused(cfg_denoiser: Any, *args: Any, **kwargs: Any) -> bool:
        return _current_pass(getattr(cfg_denoiser, "p", None)) is not None

    # What the panel reads.

    def last_pass(self, p: Any) -> FusionPass | None:
        """The last pass of a job, running or over; None if nothing was fused. See FusionPass.trace, settings, notes."""
        passes = self.passes(p)
        return passes[-1] if passes else None

    def passes(self, p: Any) -> list[FusionPass]:
        """The passes of a job's last batch: the first pass and, with hires fix, the second."""
        job = FusionJob.of(p)
        return job.passes if job is not None else []

    # One job.

    def _around_job(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        p = argument(args, kwargs, 0, "p")
        try:
            if FusionJob.of(p) is not None:
                del p.dynfuse  # some scripts run the same processing object again and again
            result = original(*args, **kwargs)
        finally:
            self._end_job(p)
        self._tell(p, result)
        return result

    def _end_job(self, p: Any) -> None:
        self._active = None
        try:
            self._take_text_parts_back()
        finally:
            job = FusionJob.of(p)
            if job is not None:
                job.end()

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

    def _around_activate(self, original: Callable[..., Any], p: Any, extra_network_data: Any, *args: Any, **kwargs: Any) -> Any:
        if self._asks(p, extra_network_data) or self._active is not None or self._text_parts_in:
            job = FusionJob.of(p)
            # Forge activates the tags again when the refiner takes over in the middle of a pass; A1111 does not.
            if job is None or job.current is None or not job.current.denoising:
                self._begin_pass(p, extra_network_data or {})
        return original(p, extra_network_data, *args, **kwargs)

    def _begin_pass(self, p: Any, data: Mapping[str, Sequence[Any]]) -> None:
        """Every activation replaces whatever was asked for before; nothing of it is left, even if its job died."""
        self._active = None
        self._take_text_parts_back()
        known = FusionJob.of(p)
        job = known or FusionJob(p)
        new = self._requested(p, data, job)
        if known is None and new is None:
            return
        p.dynfuse = job
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

    def _take_text_parts_back(self) -> None:
        """A WebUI that never merged anything of ours is not even looked at."""
        if self._text_parts_in:
            self.remove_text_parts()
            self._text_parts_in = False

    def _requested(self, p: Any, data: Mapping[str, Sequence[Any]], job: FusionJob) -> FusionPass | None:
        """The pass that the tags ask for: None without a tag, one with an error sentence if it cannot be done."""
        new = FusionPass(self, hires=bool(getattr(p, "is_hr_pass", False)), batch=getattr(p, "iteration", 0))
        try:
            # A reference's job says itself what it is.
            own = getattr(p, "dynfuse_settings", None)
            new.settings = own or self._parse_tags([list(params.items) for params in data.get(TAG, [])])
            if new.settings is None:
                return None
            new.request = self._read_pair(new.settings)
            if wants_guidance(new.settings):
                new.guidance = self._guidance(p, data, new, job)
        except (SettingsError, LoraError, UnknownLora, FusionError, EncoderError, ReferenceFailed) as reason:
            new.error = f"DynFuse: {reason}"
        except Exception as reason:
            log.exception("DynFuse could not prepare the fusion")
            new.error = f"DynFuse could not prepare the fusion: {type(reason).__name__}: {reason}"
        else:
            for file in (new.request.subject, new.request.style):
                for note in _unused(file):
                    new.note(note)
        return new

    def _guidance(self, p: Any, data: Mapping[str, Sequence[Any]], new: FusionPass, job: FusionJob) -> GuidedPass | None:
        """The guidance of a pass, with its references at hand. Raises EncoderError, SettingsError or ReferenceFailed."""
        assert new.settings is not None
        assert new.request is not None
        try:
            with own_random_state():  # a new encoder is filled with random numbers before its weights are
                job.encoders = encoders = load_encoders(self.encoder_sources(), _loading_progress)
            references = job.references_for(new) or self._reference_maker(p, data, new.request, encoders).references()
        except EncoderError as reason:
            if _option("dynfuse_without_encoders", "stop") != "go on":
                raise
            new.note(f"The picture was not guided. {reason}")
            return None
        except Interrupted:
            return None  # the job itself stops at its first step
        return GuidedPass(self, new.settings, encoders, references, job.decoders)

    def _reference_maker(self, p: Any, data: Mapping[str, Sequence[Any]], request: Request, encoders: Encoders) -> ReferenceMaker:
        settings = request.settings
        names = {"subject": settings.subject, "style": settings.style}
        versions = dict(zip(names, request.versions))
        tags = other_tags(data, TAG, lambda name: self._is_claimed(name, request.paths))
        return ReferenceMaker(
            p,
            settings,
            encoders,
            self.reference_cache,
            self.base_identity(p),
            hashes={side: self.lora_hash(name) or file_identity(versions[side].path) for side, name in names.items()},
            activation_texts={side: self.activation_text(name) for side, name in names.items()},
            tags=" ".join(f"<{kind}:{':'.join(items)}>" for kind, items in tags),
            tags_identity="; ".join(
                f"{kind}:{':'.join(items)} ({file_identity(self.lora_path(items[0])) if items else ''})" for kind, items in tags
            ),
            more=self.reference_arguments(p),
        )

    def _read_pair(self, settings: FuseSettings) -> Request:
        paths = [self._known_path(name) for name in (settings.subject, settings.style)]
        real = frozenset(os.path.realpath(path) for path in paths)
        if len(real) == 1:
            raise UnknownLora(f"{settings.subject!r} and {settings.style!r} are the same LoRA, {os.path.basename(paths[0])}; name two.")
        versions: list[FileVersion] = []
        files: list[LoraFile] = []
        for path in paths:
            try:
                version, file = self._files.read(path)
            except OSError as error:
                raise LoraError(f"{os.path.basename(path)} cannot be read: {error.strerror or error}.") from None
            versions.append(version)
            files.append(file)
        reason = compatible(*files)
        if reason is not None:
            raise FusionError(reason)
        return Request(settings, files[0], files[1], real, tuple(versions), text_parts(settings, files, versions))

    def _known_path(self, name: str) -> str:
        path = self.lora_path(name)
        if path is None or not os.path.isfile(path):
            self.refresh()
            path = self.lora_path(name)
        if path is None:
            raise UnknownLora(_unknown(name, [*_networks().available_networks, *_networks().available_network_aliases]))
        return path

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
        claimed = [self._is_claimed(name, request.paths) for name in names]
        for name in dict.fromkeys(name for name, ours in zip(names, claimed) if ours):
            active.note(f"<lora:{name}> was left out: DynFuse uses this LoRA already, at the weights of its own tag or panel.")

        def kept(values: Any) -> Any:
            if not isinstance(values, (list, tuple)) or len(values) != len(names):
                return values
            return [value for value, ours in zip(values, claimed) if not ours]

        return tuple(kept(values) for values in args), {key: kept(values) for key, values in kwargs.items()}

    def _is_claimed(self, name: str, paths: frozenset[str]) -> bool:
        path = self.lora_path(name)
        return path is not None and os.path.realpath(path) in paths

    def _merge_text_parts(self, active: FusionPass) -> None:
        assert active.request is not None
        if active.request.text is None:
            return
        self._text_parts_in = True
        try:
            unmatched = self.add_text_parts(active.request.text)
        except Exception as reason:
            log.exception("DynFuse could not merge the text-encoder parts")
            self._text_label = None  # what is encoded now must not be found again
            active.error = f"DynFuse could not merge the text-encoder parts: {type(reason).__name__}: {reason}"
            return
        if unmatched:
            active.note(f"{len(unmatched)} layers of the LoRAs' text-encoder parts are not in this model (such as {unmatched[0]}).")

    def _around_denoiser(self, original: Callable[..., Any], cfg_denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        current = _current_pass(getattr(cfg_denoiser, "p", None))
        if current is None:
            return original(cfg_denoiser, *args, **kwargs)
        return current.denoise(cfg_denoiser, functools.partial(original, cfg_denoiser), args, kwargs)

    def _around_schedule(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        levels = original(*args, **kwargs)
        current = _current_pass(argument(args, kwargs, 1, "p"))
        if current is not None and current.guidance is not None:
            current.guidance.levels = levels
        return levels

    def _around_refiner(self, original: Callable[..., Any], cfg_denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        current = _current_pass(getattr(cfg_denoiser, "p", None))
        if current is None:
            return original(cfg_denoiser, *args, **kwargs)
        return current.switch_model(cfg_denoiser, lambda: original(cfg_denoiser, *args, **kwargs))

    def before_sampling(self, p: Any) -> None:
        """A sampling is about to begin, and the host about to decide what stays in the device's memory."""
        current = _current_pass(p)
        if current is not None and current.request is not None:
            files = (current.request.subject, current.request.style)
            self.reserve_memory(p, sum(applied_size(branch) for file in files for branch in file.denoiser.values()))
            guidance = current.guidance
            if guidance is not None and guidance.encoders is not None:
                size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if current.hires else (p.width, p.height)
                self.reserve_guidance_memory(p, memory_needed(guidance.settings, guidance.encoders, *size, p.batch_size))

    # What a guided pass asks (see guided_pass.Guided), as far as the hosts agree.

    def denoised(self, cfg_denoiser: Any, x: Tensor, s: float, prediction: Tensor) -> Tensor:
        """See Guided."""
        if not self.works_on_eps(cfg_denoiser):
            return prediction
        return x * (1.0 + s**2) ** 0.5 - s * prediction

    def rectified_ancestral(self, cfg_denoiser: Any) -> bool:
        """See Guided."""
        return False

    def taesd_decoder(self, cfg_denoiser: Any) -> nn.Module | None:
        """See Guided."""
        from modules import sd_vae_taesd

        decoder = sd_vae_taesd.decoder_model()
        return ZeroToOne(decoder) if decoder is not None else None

    def reference_arguments(self, p: Any) -> dict[str, Any]:
        """Arguments of a reference's job, StableDiffusionProcessingTxt2Img, that only this WebUI has."""
        return {}

    def base_identity(self, p: Any) -> BaseIdentity:
        """What tells the checkpoint and the VAE apart from others."""
        from modules import sd_vae, shared

        info = shared.sd_model.sd_checkpoint_info
        vae = getattr(sd_vae, "loaded_vae_file", None)
        return BaseIdentity(getattr(info, "sha256", None) or file_identity(info.filename), file_identity(vae))

    # What differs between the hosts.

    @abstractmethod
    def reserve_memory(self, p: Any, elements: int) -> None:
        """Tell the host that this many numbers of the denoiser's type will come beside the model, where it keeps account of that."""

    @abstractmethod
    def reserve_guidance_memory(self, p: Any, bytes_: int) -> None:
        """The same for what a guided step takes."""

    @abstractmethod
    def noise_levels(self, cfg_denoiser: Any, values: Tensor) -> Tensor:
        """See Guided."""

    @abstractmethod
    def works_on_eps(self, cfg_denoiser: Any) -> bool:
        """See Guided."""

    @abstractmethod
    def schedule_kind(self, cfg_denoiser: Any) -> Kind:
        """See Guided."""

    @abstractmethod
    def host_vae(self, cfg_denoiser: Any) -> HostVae:
        """See Guided."""

    @abstractmethod
    def differentiable(self, cfg_denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """See Guided."""

    @abstractmethod
    def denoiser(self, cfg_denoiser: Any) -> nn.Module:
        """See Denoisers."""

    @abstractmethod
    def denoiser_identity(self, cfg_denoiser: Any) -> object:
        """See Denoisers."""

    @abstractmethod
    def merged_loras(self, cfg_denoiser: Any) -> object:
        """See Denoisers."""

    @abstractmethod
    def weight_of(self, layer: nn.Module) -> Tensor:
        """See Denoisers."""

    @abstractmethod
    def row_layout(self, cfg_denoiser: Any, cond: Any) -> RowLayout:
        """See Denoisers."""

    @abstractmethod
    def add_text_parts(self, text: TextParts) -> list[str]:
        """Merge them by the host's own means, beside the LoRAs that it merges. Returns the layers that this model does not have."""

    @abstractmethod
    def remove_text_parts(self) -> None:
        """Take out whatever add_text_parts has put in, at any time, also of a job that died."""


def refuse_replaced_denoiser() -> None:
    """Raises FusionError where another program (TensorRT) computes in place of the model's layers."""
    try:
        from modules import sd_unet
    except ImportError:
        return  # a WebUI without the choice
    if getattr(sd_unet, "current_unet", None) is not None:
        raise FusionError("DynFuse works on the model's own layers; set 'SD Unet' to None in the settings.")


def _current_pass(p: Any) -> FusionPass | None:
    """The pass that p's next denoiser call belongs to; None: a plain one."""
    job = FusionJob.of(p)
    return job.current if job is not None else None


def _networks() -> Any:
    """The WebUI's LoRA module."""
    import networks

    return networks


def _option(name: str, default: Any) -> Any:
    from modules.shared import opts

    return getattr(opts, name, default)


def _loading_progress(what: str, done: int, total: int) -> None:
    """Shows a download in the WebUI's progress bar; the console's is tqdm's. Raises Interrupted when the user stops the job."""
    from modules.shared import state

    if state.interrupted or state.skipped:
        raise Interrupted
    state.textinfo = f"DynFuse: {what} ({done // MEBIBYTE} of {total // MEBIBYTE} MB)" if done < total else None


def _unused(file: LoraFile) -> list[str]:
    """Sentences on what is in a file and takes no part. Layers that this model lacks are for the session to tell."""
    notes = []
    layers = {key for keys in file.keys.values() for key in keys}
    unread = [key for key in file.unmatched if key not in layers]
    if unread:
        notes.append(f"{len(unread)} keys of {file.name} are of no known kind and were not used (such as {unread[0]}).")
    if file.embeddings:
        notes.append(f"The embeddings inside {file.name} ({', '.join(file.embeddings)}) are not used.")
    return notes


def _unknown(name: str, known: Sequence[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f"there is no LoRA named {name!r}" + (f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ".")


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


__all__ = ["ParseTags", "UnknownLora", "WebUIHost", "refuse_replaced_denoiser"]
