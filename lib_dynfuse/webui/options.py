"""DynFuse's page in the WebUI's settings."""

from __future__ import annotations

SAVE_MAP = "dynfuse_save_map"


def register() -> None:
    """Add the page to the host's settings. Called while scripts load: also an API-only WebUI then knows the options."""
    from modules import shared

    options = {
        SAVE_MAP: shared.OptionInfo(False, "Save the selection map beside the image").info(
            "named as the image, with -dynfuse.png; shows which LoRA each layer used at each step"
        ),
    }
    shared.options_templates.update(shared.options_section(("dynfuse", "DynFuse"), options))


def saves_map() -> bool:
    """Whether the user wants the selection map saved beside the image."""
    from modules import shared

    return bool(getattr(shared.opts, SAVE_MAP, False))
