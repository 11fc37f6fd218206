"""bench steering: whether guided pictures come closer to their references than unguided ones of the same seeds, and how much.

In the miniature world (dynfuse_world): its trained model, a subject's and a style's LoRA, and its encoders. Whether what the encoders
find closer is better is for other judges: `toy bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_dynfuse.guidance.encoders import Encoders, load_encoders
from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.guidance.score import LABELS, TERMS, Targets, score, similarities
from lib_dynfuse.guidance.weights import EncoderSources
from lib_dynfuse.lora import read_lora
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.threads import one_thread

from .benchmark.protocol import CFG_SCALE, REFERENCE_SEED, TUNING, Pair
from .lora_sets import lora_path
from .model import WEIGHTS, load_pipeline

STRENGTHS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 50.0)
GRADIENTS = ("fast", "exact")

_WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
# Watches the unguided steps: too small to change a float32.
_NOTHING = 1e-30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=16, metavar="N", help="pictures, of seeds 0 to N - 1 (default: 16)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        import diffusers  # noqa: F401
        import open_clip  # noqa: F401
    except ImportError as error:
        print(f"The benchmark builds its model with {error.name}, which is not installed here: pip install {error.name}", file=sys.stderr)
        return 2
    if arguments.seeds < 2 or arguments.steps < 2:
        print("--seeds and --steps must be at least 2.", file=sys.stderr)
        return 2
    progress = (lambda text: None) if arguments.json else (lambda text: print(text, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory() as folder, one_thread():
        make = Maker(TUNING[0], Path(folder), range(arguments.seeds), arguments.steps)
        result = measure(make, STRENGTHS, GRADIENTS, progress)
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def measure(
    make: Maker, strengths: Sequence[float], gradients: Sequence[str], progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Make the pictures of all seeds for each gradient and m, the first of which must be 0.

    Returns per gradient and m: final (seeds, R of the finished picture, 8 bits a channel), terms (its three similarities), gain (of R
    against the same seed unguided), along (R of D before each step's correction, mean over the seeds), and bitten (share of the
    corrections that the limit scaled down).
    """
    unguided, *guided = strengths
    progress("Unguided ...")
    first = {"gradient": "none", "m": unguided, **make("fast", unguided)}
    jobs = [first]
    for gradient in gradients:
        for m in guided:
            progress(f"{gradient}, m = {m:g} ...")
            jobs.append({"gradient": gradient, "m": m, **make(gradient, m)})
    for job in jobs:
        job["gain"] = [before - after for before, after in zip(first["final"], job["final"])]
    setup = {
        "seeds": len(make.seeds),
        "steps": make.steps,
        "pair": make.pair.name,
        "limit": FuseSettings().limit,
        "torch": torch.__version__,
    }
    return {**setup, "jobs": jobs}


class Maker:
    """Makes a pair's pictures of all seeds."""

    def __init__(self, pair: Pair, folder: Path, seeds: Sequence[int], steps: int) -> None:
        """folder: for the references."""
        self.pair, self.folder, self.seeds, self.steps = pair, folder, seeds, steps
        self.encoders = load_encoders(EncoderSources(WEIGHTS, str(WEIGHTS / "clip"), str(WEIGHTS / "dino"), download=False))
        self._pipeline = load_pipeline(WEIGHTS)
        self._subject, self._style = (read_lora(lora_path(WEIGHTS, name)) for name in (pair.subject, pair.style))

    def __call__(self, gradient: str, m: float) -> dict[str, Any]:
        """final, terms, along and bitten, as measure returns them."""
        from lib_dynfuse.hosts.diffusers import FusedPipeline, GuidanceSources

        settings = FuseSettings(
            method="direct",
            guidance=True,
            gradient=gradient,
            m=m or _NOTHING,
            subject_prompt=self.pair.subject_prompt,
            style_prompt=self.pair.style_prompt,
            reference_seed=REFERENCE_SEED,
        )
        sources = GuidanceSources(self.encoders, ReferenceCache(self.folder))
        fused = FusedPipeline(self._pipeline, self._subject, self._style, settings, sources)
        made = fused(self.pair.prompt, seeds=self.seeds, steps=self.steps, cfg_scale=CFG_SCALE)
        record = made.guidance
        assert record is not None
        subject, style = made.references
        terms = final_similarities(made.images, Targets.of(subject.embeddings, style.embeddings), self.encoders)
        return {
            "final": score(terms, _WEIGHTS).tolist(),
            "terms": dict(zip(TERMS, terms.tolist())),
            "along": [float(score(step, _WEIGHTS).mean()) for step in record.similarities],
            "bitten": record.bites / (len(record.steps) * len(self.seeds)),
        }


def final_similarities(images: Sequence[Image.Image], targets: Targets, encoders: Encoders) -> torch.Tensor:
    """(3, images): of the finished pictures."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    with torch.no_grad():
        return similarities(torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2), targets, encoders)


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['pair']}, {result['seeds']} seeds, {result['steps']} steps, limit {result['limit']:g}, torch {result['torch']}; "
        "R: smaller is closer to the references",
        f"{'gradient':9}{'m':>5}{'R of the picture':>20}{'gain (spread)':>20}{'closer':>9}{'R of D, first to last step':>29}{'limited':>9}"
        + "".join(f"{label:>14}" for label in LABELS),
    ]
    for job in result["jobs"]:
        final, gain = job["final"], job["gain"]
        places = (0, len(job["along"]) // 2, -1)
        along = " -> ".join(f"{job['along'][place]:.3f}" for place in places)
        closer = f"{sum(g > 0 for g in gain)}/{len(gain)}" if job["m"] else ""
        lines.append(
            f"{job['gradient']:9}{job['m']:5g}{f'{statistics.mean(final):.4f} ({statistics.stdev(final):.4f})':>20}"
            f"{f'{statistics.mean(gain):+.4f} ({statistics.stdev(gain):.4f})' if job['m'] else '':>20}{closer:>9}"
            f"{along:>29}"
            f"{job['bitten']:9.0%}" + "".join(f"{statistics.mean(job['terms'][term]):14.4f}" for term in TERMS)
        )
    return "\n".join(lines)


__all__ = ["GRADIENTS", "STRENGTHS", "Maker", "add_arguments", "final_similarities", "measure", "run"]
