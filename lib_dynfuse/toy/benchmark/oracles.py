"""The LoRAs that were trained on true pictures of a pair: all in one file, as theirs share what a file of its own would repeat."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ...lora import LoraFile, read_lora
from .protocol import Pair

FILE = "oracles.safetensors"


def read_oracle(weights: Path, pair: Pair) -> LoraFile:
    """The pair's LoRA out of weights/oracles.safetensors, whose keys are "{subject}-{style}/{kohya's key}".

    Raises OSError where there is no such file, LoraError where it holds nothing for the pair.
    """
    prefix = f"{pair.name}/"
    with safe_open(weights / FILE, "pt") as file:  # type: ignore[attr-defined]
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in list(file.keys()) if key.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{pair.name}.safetensors")
        save_file(tensors, str(path))
        return read_lora(path)


__all__ = ["FILE", "read_oracle"]
