"""From pictures in [-1, 1] to what an image encoder takes, as Pillow would do it, and differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def prepared(pictures: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures as an encoder takes them: to [0, 1], resized straight to a square by Pillow's bicubic filter, normalised.

    pictures: (B, 3, H, W) in about [-1, 1], any float dtype. mean, std: of the three channels in [0, 1]. Result: (B, 3, size, size)
    float32 (float64 of float64).

    What leaves [0, 1] is cut off wherever Pillow cuts it, in the picture and after each of the filter's two passes, but the gradient
    passes through: a pixel that is too bright must still learn that it should be darker.
    """
    pictures = pictures if pictures.dtype == torch.float64 else pictures.float()
    pictures = _clamped((pictures + 1) / 2)
    height, width = pictures.shape[-2:]
    # Matrix products instead of F.interpolate(antialias=True), which computes the same: its backward on CUDA adds up in any order, so
    # that no picture could be made again to the pixel, and MPS has none.
    if width != size:
        pictures = _clamped(pictures @ _bicubic(width, size, pictures.dtype, pictures.device).T)
    if height != size:
        pictures = _clamped(_bicubic(height, size, pictures.dtype, pictures.device) @ pictures)
    return (pictures - _channels(tuple(mean), pictures.dtype, pictures.device)) / _channels(tuple(std), pictures.dtype, pictures.device)


def _clamped(values: Tensor) -> Tensor:
    return values + (values.clamp(0, 1) - values).detach()


# Kept on the device: a copy from ordinary memory makes the host wait for all that the device has been given to do.
@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1, 1)


@lru_cache(maxsize=32)
def _bicubic(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights (size, length) by which Pillow's BICUBIC (a = -1/2) makes `size` pixels of `length`.

    Scaling down, the kernel is as much wider as the picture gets smaller, so that every pixel counts (Pillow, Resample.c).
    """
    with torch.inference_mode(False):
        scale = length / size
        stretch = max(scale, 1.0)
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
        pixels = torch.arange(length, dtype=torch.float64)
        # Pillow rounds the kernel's support to whole pixels; beyond two the kernel is zero anyway.
        distance = ((pixels + 0.5)[None] - centres[:, None]).abs() / stretch
        inner = (1.5 * distance - 2.5) * distance * distance + 1
        outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, inner, torch.where(distance < 2, outer, torch.zeros_like(distance)))
        return (weights / weights.sum(1, keepdim=True)).to(device, dtype)
