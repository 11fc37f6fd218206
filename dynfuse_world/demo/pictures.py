"""The demo's pictures: what two LoRAs were taught, what each makes alone, both in one picture in four ways; and what the judges say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_dynfuse.evaluate.statistics import harmonic_mean
from lib_dynfuse.fusion import Trace
from lib_dynfuse.guidance.guide import GuidanceRecord
from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.guidance.weights import EncoderSources
from lib_dynfuse.lora import read_lora

from ..benchmark.methods import METHODS, Row
from ..benchmark.protocol import CFG_SCALE, Pair
from ..judges import Judges
from ..lora_sets import lora_path
from ..painter import SUBJECTS
from ..training.loras import Lesson, style_lesson, subject_lesson

SIDES = ("subject", "style")
SHOWN = ("direct", "default", "selection", "both")
"""Of the benchmark's methods."""

Progress = Callable[[str], None]
"""Called after each step with what is being made."""


@dataclass(frozen=True)
class Judged:
    """A picture with how sure the judges are, 0 to 1: that it shows the subject, and that it is in the style."""

    picture: Image.Image
    subject: float
    style: float

    @property
    def both(self) -> float:
        """Harmonic mean of subject and style: near 0 where either is."""
        return float(harmonic_mean(np.array(self.subject), np.array(self.style)))


@dataclass(frozen=True)
class Show:
    """All that is shown of a pair.

    taught: what each LoRA was trained on, captions and pictures; alone: the picture of each LoRA alone; both by side (SIDES). fused: by
    method, a picture for each seed. trace: of the selection. record: of the guidance with selection.
    """

    pair: Pair
    seeds: tuple[int, ...]
    steps: int
    taught: Mapping[str, Sequence[tuple[str, Image.Image]]]
    alone: Mapping[str, Judged]
    fused: Mapping[str, Sequence[Judged]]
    trace: Trace
    record: GuidanceRecord

    @property
    def kind(self) -> str:
        """What the subject is one of: creature or robot."""
        return SUBJECTS[self.pair.subject].character.kind

    @property
    def prompts(self) -> Mapping[str, str]:
        """What the pictures of one LoRA alone were asked for, by side."""
        return {"subject": self.pair.subject_prompt, "style": self.pair.style_prompt}


def steps_in_all(pairs: int, steps: int) -> int:
    """How many times `make` calls its progress for that many pairs."""
    return pairs * steps * (len(SHOWN) + len(SIDES))


def make(
    pipeline: Any, judges: Judges, pair: Pair, weights: Path, cache: Path, seeds: Sequence[int], steps: int, progress: Progress
) -> Show:
    """Make and judge all pictures of a pair. weights: the miniature world's. cache: an empty folder, for the references."""
    from lib_dynfuse.hosts.diffusers import FusedImages, FusedPipeline, GuidanceSources

    subject, style = (read_lora(lora_path(weights, name)) for name in (pair.subject, pair.style))
    # The settings that a user has for encoders of their own.
    encoders = EncoderSources(cache, clip=str(weights / "clip"), dino=str(weights / "dino"), download=False)
    sources = GuidanceSources(encoders, ReferenceCache(cache))
    made: dict[str, FusedImages] = {}
    for name in SHOWN:
        settings = METHODS[name]
        fused = FusedPipeline(pipeline, subject, style, Row(name, settings=settings).settings_for(pair), sources)

        def drawing(done: int, total: int, what: str = f"{pair.name}: {name}") -> None:
            progress(what)

        made[name] = fused(
            pair.prompt,
            seeds=seeds,
            steps=steps,
            cfg_scale=CFG_SCALE,
            progress=drawing,
            reference_progress=lambda side, done, total: progress(f"{pair.name}: {side} alone"),
        )
    both = made["both"]
    assert both.guidance is not None
    return Show(
        pair=pair,
        seeds=tuple(seeds),
        steps=steps,
        taught={"subject": taught(subject_lesson(pair.subject)), "style": taught(style_lesson(pair.style))},
        alone={reference.side: judged([reference.picture], pair, judges)[0] for reference in both.references},
        fused={name: judged(result.images, pair, judges) for name, result in made.items()},
        trace=made["selection"].trace,
        record=both.guidance,
    )


def judged(pictures: Sequence[Image.Image], pair: Pair, judges: Judges) -> list[Judged]:
    """What the judges say of pictures for that pair."""
    pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    scores = judges.scores(torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2))
    columns = scores.subject(pair.subject), scores.style(pair.style)
    return [Judged(picture, *map(float, row)) for picture, *row in zip(pictures, *columns)]


def taught(lesson: Lesson) -> list[tuple[str, Image.Image]]:
    """The pictures that a LoRA was trained on, with their captions."""
    pixels = lesson.pictures().permute(0, 2, 3, 1).numpy()
    return [(caption, Image.fromarray(picture)) for caption, picture in zip(lesson.captions, pixels)]


__all__ = ["SHOWN", "SIDES", "Judged", "Show", "judged", "make", "steps_in_all", "taught"]
