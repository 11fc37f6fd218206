"""`python -m lib_dynfuse toy plan DIR`: the miniature world as `evaluate` takes a user's own model, and its judges as metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_dynfuse.evaluate.atomic import write_whole
from lib_dynfuse.evaluate.folder import EvaluationError, Pair
from lib_dynfuse.evaluate.metrics import Metric, Shelf
from lib_dynfuse.program import program

from .benchmark.protocol import CFG_SCALE, REFERENCE_SEED, REPORTED, STEPS
from .benchmark.protocol import Pair as WorldPair
from .captions import caption, name_of
from .judges import Judges, load_judges
from .lora_sets import lora_path
from .model import WEIGHTS, load_pipeline
from .shipped import verify

METHODS: dict[str, dict[str, Any]] = {
    "base": {"loras": "none"},
    "subject only": {"loras": "subject"},
    "style only": {"loras": "style"},
    "direct": {"method": "direct"},
    "default": {},
    "best": {"preset": "best"},
    "selection": {"method": "dynfuse"},
    "guidance": {"method": "direct", "guidance": True, "reference_seed": REFERENCE_SEED},
    "both": {"method": "dynfuse", "guidance": True, "reference_seed": REFERENCE_SEED},
}
"""The benchmark's rows, as a plan has them."""
SEEDS = tuple(range(8))


class _Judge(Metric):
    """How sure a network is that never took part in making pictures, 0 to 1."""

    family = "judges"

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf)
        self._judges: Judges | None = None

    def scores(self, pair: Pair, pictures: Sequence[Path]) -> list[float]:
        self._judges = self._judges or load_judges()
        pixels = []
        for path in pictures:
            with Image.open(path) as picture:
                pixels.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1)
        found = self._judges.scores(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        return [float(score) for score in (found.subject(pair.subject) if self.side == "subject" else found.style(pair.style))]


class SubjectJudge(_Judge):
    name, side = "judge-subject", "subject"
    protocol = "The miniature world's judge: how probably the picture shows the subject."


class StyleJudge(_Judge):
    name, side = "judge-style", "style"
    protocol = "The miniature world's judge: how probably the picture is in the style."


JUDGES = tuple(f"{judge.__module__}:{judge.__name__}" for judge in (SubjectJudge, StyleJudge))
METRICS = (*JUDGES, "style-sim", "clip-score", "dino-score")


def write_plan(
    folder: Path,
    *,
    pairs: Iterable[WorldPair] = REPORTED,
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    metrics: Sequence[str] = METRICS,
    seeds: Sequence[int] = SEEDS,
) -> Path:
    """Write the model as a diffusers folder, the LoRAs, references and encoders, and the plan world.toml. Returns the plan's path.

    Raises WeightsError where the world's weights are missing or damaged, EvaluationError where there is a plan already; OSError.
    """
    path = folder / "world.toml"
    if path.exists():
        raise EvaluationError(f"{path} is there already, and is not overwritten.")
    verify(WEIGHTS)
    load_pipeline().save_pretrained(folder / "model")
    pairs = tuple(pairs)
    sides = {
        "subjects": {pair.subject: (name_of(pair.subject), caption(name_of(pair.subject))) for pair in pairs},
        "styles": {pair.style: (pair.style, caption("house", pair.style)) for pair in pairs},
    }
    for kind in ("clip", "dino"):
        shutil.copytree(WEIGHTS / kind, folder / "encoders" / kind, dirs_exist_ok=True)
    for word in (*sides["subjects"], *sides["styles"]):
        lora = folder / "loras" / f"{word}.safetensors"
        lora.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(lora_path(WEIGHTS, word), lora)
        _write_references(folder / "references" / word, word, word in sides["subjects"])
    write_whole(path, _text(pairs, sides, methods, metrics, seeds).encode())
    return path


def run(folder: Path) -> int:
    """Write the plan, and say what to do next. Returns the exit code. Raises as write_plan does."""
    path = write_plan(folder)
    print(f"Wrote {path}. Try it: {program()} evaluate {path}")
    return 0


def _write_references(folder: Path, word: str, is_subject: bool) -> None:
    """The pictures that the LoRA was trained on."""
    from .training.loras import style_lesson, subject_lesson

    lesson = subject_lesson(word) if is_subject else style_lesson(word)
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(lesson.pictures().permute(0, 2, 3, 1).numpy(), 1):
        Image.fromarray(pixels).save(folder / f"{number}.png")


def _text(
    pairs: Sequence[WorldPair],
    sides: Mapping[str, Mapping[str, tuple[str, str]]],
    methods: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    seeds: Sequence[int],
) -> str:
    lines = [
        "# The miniature world: 64 x 64 pixels, LoRAs whose truth is known, judges that no method optimises (docs/quality.md).",
        'title = "The miniature world"',
        'out = "out"',
        'prompts = ["a {subject} in {style} style"]',
        f"pairs = {_value([[pair.subject, pair.style] for pair in pairs])}",
        f"metrics = {_value(list(metrics))}",
        "",
        *("[make]", 'model = "model"', f"steps = {STEPS}", f"cfg_scale = {CFG_SCALE}", f"seeds = {_value(list(seeds))}"),
        f"batch = {min(len(seeds), 8)}",
        *("", "[encoders]", 'clip = "encoders/clip"', 'dino = "encoders/dino"', "download = false"),
    ]
    for kind, entries in sides.items():
        for word, (words, alone) in entries.items():
            lines += ["", f"[{kind}.{word}]", f'lora = "loras/{word}.safetensors"', f"words = {_value(words)}", f"alone = {_value(alone)}"]
            lines += [f'references = ["references/{word}"]']
    for name, values in methods.items():
        lines += ["", f"[methods.{_value(name)}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """TOML's text of a string, a number, a truth value or a list of these is JSON's."""
    return json.dumps(value)


__all__ = ["JUDGES", "METHODS", "METRICS", "StyleJudge", "SubjectJudge", "run", "write_plan"]
