"""`python -m lib_dynfuse generate`: fused images from the command line, each with its settings inside and its selection map beside it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from .bars import Bars
from .fusion import Trace, selection_map
from .fusion.merging import describe_merged, merge_pictures
from .given_files import read_sides
from .guidance import curve
from .guidance.encoders import Encoders, load_encoders
from .guidance.references import ReferenceCache
from .guidance.weights import EncoderError, EncoderSources
from .home import encoders_folder, references_folder
from .lora import LoraFile, check_target
from .settings import FuseSettings
from .text import infotext
from .tuning import sheet
from .tuning.plan import untuned, wants_tuning
from .tuning.search import Tuned

if TYPE_CHECKING:  # imports diffusers, which is not everywhere
    from .hosts.diffusers import FusedImages, FusedPipeline


@dataclass(frozen=True)
class Request:
    """What to generate. model, config: as load_pipeline takes them. subjects, styles: paths of LoRA files.

    size: width and height in pixels, None for the model's own. cfg_scale: None for the pipeline's default. seed: of the first
    image, the next one's is one higher; -1 for a random one. batch: images made at once. dtype: None for the device's best. encoders,
    go_on_without_encoders, cache: as GuidanceSources takes them; taesd: a folder with an AutoencoderTiny. save_lora: a file for both
    LoRAs as one, weighted as in the pictures, with layers of at most save_rank.
    """

    model: Path
    subjects: Sequence[Path]
    styles: Sequence[Path]
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
    encoders: EncoderSources = field(default_factory=lambda: EncoderSources(encoders_folder()))
    go_on_without_encoders: bool = False
    taesd: Path | None = None
    cache: ReferenceCache = field(default_factory=lambda: ReferenceCache(references_folder()))
    save_lora: Path | None = None
    save_rank: int | None = None


def run(request: Request) -> int:
    """Generate, with progress on standard error and the files' names on standard output. Returns the exit code.

    Raises LoraError, FusionError, PipelineError, EncoderError, SettingsError or OSError with a sentence for the user.
    """
    if request.save_lora is not None:
        check_target(request.save_lora)
    subjects, styles, settings = read_sides(request.subjects, request.styles, request.settings)  # before gigabytes are loaded
    files = [*subjects, *styles]
    encoders = _encoders(request)
    request.out.mkdir(parents=True, exist_ok=True)

    from .hosts.diffusers import FusedPipeline, GuidanceSources, load_pipeline, load_taesd

    taesd = load_taesd(request.taesd) if request.taesd else None
    pipeline = load_pipeline(request.model, device=request.device, dtype=request.dtype, config=request.config)
    first = request.seed if request.seed >= 0 else secrets.randbelow(2**32 - request.images)
    seeds = list(range(first, first + request.images))
    if settings.guidance and settings.reference_seed < 0:
        # One pair of references for all images; each image's settings name their seed, so that it can be made again alone.
        settings = replace(settings, reference_seed=first)
    sources = GuidanceSources(encoders, request.cache, taesd, request.go_on_without_encoders)
    fused = FusedPipeline(pipeline, subjects, styles, settings, sources)
    width, height = request.size or (None, None)
    notes: dict[str, None] = {}
    found = None
    if wants_tuning(settings):
        try:
            found = _tuned(request, fused, first)
            settings = found.settings(settings)
        except EncoderError as error:
            notes[f"The pair was not tuned: {error}"] = None
            settings = untuned(settings)
        fused = FusedPipeline(pipeline, subjects, styles, settings, sources)
    traces: list[Trace] = []
    with tqdm(total=request.steps * -(-len(seeds) // request.batch), unit="step") as bar, Bars() as bars:
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
                reference_progress=lambda side, done, total: bars.show(f"Reference picture of the {side}", done, total, "step"),
            )
            notes.update(dict.fromkeys(made.notes))
            traces.append(made.trace)
            # An image that had to do without guidance does not claim it.
            used = settings if made.guidance is not None or not settings.m else replace(settings, guidance=False)
            for position, (seed, image) in enumerate(zip(batch, made.images, strict=True)):
                path = next_path(request.out, seed)
                fields = infotext_fields(request, used, pipeline, seed, image.size, files)
                if found is not None:
                    fields[infotext.TUNED] = found.sentence
                information = PngInfo()
                information.add_text("parameters", format_infotext(request.prompt, request.negative_prompt, fields))
                image.save(path, pnginfo=information)
                with tqdm.external_write_mode():
                    print(path)
                _save_beside(path, made, position, with_references=seed == first)
                if found is not None and seed == first:
                    sheet.draw(found).save(path.with_name(f"{path.stem}-dynfuse-tuned.png"))
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    if request.save_lora is not None:
        _save_lora(request.save_lora, request.save_rank, fused, traces)
    return 0


def _tuned(request: Request, fused: FusedPipeline, seed: int) -> Tuned:
    """The settings found for the pair, told on standard output. Raises EncoderError."""
    width, height = request.size or (None, None)
    with Bars() as bars:
        found = fused.tuned(
            request.prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            steps=request.steps,
            cfg_scale=request.cfg_scale,
            width=width,
            height=height,
            progress=lambda done, total: bars.show("Small pictures for tuning", done, total, "picture"),
        )
    print("Tuned:", found.sentence)
    print(*found.table(), sep="\n")
    return found


def _save_lora(path: Path, rank: int | None, fused: FusedPipeline, traces: Sequence[Trace]) -> None:
    with Bars(delay=1.0) as bars:
        merged = merge_pictures(
            *(path, fused.subjects, fused.styles, fused.settings, traces, fused.layer_shapes),
            rank=rank,
            weight_of=fused.layer_weight,
            progress=lambda done, total: bars.show(f"Saving {path.name}", done, total, "layer"),
        )
    print(*describe_merged(merged), sep="\n")


def _encoders(request: Request) -> EncoderSources | Encoders:
    """The encoders, before the model is loaded: what is missing is said, or downloaded, at once. Raises EncoderError."""
    settings = request.settings
    guided = settings.guidance and settings.m
    if not guided and not wants_tuning(settings):
        return request.encoders
    try:
        with Bars() as bars:
            return load_encoders(request.encoders, lambda what, done, total: bars.show(what, done, total, "B"))
    except EncoderError:
        if guided and not request.go_on_without_encoders:
            raise
    return request.encoders


def _save_beside(path: Path, made: FusedImages, image: int, *, with_references: bool) -> None:
    """The selection map, the curve of the similarities and the references, under the image's name."""

    def beside(what: str) -> Path:
        return path.with_name(f"{path.stem}-dynfuse{what}.png")

    if made.trace.decided.any():
        selection_map.draw(made.trace.of_image(image)).save(beside(""))
    if made.guidance is not None and made.guidance.steps:
        curve.draw(replace(made.guidance, similarities=made.guidance.similarities[:, :, image : image + 1])).save(beside("-curve"))
    for reference in made.references if with_references else ():
        reference.picture.save(beside(f"-{reference.side}"))


def infotext_fields(
    request: Request, settings: FuseSettings, pipeline: Any, seed: int, size: tuple[int, int], files: Sequence[LoraFile]
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


def _progress(bar: Any, images: int, batch: int) -> Any:
    def progress(done: int, total: int) -> None:
        # Some schedulers take more denoiser calls than steps were asked for; only they know.
        bar.total = total * -(-images // batch)
        bar.update()

    return progress


__all__ = ["Request", "run"]
