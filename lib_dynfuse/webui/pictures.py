"""Pictures for the page: PIL images and preview files as data addresses, which need no file served by the host."""

from __future__ import annotations

import base64
import functools
import io
import os

from PIL import Image

THUMBNAIL_SIZE = 192
SHOWN_SIZE = 512


def picture_address(image: Image.Image, file_format: str = "PNG") -> str:
    """An address for <img src> that holds the picture itself."""
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def is_address(value: object) -> bool:
    """Whether it is what picture_address made."""
    return isinstance(value, str) and value.startswith("data:image/")


def picture_at(address: str) -> Image.Image:
    """The picture of such an address."""
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def shown_address(image: Image.Image) -> str:
    """An address of the whole picture, made smaller to fit into a square of SHOWN_SIZE pixels."""
    shown = image.convert("RGB")
    shown.thumbnail((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.LANCZOS)
    return picture_address(shown, "JPEG")


def thumbnail_address(path: str | os.PathLike[str]) -> str | None:
    """The picture in a file, cut to a square of THUMBNAIL_SIZE pixels, as an address; None if it is no readable picture."""
    try:
        return _thumbnail_address(os.fspath(path), os.stat(path).st_mtime_ns)
    except OSError:
        # Also what PIL raises for a file that is no picture: a preview may be a video.
        return None


@functools.lru_cache(maxsize=64)
def _thumbnail_address(path: str, modified: int) -> str:
    with Image.open(path) as image:
        side = min(image.size)
        # The upper part: that is where a portrait's face is, and the WebUI's own cards show the same.
        left = (image.width - side) // 2
        square = image.convert("RGB").crop((left, 0, left + side, side))
    return picture_address(square.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS), "JPEG")
