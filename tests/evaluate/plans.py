"""Small plans and evaluations for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_dynfuse.evaluate.folder import Evaluation, Method, Pair
from lib_dynfuse.evaluate.plan import Plan, read_plan

PLAN = """
title = "A test"
pairs = "all"
prompts = ["a {subject} in {style} style"]
metrics = []
out = "out"

[make]
model = "model"
steps = 4
seeds = [1, 2]

[subjects.dog]
lora = "dog.safetensors"
words = "sks dog"
references = ["references/dog"]

[styles.ink]
lora = "ink.safetensors"
references = ["references/ink.png"]

[methods.direct]
method = "direct"

[methods.default]
"""


def noise(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    """size: height, width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_lora(path: Path, value: float = 1.0) -> None:
    """A file that can be opened, for what looks no further."""
    save_file({"lora_unet_mid.lora_up.weight": torch.full((1, 1), value)}, path)


def write_files(folder: Path) -> None:
    """What PLAN names."""
    (folder / "model").mkdir(parents=True)
    for name in ("dog", "ink"):
        write_lora(folder / f"{name}.safetensors")
    (folder / "references/dog").mkdir(parents=True)
    for number in range(2):
        noise(number).save(folder / f"references/dog/{number}.png")
    noise(9).save(folder / "references/ink.png")


def plan_in(folder: Path, text: str = PLAN, name: str = "test") -> Plan:
    """The plan of that text, in a folder where its files are."""
    if not (folder / "model").exists():
        write_files(folder)
    path = folder / f"{name}.toml"
    path.write_text(text, "utf-8")
    return read_plan(path)


def evaluation_in(folder: Path, *, pairs: int = 2, methods: tuple[str, ...] = ("direct", "default"), seeds: int = 2) -> Evaluation:
    """With all of its pictures and references, which are noise."""
    made = []
    for index in range(pairs):
        references = [folder / f"references/{side}/{index}/01.png" for side in ("subject", "style")]
        for number, path in enumerate(references):
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(100 + 2 * index + number).save(path)
        made.append(Pair(f"s{index}+t{index}", f"s{index}", f"t{index}", ("a picture",), *((path,) for path in references)))
    settings = {"direct": {"method": "direct"}, "guided": {"method": "direct", "guidance": True}}
    found = Evaluation(folder, "A test", tuple(made), tuple(Method(n, "both", settings.get(n, {})) for n in methods), tuple(range(seeds)))
    found.save()
    for number, picture in enumerate(found.pictures()):
        path = found.path(picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(1000 + number).save(path)
    return found
