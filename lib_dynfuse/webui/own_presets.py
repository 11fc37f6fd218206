"""The row of the panel with the user's own presets: choose, save, delete."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..hosts.webui.host import WebUIHost
from ..settings import FuseSettings, SettingsError
from ..user_presets import FIELDS
from .arguments import WEIGHTS

NAME_TOOLTIP = (
    "A preset of your own: pick one, or write a new name and save. It holds all settings but LoRAs, prompts, pictures and the "
    "reference seed; preset=NAME in a tag stands for it too."
)
TOOLTIPS = {
    "apply": "Set the panel as the preset says. LoRAs, prompts and pictures stay.",
    "save": "Keep the panel's settings under this name; what was kept under it is replaced.",
    "delete": "Forget the preset of this name.",
}


@dataclass(frozen=True)
class OwnPresets:
    """The row's controls. None of them is a setting."""

    name: Any
    buttons: dict[str, Any]
    message: Any


def build(element: Callable[[str], str], host: WebUIHost) -> OwnPresets:
    with gr.Row(elem_classes=["dynfuse-row", "dynfuse-own-presets"]):
        custom = {} if gr.__version__.startswith("3.") else {"filterable": True}
        name = gr.Dropdown(
            label="Your presets", choices=_names(host), value=None, allow_custom_value=True, elem_id=element("own_preset"), **custom
        )
        with gr.Column(elem_classes=["dynfuse-own-buttons"], scale=0, min_width=200), gr.Row():
            buttons = {
                what: gr.Button(what.capitalize(), elem_id=element(f"own_preset_{what}"), size="sm", min_width=60) for what in TOOLTIPS
            }
    message = gr.HTML(value="", elem_id=element("own_preset_message"), elem_classes=["dynfuse-kept", "dynfuse-own-message"])
    name.do_not_save_to_config = True
    name.webui_tooltip = NAME_TOOLTIP
    for what, button in buttons.items():
        button.webui_tooltip = TOOLTIPS[what]
    return OwnPresets(name, buttons, message)


def wire(own: OwnPresets, fields: Mapping[str, Any], host: WebUIHost, quietly: Callable[..., None]) -> None:
    """fields: the panel's controls by name, with the weights' texts."""
    names = [*FIELDS, *(f"{weight}_text" for weight in WEIGHTS)]
    controls = [fields[name] for name in names]
    quietly(own.buttons["apply"].click, functools.partial(_applied, host), inputs=[own.name], outputs=[*controls, own.message])
    quietly(own.buttons["save"].click, functools.partial(_saved, host), inputs=[own.name, *controls], outputs=[own.name, own.message])
    quietly(own.buttons["delete"].click, functools.partial(_deleted, host), inputs=[own.name], outputs=[own.name, own.message])


def _names(host: WebUIHost) -> list[str]:
    return sorted(host.presets.all(), key=str.lower)


def _applied(host: WebUIHost, name: str | None) -> list[Any]:
    """An update of each control, and a sentence."""
    values = host.presets.all().get(name or "")
    if values is None:
        return [*[gr.update()] * (len(FIELDS) + len(WEIGHTS)), _sentence("Pick one of your presets first.")]
    # A weight over the steps goes into its text; the slider stays where it was.
    written = {weight: str(values[weight]) for weight in WEIGHTS if isinstance(values[weight], str)}
    sliders = [gr.update() if field in written else gr.update(value=values[field]) for field in FIELDS]
    return [*sliders, *(gr.update(value=written.get(weight, "")) for weight in WEIGHTS), _sentence(f"Set as in {name!r}.")]


def _saved(host: WebUIHost, name: str | None, *values: Any) -> list[Any]:
    texts = dict(zip(WEIGHTS, values[len(FIELDS) :]))
    given = {field: value for field, value in zip(FIELDS, values) if value is not None}
    given.update({weight: text for weight, text in texts.items() if text})
    try:
        kept = host.presets.save(name or "", FuseSettings.from_mapping(given))
    except (SettingsError, OSError) as error:
        return [gr.update(), _sentence(f"Not saved: {error}")]
    return [gr.update(choices=_names(host), value=kept), _sentence(f"Saved as {kept!r}; in a tag: preset={kept}")]


def _deleted(host: WebUIHost, name: str | None) -> list[Any]:
    try:
        if not host.presets.delete(name or ""):
            return [gr.update(), _sentence("Pick one of your presets first.")]
    except OSError as error:
        return [gr.update(), _sentence(f"Not deleted: {error}")]
    return [gr.update(choices=_names(host), value=None), _sentence(f"{name!r} was deleted.")]


def _sentence(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


__all__ = ["OwnPresets", "build", "wire"]
