"""How the cost of a step grows: with the rank, the number of LoRAs, of pixels, and of layers that the LoRAs change."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..fusion import FusionSession
from ..settings import FuseSettings
from .denoisers import WORLD, Denoiser, Loras, loras, random_lora, transformer_layers, unet_inputs

AXES = ("rank", "loras", "size", "layers")
_RANKS = (4, 8, 16, 32, 64, 128)
_COUNTS = (1, 2, 3, 4)
_FRACTIONS = (1, 2, 3, 4)  # quarters
_SIZES = {"sd15": (128, 256, 384, 512), "sdxl": (256, 512, 768, 1024), WORLD: (64, 128, 192, 256)}

Timed = Callable[[Denoiser, dict[str, Callable[[], Any]]], dict[str, dict[str, Any]]]
Way = Callable[[Denoiser, FusionSession], Callable[[], Any]]


def measure(
    axis: str, denoiser: Denoiser, count: int, rank: int | None, fused: FuseSettings, timed: Timed, way: Way
) -> list[dict[str, Any]]:
    """One row for each value of the axis: value, plain_seconds, and ratio_to_plain of direct and fused."""
    rows = []
    for value, own, branches in _cases(axis, denoiser, count, rank):
        sessions = {"direct": branches.session(own, FuseSettings(method="direct")), "fused": branches.session(own, fused)}
        ways: dict[str, Callable[[], Any]] = {"plain": own.run}
        ways.update({name: way(own, session) for name, session in sessions.items()})
        result = timed(own, ways)
        rows.append(
            {"value": value, "plain_seconds": result["median_seconds"]["plain"], "ratio_to_plain": result["ratio_to_plain"]},
        )
        for session in sessions.values():
            session.release()
    return rows


def _cases(axis: str, denoiser: Denoiser, count: int, rank: int | None) -> list[tuple[int, Denoiser, Loras]]:
    if axis == "rank":
        return [(value, denoiser, loras(denoiser, count, value)) for value in _RANKS]
    if axis == "loras":
        return [(value, denoiser, loras(denoiser, value, rank)) for value in _COUNTS]
    if axis == "size":
        branches = loras(denoiser, count, rank)
        return [(size, _resized(denoiser, size), branches) for size in _SIZES[denoiser.model]]
    assert rank is not None
    total = len(transformer_layers(denoiser.unet))
    return [(total * part // 4, denoiser, _on_layers(denoiser, count, rank, total * part // 4)) for part in _FRACTIONS]


def _resized(denoiser: Denoiser, size: int) -> Denoiser:
    """The same U-Net with inputs for pictures of another size."""
    latent = denoiser.latent
    return Denoiser(denoiser.model, size, denoiser.unet, unet_inputs(denoiser.model, size, latent.device, latent.dtype))


def _on_layers(denoiser: Denoiser, count: int, rank: int, layers: int) -> Loras:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.safetensors" for seed in range(1, count + 1)]
        return Loras.split([random_lora(denoiser.unet, rank, seed, path, layers) for seed, path in enumerate(paths, 1)])


def table(axis: str, rows: list[dict[str, Any]]) -> list[str]:
    unit = {"rank": "rank", "loras": "LoRAs", "size": "pixels", "layers": "layers"}[axis]
    lines = [f"{unit:>8}{'plain, s':>12}{'direct':>10}{'fused':>10}  times plain"]
    for row in rows:
        ratios = row["ratio_to_plain"]
        lines.append(f"{row['value']:8}{row['plain_seconds']:12.3f}{ratios['direct']:10.3f}{ratios['fused']:10.3f}")
    return lines


__all__ = ["AXES", "measure", "table"]
