"""Tuning in the panel: the button, the contact sheet under the result and a click on it; and what a job's infotext tells of it.

The button sets *Tune* to auto and presses the WebUI's own Generate button: the small pictures are made inside an ordinary job, with its
prompt, queue, progress bar and Interrupt, as no click on an extension's button is in every host. A click on a picture of the sheet sends
that picture's settings through a hidden text box, so that it works as long as the sheet is on the page.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..settings import LORA_FIELDS, FuseSettings, SettingsError
from ..text import infotext, tag
from ..tuning.plan import AUTO, FIELDS, OFF
from ..tuning.search import Tried, Tuned
from . import pictures

BUTTON_TOOLTIP = (
    "Generate now, with Tune set to auto: small pictures of this prompt at a few tilts and contrasts first, then the picture with the "
    "best of them. The small ones are shown under the result; a click on one puts its settings into the panel."
)
SETTING = "tune"
GENERATE = "dynfuse-generate"
"""In the message's HTML, it has the browser press Generate."""

_PROMPTS = ("all_prompts", "all_hr_prompts")
_TOLD = "dynfuse_tuned"


@dataclass(frozen=True)
class Tuning:
    """The controls, none of them a setting. sheet: under the result. choice: hidden, takes the settings of the picture that is clicked."""

    button: Any
    message: Any
    sheet: Any
    choice: Any


def build(element: Callable[[str], str], add: Callable[[str], Any]) -> tuple[Any, Any]:
    """The row of the setting, with the button beside it. Returns the button and the place of its message."""
    with gr.Row(elem_classes=["dynfuse-row", "dynfuse-own-presets"]):
        add(SETTING)
        with gr.Column(elem_classes=["dynfuse-own-buttons"], scale=0, min_width=120):
            button = gr.Button("Tune this pair", elem_id=element("tune_button"), size="sm", min_width=60)
    button.webui_tooltip = BUTTON_TOOLTIP
    return button, gr.HTML(value="", elem_id=element("tune_message"), elem_classes=["dynfuse-kept"])


def build_sheet(element: Callable[[str], str], button: Any, message: Any) -> Tuning:
    """The place under the result."""
    sheet = gr.HTML(value="", elem_id=element("tuned"), elem_classes=["dynfuse-tuned"])
    choice = gr.Textbox(label="Chosen small picture", value="", elem_id=element("tuned_choice"), elem_classes=["dynfuse-unseen"])
    choice.do_not_save_to_config = True
    return Tuning(button, message, sheet, choice)


def wire(tuning: Tuning, tab: str, enabled: Any, controls: Mapping[str, Any], quietly: Callable[..., Any]) -> None:
    """enabled: the panel's switch. controls: by name."""
    pressed = tuning.button.click(
        fn=_begun,
        inputs=[controls[name] for name in LORA_FIELDS],
        outputs=[enabled, controls[SETTING], tuning.message],
        show_progress="hidden",
        queue=False,
    )
    script = "_js" if gr.__version__.startswith("3.") else "js"
    press = f"(message) => dynfusePressGenerate('{tab}', message, '{GENERATE}')"
    pressed.then(fn=None, inputs=[tuning.message], outputs=[], **{script: press})
    set_by_a_click = [controls[name] for name in (*FIELDS, SETTING)]
    quietly(tuning.choice.change, _chosen, inputs=[tuning.choice], outputs=[*set_by_a_click, tuning.message])


@dataclass(frozen=True)
class Sheet:
    """What is shown of a search. settings: of the job, with what was found."""

    found: Tuned
    settings: FuseSettings


def sheet_html(tab: str, shown: Sheet | None) -> str:
    """The contact sheet; empty for a job without a search."""
    if shown is None:
        return ""
    cells = "".join(_cell(tab, shown, position, one) for position, one in enumerate(shown.found.tried))
    said = html.escape(shown.found.sentence)
    hint = "A click on a picture puts its settings into the panel; the first is as asked, the framed one was used."
    return f'<p class="dynfuse-kept">Tuned: {said}. {hint}</p><div class="dynfuse-sheet">{cells}</div>'


def _cell(tab: str, shown: Sheet, position: int, one: Tried) -> str:
    best = " dynfuse-best" if position == shown.found.best else ""
    written = tag.format_tag(FuseSettings(**{**shown.settings.non_default(), **one.changes}))
    score = one.score
    return (
        f'<button type="button" class="dynfuse-cell{best}" data-tab="{tab}" data-settings="{html.escape(json.dumps(dict(one.changes)))}" '
        f'title="{html.escape(f"subject {score.subject:.2f}, style {score.style:.2f}: {written}")}">'
        f'<img src="{pictures.picture_address(one.picture, "JPEG")}" alt=""><span>{html.escape(one.label)}</span>'
        f"<span>score {score.total:.2f}</span></button>"
    )


def _begun(subjects: Sequence[str] | None, styles: Sequence[str] | None) -> list[Any]:
    """Updates of the switch and of *Tune*, and a message, whose mark presses Generate."""
    if not subjects or not styles:
        return [gr.update(), gr.update(), _sentence("Pick a subject LoRA and a style LoRA first.")]
    return [True, AUTO, _sentence("The small pictures are made with this picture, and shown below.", GENERATE)]


def _chosen(text: str) -> list[Any]:
    """An update of each control that a click on the sheet sets, and a message. text: a cell's settings in JSON, with a click's number."""
    nothing = [gr.update()] * (len(FIELDS) + 1)
    try:
        given = json.loads(text)["settings"]
        settings = FuseSettings.from_mapping({name: given[name] for name in FIELDS})
    except (ValueError, KeyError, TypeError, SettingsError):
        return [*nothing, ""]
    said = "Set as in the picture; Tune is off. A tag in the prompt would go before the panel."
    return [*(getattr(settings, name) for name in FIELDS), OFF, _sentence(said)]


def _sentence(text: str, mark: str = "") -> str:
    return f'<p class="{mark}">{html.escape(text)}</p>' if mark else f"<p>{html.escape(text)}</p>"


def tell(p: Any, asked: FuseSettings, used: FuseSettings, found: Tuned | None) -> None:
    """Write what is used into the job's prompts and infotext in place of what was asked for, so that a paste repeats the picture."""
    setattr(p, _TOLD, {**getattr(p, _TOLD, {}), asked: (used, found)})
    _write(p, asked, used, found)


def tell_again(p: Any) -> None:
    """Write it once more, after the infotext was made anew from what the panel says."""
    for asked, told in getattr(p, _TOLD, {}).items():
        _write(p, asked, *told)


def forget(p: Any) -> None:
    """Of another job with the same object, or with one that this is a copy of."""
    setattr(p, _TOLD, {})


def _write(p: Any, asked: FuseSettings, used: FuseSettings, found: Tuned | None) -> None:
    def replaced(prompt: str) -> str:
        return tag.replace_tags(prompt, functools.partial(_replacement, asked, used))

    for name in _PROMPTS:
        if prompts := getattr(p, name, None):
            prompts[:] = map(replaced, prompts)
    if isinstance(getattr(p, "main_prompt", None), str):
        p.main_prompt = replaced(p.main_prompt)
    entries = p.extra_generation_params
    if infotext.field_key(SETTING) in entries:  # the panel, the API or a plot asked
        written = infotext.settings_fields(used)
        for name in (*FIELDS, SETTING):
            key = infotext.field_key(name)
            entries[key] = _where(entries.get(infotext.ENABLED), written.get(key))
    if found is not None:
        entries[infotext.TUNED] = found.sentence


def _replacement(asked: FuseSettings, used: FuseSettings, items: list[str]) -> str | None:
    try:
        return tag.format_tag(used) if tag.parse_tag(items) == asked else None
    except SettingsError:
        return None


def _where(enabled: Any, text: str | None) -> Any:
    """An infotext entry, of the pictures that the panel made alone. enabled: the switch's entry, asked for each picture if callable."""
    if not callable(enabled):
        return text
    return lambda **about: text if enabled(**about) is not None else None


__all__ = ["Sheet", "Tuning", "build", "build_sheet", "forget", "sheet_html", "tell", "tell_again", "wire"]
