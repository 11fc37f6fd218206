"""The script a WebUI runs for every job, and its callbacks.

The panel's settings travel as a prompt tag: the batch's first prompt gets one before the host parses it, so that panel,
tag and API take one path, and the host's caches of text conditionings see the settings. The host part of DynFuse reads it.

No hook of ours raises, and in a WebUI that DynFuse does not fit (WebUIHost.off) none of them does anything but say so.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from modules import errors, extra_networks, script_callbacks, scripts

from ..fusion.rules import RULES
from ..guidance.guide import wants_guidance
from ..hosts.webui.detect import detect
from ..settings import LORA_FIELDS, FuseSettings, SettingsError, use_own_presets
from ..text import infotext, tag
from . import axes, options, panel, result, results, tuning
from .arguments import read_arguments

log = logging.getLogger(__name__)

EXTRA_NETWORK = "dynfuse"

_NEGATIVE_PROMPTS = ("all_negative_prompts", "all_hr_negative_prompts")
_MIXED = (
    "the pictures of one batch ask for different fusions, and the WebUI reads the tags of the first for all; set the batch size to 1 and "
    "the batch count higher"
)

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _harmless(hook: Hook) -> Hook:
    """The hook, whose errors are logged once and then end with it: whatever the WebUI was about to do is done."""
    failed: list[bool] = []

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            if not failed:
                failed.append(True)
                log.exception("DynFuse failed in %s; the WebUI goes on as if it were not there", hook.__name__.lstrip("_"))
            return None

    return guarded  # type: ignore[return-value]


class DynFuseScript(scripts.Script):
    """The panel, and what it does to a job."""

    def __init__(self) -> None:
        self._panel: panel.Panel | None = None
        self._batches: list[results.Batch] = []

    def title(self) -> str:
        return panel.TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return self._ui(is_img2img) or []  # without controls the hooks are called without arguments: switched off

    @_harmless
    def _ui(self, is_img2img: bool) -> list[Any]:
        self._panel = None
        host = detect()
        if host.off is not None:
            return [panel.build_notice(_tab(is_img2img), host.off)]
        from modules.infotext_utils import PasteField

        built = panel.build(_tab(is_img2img), host)
        functions = panel.paste_functions(host)
        self.infotext_fields = [
            *(PasteField(control, functions[name]) for name, control in built.controls.items()),
        ]
        # "Send to img2img" carries over the controls whose paste functions are listed here (infotext_utils.connect_paste_params_buttons).
        self.paste_field_names = list(functions.values())
        self._panel = built
        return built.arguments

    @_harmless
    def after_component(self, component: Any, **kwargs: Any) -> None:
        tab = _tab(self.is_img2img)
        if self._panel is not None and kwargs.get("elem_id") == f"generation_info_{tab}":
            host = detect()
            result.wire(
                component, self._panel.result, tab, host, self._panel.references, [self._panel.fields[side] for side in LORA_FIELDS]
            )

    @_harmless
    def process(self, p: Any, *arguments: Any) -> None:
        host = detect()
        if not host.is_inner(p):
            self._batches = []
        off = host.off
        if off is None:
            _read_prompts(p)
            negative = [text for name in _NEGATIVE_PROMPTS for text in getattr(p, name, None) or []]
            if p.all_prompts:
                p.all_prompts[0] = tag.misplaced(negative) + p.all_prompts[0]
        prompts = [*p.all_prompts, *(getattr(p, "all_hr_prompts", None) or [])]
        tags = [items for prompt in prompts for items in tag.find_tags(prompt)]
        if off is not None:
            if tags or _is_switched_on(arguments):
                _say(p, off)
            return
        p.extra_generation_params.pop(infotext.NOTE, None)
        settings = _settings_or_none(p, arguments)
        tuning.forget(p)
        _tell(p, settings)
        if settings is None and not tags and _is_empty(arguments) and not axes.asked(p):
            _say(p, "no LoRA is chosen in the panel, so nothing was fused")
        if p.disable_extra_networks and (settings is not None or tags):
            _say(p, "extra networks are disabled for this job, so the LoRAs were not fused")

    @_harmless
    def before_process_batch(self, p: Any, *arguments: Any, prompts: list[str], **kwargs: Any) -> None:
        if not prompts or detect().off is not None:
            return
        # Once more: other scripts' hooks, which write prompts (Dynamic Prompts), ran after ours.
        _read_prompts(p)
        prompts[:] = [_understood(p, prompt) for prompt in prompts]
        text = _tag_for(p, arguments)
        own = [tag.find_tags(prompt) for prompt in prompts]
        if any(own) and any(tags != own[0] for tags in own):
            # The host reads the tags of a batch's first prompt, for all of its pictures.
            text = tag.format_error(_MIXED)
        elif own[0]:
            return  # a tag goes before the panel, whatever that says
        if text:
            # In front: behind an unclosed "<lora:" the host would take it for a part of that tag.
            # prompts is the batch's own slice of p.all_prompts; the infotext's prompt stays as the user wrote it.
            prompts[0] = text + prompts[0]

    @_harmless
    def process_batch(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        text = _tag_for(p, arguments)
        data = getattr(p, "hr_extra_network_data", None) if getattr(p, "enable_hr", False) else None
        if text and data is not None and EXTRA_NETWORK not in data:
            data[EXTRA_NETWORK] = [extra_networks.ExtraNetworkParams(items=items) for items in tag.find_tags(text)]
        if detect().off is None:
            _tell(p, _settings_or_none(p, arguments))  # of the prompts as they have become
            tuning.tell_again(p)  # found before this hook, as the LoRAs are

    @_harmless
    def process_before_every_sampling(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        detect().before_sampling(p)

    @_harmless
    def postprocess_batch(self, p: Any, *arguments: Any, batch_number: int = 0, **kwargs: Any) -> None:
        if not detect().is_inner(p):
            size = getattr(p, "batch_size", 1)
            seeds = p.all_seeds[batch_number * size : (batch_number + 1) * size]
            self._batches.append(results.batch_of(detect().passes(p), seeds))

    @_harmless
    def postprocess(self, p: Any, processed: Any, *arguments: Any) -> None:
        if not detect().is_inner(p):
            batches, self._batches = self._batches, []
            results.remember(_tab(self.is_img2img), results.job_of(processed), [batch for batch in batches if batch.passes])


class DynFuseNetwork(extra_networks.ExtraNetwork):
    """Makes the tag known to the host, which cuts it out of the prompt and would otherwise log it as unknown.

    It does nothing itself: the host may call it after its LoRA module, when the pair is merged already. The host part of
    DynFuse reads the tag before any network is activated.
    """

    def __init__(self) -> None:
        super().__init__(EXTRA_NETWORK)

    def activate(self, p: Any, params_list: list[Any]) -> None: ...

    def deactivate(self, p: Any) -> None: ...


def register() -> None:
    """Tell the host about us. Called each time it loads the script file; it has forgotten all callbacks by then."""
    # All of them are looked up before the first is given away: without one of them DynFuse is not begun.
    callbacks = [
        (script_callbacks.on_before_ui, _before_ui),
        (script_callbacks.on_script_unloaded, _unloaded),
        (script_callbacks.on_infotext_pasted, _infotext_pasted),
        (script_callbacks.on_image_saved, _image_saved),
    ]
    _harmless(options.register)()  # every option has a default where it is read
    for tell, callback in callbacks:
        tell(callback)


@_harmless
def _before_ui() -> None:
    # Not earlier: the registry of extra networks is emptied after the scripts have loaded (initialize.py, initialize_rest).
    # Also called without a user interface (--nowebui).
    host = detect()
    host.install(tag.parse_tags, tuning.tell)
    use_own_presets(lambda: host.presets.all())
    if host.off is None:
        extra_networks.register_extra_network(DynFuseNetwork())
        _add_axes()


@_harmless
def _add_axes() -> None:
    axes.add_axes(getattr(scripts, "scripts_data", ()), detect().catalogue.names)


@_harmless
def _unloaded() -> None:
    detect().uninstall()


@_harmless
def _image_saved(parameters: Any) -> None:
    # Also called for images of other tabs, with whatever they have for a processing object.
    results.save_beside(parameters.filename, detect().passes(parameters.p))


@_harmless
def _infotext_pasted(text: str, entries: dict[str, Any]) -> None:
    if detect().off is not None:
        return
    hashes = infotext.read_hashes(entries)
    for key in ("Prompt", "Hires prompt"):
        if hashes and entries.get(key):
            entries[key] = infotext.renamed_tags(entries[key], hashes, panel.renaming(detect()))
    panel.warn_about_paste(entries, detect())


def _understood(p: Any, prompt: str) -> str:
    """The prompt with tags as the host reads them, which ask for what the axes of a plot say."""
    wanted = axes.asked(p)
    prompt = tag.put_right(prompt)
    return axes.changed_tags(prompt, wanted) if wanted else prompt


def _read_prompts(p: Any) -> None:
    """Have all prompts of a job understood."""
    for name in ("all_prompts", "all_hr_prompts"):
        if getattr(p, name, None):
            setattr(p, name, [_understood(p, prompt) for prompt in getattr(p, name)])


def _tell(p: Any, settings: FuseSettings | None) -> None:
    """Put into the infotext of each picture what makes it again, in place of what was there. settings: the panel's."""
    given = [key for key in p.extra_generation_params if key == infotext.ENABLED or key.startswith(f"{infotext.ENABLED} ")]
    for key in given:
        if key != infotext.NOTE:
            del p.extra_generation_params[key]
    # A tag in a prompt goes before the panel, whose settings then made no image.
    fields = {} if settings is None else infotext.settings_fields(_repeatable(settings, p.all_seeds))
    images = []
    for texts in zip(p.all_prompts, getattr(p, "all_hr_prompts", None) or p.all_prompts):
        own = fields if any(not tag.find_tags(text) for text in texts) else {}
        images.append({**own, **infotext.hash_field(_names(texts, settings), detect().catalogue.hash)})
    p.extra_generation_params.update(_by_image(images))


def _say(p: Any, note: str) -> None:
    """Put a sentence under the picture, and into its parameters for API clients."""
    p.comment(note if note.startswith("DynFuse") else f"DynFuse: {note}")
    p.extra_generation_params[infotext.NOTE] = note


def _tab(is_img2img: bool) -> str:
    return "img2img" if is_img2img else "txt2img"


def _is_switched_on(arguments: Sequence[Any]) -> bool:
    return bool(arguments and arguments[0])


def _is_empty(arguments: Sequence[Any]) -> bool:
    """Whether the panel is switched on, and neither side has a LoRA: opening it switches it on in Forge."""
    if not _is_switched_on(arguments) or len(arguments) < 2:
        return False
    first = arguments[1]
    chosen = (first.get("subject"), first.get("style")) if isinstance(first, Mapping) else arguments[1:3]
    return not any(chosen)


def _names(prompts: Sequence[str], panel_settings: FuseSettings | None) -> list[str]:
    """Of the LoRAs that are fused in a picture of this prompt and this hires prompt."""
    used: list[FuseSettings] = []
    for prompt in prompts:
        tags = tag.find_tags(prompt)
        used += _readable(tags) if tags else [panel_settings] if panel_settings is not None else []
    return [name for settings in used for name in settings.subjects + settings.styles]


def _by_image(images: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Infotext entries from those of each picture: a text where all have the same, else what the host asks when it writes an infotext
    (processing.py, create_infotext), so that no picture has another one's.
    """

    def entry(key: str) -> Callable[..., str | None]:
        return lambda index=0, **_: images[index].get(key) if index < len(images) else None

    keys = dict.fromkeys(key for image in images for key in image)
    return {key: images[0][key] if len({image.get(key) for image in images}) == 1 else entry(key) for key in keys}


def _settings_or_none(p: Any, arguments: Sequence[Any]) -> FuseSettings | None:
    try:
        return _wanted(p, arguments)
    except SettingsError:
        return None


def _wanted(p: Any, arguments: Sequence[Any]) -> FuseSettings | None:
    """What the panel or the API asks for, with what the axes of a plot say; None where nobody asks. Raises SettingsError."""
    own = None
    if _is_switched_on(arguments) and not _is_empty(arguments):
        own = read_arguments(arguments, detect().reference_cache)
    plotted = axes.asked(p)
    if not plotted:
        return own
    settings = axes.changed(own or FuseSettings(), plotted)
    tag.check_pair(settings)
    return settings


def _repeatable(settings: FuseSettings, seeds: Sequence[int]) -> FuseSettings:
    """The settings under which each image of a job can be made again alone: the references are those of the job's first seed."""
    rule = RULES[settings.method]
    if not (wants_guidance(settings) or rule.compares or rule.calibrates) or settings.reference_seed >= 0 or len(seeds) < 2:
        return settings
    return dataclasses.replace(settings, reference_seed=int(seeds[0]))


def _readable(tags: list[list[str]]) -> Iterator[FuseSettings]:
    for items in tags:
        try:
            yield tag.parse_tag(items)
        except SettingsError:
            continue


def _tag_for(p: Any, arguments: Sequence[Any]) -> str | None:
    """The tag that says what the panel or the API asks for, also when it asks for something impossible; None when switched off."""
    if not (axes.asked(p) or (_is_switched_on(arguments) and not _is_empty(arguments))):
        return None
    try:
        if detect().off is not None:
            return None
        settings = _wanted(p, arguments)
    except SettingsError as error:
        return tag.format_error(str(error))
    except Exception as error:
        # The host would print this and go on to make an image without us.
        errors.report("DynFuse cannot read its arguments", exc_info=True)
        return tag.format_error(f"cannot read the script's arguments: {error!r}")
    return None if settings is None else tag.format_tag(settings)
