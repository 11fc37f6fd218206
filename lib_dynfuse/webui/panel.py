"""The accordion "DynFuse" in txt2img and img2img, built from the fields of FuseSettings.

Builds under gradio 3.41 (A1111) and 4.40 (Forge). The controls, after the switch, stand in the order of FuseSettings, and behind
them the texts of the weights: that order is the script's argument order, and public. Labels are keys of the user's ui-config.json:
a renamed label loses the defaults saved under it.
"""

from __future__ import annotations

import functools
import html
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ..fusion.rules import RULES
from ..hosts.webui.host import WebUIHost
from ..printable import printable
from ..settings import LORA_FIELDS, PRESET, PRESETS, SettingsError, default_value, field_metadata, field_types, preset_names, split_names
from ..strength import BLOCKS_EXAMPLE, SCHEDULE_EXAMPLE
from ..text import infotext
from . import gallery, inspector, own_presets, pictures, result, results, tuning
from .arguments import WEIGHTS
from .given_picture import GivenPicture

TITLE = "DynFuse"
SWITCH_TOOLTIP = "Fuse a subject LoRA and a style LoRA. A <dynfuse:...> tag in the prompt goes before what is chosen here."
PRESET_TOOLTIPS = {
    "default": "Set the method, its advanced settings and the guidance back to what this extension recommends. LoRAs, weights, prompts and "
    "pictures stay.",
    "best": "As the default, with twice the contrast, made at every step: takes half as long again.",
    "paper": "Set the method, its advanced settings and the guidance as in the paper's experiments. Exact gradients and the full VAE take "
    "several times as long, and much memory.",
}
SWAP_TOOLTIP = "Exchange subject and style: LoRAs, weights, blocks, prompts, pictures and all else that each side has of its own."
BETWEEN = "tilt"
TOP_ROW = ("method", "contrast")
ADVANCED_ROWS = (
    ("criterion",),
    ("granularity", "scope", "one_sided", "temperature", "balance", "decide"),
    ("te_weight", "bias", "decide_every", "vote_tokens", "negative_weight", "loser"),
    ("style_contrast", "subject_contrast", "contrast_every", "contrast_start", "contrast_end"),
    ("switch_every", "density", "dare_seed"),
    ("subject_weight_text", "style_weight_text"),
    ("subject_blocks", "style_blocks"),
    ("hr",),
)
GUIDANCE_ROWS = (
    ("guidance",),
    ("m", "limit"),
    ("content_weight", "style_clip_weight", "style_dino_weight", "start", "end", "every"),
    ("gradient", "decoder"),
)
PROMPT_PLACEHOLDER = "LoRA's activation text, else the prompt"
PLACEHOLDERS = {"hr": "0.7 or 0.7/1", "subject_blocks": BLOCKS_EXAMPLE, "style_blocks": BLOCKS_EXAMPLE}
WEIGHT_TEXT_TOOLTIP = (
    "In place of the slider above: the weight over the steps, as points weight@place with straight lines between them. A place is a "
    "fraction of the steps (0.3), or a step's number (5). For several LoRAs also one each: 1+0.5. Empty: the slider's."
)


def _unplaced() -> list[tuple[str, ...]]:
    """Rows of the settings that no table above has a place for: none is without a control."""
    sides = (*LORA_FIELDS, *(f"{side}_{part}" for side in LORA_FIELDS for part in ("weight", "prompt", "image")), "reference_seed")
    placed = {*sides, BETWEEN, tuning.SETTING, *TOP_ROW, *(name for row in (*ADVANCED_ROWS, *GUIDANCE_ROWS) for name in row)}
    left = [name for name in field_types() if name not in placed]
    return [tuple(left)] if left else []


def _row(names: Sequence[str]) -> list[str]:
    """Classes of a row: more than two controls stand in columns of one width, as many as the panel has room for."""
    return ["dynfuse-row", "dynfuse-columns"] if len(names) > 2 else ["dynfuse-row"]


@dataclass(frozen=True)
class Panel:
    """The built controls.

    enabled: the switch. fields: by field name, in the order of FuseSettings. texts: of the weights, by name (see weight_text). result:
    where what is known of the job's pictures goes. references: where the kept references are shown.
    tuning: the contact sheet and its button.
    """

    enabled: Any
    fields: dict[str, Any]
    texts: dict[str, Any]
    result: result.Result
    references: Any
    tuning: tuning.Tuning

    @property
    def arguments(self) -> list[Any]:
        """What the script's ui() returns, and in this order."""
        return list(self.controls.values())

    @property
    def controls(self) -> dict[str, Any]:
        """By the names of paste_functions."""
        return {"enabled": self.enabled, **self.fields, **self.texts}


def weight_text(name: str) -> str:
    """The name of the control that takes a weight as a text, in place of its slider. name: of the weight's field."""
    return f"{name}_text"


WEIGHT_TEXTS = {weight_text(name): name for name in WEIGHTS}


def build_notice(tab: str, sentence: str) -> Any:
    """The accordion with a sentence in place of the controls. Returns its switch, the script's only argument."""
    from modules.ui_components import InputAccordion

    with InputAccordion(False, label=TITLE, elem_id=f"dynfuse_{tab}_panel") as enabled:
        gr.HTML(value=f"<p>{html.escape(sentence)}</p>", elem_id=f"dynfuse_{tab}_off")
    enabled.webui_tooltip = SWITCH_TOOLTIP
    return enabled


def build(tab: str, host: WebUIHost) -> Panel:
    """Build the accordion inside the current gradio context. tab: "txt2img" or "img2img"; it keeps element ids apart."""
    # Looked up at each build: Reload UI may reload the host's ui modules (initialize.py, initialize_rest).
    from modules.ui_common import create_refresh_button
    from modules.ui_components import InputAccordion

    def element(name: str) -> str:
        return f"dynfuse_{tab}_{name}"

    def choices() -> dict[str, list[str]]:
        return {"choices": host.catalogue.names()}

    fields: dict[str, Any] = {}

    def first_thumbnail(name: str) -> str:
        # The host puts the user's defaults from ui-config.json on a dropdown after it was built.
        return _thumbnails(host, fields[name].value if name in fields else [])

    def kept_references() -> str:
        return gallery.gallery_html(host.reference_cache)

    def cleared_references() -> str:
        return gallery.cleared_html(host.reference_cache)

    def add(name: str) -> Any:
        fields[name] = _weight_text(name, element(name)) if name in WEIGHT_TEXTS else _control(name, element(name), host)
        return fields[name]

    # A class on A1111, a function on Forge: only called, never tested for its type.
    with InputAccordion(False, label=TITLE, elem_id=element("panel")) as enabled:
        enabled.webui_tooltip = SWITCH_TOOLTIP
        with gr.Row(elem_classes=["dynfuse-pair"]):
            for name in LORA_FIELDS:
                with gr.Row(elem_classes=["dynfuse-part"]):
                    with gr.Column(elem_classes=["dynfuse-preview"], scale=0, min_width=96):
                        # A function is called anew for each page that is opened.
                        thumbnail = gr.HTML(value=functools.partial(first_thumbnail, name), elem_id=element(f"{name}_preview"))
                    with gr.Column(elem_classes=["dynfuse-choice"], min_width=160):
                        dropdown = add(name)
                        add(f"{name}_weight")
                _quietly(dropdown.change, functools.partial(_thumbnails, host), inputs=[dropdown], outputs=[thumbnail])
            with gr.Column(elem_classes=["dynfuse-refresh"], scale=0, min_width=40):
                create_refresh_button([fields[name] for name in LORA_FIELDS], host.catalogue.refresh, choices, element("refresh"))
                swap = gr.Button("\u21c4", elem_id=element("swap"), elem_classes=["tool"], min_width=40)
                swap.webui_tooltip = SWAP_TOOLTIP
        with gr.Row(elem_classes=["dynfuse-row", "dynfuse-tilt"]):
            add(BETWEEN)
        chosen = gr.HTML(value="", elem_id=element("chosen"))
        gr.HTML(value=_keys, elem_id=element("keys"), elem_classes=["dynfuse-unseen"])
        with gr.Row(elem_classes=["dynfuse-row"]):
            for name in TOP_ROW:
                add(name)
        chosen_so = [fields[name] for name in TOP_ROW]
        said = _explained(*map(default_value, TOP_ROW))
        explained = gr.HTML(value=said, elem_id=element("method_text"), elem_classes=["dynfuse-kept"])
        for control in chosen_so:
            _quietly(control.change, _explained, inputs=chosen_so, outputs=[explained])
        with gr.Row(elem_classes=["dynfuse-row", "dynfuse-presets"]):
            presets = {name: gr.Button(f"Preset: {name}", elem_id=element(f"preset_{name}"), size="sm", min_width=60) for name in PRESETS}
        own = own_presets.build(element, host)
        tune = tuning.build(element, add)
        with gr.Accordion("Advanced", open=False, elem_id=element("advanced"), elem_classes=["dynfuse-advanced"]):
            for row in (*ADVANCED_ROWS, *_unplaced()):
                with gr.Row(elem_classes=_row(row)):
                    for name in row:
                        add(name)
        with gr.Accordion("Guidance", open=False, elem_id=element("guidance_part"), elem_classes=["dynfuse-advanced", "dynfuse-guidance"]):
            for row in GUIDANCE_ROWS:
                with gr.Row(elem_classes=_row(row)):
                    for name in row:
                        add(name)
            with gr.Row(elem_classes=["dynfuse-pair", "dynfuse-row"]):
                for side in LORA_FIELDS:
                    with gr.Row(elem_classes=["dynfuse-part"]):
                        with gr.Column(elem_classes=["dynfuse-given"], scale=0, min_width=128):
                            add(f"{side}_image")
                        with gr.Column(elem_classes=["dynfuse-choice"], min_width=160):
                            add(f"{side}_prompt")
            with gr.Row(elem_classes=["dynfuse-row"]):
                add("reference_seed")
            with gr.Accordion("Kept references", open=False, elem_id=element("references_part"), elem_classes=["dynfuse-advanced"]):
                with gr.Row(elem_classes=["dynfuse-cache"]):
                    with gr.Column(min_width=160):
                        references = gr.HTML(value=kept_references, elem_id=element("references"))
                    with gr.Column(elem_classes=["dynfuse-cache-buttons"], scale=0, min_width=40):
                        # The look of the WebUI's own small buttons, without the frame that its ToolButton brings.
                        refresh = gr.Button("\U0001f504", elem_id=element("references_show"), elem_classes=["tool"], min_width=40)
                        clear = gr.Button("Clear", elem_id=element("references_clear"), size="sm", min_width=40)
                refresh.webui_tooltip = "Show what is kept now, the references used last first."
                clear.webui_tooltip = "Remove all of them; a reference is made anew when it is needed."
                _quietly(refresh.click, kept_references, inputs=[], outputs=[references])
                _quietly(clear.click, cleared_references, inputs=[], outputs=[references])
        for name, button in presets.items():
            button.webui_tooltip = PRESET_TOOLTIPS[name]
            values = PRESETS[name]
            _quietly(button.click, functools.partial(list, values.values()), inputs=[], outputs=[fields[field] for field in values])
        own_presets.wire(own, fields, host, _quietly)
        for name in LORA_FIELDS:
            both = [fields[side] for side in LORA_FIELDS]
            _quietly(fields[name].change, functools.partial(inspector.chosen_html, host, tab), inputs=both, outputs=[chosen])
        sides = [fields[name] for name in _sided(fields)]
        _quietly(swap.click, functools.partial(_swapped, _sided(fields)), inputs=sides, outputs=sides)
        shown = result.build(element)
        sheet = tuning.build_sheet(element, *tune)
        tuning.wire(sheet, tab, enabled, fields, _quietly)
        _quietly(shown.job.change, lambda job: tuning.sheet_html(tab, results.tuned(tab, job)), inputs=[shown.job], outputs=[sheet.sheet])

    texts = {name: fields.pop(name) for name in WEIGHT_TEXTS}
    return Panel(enabled, {name: fields[name] for name in field_types()}, texts, shown, references, sheet)


def _explained(method: str | None, contrast: float | None) -> str:
    """What the chosen method and contrast do, in a line."""
    rule = RULES.get(method or "")
    if rule is None:
        return ""
    recommended = ", recommended" if method == default_value("method") else ""
    own = contrast is None or contrast < 0
    strength = rule.contrast if own else contrast
    told = f"contrast {strength:g}{', as the method has it' if own else ''}" if strength else "no contrast"
    return f"<p><b>{html.escape(rule.name)}</b>{recommended}: {html.escape(rule.summary)}; {told}.</p>"


def _keys() -> str:
    """What a tag may hold behind its names, and the choices of each, for the completion of tags (javascript/dynfuse_completion.js)."""
    known = {PRESET: list(preset_names())}
    for name, kind in field_types().items():
        if name not in LORA_FIELDS and not field_metadata(name)["picture"]:
            known[name] = ["true", "false"] if kind is bool else list(field_metadata(name)["choices"])
    return f'<span data-keys="{html.escape(json.dumps(known))}"></span>'


def _sided(names: Iterable[str]) -> list[str]:
    """The controls that each side has of its own, and the hires pass's, whose text holds both."""
    subject, style = LORA_FIELDS
    both = set(names)
    pairs = [(name, name.replace(subject, style, 1)) for name in names if name.startswith(subject)]
    return [name for pair in pairs if pair[1] in both for name in pair] + ["hr"]


def _swapped(names: Sequence[str], *values: Any) -> list[Any]:
    """values: of the controls that _sided names. Returns them in that order, with the sides exchanged."""
    *sided, hires = values
    # A number alone is the subject's; an empty side is as in the first pass.
    subject, _, style = str(hires or "").partition("/")
    exchanged = f"{style.strip()}/{subject.strip()}".removesuffix("/")
    return [value for place in range(0, len(names) - 1, 2) for value in (sided[place + 1], sided[place])] + [exchanged]


@functools.cache
def paste_functions(host: WebUIHost) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
    """What a pasted infotext sets each control to: by field name, "enabled" for the switch, and the weights' texts.

    Always the same functions for a host: "Send to img2img" finds a control of the other tab by its function.
    None leaves a control as it is.
    """

    def reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
        def read(entries: Mapping[str, Any]) -> Any:
            if not infotext.is_enabled(entries):
                return None
            try:
                value = infotext.read_value(entries, name)
            except SettingsError:
                # warn_about_paste has told the user.
                return default_value(name)
            if field_metadata(name)["picture"]:
                # None, for the host, leaves a control as it is; an image without a picture of its own takes the old one away.
                # A missing one: warn_about_paste has told the user.
                return gr.update(value=_kept_picture(host, value)[0])
            if name in LORA_FIELDS:
                # An update, for the host makes any other value into one of the type that the control was built with.
                return gr.update(value=list(split_names(infotext.renamed_names(value, infotext.read_hashes(entries), renaming(host)))))
            if name in WEIGHTS and isinstance(value, str):
                return default_value(name)
            return value

        return read

    def text_reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
        def read(entries: Mapping[str, Any]) -> Any:
            if not infotext.is_enabled(entries):
                return None
            try:
                value = infotext.read_value(entries, name)
            except SettingsError:
                return ""
            return value if isinstance(value, str) else ""

        return read

    fields = {name: reader(name) for name in field_types()}
    return {"enabled": infotext.is_enabled, **fields, **{text: text_reader(name) for text, name in WEIGHT_TEXTS.items()}}


def renaming(host: WebUIHost) -> Callable[[str, str | None], str]:
    """The host's answer to infotext.known_name."""
    return infotext.known_name(lambda name: host.catalogue.path(name) is not None, host.catalogue.name_by_hash)


def warn_about_paste(entries: Mapping[str, Any], host: WebUIHost) -> None:
    """Show the user which pasted LoRAs are not here, and which settings cannot be used; they are replaced by their defaults."""
    for name in infotext.pasted_loras(entries, renaming(host)):
        if host.catalogue.path(name) is None:
            gr.Warning(f"DynFuse: there is no LoRA named {printable(name)!r} here")
    if not infotext.is_enabled(entries):
        return
    for name in field_types():
        try:
            value = infotext.read_value(entries, name)
        except SettingsError as error:
            gr.Warning(f"DynFuse: the pasted {error}; the default is used")
            continue
        if field_metadata(name)["picture"]:
            _, reason = _kept_picture(host, value)
            if reason:
                gr.Warning(f"DynFuse: {field_metadata(name)['label']}: {reason}")


def _control(name: str, element: str, host: WebUIHost) -> Any:
    metadata = field_metadata(name)
    common = {"label": metadata["label"], "value": default_value(name), "elem_id": element}
    if name in LORA_FIELDS:
        control = gr.Dropdown(**{**common, "value": []}, choices=host.catalogue.names(), multiselect=True, **_custom_values())
    elif name == "criterion":
        control = gr.Radio(choices=list(metadata["choices"]), **common)
    elif metadata["picture"]:
        control = GivenPicture(**{**common, "value": None}, type="pil", interactive=True, height=150, **_plain_image_arguments())
    elif field_types()[name] is bool:
        control = gr.Checkbox(elem_classes=["dynfuse-switch"], **common)
    elif metadata["choices"]:
        control = gr.Dropdown(choices=list(metadata["choices"]), **common)
    elif name in PLACEHOLDERS:
        control = gr.Textbox(max_lines=1, placeholder=PLACEHOLDERS[name], elem_classes=["dynfuse-written"], **common)
    elif field_types()[name] is str:
        control = gr.Textbox(lines=2, placeholder=PROMPT_PLACEHOLDER, **common)
    elif metadata["slider"] is None:
        control = gr.Number(precision=0, **common)
    else:
        lowest, highest, step = metadata["slider"]
        control = gr.Slider(minimum=lowest, maximum=highest, step=step, **common)
    # The hosts turn this attribute into the element's title (javascript/hints.js); gradio itself has no tooltips.
    control.webui_tooltip = metadata["tooltip"]
    return control


def _weight_text(name: str, element: str) -> Any:
    label = f"{field_metadata(WEIGHT_TEXTS[name])['label']} over the steps"
    look = {"max_lines": 1, "placeholder": SCHEDULE_EXAMPLE, "elem_classes": ["dynfuse-written"]}
    control = gr.Textbox(label=label, value="", elem_id=element, **look)
    control.webui_tooltip = WEIGHT_TEXT_TOOLTIP
    return control


def _custom_values() -> dict[str, Any]:
    """A LoRA of a pasted image that is not here must reach the script, which says so in words: gradio 3.41 takes any, 4.40 asks."""
    return {} if gr.__version__.startswith("3.") else {"allow_custom_value": True}


def _plain_image_arguments() -> dict[str, Any]:
    """A place to drop a picture into, without an editor, a camera or buttons for what comes out of it."""
    known = inspect.signature(gr.Image.__init__).parameters
    sources: dict[str, Any] = {"sources": ["upload"]} if "sources" in known else {"source": "upload", "tool": None}
    return {**sources, "show_download_button": False, "show_share_button": False}


def _kept_picture(host: WebUIHost, text: str) -> tuple[Image.Image | None, str]:
    """The picture that a pasted setting stands for, and why it cannot be had."""
    try:
        return (host.reference_cache.picture(text) if text else None), ""
    except SettingsError as error:
        return None, str(error)


def _thumbnails(host: WebUIHost, names: Sequence[str] | None) -> str:
    """names: as the dropdown has them; None when it was emptied."""
    several = " dynfuse-several" if names and len(names) > 1 else ""
    return f'<div class="dynfuse-thumbnails{several}">{"".join(_thumbnail(host, name) for name in names or [""])}</div>'


def _thumbnail(host: WebUIHost, name: str) -> str:
    path = host.catalogue.preview(name) if name else None
    address = pictures.thumbnail_address(path) if path else None
    if address is None:
        return f'<div class="dynfuse-thumbnail dynfuse-no-picture">{"no preview" if name else ""}</div>'
    return f'<img class="dynfuse-thumbnail" src="{address}" alt="{html.escape(name, quote=True)}">'


def _quietly(event: Callable[..., Any], function: Callable[..., Any], **wiring: Any) -> None:
    event(fn=function, show_progress="hidden", queue=False, **wiring)
