"""`python -m lib_dynfuse toy check`: what the miniature world's model can do, in figures and pictures, before anything is fused with it."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .captions import caption, name_of
from .judges import Judges, Scores, SecondJudges, load_judges, load_second_judges
from .lora_sets import PLAIN, lora_path, missing
from .model import load_pipeline
from .painter import CLASSES, HELD_OUT_STYLES, STYLES, SUBJECTS, Scene
from .training.loras import SUBJECT_STYLES
from .training.pictures import HELD_OUT_PAIRS, as_floats, as_tensor

if TYPE_CHECKING:
    from lib_dynfuse.lora import LoraFile

STEPS, CFG_SCALE = 20, 5.0
PICTURES = 400
_BATCH = 40
_SEED = 2026
_STYLE_CLASSES = ("fish", "tree", "boat", "bird")
"""Of which no style's LoRA has seen a picture."""


@dataclass
class Report:
    """Shares from 0 to 1; differences are means over pixels and channels, on the scale of 0 to 255.

    reconstruction: what the autoencoder makes of what is held out, by kind: difference, and how often the judges name it before and after.
    base: of PICTURES generated pictures, how often the judges name class, style, both; the same for the pairs kept out of training.
    alone: the mean score of each LoRA's subject or style on pictures made with it alone; second_alone: the second judges' of the same.
    halves, second_halves: the same with a random half of its layers, another one for each prompt.
    """

    reconstruction: dict[str, dict[str, float]] = field(default_factory=dict)
    base: dict[str, dict[str, float]] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    second_alone: dict[str, float] = field(default_factory=dict)
    halves: dict[str, float] = field(default_factory=dict)
    second_halves: dict[str, float] = field(default_factory=dict)


def run(weights: Path, out: Path | None, as_json: bool, kind: str = PLAIN) -> int:
    """Measure, with progress on standard error. out: a folder for reconstruction.png, base.png and alone.png. kind: the set of LoRAs, of
    lora_sets.TRAINED. Returns the exit code. Raises OSError for a file that is missing.
    """
    from tqdm import tqdm

    names = (*SUBJECTS, *HELD_OUT_STYLES)
    if kind != PLAIN and (reason := missing(weights, names, kind)):
        print(f"{reason[0].upper()}{reason[1:]}.", file=sys.stderr)
        return 2
    pipeline, judges = load_pipeline(weights), load_judges(weights / "judges.safetensors")
    second = load_second_judges(weights / "judges2.safetensors")
    report = Report()
    sheets: dict[str, Image.Image] = {}
    with tqdm(total=5, unit="part", file=sys.stderr) as bar:
        report.reconstruction, sheets["reconstruction"] = _reconstruction(pipeline.vae, judges)
        bar.update()
        grid = [(what, style) for what in CLASSES for style in STYLES]
        # Every pair as often as possible, then some once more.
        pairs = (grid * (PICTURES // len(grid) + 1))[:PICTURES]
        report.base["all"], pictures = _named(pipeline, judges, pairs)
        sheets["base"] = sheet(pictures[: len(grid)], len(STYLES))
        bar.update()
        report.base["pairs kept out"], _ = _named(pipeline, judges, sorted(HELD_OUT_PAIRS) * 8)
        bar.update()
        files = {name: lora_path(weights, name, kind) for name in names}
        (report.alone, report.second_alone), sheets["alone"] = _alone(pipeline, (judges, second), files)
        bar.update()
        (report.halves, report.second_halves), _ = _alone(pipeline, (judges, second), files, half=True)
        bar.update()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in sheets.items():
            picture.save(out / f"{name}.png")
    print(json.dumps(asdict(report), indent=1) if as_json else _as_text(report))
    return 0


@torch.no_grad()
def _reconstruction(vae: Any, judges: Judges) -> tuple[dict[str, dict[str, float]], Image.Image]:
    everything = (*STYLES, *HELD_OUT_STYLES)
    kinds = {
        "known": [Scene(what, style) for what in CLASSES for style in STYLES],
        "subjects kept out": [Scene(word, style) for word in SUBJECTS for style in everything],
        "styles kept out": [Scene(what, style) for what in CLASSES for style in HELD_OUT_STYLES],
    }
    found = {}
    shown: list[Tensor] = []
    for kind, scenes in kinds.items():
        painted = as_floats(as_tensor(scenes, random.Random(_SEED)))
        again = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in painted.split(_BATCH)]).clamp(-1, 1)
        found[kind] = {"difference": float((again - painted).abs().mean()) * 127.5}
        for when, pictures in (("painted", painted), ("decoded", again)):
            subject, style, _ = _right(judges, pictures, [(scene.what, scene.style or "") for scene in scenes])
            found[kind].update({f"{when}, object named": subject, f"{when}, style named": style})
        if kind == "subjects kept out":
            shown = [part for row in zip(painted.split(12), again.split(12), strict=True) for part in row]
    return found, sheet(_images(torch.cat(shown)), 12)


def _named(pipeline: Any, judges: Judges, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, float], list[Image.Image]]:
    """How often the judges name what was asked for."""
    images = generated(pipeline, [caption(what, style) for what, style in pairs])
    objects, styles, both = _right(judges, _tensor(images), pairs)
    return {"pictures": len(pairs), "object": objects, "style": styles, "both": both}, images


def _right(judges: Judges, pictures: Tensor, wanted: Sequence[tuple[str, str]]) -> tuple[float, float, float]:
    """How often the judges name class or subject, style, and both."""
    scores = judges.scores(pictures)
    objects = torch.tensor([judges.subject_names.index(what) for what, _ in wanted])
    styles = torch.tensor([judges.style_names.index(style) for _, style in wanted])
    right_object = scores.subject_probabilities.argmax(1) == objects
    right_style = scores.style_probabilities.argmax(1) == styles
    shares = (right_object, right_style, right_object & right_style)
    return tuple(float(share.float().mean()) for share in shares)  # type: ignore[return-value]


def _alone(
    pipeline: Any, judges: Sequence[Judges | SecondJudges], files: Mapping[str, Path], half: bool = False
) -> tuple[list[dict[str, float]], Image.Image]:
    """Subjects in the styles that they were taught in; styles on classes that they were not taught on. By each of the judges.

    half: with half of the LoRA's layers, drawn anew for each prompt.
    """
    from lib_dynfuse.hosts.diffusers import FusedPipeline
    from lib_dynfuse.lora import read_lora
    from lib_dynfuse.settings import FuseSettings

    scores: list[dict[str, float]] = [{} for _ in judges]
    shown: list[Image.Image] = []

    def measure(name: str, prompts: Iterable[str], settings: FuseSettings, score: Callable[[Scores], Tensor]) -> None:
        images: list[Image.Image] = []
        for prompt in prompts:
            lora = half_of(files[name], random.Random(prompt)) if half else read_lora(files[name])
            subject, style = (lora, read_lora(files["blueprint"])) if name in SUBJECTS else (read_lora(files["zib"]), lora)
            images += FusedPipeline(pipeline, subject, style, settings)(prompt, seeds=range(6), steps=STEPS, cfg_scale=CFG_SCALE).images
        for of_one, judge in zip(scores, judges, strict=True):
            of_one[name] = float(score(judge.scores(_tensor(images))).mean())
        shown.extend(images[::2])

    for word in SUBJECTS:
        prompts = [caption(name_of(word), style) for style in SUBJECT_STYLES]
        measure(word, prompts, FuseSettings(method="direct", style_weight=0.0), partial(Scores.subject, name=word))
    for style in HELD_OUT_STYLES:
        prompts = [caption(what, style) for what in (*_STYLE_CLASSES, "creature")]
        measure(style, prompts, FuseSettings(method="direct", subject_weight=0.0), partial(Scores.style, name=style))
    return scores, sheet(shown, 15)


def half_of(path: Path, rng: random.Random) -> LoraFile:
    """The LoRA with half of its layers, by lot."""
    from safetensors.torch import load_file, save_file

    from lib_dynfuse.lora import read_lora

    tensors = load_file(path)
    layers = sorted({key.partition(".")[0] for key in tensors})
    kept = set(rng.sample(layers, len(layers) // 2))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        save_file({key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in kept}, copy)
        return read_lora(copy)


def generated(pipeline: Any, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture for each prompt, each with a seed of its own."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        part = list(prompts[start : start + _BATCH])
        generators = [torch.Generator("cpu").manual_seed(_SEED + start + place) for place in range(len(part))]
        images += pipeline(part, num_inference_steps=STEPS, guidance_scale=CFG_SCALE, generator=generators).images
    return images


def sheet(pictures: Sequence[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """The pictures, enlarged, in rows."""
    side = 64 * scale + 2
    paper = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for place, picture in enumerate(pictures):
        large = picture.resize((64 * scale, 64 * scale), Image.Resampling.NEAREST)
        paper.paste(large, (place % columns * side, place // columns * side))
    return paper


def _tensor(images: Sequence[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return as_floats(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def _images(pictures: Tensor) -> list[Image.Image]:
    pixels = (pictures.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _as_text(report: Report) -> str:
    lines = ["Autoencoder:"]
    for kind, found in report.reconstruction.items():
        lines.append(f"  {kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    lines.append("Base model, named by the judges:")
    for kind, found in report.base.items():
        lines.append(f"  {kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    for which, first, second in (
        ("alone", report.alone, report.second_alone),
        ("alone, with a random half of its layers", report.halves, report.second_halves),
    ):
        lines.append(f"Each LoRA {which}, mean score of its own subject or style (by the second judges):")
        lines.append("  " + ", ".join(f"{name} {value:.2f} ({second[name]:.2f})" for name, value in first.items()))
    return "\n".join(lines)


__all__ = ["Report", "generated", "half_of", "run", "sheet"]
