"""The steps of the training, in order. Each can be killed and goes on where it was; what is done is not done again."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..lora_sets import PLAIN
from ..shipped import write_checksums
from .autoencoder import train_autoencoder, train_decoder
from .base import train_base
from .encoders import train_clip, train_dino
from .judges import train_judges
from .loras import train_loras, train_oracles
from .second_judges import train_second_judges

Step = Callable[..., Mapping[str, Any]]
"""(folder of unfinished work, folder of weights) -> what is worth recording."""

STEPS: dict[str, Step] = {
    "autoencoder": train_autoencoder,
    "base": train_base,
    "decoder": train_decoder,
    "clip": train_clip,
    "dino": train_dino,
    "judges": train_judges,
    "second-judges": train_second_judges,
    "loras": train_loras,
    "oracles": train_oracles,
}


def train(work: Path, weights: Path, names: Sequence[str] = tuple(STEPS), *, kind: str = PLAIN) -> int:
    """Run the steps that are not done, with progress on standard error. Returns the exit code.

    work: checkpoints, pictures, and records.json with what each finished step took. kind: the set of LoRAs that the step loras makes;
    names: that step alone, if it is not the plain one.
    """
    steps: dict[str, Step] = {**STEPS, "loras": partial(STEPS["loras"], kind=kind)}
    torch.set_flush_denormal(True)
    records_file = work / "records.json"
    records: dict[str, Any] = json.loads(records_file.read_text("utf-8")) if records_file.is_file() else {}
    for number, name in enumerate(names, 1):
        recorded = name if kind == PLAIN else f"{name} {kind}"
        if recorded in records:
            print(f"{recorded} is done. To do it again, remove it from {records_file}.", file=sys.stderr)
            continue
        print(f"Step {number} of {len(names)}: {name}", file=sys.stderr)
        records[recorded] = {**steps[name](work, weights), "on": _machine()}
        work.mkdir(parents=True, exist_ok=True)
        records_file.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
        write_checksums(weights)
    for name, record in records.items():
        print(f"{name}: {json.dumps(record)}")
    return 0


def _machine() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


__all__ = ["STEPS", "Step", "train"]
