"""A place for a picture in the panel, whose value is text.

The script's arguments must be what JSON can hold: extensions hand them to other machines as they are.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..guidance.references import as_kept
from . import pictures


class GivenPicture(gr.Image):
    """Gives the picture, as it is kept, in base64 (a data address); None for none. Takes such a text, or whatever gr.Image takes."""

    def get_block_name(self) -> str:
        return "image"  # what the page draws

    def preprocess(self, *payload: Any) -> Any:
        picture = super().preprocess(*payload)
        return None if picture is None else pictures.picture_address(as_kept(picture))

    def postprocess(self, *value: Any) -> Any:
        return super().postprocess(*(pictures.picture_at(one) if pictures.is_address(one) else one for one in value))


__all__ = ["GivenPicture"]
