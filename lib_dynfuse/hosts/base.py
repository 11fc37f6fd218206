"""What DynFuse asks of a WebUI, and what all of them have in common.

Five functions of the WebUI are wrapped (Seams); together they are one job's life:

    processing.process_images_inner     a job: whatever happens inside, its end takes back what is ours
    extra_networks.activate             the tags of a batch's prompt: which pair is fused in the pass that begins
    networks.load_networks              the pair is taken out of what is merged; its text-encoder parts are merged instead
    CFGDenoiser.forward                 one denoiser step, fused
    sd_samplers_common.apply_refiner    inside it, the refiner may replace the model

A host's callbacks swallow exceptions, and an image would come out as if nothing had happened; so what must stop an image is
kept as a sentence and raised in CFGDenoiser.forward, from where it reaches the UI and the API.
"""

from __future__ import annotations

import difflib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..fusion import FusionError
from ..lora import LoraFile, compatible
from ..lora.branch import LoraError, applied_size
from ..settings import FuseSettings, SettingsError
from .fusion_pass import FusionJob, FusionPass, Request, RowLayout
from .lora_files import FileVersion, LoraFiles
from .text_parts import TextParts, text_parts
from .webui_patches import Seams

log = logging.getLogger(__name__)

TAG = "dynfuse"
NOTE = "DynFuse note"
PREVIEW_ENDINGS = tuple(f"{middle}.{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif") for middle in ("", ".preview"))

# The items of every <dynfuse:...> tag of a prompt -> the settings they ask for, None without a tag. Raises SettingsError.
ParseTags = Callable[[Sequence[Sequence[str]]], FuseSettings | None]


class UnknownLora(LookupError):
    """A name that the WebUI's list of LoRAs does not have. One sentence."""


class WebUIHost(ABC):
    """A running WebUI. There is one of it per process: see detect."""

    name: str

    def __init__(self) -> None:
        self._seams = Seams()
        self._files = LoraFiles()
        self._parse_tags: ParseTags = lambda tags: None
        self._active: FusionPass | None = None
        self._text_label: str | None = None

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

    def _entry(self, name: str) -> Any:
        """The WebUI's record of a LoRA. Looks names up as networks.load_networks does."""
        networks = _networks()
        # An alias that two files share stands for neither.
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name) or networks.available_networks.get(name)

    # Installing.

    def install(self, parse_tags: ParseTags) -> None:
        """Wrap the WebUI's functions. May be called again at any time, with another parser."""
        from modules import extra_networks, processing, sd_samplers_common
        from modules.sd_samplers_cfg_denoiser import CFGDenoiser

        self._parse_tags = parse_tags
        self._seams.wrap(processing, "process_images_inner", self._around_job)
        self._seams.wrap(extra_networks, "activate", self._around_activate)
        self._seams.wrap(_networks(), "load_networks", self._around_load_networks)
        self._seams.wrap(CFGDenoiser, "forward", self._around_denoiser)
        self._seams.wrap(sd_samplers_common, "apply_refiner", self._around_refiner)

    def uninstall(self) -> None:
        """Take everything back."""
        self._active = None
        self.remove_text_parts()
        self._seams.undo()

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

    def _around_job(self, original: Callable[..., Any], p: Any, *args: Any, **kwargs: Any) -> Any:
        if FusionJob.of(p) is not None:
            del p.dynfuse  # some scripts run the same processing object again and again
        try:
            result = original(p, *args, **kwargs)
        finally:
            self._end_job(p)
        self._tell(p, result)
        return result

    def _end_job(self, p: Any) -> None:
        job = FusionJob.of(p)
        if job is not None:
            job.end()
        self._active = None
        try:
            self.remove_text_parts()
        except Exception:
            log.exception("DynFuse could not take its text-encoder parts back")

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

    def _around_activate(self, original: Callable[..., Any], p: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        job = FusionJob.of(p)
        # Forge activates the tags again when the refiner takes over in the middle of a pass; A1111 does not.
        if job is None or job.current is None or not job.current.denoising:
            self._begin_pass(p, [list(params.items) for params in (data or {}).get(TAG, [])])
        return original(p, data, *args, **kwargs)

    def _begin_pass(self, p: Any, tags: list[list[str]]) -> None:
        """Every activation replaces whatever was asked for before; nothing of it is left, even if its job died."""
        self._active = None
        self.remove_text_parts()
        job = FusionJob.of(p)
        new = self._requested(p, tags)
        if job is None:
            if new is None:
                return
            job = p.dynfuse = FusionJob(p)
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

    def _requested(self, p: Any, tags: list[list[str]]) -> FusionPass | None:
        """The pass that the tags ask for: None without a tag, one with an error sentence if it cannot be done."""
        new = FusionPass(self, hires=bool(getattr(p, "is_hr_pass", False)), batch=getattr(p, "iteration", 0))
        try:
            new.settings = self._parse_tags(tags)
            if new.settings is None:
                return None
            new.request = self._read_pair(new.settings)
        except (SettingsError, LoraError, UnknownLora, FusionError) as reason:
            new.error = f"DynFuse: {reason}"
        except Exception as reason:
            log.exception("DynFuse could not prepare the fusion")
            new.error = f"DynFuse could not prepare the fusion: {type(reason).__name__}: {reason}"
        else:
            for file in (new.request.subject, new.request.style):
                for note in _unused(file):
                    new.note(note)
        return new

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

    def _around_load_networks(
        self,
        original: Callable[..., Any],
        names: Sequence[str],
        te_multipliers: Sequence[float] | None = None,
        unet_multipliers: Sequence[float] | None = None,
        dyn_dims: Sequence[int | None] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        active = self._active
        if active is None or active.request is None:
            return original(names, te_multipliers, unet_multipliers, dyn_dims, *args, **kwargs)
        claimed = [self._is_claimed(name, active.request.paths) for name in names]
        for name in dict.fromkeys(name for name, ours in zip(names, claimed) if ours):
            active.note(f"<lora:{name}> was left out: DynFuse uses this LoRA already, at the weights of its own tag or panel.")

        def kept(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [value for value, ours in zip(values, claimed) if not ours]

        try:
            return original(kept(names), kept(te_multipliers), kept(unet_multipliers), kept(dyn_dims), *args, **kwargs)
        finally:
            # Forge's own function fails on an unknown <lora:...>, and the WebUI goes on without it; the pair must not be lost with it.
            self._merge_text_parts(active)

    def _is_claimed(self, name: str, paths: frozenset[str]) -> bool:
        path = self.lora_path(name)
        return path is not None and os.path.realpath(path) in paths

    def _merge_text_parts(self, active: FusionPass) -> None:
        assert active.request is not None
        if active.request.text is None:
            return
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
        job = FusionJob.of(cfg_denoiser.p)
        if job is None or job.current is None:
            return original(cfg_denoiser, *args, **kwargs)
        cond = kwargs["cond"] if "cond" in kwargs else args[3]  # forward(self, x, sigma, uncond, cond, ...)
        return job.current.denoise(cfg_denoiser, cond, lambda: original(cfg_denoiser, *args, **kwargs))

    def _around_refiner(self, original: Callable[..., Any], cfg_denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        job = FusionJob.of(cfg_denoiser.p)
        if job is None or job.current is None:
            return original(cfg_denoiser, *args, **kwargs)
        return job.current.switch_model(cfg_denoiser, lambda: original(cfg_denoiser, *args, **kwargs))

    def before_sampling(self, p: Any) -> None:
        """A sampling is about to begin, and the host about to decide what stays in the device's memory."""
        job = FusionJob.of(p)
        if job is not None and job.current is not None and job.current.request is not None:
            files = (job.current.request.subject, job.current.request.style)
            self.reserve_memory(p, sum(applied_size(branch) for file in files for branch in file.denoiser.values()))

    # What differs between the hosts.

    @abstractmethod
    def reserve_memory(self, p: Any, elements: int) -> None:
        """Tell the host that this many numbers of the denoiser's type will come beside the model, where it keeps account of that."""

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
    from modules import sd_unet

    if getattr(sd_unet, "current_unet", None) is not None:
        raise FusionError("DynFuse works on the model's own layers; set 'SD Unet' to None in the settings.")


def _networks() -> Any:
    """The WebUI's LoRA module."""
    import networks

    return networks


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


_host: WebUIHost | None = None


def detect() -> WebUIHost:
    """The WebUI that this process is. Raises RuntimeError outside of one."""
    global _host
    if _host is None:
        _host = _detect()
    return _host


def _detect() -> WebUIHost:
    # By what it can do, never by a version string: forks carry the strings of what they were forked from.
    try:
        import modules.sd_models  # noqa: F401
    except ImportError:
        raise RuntimeError("DynFuse's WebUI part runs inside A1111 or Forge only.") from None
    try:
        from backend.patcher.clip import CLIP  # noqa: F401
    except ImportError:
        from .a1111 import A1111

        return A1111()
    from .forge import Forge

    return Forge()


__all__ = ["ParseTags", "UnknownLora", "WebUIHost", "detect", "refuse_replaced_denoiser"]
