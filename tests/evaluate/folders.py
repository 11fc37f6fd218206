"""Small folders of pictures: each method's are of one colour, so that a test knows whose picture it sees."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

COLOURS = {"direct": (200, 0, 0), "balanced": (0, 200, 0), "klora": (0, 0, 200), "paper's <b>": (200, 200, 0)}
METHODS = tuple(COLOURS)


def plain_folder(folder: Path, pairs: int = 2, seeds: int = 3, methods: tuple[str, ...] = METHODS, size: tuple[int, int] = (12, 8)) -> Path:
    """PAIR/METHOD/SEED.png with the settings in each picture, as the WebUIs write them."""
    for pair in range(pairs):
        place = folder / f"pair {pair}"
        place.mkdir(parents=True)
        for side in ("subject", "style"):
            Image.new("RGB", size, (pair, 100, 100)).save(place / f"{side}.png")
        for method in methods:
            (place / method).mkdir()
            for seed in range(seeds):
                settings = PngInfo()
                settings.add_text("parameters", f"a dog, DynFuse method: {method}")
                Image.new("RGB", size, COLOURS[method]).save(place / method / f"{seed}.png", pnginfo=settings)
    return folder


def method_of(picture: Image.Image) -> str:
    """Whose colour it has, the nearest one."""
    seen = picture.convert("RGB").getpixel((1, 1))
    return min(COLOURS, key=lambda method: sum((a - b) ** 2 for a, b in zip(COLOURS[method], seen)))
