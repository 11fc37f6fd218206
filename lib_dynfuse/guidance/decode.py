"""Latent -> picture, differentiably: what the encoders look at.

A host's own decoding runs without gradients (A1111's and Forge's decode_first_stage), and on Forge its weights cannot take part in
autograd at all; private_copy makes a decoder that can.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The "small" decoder's picture: about what the encoders see (224 x 224), for a sixteenth of the work of a picture of 1024 x 1024.
SMALL_PIXELS = 256

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@runtime_checkable
class LatentDecoder(Protocol):
    """What Guide needs of a decoder. name: for people, as in the setting `decoder`."""

    name: str

    def __call__(self, latent: Tensor) -> Tensor:
        """latent: (B, C, h, w) in the model's latent units, any float dtype. Returns (B, 3, H, W) float32 in about [-1, 1]."""

    def to(self, device: torch.device) -> LatentDecoder:
        """Moves its weights; returns itself."""


class VaeDecoder:
    """A VAE, or a decoder that stands for one (TAESD), as a LatentDecoder.

    decode: a module or a function from (B, C, h, w) in the VAE's units to pictures. scale, shift: of the model's latent,
    (vae - shift) * scale; numbers, or by channel, (C,), or by channel and place in a pattern that repeats over the latent, (C, k, k).
    packing: the latent's channels hold packing x packing places of the VAE's grid each, (c, i, j). dtype: what decode works in. pixels: the
    decoded picture is made with about pixels^2 pixels of the same aspect, never more than the latent has; None: all. factor: pixels
    of the picture per place of the VAE's grid, on each side.

    A latent may have a time axis of one frame, (B, C, 1, h, w).
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        *,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        packing: int = 1,
        dtype: torch.dtype = torch.float32,
        pixels: int | None = None,
        factor: int = 8,
        name: str | None = None,
    ):
        self.decode = decode
        self.scale = scale
        self.shift = shift
        self.packing = packing
        self.dtype = dtype
        self.pixels = pixels
        self.factor = factor
        self.name = name or ("vae" if pixels is None else "vae-small")

    def __call__(self, latent: Tensor) -> Tensor:
        small = latent.float() if latent.dtype != torch.float64 else latent
        if small.dim() == 5:
            small = small.squeeze(2)
        small = small / _over_places(self.scale, small) + _over_places(self.shift, small)
        if self.packing > 1:
            small = F.pixel_shuffle(small, self.packing)
        height, width = small.shape[-2:]
        small_height, small_width = self.latent_size(height, width)
        # Matrix products instead of F.interpolate(mode="area"): its backward on CUDA adds up in any order where the sizes do not divide,
        # so that no picture could be made again to the pixel, and on MPS such sizes are refused.
        if small_width != width:
            small = small @ _area(width, small_width, small.dtype, small.device).T
        if small_height != height:
            small = _area(height, small_height, small.dtype, small.device) @ small
        pictures = self.decode(small.to(self.dtype))
        return pictures if pictures.dtype == torch.float64 else pictures.float()

    def to(self, device: torch.device) -> VaeDecoder:
        # Moved under inference mode, a weight would be an inference tensor, which autograd refuses.
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(self.decode, nn.Module):
                self.decode.to(device)
            self.scale, self.shift = (
                value.detach().to(device, copy=True) if isinstance(value, Tensor) else value for value in (self.scale, self.shift)
            )
        return self

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what is decoded, for a latent that has so many places on the VAE's grid."""
        if self.pixels is None:
            return height, width
        ratio = self.pixels / (self.factor * math.sqrt(height * width))
        if ratio >= 1:
            return height, width
        return max(1, round(height * ratio)), max(1, round(width * ratio))


def _over_places(values: float | Tensor, latent: Tensor) -> float | Tensor:
    """A latent space's statistics as something that broadcasts with a latent (B, C, h, w)."""
    if not isinstance(values, Tensor):
        return values
    values = values.to(latent)
    if values.dim() == 1:
        return values[:, None, None]
    height, width = latent.shape[-2:]
    rows, columns = -(-height // values.shape[1]), -(-width // values.shape[2])
    return values.repeat(1, rows, columns)[:, :height, :width]


# Kept on the device: a copy from ordinary memory makes the host wait for all that the device has been given to do.
@functools.lru_cache(maxsize=16)
def _area(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights (size, length) that average `length` pixels to `size`, each pixel by the part of it that a larger one covers."""
    with torch.inference_mode(False):
        scale = length / size
        start = torch.arange(size, dtype=torch.float64)[:, None] * scale
        pixel = torch.arange(length, dtype=torch.float64)[None]
        covered = torch.minimum(pixel + 1, start + scale) - torch.maximum(pixel, start)
        return (covered.clamp_min(0) / scale).to(device, dtype)


def decoding_half(post_quant_conv: nn.Module | None, decoder: nn.Module) -> nn.Module:
    """The half of an autoencoder that makes pictures, from its own units; some have no convolution in front of it."""
    return nn.Sequential(decoder) if post_quant_conv is None else nn.Sequential(post_quant_conv, decoder)


class OneFrame(nn.Module):
    """A decoder of videos, (B, C, 1, h, w) to frames or a list of stretches of them, as one of pictures."""

    def __init__(self, first: nn.Module, decoder: nn.Module):
        super().__init__()
        self.first = first
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        frames = self.decoder(self.first(latent.unsqueeze(2)))
        return (frames if isinstance(frames, Tensor) else frames[0])[:, :, 0]


class ZeroToOne(nn.Module):
    """A decoder whose pictures lie in [0, 1], as the WebUIs' TAESD, as one whose pictures lie in [-1, 1]."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(latent) * 2 - 1


_CONTEXTS = "torch.utils._contextlib"  # where the functions of @torch.inference_mode() are made
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def private_copy(module: AnyModule, dtype: torch.dtype, device: torch.device | str) -> AnyModule:
    """A copy of a host's decoder that autograd can go through, in that dtype and on that device, in evaluation mode.

    Its parameters and buffers are normal tensors without gradient that share nothing with the host's, whatever those are (inference
    tensors as on Forge, another dtype, another device); the host's hooks, which move weights about, are left out, and so are inference
    modes around its forwards (Forge Neo, backend/nn/vae.py:48). The host's module is not touched. Weights are copied one by one: no second
    copy in the host's dtype comes to be.
    """
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for parameter in part._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(_fresh(parameter, dtype, device), requires_grad=False)
            for buffer in part._buffers.values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = _fresh(buffer, dtype, device)
            for name in _HOOKS:
                memo[id(vars(part)[name])] = OrderedDict()
            # accelerate's offloading replaces forward by one that moves the weights (accelerate hooks.py, add_hook_to_module).
            if "_hf_hook" in vars(part):
                memo[id(vars(part)["_hf_hook"])] = OrderedDict()
        twin = copy.deepcopy(module, memo)
        for part in twin.modules():
            if "_hf_hook" in vars(part):
                for name in ("_hf_hook", "_old_forward", "forward"):
                    vars(part).pop(name, None)
            forward = type(part).forward
            if getattr(forward, "__globals__", {}).get("__name__") == _CONTEXTS and "forward" not in vars(part):
                vars(part)["forward"] = types.MethodType(inspect.unwrap(forward), part)
    return twin.eval()


def _fresh(values: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A new tensor with these values; whole numbers and masks keep their dtype."""
    kind = dtype if values.is_floating_point() else values.dtype
    return torch.empty(values.shape, dtype=kind, device=device).copy_(values.detach())


__all__ = ["SMALL_PIXELS", "LatentDecoder", "OneFrame", "VaeDecoder", "ZeroToOne", "decoding_half", "private_copy"]
