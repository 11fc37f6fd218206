"""`python -m lib_dynfuse generate`: fused images from the command line, each with its settings inside and its selection map beside it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from .fusion import FusionError, Trace
from .fusion.selection_map import draw
from .lora import LoraFile, compatible, read_lora
from .settings import FuseSettings
from .webui import infotext


@dataclass(frozen=True)
class Request:
    """What to generate. model, config: as load_pipeline takes them. subject, style: paths of LoRA files.

    size: width and height in pixels, None for the model's own. cfg_scale: None for the pipeline's default. seed: of the first
    image, the next one's is one higher; -1 for a random one. batch: images made at once. dtype: None for the device's best.
    """

    model: Path
    subject: Path
    style: Path
    prompt: str
    settings: FuseSettings
    out: Path
    negative_prompt: str = ""
    steps: int = 30
    cfg_scale: float | None = None
    size: tuple[int, int] | None = None
    seed: int = -1
    images: int = 1
    batch: int = 1
    device: str | None = None
    dtype: torch.dtype | None = None
    config: Path | None = None


def run(request: Request) -> int:
    """Generate, with progress on standard error and the files' names on standard output. Returns the exit code.

    Raises LoraError, FusionError, PipelineError or OSError with a sentence for the user.
    """
    subject, style = read_lora(request.subject), read_lora(request.style)
    if reason := compatible(subject, style):  # before gigabytes are loaded
        raise FusionError(reason)
    request.out.mkdir(parents=True, exist_ok=True)

    from .hosts.diffusers import FusedPipeline, load_pipeline

    pipeline = load_pipeline(request.model, device=request.device, dtype=request.dtype, config=request.config)
    settings = replace(request.settings, subject=subject.name, style=style.name)
    fused = FusedPipeline(pipeline, subject, style, settings)
    first = request.seed if request.seed >= 0 else secrets.randbelow(2**32 - request.images)
    seeds = list(range(first, first + request.images))
    width, height = request.size or (None, None)
    notes: dict[str, None] = {}
    with tqdm(total=request.steps * -(-len(seeds) // request.batch), unit="step") as bar:
        for start in range(0, len(seeds), request.batch):
            batch = seeds[start : start + request.batch]
            made = fused(
                request.prompt,
                negative_prompt=request.negative_prompt,
                seeds=batch,
                steps=request.steps,
                cfg_scale=request.cfg_scale,
                width=width,
                height=height,
                progress=_progress(bar, len(seeds), request.batch),
            )
            notes.update(dict.fromkeys(made.notes))
            for position, (seed, image) in enumerate(zip(batch, made.images, strict=True)):
                path = next_path(request.out, seed)
                fields = infotext_fields(request, settings, pipeline, seed, image.size, (subject, style))
                information = PngInfo()
                information.add_text("parameters", format_infotext(request.prompt, request.negative_prompt, fields))
                image.save(path, pnginfo=information)
                with tqdm.external_write_mode():
                    print(path)
                if made.trace.measured.any():
                    draw(trace_of_image(made.trace, position), subject.name, style.name).save(path.with_name(f"{path.stem}-dynfuse.png"))
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    return 0


def infotext_fields(
    request: Request, settings: FuseSettings, pipeline: Any, seed: int, size: tuple[int, int], files: tuple[LoraFile, LoraFile]
) -> dict[str, str]:
    """The entries of an image's infotext, named as a WebUI names them, so that pasting the image there restores the panel."""
    scale = pipeline.guidance_scale
    distilled = getattr(pipeline, "transformer", None) is not None
    hashes = {file.name: lora_hash(file.path) for file in files}
    return {
        "Steps": str(request.steps),
        "Sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
        **({"CFG scale": "1", "Distilled CFG Scale": f"{scale:g}"} if distilled else {"CFG scale": f"{scale:g}"}),
        "Seed": str(seed),
        "Size": f"{size[0]}x{size[1]}",
        "Model": request.model.resolve().stem if request.model.is_file() else request.model.resolve().name,
        **infotext.settings_fields(settings),
        **infotext.hash_field(hashes, hashes.get),
    }


def format_infotext(prompt: str, negative_prompt: str, fields: Mapping[str, str]) -> str:
    """The text that WebUIs keep under "parameters" in a PNG: prompt, negative prompt, and one line of entries."""
    entries = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else []), entries])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def lora_hash(path: Path) -> str:
    """The short hash under which WebUIs know a LoRA: of a .safetensors file's tensors without its header, else of the whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def next_path(folder: Path, seed: int) -> Path:
    """NUMBER-SEED.png with the number after the highest in the folder: nothing is overwritten."""
    numbers = [int(found[1]) for file in folder.iterdir() if (found := re.match(r"(\d{5})-", file.name))]
    return folder / f"{max(numbers, default=0) + 1:05d}-{seed}.png"


def trace_of_image(trace: Trace, image: int) -> Trace:
    """The part of a batch's trace that belongs to one image."""
    return replace(trace, winners=trace.winners[:, :, image : image + 1], divergences=trace.divergences[:, :, image : image + 1])


def _progress(bar: Any, images: int, batch: int) -> Any:
    def progress(done: int, total: int) -> None:
        # Some schedulers take more denoiser calls than steps were asked for; only they know.
        bar.total = total * -(-images // batch)
        bar.update()

    return progress


__all__ = ["Request", "run"]
