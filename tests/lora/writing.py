"""Random LoRA files for the tests, written key by key as the trainers write them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on shape and seed only."""
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, generator=generator).to(dtype)


def pair(out: int, into: int, rank: int = 2, *, kernel: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(down, up) of a linear layer, or of a convolution with a square kernel."""
    if kernel is None:
        return random(rank, into, seed=seed), random(out, rank, seed=seed + 1)
    return random(rank, into, kernel, kernel, seed=seed), random(out, rank, 1, 1, seed=seed + 1)


def kohya(name: str, down: Tensor, up: Tensor, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def peft(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "test.safetensors", metadata: dict[str, str] | None = None) -> Path:
    path = folder / name
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
