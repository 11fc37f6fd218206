"""What the panel shows of the job whose pictures the browser has: the map of one of them, and beside it references, curve and saving.

Which job that is stands in a text box that the page does not show. A finished job writes it; a page that is opened again writes the one
that it had before (javascript/dynfuse.js), for as long as this server remembers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..hosts.webui.host import WebUIHost
from . import gallery, results, saving

PICTURE_TOOLTIP = "Of which picture of the job the map is, and what is saved as one LoRA."
VIEW_TOOLTIP = (
    "What was used: how much of each LoRA each layer had at each step. What the selection would choose: which LoRA the paper's method "
    "would have taken there, by how far each moves the layer's features."
)
SAVING_TOOLTIPS = (
    "Name of a new LoRA that does on average what this picture's did: each LoRA, in each layer, at the mean of its weights over the steps. "
    "It needs no DynFuse. A LoRA of that name is never overwritten.",
    "0: exact, as large as all LoRAs together. Else at most this rank in each layer: a smaller file, which loses a little; how much is "
    "said.",
    "Write the file into the WebUI's folder for LoRAs. Large models take up to some minutes when a rank is given.",
)


@dataclass(frozen=True)
class Result:
    """The controls. None of them is a setting.

    job: see results.job_of, in a box that is not seen. part, saving: to be shown or hidden. map, beside, message: HTML.
    """

    job: Any
    part: Any
    picture: Any
    view: Any
    map: Any
    beside: Any
    saving: Any
    name: Any
    rank: Any
    button: Any
    message: Any


def build(element: Callable[[str], str]) -> Result:
    job = gr.Textbox(value="", elem_id=element("job"), elem_classes=["dynfuse-unseen"], show_label=False, container=False)
    with gr.Column(visible=False, elem_id=element("result_part"), elem_classes=["dynfuse-result-part"]) as part:
        with gr.Row(elem_classes=["dynfuse-row", "dynfuse-result-head"]):
            picture = gr.Dropdown(label="Picture", choices=[], value=None, visible=False, elem_id=element("picture"))
            view = gr.Radio(label="Map", choices=list(results.VIEWS), value=results.USED, visible=False, elem_id=element("view"))
        with gr.Row(elem_classes=["dynfuse-result-row"]):
            with gr.Column(scale=3, min_width=320, elem_classes=["dynfuse-map-part"]):
                shown = gr.HTML(value="", elem_id=element("result"), elem_classes=["dynfuse-result"])
            with gr.Column(scale=2, min_width=320):
                beside = gr.HTML(value="", elem_id=element("beside"), elem_classes=["dynfuse-result"])
                with gr.Column(visible=False, elem_id=element("saving"), elem_classes=["dynfuse-saving"]) as save:
                    name = gr.Textbox(label="Save as one LoRA", value="", max_lines=1, elem_id=element("saving_name"))
                    rank = gr.Slider(
                        label="Rank of the saved LoRA", value=0, minimum=0, maximum=128, step=1, elem_id=element("saving_rank")
                    )
                    button = gr.Button("Save LoRA", elem_id=element("saving_button"), size="sm")
                    message = gr.HTML(value="", elem_id=element("saving_message"), elem_classes=["dynfuse-saved"])
    for control in (job, picture, view, name, rank):
        control.do_not_save_to_config = True  # of one job
    for control, tooltip in zip((picture, view, name, rank, button), (PICTURE_TOOLTIP, VIEW_TOOLTIP, *SAVING_TOOLTIPS)):
        control.webui_tooltip = tooltip
    return Result(job, part, picture, view, shown, beside, save, name, rank, button, message)


def wire(information: Any, made: Result, tab: str, host: WebUIHost, references: Any, loras: Sequence[Any]) -> None:
    """information: the host's hidden "generation_info" box of the tab, which every finished job fills anew, in the browser that asked for
    it. references: HTML of the kept ones. loras: dropdowns whose choices a saved file joins.
    """

    def after_job(text: str) -> tuple[str, str]:
        return results.job_in(text), gallery.gallery_html(host.reference_cache)

    def of_job(job: str) -> list[Any]:
        found = results.pictures_of(tab, job)
        titles = [one.title for one in found]
        first = titles[0] if titles else None
        some = found[0] if found else None
        return [
            gr.update(visible=any(one.passes for one in found)),
            gr.update(choices=titles, value=first, visible=len(found) > 1),
            gr.update(value=results.USED, visible=some is not None and results.has_selection(some)),
            *_parts(some, results.USED),
            *_saving(some, host),
        ]

    def of_picture(job: str, title: str | None, view: str) -> list[Any]:
        one = _chosen(tab, job, title)
        return [*_parts(one, view), *_saving(one, host)]

    def of_view(job: str, title: str | None, view: str) -> str:
        return _parts(_chosen(tab, job, title), view)[0]

    def save(job: str, title: str | None, name: str, rank: Any) -> str:
        one = _chosen(tab, job, title)
        return saving.save(results.recipe(one) if one is not None else None, name, rank, host.catalogue)

    def choices() -> list[Any]:
        return [gr.update(choices=host.catalogue.names()) for _ in loras]

    def quietly(event: Callable[..., Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        event(fn=function, inputs=inputs, outputs=outputs, show_progress="hidden", queue=False)

    parts = [made.map, made.beside, made.saving, made.name, made.message]
    chosen = [made.job, made.picture, made.view]
    quietly(information.change, after_job, [information], [made.job, references])
    quietly(made.job.change, of_job, [made.job], [made.part, made.picture, made.view, *parts])
    quietly(made.picture.input, of_picture, chosen, parts)
    quietly(made.view.input, of_view, chosen, [made.map])
    # Singular values of a large model take a minute: the message's place shows that something is under way.
    pressed = made.button.click(
        fn=save, inputs=[made.job, made.picture, made.name, made.rank], outputs=[made.message], show_progress="full", queue=False
    )
    quietly(pressed.then, choices, [], list(loras))


def _chosen(tab: str, job: str, title: str | None) -> results.Shown | None:
    found = results.pictures_of(tab, job)
    return next((one for one in found if one.title == title), found[0] if found else None)


def _parts(shown: results.Shown | None, view: str) -> tuple[str, str]:
    return ("", "") if shown is None else (results.map_part(shown, view), results.beside_part(shown))


def _saving(shown: results.Shown | None, host: WebUIHost) -> list[Any]:
    """Whether there is something to save, a name for it, and no message yet."""
    recipe = results.recipe(shown) if shown is not None and host.catalogue.folder() is not None else None
    name = saving.proposed_name(recipe.settings, host.catalogue) if recipe is not None else ""
    return [gr.update(visible=recipe is not None), name, ""]


__all__ = ["Result", "build", "wire"]
