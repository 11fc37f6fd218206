"""Training of the guidance's two encoders: a small CLIP, and a small ViT in DINO's role.

Both see what the base model sees, and nothing that is held out. They are saved as a user's own folders would be, for
guidance.EncoderSources(clip=FOLDER, dino=FOLDER).
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_dynfuse.guidance.encoders import Encoders, EncoderSources, load_encoders
from lib_dynfuse.guidance.weights import CLIP_CONFIG, CLIP_WEIGHTS, DINO_CONFIG, DINO_PREPROCESSING, DINO_WEIGHTS, imported

from ..captions import caption, training_caption
from ..model import WEIGHTS, known_tokens, save_weights, tokenizer
from ..painter import CLASSES, HELD_OUT_STYLES, PIXELS, STYLES, SUBJECTS, Scene
from .flawed import softened
from .loop import TrainingLoop
from .pictures import HELD_OUT_PAIRS, as_floats, as_tensor, base_scene

CLIP_STEPS = 3000
DINO_STEPS = 1200
CONTEXT = 12
"""Tokens of a caption, with those that begin and end it."""
_MEAN = _STD = (0.5, 0.5, 0.5)  # the world's pictures lie in [-1, 1], and the networks see them so
_WIDTH, _LAYERS, _HEADS, _PATCH = 80, 4, 4, 8
_CLIP_SEED, _DINO_SEED = 3_001, 4_001
_BATCH = 64

CLIP_MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": PIXELS,
        "patch_size": _PATCH,
        "width": _WIDTH,
        "layers": _LAYERS,
        "head_width": _WIDTH // _HEADS,
        "mlp_ratio": 2.0,
        "patch_dropout": 0.4,  # in training only, which it makes faster
    },
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 45, "width": 64, "heads": 4, "layers": 1},
}
"""open_clip's description of it. The vocabulary is the world's own: see clip_tokens."""


def clip_tokens(captions: Sequence[str]) -> Tensor:
    """(B, CONTEXT) int64: CLIP's tokens, renumbered in their order among those that the world's words need, then zeros."""
    number = _numbers()
    rows = torch.zeros(len(captions), CONTEXT, dtype=torch.int64)
    for row, tokens in zip(rows, tokenizer()(list(captions)).input_ids, strict=True):
        row[: len(tokens)] = torch.tensor([number[token] for token in tokens])
    return rows


@functools.cache
def _numbers() -> dict[int, int]:
    return {token: number for number, token in enumerate(known_tokens().tolist())}


def new_clip() -> Any:
    """An open_clip.CLIP with random weights."""
    imported("open_clip_torch", "open_clip")
    model = imported("open_clip_torch", "open_clip.model")
    return model.CLIP(**copy.deepcopy(CLIP_MODEL))


def new_vit() -> Any:
    """A transformers.ViTModel with random weights."""
    transformers = imported("transformers", "transformers")
    config = transformers.ViTConfig(
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        image_size=PIXELS,
        patch_size=_PATCH,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


# CLIP


def train_clip(work: Path, weights: Path, steps: int = CLIP_STEPS) -> dict[str, Any]:
    """Writes clip/open_clip_config.json and clip/open_clip_model.safetensors. Returns what is worth recording."""
    torch.manual_seed(_CLIP_SEED)
    clip = new_clip().train()
    loop = TrainingLoop("clip", {"clip": clip}, steps=steps, rate=1.5e-3, checkpoint=work / "clip.pt", seed=_CLIP_SEED, decay=0.02)
    generator = torch.Generator()
    for step in loop:
        rng = random.Random(_CLIP_SEED + step)
        generator.manual_seed(_CLIP_SEED + step)
        scenes, captions = zip(*(_captioned(rng) for _ in range(_BATCH)), strict=True)
        pictures = softened(as_floats(as_tensor(scenes, rng)), generator)
        images, texts, scale = clip(pictures, clip_tokens(captions))
        loop.descend(contrastive_loss(scale.clamp(max=50) * images @ texts.T, captions))
    loop.finish()
    write_clip(clip, weights / "clip")
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": _BATCH, "loss": loop.figures["loss"]}


def _captioned(rng: random.Random) -> tuple[Scene, str]:
    """A picture about which something is said."""
    scene = base_scene(rng)
    while not (said := training_caption(scene, rng)):
        pass
    return scene, said


def contrastive_loss(logits: Tensor, captions: Sequence[str]) -> Tensor:
    """CLIP's loss, from pictures to captions and back, where every picture with the same caption is a right one.

    logits: (B, B), pictures by captions.
    """
    same = torch.tensor([[float(one == other) for other in captions] for one in captions])
    same = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def write_clip(clip: nn.Module, folder: Path) -> None:
    """A folder that open_clip's users know: the configuration and the weights, float16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CLIP_MODEL, "preprocess_cfg": {"mean": _MEAN, "std": _STD}}
    (folder / CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_weights(clip.state_dict(), folder / CLIP_WEIGHTS[0])


# The ViT


class _Head(nn.Module):
    """From features to the shares of prototypes, as DINO has it, narrow. (B, C) -> (B, prototypes)."""

    def __init__(self, width: int = _WIDTH, hidden: int = 192, bottleneck: int = 48, prototypes: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * 0.1)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class _Network(nn.Module):
    """The ViT and the head that is needed in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = new_vit(), _Head()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.vit(pixel_values=pictures, interpolate_pos_encoding=True).last_hidden_state[:, 0])


class _Teacher(nn.Module):
    """Follows the student slowly, and keeps its answers centred, so that it does not say the same of everything."""

    def __init__(self, student: _Network, prototypes: int = 256) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))

    centre: Tensor

    @torch.no_grad()
    def answers(self, pictures: Tensor, temperature: float) -> Tensor:
        said = self.network(pictures)
        shares = ((said - self.centre) / temperature).softmax(-1)
        self.centre.lerp_(said.mean(0), 0.1)
        return shares

    @torch.no_grad()
    def follow(self, student: _Network, keep: float) -> None:
        for mine, new in zip(self.network.parameters(), student.parameters(), strict=True):
            mine.lerp_(new, 1 - keep)


def train_dino(work: Path, weights: Path, steps: int = DINO_STEPS) -> dict[str, Any]:
    """Self-supervised, in DINO's manner (arXiv 2104.14294): a student that sees parts of a picture says what its teacher says of all of it.

    Writes dino/config.json, dino/model.safetensors and dino/preprocessor_config.json. Returns what is worth recording.
    """
    torch.manual_seed(_DINO_SEED)
    student = _Network().train()
    teacher = _Teacher(student)
    loop = TrainingLoop(
        "dino",
        {"student": student, "teacher": teacher},
        steps=steps,
        rate=1.5e-3,
        checkpoint=work / "dino.pt",
        seed=_DINO_SEED,
        decay=0.02,
        average=0.0,
    )
    generator = torch.Generator()
    for step in loop:
        rng = random.Random(_DINO_SEED + step)
        generator.manual_seed(_DINO_SEED + step)
        pictures = as_floats(as_tensor([base_scene(rng) for _ in range(_BATCH)], rng))
        wide = torch.cat([_view(pictures, 48, generator) for _ in range(2)])
        narrow = torch.cat([_view(pictures, 32, generator) for _ in range(2)])
        targets = teacher.answers(wide, 0.04).chunk(2)
        said = [*student(wide).chunk(2), *student(narrow).chunk(2)]
        pairs = [(target, answer) for one, target in enumerate(targets) for other, answer in enumerate(said) if one != other]
        loss = torch.stack([-(target * (answer / 0.1).log_softmax(-1)).sum(-1).mean() for target, answer in pairs]).mean()
        spread = targets[0].mean(0)
        loop.descend(loss, prototypes=float((-spread * (spread + 1e-9).log()).sum().exp()))
        teacher.follow(student, 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    loop.finish()
    write_vit(teacher.network.vit, weights / "dino")
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": _BATCH, **loop.figures}


def _view(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Another part of each picture, (B, 3, size, size), its colours a little different. Not scaled: a pattern's width is its style's."""
    count = len(pictures)
    corners = torch.randint(PIXELS - size + 1, (count, 2), generator=generator).tolist()
    view = torch.stack([picture[:, y : y + size, x : x + size] for picture, (y, x) in zip(pictures, corners, strict=True)])
    light = torch.rand(count, 1, 1, 1, generator=generator) * 0.4 + 0.8
    tint = (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.3
    return softened((view * light + tint).clamp(-1, 1), generator)


def write_vit(vit: Any, folder: Path) -> None:
    """A folder that transformers' users know: configuration, weights (float16), preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**vit.config.to_diff_dict(), "architectures": ["ViTModel"], "model_type": "vit"}
    config.pop("transformers_version", None)
    (folder / DINO_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    size = {"height": PIXELS, "width": PIXELS}
    preprocessing = {"image_processor_type": "ViTImageProcessor", "image_mean": _MEAN, "image_std": _STD, "size": size, "resample": 3}
    (folder / DINO_PREPROCESSING).write_text(json.dumps(preprocessing, indent=2) + "\n", "utf-8")
    save_weights(vit.state_dict(), folder / DINO_WEIGHTS[0], {"format": "pt"})


# Figures


@torch.no_grad()
def evaluate_clip(clip: nn.Module, pictures: int = 1000, seed: int = 9_101) -> dict[str, float]:
    """Which of the 14 x 8 captions CLIP gives new pictures. Shares of right ones: of captions, of classes, of styles; and of the pairs
    that it was never shown."""
    clip.eval()
    rng = random.Random(seed)
    pairs = [(what, style) for what in CLASSES for style in STYLES]
    texts = clip.encode_text(clip_tokens([caption(*pair) for pair in pairs]), normalize=True)

    def chosen(asked: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        scenes = as_floats(as_tensor([Scene(*pair) for pair in asked], rng))
        return [
            pairs[int(number)] for part in scenes.split(250) for number in (clip.encode_image(part, normalize=True) @ texts.T).argmax(1)
        ]

    def right(asked: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]], same: Callable[[Any, Any], bool]) -> float:
        return round(sum(map(same, asked, answers)) / len(asked), 3)

    asked = [rng.choice(pairs) for _ in range(pictures)]
    unseen = [rng.choice(sorted(HELD_OUT_PAIRS)) for _ in range(pictures // 2)]
    answers = chosen(asked)
    return {
        "captions": right(asked, answers, lambda one, other: one == other),
        "classes": right(asked, answers, lambda one, other: one[0] == other[0]),
        "styles": right(asked, answers, lambda one, other: one[1] == other[1]),
        "captions of unseen pairs": right(unseen, chosen(unseen), lambda one, other: one == other),
    }


def evaluate_encoders(encoders: Encoders, pictures: int = 1000, seed: int = 9_201) -> dict[str, dict[str, float]]:
    """How well near pictures are alike, for {"clip", "dino"}: shares of pictures whose five nearest neighbours say the right thing.

    "class" and "style": neighbours among 2000 pictures of the base model's world. "held-out subject" and "held-out style": neighbours
    among five pictures of each of the four, as a person has; the subjects in any of the base model's styles, the styles on any of its
    classes. "held-out style among all": among five pictures of each of the twelve.
    """
    rng = random.Random(seed)
    styles, subjects, held_out, classes = list(STYLES), list(SUBJECTS), list(HELD_OUT_STYLES), list(CLASSES)

    def embedded(scenes: Sequence[Scene]) -> dict[str, Tensor]:
        parts = [encoders.embed(part) for part in as_floats(as_tensor(scenes, rng)).split(250)]
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in ("clip", "dino")}

    def neighbours(known: Sequence[Scene], asked: Sequence[Scene], labels: Sequence[Callable[[Scene], Any]]) -> dict[str, list[float]]:
        bank, queries = embedded(known), embedded(asked)
        return {name: [_nearest(bank[name], queries[name], list(map(of, known)), list(map(of, asked))) for of in labels] for name in bank}

    def anywhere() -> Scene:
        return Scene(rng.choice(classes), rng.choice(styles))

    def repeated(known: Callable[[], Sequence[Scene]], asked: Callable[[], Scene], label: Callable[[Scene], Any]) -> dict[str, float]:
        draws = [neighbours(known(), [asked() for _ in range(pictures // 10)], [label]) for _ in range(10)]
        return {name: sum(draw[name][0] for draw in draws) / len(draws) for name in draws[0]}

    def what(scene: Scene) -> str:
        return scene.what

    def style(scene: Scene) -> str | None:
        return scene.style

    of_world = neighbours([anywhere() for _ in range(2000)], [anywhere() for _ in range(pictures)], [what, style])
    few = {
        "held-out subject": repeated(
            lambda: [Scene(name, rng.choice(styles)) for name in subjects for _ in range(5)],
            lambda: Scene(rng.choice(subjects), rng.choice(styles)),
            what,
        ),
        "held-out style": repeated(
            lambda: [Scene(rng.choice(classes), name) for name in held_out for _ in range(5)],
            lambda: Scene(rng.choice(classes), rng.choice(held_out)),
            style,
        ),
        "held-out style among all": repeated(
            lambda: [Scene(rng.choice(classes), name) for name in (*styles, *held_out) for _ in range(5)],
            lambda: Scene(rng.choice(classes), rng.choice(held_out)),
            style,
        ),
    }
    return {
        name: {
            "class": round(of_world[name][0], 3),
            "style": round(of_world[name][1], 3),
            **{question: round(answers[name], 3) for question, answers in few.items()},
        }
        for name in ("clip", "dino")
    }


def _nearest(known: Tensor, asked: Tensor, known_labels: list[Any], asked_labels: list[Any], k: int = 5) -> float:
    """The share of questions that the k nearest, weighted by how near they are, answer right."""
    names = sorted(set(known_labels), key=str)
    votes = torch.zeros(len(asked), len(names))
    near = (asked @ known.T).topk(k, 1)
    label = torch.tensor([names.index(each) for each in known_labels])
    votes.scatter_add_(1, label[near.indices], (near.values / 0.1).exp())
    answers = votes.argmax(1).tolist()
    return sum(names[answer] == right for answer, right in zip(answers, asked_labels, strict=True)) / len(asked)


def _main() -> None:
    """Print the figures of the shipped encoders."""
    from safetensors.torch import load_file

    clip = new_clip()
    clip.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS / "clip" / CLIP_WEIGHTS[0]).items()})
    sources = EncoderSources(WEIGHTS, clip=str(WEIGHTS / "clip"), dino=str(WEIGHTS / "dino"), download=False)
    figures = {"clip's captions": evaluate_clip(clip), **evaluate_encoders(load_encoders(sources))}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    _main()

__all__ = [
    "CLIP_MODEL",
    "CLIP_STEPS",
    "CONTEXT",
    "DINO_STEPS",
    "clip_tokens",
    "contrastive_loss",
    "evaluate_clip",
    "evaluate_encoders",
    "new_clip",
    "new_vit",
    "train_clip",
    "train_dino",
    "write_clip",
    "write_vit",
]
