"""Normalisation layers: all LoRAs' shifts are summed, for there is no change of features to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora.branch import NormShift
from .call import FusionState
from .patching import PatchedLayer, argument


class ShiftedNorm(PatchedLayer):
    """y = y0 + sum over b of s_b (xhat * dg_b + db_b), xhat the normalised input."""

    def __init__(self, name: str, module: nn.Module, shifts: Sequence[tuple[int, NormShift, float]], state: FusionState):
        """shifts: (number of the LoRA, its shift, the factor of the layer's block)."""
        super().__init__(name, module)
        self.shifts = shifts
        self._state = state
        self._copies: dict[int, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x: (N, C, ...) for a group norm, (..., C) for a layer or RMS norm."""
        y = self._base(*args, **kwargs)
        strengths = self._state.strengths()
        if not strengths:
            return y
        x = argument(args, kwargs)
        groups = getattr(self.module, "num_groups", None)
        shape = (1, -1, *(1,) * (x.dim() - 2)) if groups is not None else (-1,)
        gain, offset = (self._sum(strengths, part, y.device) for part in ("weight", "bias"))
        shift = torch.zeros((), device=y.device)
        if gain is not None:
            shift = shift + self._normalised(x.float(), groups) * gain.reshape(shape)
        if offset is not None:
            shift = shift + offset.reshape(shape)
        factors = self._state.row_factors(y.shape[0], y.device)
        if factors is not None:
            shift = shift * factors.view(-1, *[1] * (y.dim() - 1))
        return y + shift.to(y.dtype)

    def _sum(self, strengths: Sequence[float], part: str, device: torch.device) -> Tensor | None:
        total: Tensor | None = None
        for number, shift, factor in self.shifts:
            own = getattr(shift, part)
            if own is None or not strengths[number] * factor:
                continue
            term = self._moved(own, device) * (strengths[number] * factor)
            total = term if total is None else total + term
        return total

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """On the device, once: no step but the first copies it there."""
        known = self._copies.get(id(tensor))
        if known is None or known.device != device:
            with torch.inference_mode(False):
                known = self._copies[id(tensor)] = tensor.to(device, torch.float32)
        return known

    def _normalised(self, x: Tensor, groups: int | None) -> Tensor:
        eps = getattr(self.module, "eps", None)
        if groups is not None:
            return F.group_norm(x, groups, None, None, eps or 1e-5)
        if hasattr(self.module, "normalized_shape") and isinstance(self.module, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], None, None, eps or 1e-5)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (eps or 1e-6))

    def release(self) -> None:
        """Drop the copies on the device."""
        self._copies.clear()


__all__ = ["ShiftedNorm"]
