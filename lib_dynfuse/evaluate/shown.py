"""Pictures as voters get them: pixels and nothing else, since a file's texts name the method that made it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from .folder import EvaluationError

SMALL = 128
"""Pictures of at most this many pixels a side are packed without loss."""
WEBP_QUALITY = 90


def bare(path: Path) -> Image.Image:
    """The upright RGB picture of a file, over white where it is transparent. Raises EvaluationError for a file that is no picture."""
    try:
        with open(path, "rb") as content, Image.open(content) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode != "RGB":
                picture = picture.convert("RGBA")
                ground = Image.new("RGBA", picture.size, "white")
                ground.alpha_composite(picture)
                picture = ground
            pixels = picture.convert("RGB")
    except Exception as error:  # a damaged picture raises whatever its bytes happen to mean
        reason = "is no picture" if path.is_file() else "is not there"
        raise EvaluationError(f"{path} {reason}.") from error
    clean = Image.new("RGB", pixels.size)
    clean.paste(pixels)
    return clean


def png(path: Path) -> bytes:
    """The picture of a file as a PNG, pixel for pixel. Raises EvaluationError."""
    return _encoded(bare(path), "PNG", compress_level=1)


def fitted(picture: Image.Image, size: int) -> Image.Image:
    """At most `size` pixels a side, its proportions kept; never enlarged."""
    smaller = picture.copy()
    smaller.thumbnail((size, size), Image.Resampling.LANCZOS)
    return smaller


def webp_url(path: Path, size: int) -> str:
    """A data address of the picture, at most `size` pixels a side, as WebP. Raises EvaluationError."""
    picture = fitted(bare(path), size)
    lossless = max(picture.size) <= SMALL
    content = _encoded(picture, "WEBP", lossless=lossless, quality=100 if lossless else WEBP_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content).decode('ascii')}"


def png_url(path: Path, size: int) -> str:
    """The same as PNG, which every endpoint of a judge reads."""
    content = _encoded(fitted(bare(path), size), "PNG")
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


__all__ = ["SMALL", "WEBP_QUALITY", "bare", "fitted", "png", "png_url", "webp_url"]
