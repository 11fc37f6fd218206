"""DynFuse's page in the WebUI's settings."""

from __future__ import annotations

import gradio as gr

from ..guidance.weights import CLIP_DEFAULT, DINO_DEFAULT

SAVE_MAP = "dynfuse_save_map"


def register() -> None:
    """Add the page to the host's settings. Called while scripts load: also an API-only WebUI then knows the options.

    The host part reads these names from shared.opts (hosts.webui.storage); what differs there is not looked up here.
    """
    from modules import shared

    option = shared.OptionInfo
    options = {
        SAVE_MAP: option(False, "Save the selection map beside the image").info(
            "named as the image, with -dynfuse.png; shows which LoRA each layer used at each step, and the guidance's similarities"
        ),
        "dynfuse_watch_selection": option(False, "Measure what the paper's selection would choose").info(
            "for the map, with methods that do not measure themselves; slower; the picture is the same but for rounding"
        ),
        "dynfuse_clip_model": option(CLIP_DEFAULT, "CLIP encoder of the guidance").info(
            "ARCHITECTURE/TAG of open_clip, or a local file (ARCHITECTURE=PATH) or folder"
        ),
        "dynfuse_dino_model": option(DINO_DEFAULT, "DINO encoder of the guidance").info("a name on Hugging Face, or a local folder"),
        "dynfuse_encoders_folder": option("", "Folder of the encoders").info(
            "where their weights are looked for and downloaded to; empty: models/dynfuse"
        ),
        "dynfuse_download_encoders": option(True, "Download missing encoders").info("once; several hundred MB with the default encoders"),
        "dynfuse_without_encoders": option("stop", "When an encoder is missing or damaged", gr.Radio, {"choices": ["stop", "go on"]}).info(
            "stop: the job ends with the reason. go on: the picture is made without guidance, and a note says so"
        ),
        "dynfuse_reference_cache_mb": option(
            256, "Room for reference pictures (MB)", gr.Slider, {"minimum": 16, "maximum": 4096, "step": 16}
        ).info("the least recently used ones are removed first"),
    }
    # options_templates is copied when the settings page is first made (modules/options.py, reorder): what an extension adds with "Apply
    # and restart UI" must be told to the options themselves.
    for key, info in shared.options_section(("dynfuse", "DynFuse", "sd"), options).items():
        shared.options_templates[key] = info
        shared.opts.add_option(key, info)


def saves_map() -> bool:
    """Whether the user wants the selection map saved beside the image."""
    from modules import shared

    return bool(getattr(shared.opts, SAVE_MAP, False))
