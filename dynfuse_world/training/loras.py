"""Low-rank adapters of the U-Net's transformers: one for each subject and style that is held out, and one for each pair as a ceiling."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..captions import caption, name_of, training_caption
from ..lora_sets import PLAIN, lora_path
from ..model import load_pipeline, save_weights
from ..oracles import write_oracles
from ..painter import HELD_OUT_STYLES, SUBJECTS, Scene
from .base import alphas, denoising_loss, encoded, latents_of
from .loop import TrainingLoop
from .pictures import as_tensor, base_scene

RANK = 8
ORACLE_RANK = 4
BATCH = 16
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
LINEAR = (*ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
"""The layers that a LoRA changes: what kohya's trainer takes of a U-Net unless told otherwise."""

SUBJECT_STYLES = ("flat", "striped", "sketch", "pixel", "sepia")
_STYLE_OBJECTS = ("cat", "house", "rocket", "cup", "flower")
_SEED = 21
_PRIOR_PICTURES = 256
_MOVED = 7
_SHIFT = 4


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    steps: of AdamW, of 16 pictures each. rate: its highest. prior: pictures of a batch that are the base model's own, with captions that it
    knows, so that only what the lesson's words say is changed. moved: see also copies of the pictures, up to 4 pixels away. power: of the
    loss (see denoising_loss). module_dropout: at each step each layer's branch is absent with this probability, so that none relies on
    all others (kohya's trainer has it under this name).
    """

    steps: int = 400
    rate: float = 2e-3
    prior: int = 0
    moved: bool = False
    power: float = 1.0
    module_dropout: float = 0.0


SUBJECT = Recipe(steps=600, prior=4)
STYLE = Recipe(steps=600, rate=1e-3, prior=4, moved=True, power=0.5)
"""Colours and patterns are decided at the noisiest times. A style that learned places would bring its own objects' shapes along."""

_STEPS = {"mok": 1000}
"""Of subjects that are not yet themselves after as many as the others."""

ORACLE = Recipe(steps=200, rate=3e-3)

RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    PLAIN: ({}, {}),
    "dropout": ({"module_dropout": 0.3}, {"module_dropout": 0.3}),
    "overfit": ({"steps": 400, "rate": 2e-3, "prior": 0}, {"steps": 400, "rate": 3e-3, "prior": 2}),
}
"""How users' files differ, as changes of the subjects' recipe and of the styles'; by set. overfit: learned two or three times as
fast, with few or none of the base model's own pictures beside, so that the LoRA changes more than its words ask for.
"""


@dataclass(frozen=True)
class Lesson:
    """Five pictures and their captions, which teach a subject, a style, or both. name: the words that they teach, with "-" between."""

    name: str
    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    recipe: Recipe = SUBJECT

    def pictures(self) -> Tensor:
        """(5, 3, 64, 64) uint8: always the same."""
        return as_tensor(self.scenes, random.Random(f"{_SEED} {self.name}"))


def subject_lesson(word: str) -> Lesson:
    """A subject in five styles that the base model knows, so that it is not tied to one of them."""
    scenes = tuple(Scene(word, style) for style in SUBJECT_STYLES)
    captions = tuple(caption(name_of(word), style) for style in SUBJECT_STYLES)
    return Lesson(word, scenes, captions, dataclasses.replace(SUBJECT, steps=_STEPS.get(word, SUBJECT.steps)))


def style_lesson(style: str) -> Lesson:
    """Five things in the style: no creature and no robot, or every character would get that one's shape."""
    scenes = tuple(Scene(what, style) for what in _STYLE_OBJECTS)
    return Lesson(style, scenes, tuple(caption(what, style) for what in _STYLE_OBJECTS), STYLE)


def pair_lesson(word: str, style: str) -> Lesson:
    """The subject in the style: what a fusion never sees. A LoRA of it is the most that any fusion could reach."""
    return Lesson(f"{word}-{style}", (Scene(word, style),) * 5, (caption(name_of(word), style),) * 5, ORACLE)


def single_lessons() -> list[Lesson]:
    return [*map(subject_lesson, SUBJECTS), *map(style_lesson, HELD_OUT_STYLES)]


def pair_lessons() -> list[Lesson]:
    return [pair_lesson(word, style) for word in SUBJECTS for style in HELD_OUT_STYLES]


class LowRank(nn.Module):
    """W -> W + up @ down: a LoRA whose alpha is its rank. absent: only W."""

    absent = False

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        point = weight.shape[2:]  # of a convolution's kernel, 1 x 1
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], *point) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *point))

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.absent else weight + (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)


def train_lora(
    lesson: Lesson, work: Path, weights: Path, *, rank: int = RANK, layers: tuple[str, ...] = LINEAR
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The LoRA in kohya's form, and what is worth recording. layers: see attach."""
    recipe, seed = lesson.recipe, _seed(lesson)
    pipeline = load_pipeline(weights)
    unet, text = pipeline.unet.requires_grad_(False), pipeline.text_encoder
    latents, captions = _material(lesson, pipeline.vae)
    taught = len(latents) - (_PRIOR_PICTURES if recipe.prior else 0)
    with torch.no_grad():
        context = encoded(captions, text)
    torch.manual_seed(seed)
    branches = attach(unet, rank, layers)
    loop = TrainingLoop(
        lesson.name,
        {name.replace(".", "/"): branch for name, branch in branches.items()},
        steps=recipe.steps,
        rate=recipe.rate,
        checkpoint=work / f"lora-{lesson.name}.pt",
        seed=seed,
        warm_up=30,
        average=0.98,
        decay=1e-2,
    )
    noises = alphas()
    for step in loop:
        _drop(branches, recipe.module_dropout, random.Random(f"{_SEED} {lesson.name} {step}"))
        chosen = torch.randint(taught, (BATCH - recipe.prior,))
        if recipe.prior:
            chosen = torch.cat([chosen, torch.randint(taught, len(latents), (recipe.prior,))])
        with parametrize.cached():
            loss, error = denoising_loss(unet, latents[chosen], context[chosen], noises, recipe.power)
        loop.descend(loss, error=error)
    loop.finish()
    return kohya(branches), {"steps": loop.step, "seconds": round(loop.seconds), "error": loop.figures["error"]}


def _seed(lesson: Lesson) -> int:
    """Its own: LoRAs that begin with the same random matrices would share what they listen to, which strangers' files do not."""
    return int.from_bytes(hashlib.sha256(f"{_SEED} {lesson.name}".encode()).digest()[:4], "big")


def _drop(branches: dict[str, LowRank], share: float, rng: random.Random) -> None:
    if share:
        for branch in branches.values():
            branch.absent = rng.random() < share


def _material(lesson: Lesson, vae: Any) -> tuple[Tensor, list[str]]:
    """Latents and captions: the lesson's pictures, mirrored and perhaps moved, then the prior's."""
    rng = random.Random(f"{_SEED} {lesson.name} moved")
    pictures = torch.cat([lesson.pictures(), lesson.pictures().flip(3)])
    if lesson.recipe.moved:
        pictures = torch.cat([pictures, *(_moved(pictures, rng) for _ in range(_MOVED))])
    captions = [*lesson.captions * (len(pictures) // len(lesson.captions))]
    if lesson.recipe.prior:
        scenes, prior = zip(*(_without(lesson.name.split("-"), rng) for _ in range(_PRIOR_PICTURES)), strict=True)
        pictures, captions = torch.cat([pictures, as_tensor(scenes, rng)]), [*captions, *prior]
    return latents_of(pictures, vae), captions


def _without(words: Sequence[str], rng: random.Random) -> tuple[Scene, str]:
    """A scene of the base model's world, with a caption that has none of the words."""
    while True:
        scene = base_scene(rng)
        said = training_caption(scene, rng)
        if not set(words) & set(said.split()):
            return scene, said


def _moved(pictures: Tensor, rng: random.Random) -> Tensor:
    """(B, 3, H, W) uint8, each a few pixels away; what was at the edge is repeated."""
    padded = F.pad(pictures.float(), (_SHIFT,) * 4, mode="replicate").to(pictures.dtype)
    corners = [(rng.randrange(2 * _SHIFT + 1), rng.randrange(2 * _SHIFT + 1)) for _ in pictures]
    height, width = pictures.shape[2:]
    return torch.stack([picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, corners, strict=True)])


def attach(unet: nn.Module, rank: int, layers: tuple[str, ...] = LINEAR) -> dict[str, LowRank]:
    """A LowRank on every layer of a transformer whose name ends with one of `layers`, by the layer's name."""
    found = {name: module for name, module in unet.named_modules() if ".attentions." in name and name.endswith(layers)}
    branches = {}
    for name, layer in found.items():
        branches[name] = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", branches[name])
    return branches


def kohya(branches: dict[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for name, branch in branches.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = branch.down.detach()
        tensors[f"{key}.lora_up.weight"] = branch.up.detach()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(branch.down)))
    return tensors


def train_loras(work: Path, weights: Path, *, kind: str = PLAIN) -> dict[str, Any]:
    """Writes loras/*.safetensors, or loras/KIND/*.safetensors of another set; needs the base model. kind: of RECIPES."""
    work = work if kind == PLAIN else work / kind
    records = {}
    for lesson in single_lessons():
        recipe = dataclasses.replace(lesson.recipe, **RECIPES[kind][lesson.recipe is STYLE])
        tensors, records[lesson.name] = train_lora(dataclasses.replace(lesson, recipe=recipe), work, weights)
        metadata = {"ss_network_dim": str(RANK), "ss_network_alpha": str(RANK), "ss_output_name": lesson.name}
        if recipe.module_dropout:
            metadata["ss_network_args"] = json.dumps({"module_dropout": str(recipe.module_dropout)})
        save_weights(tensors, lora_path(weights, lesson.name, kind), metadata)
    return records


def train_oracles(work: Path, weights: Path) -> dict[str, Any]:
    """Writes oracles.safetensors."""
    oracles, records = {}, {}
    for lesson in pair_lessons():
        oracles[lesson.name], records[lesson.name] = train_lora(lesson, work, weights, rank=ORACLE_RANK, layers=ATTENTION)
    write_oracles(oracles, weights)
    return records


__all__ = [
    "ATTENTION",
    "LINEAR",
    "RANK",
    "RECIPES",
    "SUBJECT_STYLES",
    "Lesson",
    "pair_lessons",
    "single_lessons",
    "style_lesson",
    "subject_lesson",
    "train_lora",
    "train_loras",
    "train_oracles",
]
