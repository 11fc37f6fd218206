"""The LoRAs that were trained on true pictures of a pair, stacked in one file: the names of their tensors would take a fifth of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib_dynfuse.lora import LoraFile, read_lora

from .model import save_weights

FILE = "oracles.safetensors"
_PAIRS = "pairs"


def write_oracles(oracles: Mapping[str, Mapping[str, Tensor]], weights: Path) -> None:
    """oracles: by pair ("zib-chalk"), tensors by kohya's keys; the same keys and shapes for all.

    Each tensor of the file is theirs along a first axis; the metadata has the pairs in that order.
    """
    keys = next(iter(oracles.values()))
    stacked = {key: torch.stack([tensors[key] for tensors in oracles.values()]) for key in keys}
    save_weights(stacked, weights / FILE, {_PAIRS: ",".join(oracles)})


def read_oracle(weights: Path, pair: str) -> LoraFile:
    """The pair's LoRA. Raises OSError where there is no such file, KeyError where it has no such pair."""
    with safe_open(weights / FILE, "pt") as file:  # type: ignore[attr-defined]
        pairs = file.metadata()[_PAIRS].split(",")
        if pair not in pairs:
            raise KeyError(f"{FILE} has {', '.join(pairs)}, not {pair}")
        tensors = {key: file.get_tensor(key)[pairs.index(pair)].contiguous() for key in list(file.keys())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{pair}.safetensors")
        save_file(tensors, str(path))
        return read_lora(path)


__all__ = ["FILE", "read_oracle", "write_oracles"]
