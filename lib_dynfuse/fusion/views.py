"""A layer's input and output as tokens, and the ways to add to the output in place.

Tokens for a linear layer (or a part of a fused one), Pixels for a convolution; both do the same for their kind of layer. Shapes:
N entries of the first axis, T tokens of each, P LoRAs of rank r one after another (K = P r).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .call import Entries, FusionState
    from .votes import Ballot


class View(ABC):
    """See the module's text."""

    batch: int
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def add_pair(self, down: Tensor, up: Tensor, level: float) -> None:
        """y += level * up down x for all rows. down: as `turned` gives it; up: (K, out)."""

    @abstractmethod
    def add_by_row(self, down: Tensor, up: Tensor, weights: Tensor) -> None:
        """y += sum over the P LoRAs of w_p up_p down_p x. weights: (N, P), or (N, T, P); what has weight 0 is not added, even if NaN.
        down, up: as above, K = P r.
        """

    @abstractmethod
    def add_dense(self, weight: Tensor, bias: Tensor | None, level: float) -> None:
        """y += level * (weight x + bias). weight: (out, in[, kh, kw])."""

    @abstractmethod
    def add_dense_by_row(self, weight: Tensor, bias: Tensor | None, weights: Tensor) -> None:
        """The same under weights, (N,) or (N, T)."""

    @abstractmethod
    def tokens(self, state: FusionState) -> int:
        """Tokens of a row, all its entries together."""

    @abstractmethod
    def sampled(self, positions: tuple[int, ...], wanted: int, state: FusionState) -> tuple[Tensor, Tensor]:
        """Input and base output of the sampled tokens of these rows: (n, t, in), kernels unfolded, and (n, t, out).

        wanted: tokens a row, 0 for all. May share memory with the layer's own tensors: to be read before anything is added.
        """

    @abstractmethod
    def put(self, ballot: Ballot, place: int, entries: Entries, state: FusionState) -> bool:
        """Copy the conditional rows' samples into the ballot's room for this site; False if they do not fit it."""


class Tokens(View):
    """A linear layer's, or those of output rows start .. start + length of a fused one."""

    __slots__ = ("batch", "device", "dtype", "x", "y")

    def __init__(self, x: Tensor, y: Tensor, start: int = 0, length: int | None = None):
        """x: (N, ..., in). y: (N, ..., out), contiguous; it is written to."""
        self.batch = x.shape[0] if x.dim() > 1 else 1
        self.device = y.device
        self.dtype = y.dtype
        # (N T, in); or (N, T, in) for an input of another order in memory, which need not be copied for a product.
        self.x = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(self.batch, -1, x.shape[-1])
        self.y = y.view(-1, y.shape[-1])
        if length is not None:
            self.y = self.y.narrow(1, start, length)

    def add_pair(self, down: Tensor, up: Tensor, level: float) -> None:
        if level == 1.0:
            self.y.addmm_(self._inner(down), up)
        else:
            self.y.addmm_(self._inner(down), up, alpha=level)

    def _inner(self, down: Tensor) -> Tensor:
        """down x: (N T, K). down: (in, K)."""
        x = self.x
        if x.dim() == 2:
            return _as(torch.mm(x, down), self.dtype)
        return _as(torch.bmm(x, down.expand(x.shape[0], -1, -1)).flatten(0, 1), self.dtype)

    def add_by_row(self, down: Tensor, up: Tensor, weights: Tensor) -> None:
        inner = self._inner(down).view(self.batch, -1, weights.shape[-1], up.shape[0] // weights.shape[-1])
        weights = weights.to(self.dtype).view(self.batch, -1, weights.shape[-1], 1)
        self.y.addmm_(_weighted(inner, weights).reshape(-1, up.shape[0]), up)

    def add_dense(self, weight: Tensor, bias: Tensor | None, level: float) -> None:
        self.y.addmm_(self.x.reshape(-1, self.x.shape[-1]), weight.t(), alpha=level)
        if bias is not None:
            self.y.add_(bias, alpha=level)

    def add_dense_by_row(self, weight: Tensor, bias: Tensor | None, weights: Tensor) -> None:
        change = _as(F.linear(self.x, weight, bias), self.dtype).view(self.batch, -1, weight.shape[0])
        weights = weights.to(self.dtype).view(self.batch, -1, 1)
        self.y.add_(_weighted(change, weights).view(-1, weight.shape[0]))

    def tokens(self, state: FusionState) -> int:
        return self.y.shape[0] // len(state.entries(self.batch).rows.images)

    def sampled(self, positions: tuple[int, ...], wanted: int, state: FusionState) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(state)
        n = len(positions)
        start = positions[0]
        sides = (self.x.reshape(-1, self.x.shape[-1]), self.y)
        if (not 0 < wanted < tokens) and positions == tuple(range(start, start + n)):
            x, y = (side.narrow(0, start * tokens, n * tokens) for side in sides)
        else:
            places = state.indices(self.device).samples(positions, tokens, wanted)
            x, y = (side.index_select(0, places) for side in sides)
        return x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1])

    def put(self, ballot: Ballot, place: int, entries: Entries, state: FusionState) -> bool:
        tokens = self.y.shape[0] // len(entries.rows.images)
        slot = ballot.slot(place, entries, tokens, state)
        if slot is None:
            return False
        x_room, y_room, places = slot
        x, y = (self.x.detach(), self.y.detach()) if torch.is_grad_enabled() else (self.x, self.y)
        torch.index_select(y, 0, places, out=y_room)
        if x.dim() == 2:
            torch.index_select(x, 0, places, out=x_room)
        elif entries.fold == 1:
            _put_rows(x, entries.positions, state.indices(self.device).samples((0,), tokens, ballot.wanted), x_room)
        else:
            torch.index_select(x.reshape(-1, x.shape[-1]), 0, places, out=x_room)
        return True


class Pixels(View):
    """A convolution's."""

    __slots__ = ("batch", "device", "dtype", "module", "x", "y")

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor):
        """x: (N, in, H, W). y: (N, out, H', W'), contiguous or channels last; it is written to."""
        self.module: Any = module
        self.batch = x.shape[0]
        self.device = x.device
        self.dtype = y.dtype
        self.x, self.y = x, y

    def add_pair(self, down: Tensor, up: Tensor, level: float) -> None:
        self._add_thin(self._inner(down), up, level)

    def add_by_row(self, down: Tensor, up: Tensor, weights: Tensor) -> None:
        inner = self._inner(down)
        members = weights.shape[-1]
        apart = inner.reshape(self.batch, members, -1, *inner.shape[2:])
        weights = weights.to(self.dtype).reshape(self.batch, -1, members).transpose(1, 2)  # (N, P, 1 or T)
        space = inner.shape[2:] if weights.shape[2] > 1 else (1, 1)
        self._add_thin(_weighted(apart, weights.reshape(self.batch, members, 1, *space)).reshape(inner.shape), up, 1.0)

    def add_dense(self, weight: Tensor, bias: Tensor | None, level: float) -> None:
        self.y.add_(_as(self._convolved(weight), self.dtype), alpha=level)
        if bias is not None:
            self.y.add_(bias[:, None, None], alpha=level)

    def add_dense_by_row(self, weight: Tensor, bias: Tensor | None, weights: Tensor) -> None:
        change = _as(self._convolved(weight), self.dtype)
        if bias is not None:
            change = change + bias[:, None, None]
        space = change.shape[2:] if weights.dim() > 1 else (1, 1)
        self.y.add_(_weighted(change, weights.to(self.dtype).reshape(self.batch, 1, *space)))

    def _inner(self, down: Tensor) -> Tensor:
        """down x: (N, K, H', W')."""
        if down.dim() == 2 and self._pointwise and self.x.is_contiguous():
            return _as(torch.matmul(down.t(), self.x.flatten(2)), self.dtype).view(self.batch, -1, *self.y.shape[2:])
        return _as(self._convolved(down.t() if down.dim() == 2 else down), self.dtype)

    def _add_thin(self, inner: Tensor, up: Tensor, level: float) -> None:
        if self.y.is_contiguous():
            self.y.view(self.batch, self.y.shape[1], -1).baddbmm_(
                up.t().expand(self.batch, -1, -1), inner.reshape(self.batch, inner.shape[1], -1), alpha=level
            )
        else:  # channels last
            flat = self.y.permute(0, 2, 3, 1).view(-1, self.y.shape[1])
            flat.addmm_(inner.permute(0, 2, 3, 1).reshape(-1, inner.shape[1]), up, alpha=level)

    def _convolved(self, weight: Tensor) -> Tensor:
        """The layer's own linear map with another weight: a convolution keeps its stride, padding (also its mode) and dilation."""
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        own = getattr(self.module, "_conv_forward", None)
        if own is not None:
            return own(self.x, weight, None)
        return F.conv2d(self.x, weight, None, self.module.stride, self.module.padding, self.module.dilation)

    @property
    def _pointwise(self) -> bool:
        return self.y.shape[2:] == self.x.shape[2:] and tuple(self.module.weight.shape[2:]) == (1, 1)

    @property
    def _kernel(self) -> tuple[int, int]:
        """The kernel's size. A layer of a host's may keep its weight in a form of its own; such a one has the attribute."""
        size = getattr(self.module, "kernel_size", None) or self.module.weight.shape[2:]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def tokens(self, state: FusionState) -> int:
        return state.entries(self.batch).fold * self.y.shape[2] * self.y.shape[3]

    def sampled(self, positions: tuple[int, ...], wanted: int, state: FusionState) -> tuple[Tensor, Tensor]:
        fold = state.entries(self.batch).fold
        entries = tuple(position * fold + k for position in positions for k in range(fold))
        at = state.indices(self.device).numbers(entries)
        pixels = self.y.shape[2] * self.y.shape[3]
        y = self.y.index_select(0, at).flatten(2).transpose(1, 2).reshape(len(positions), fold * pixels, -1)
        x = self._patches(self.x.index_select(0, at), state).reshape(len(positions), fold * pixels, -1)
        if 0 < wanted < fold * pixels:
            places = state.indices(self.device).samples((0,), fold * pixels, wanted)
            x, y = x.index_select(1, places), y.index_select(1, places)
        return x, y

    def put(self, ballot: Ballot, place: int, entries: Entries, state: FusionState) -> bool:
        if entries.fold != 1 or self._kernel != (1, 1) or not self._pointwise:
            return False
        pixels = self.y.shape[2] * self.y.shape[3]
        slot = ballot.slot(place, entries, pixels, state)
        if slot is None:
            return False
        places = state.indices(self.device).samples((0,), pixels, ballot.wanted)
        for side, room in zip((self.x.detach(), self.y.detach()), slot):
            _put_rows(side.flatten(2).transpose(1, 2), entries.positions, places, room)
        return True

    def _patches(self, x: Tensor, state: FusionState) -> Tensor:
        """What each output pixel sees: (n, T, in kh kw), in the order of a flattened kernel."""
        kernel = self._kernel
        if kernel == (1, 1) and self._pointwise:
            return x.flatten(2).transpose(1, 2)
        mode = getattr(self.module, "padding_mode", "zeros")
        padding = getattr(self.module, "_reversed_padding_repeated_twice", None)
        if padding is None:
            vertical, horizontal = _two(self.module.padding)
            padding = [horizontal, horizontal, vertical, vertical]
        x = F.pad(x, list(padding), mode="constant" if mode == "zeros" else mode)
        columns = F.unfold(x, kernel, dilation=_two(self.module.dilation), stride=_two(self.module.stride))
        return columns.transpose(1, 2)


def turned(down: Tensor) -> Tensor:
    """A down matrix (K, in) as a layer's input is multiplied by it, (in, K); a kernel's (K, in, kh, kw) as it is."""
    return down.t() if down.dim() == 2 else down


def _put_rows(side: Tensor, positions: tuple[int, ...], places: Tensor, room: Tensor) -> None:
    """side: (N, T, C), of any order in memory. The rows are taken one by one: none has to be copied to bring its tokens together."""
    for position, part in zip(positions, room.view(len(positions), -1, room.shape[1])):
        torch.index_select(side[position], 0, places, out=part)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the layer's type: autocast computes products in its own."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values * weights, and 0 where the weight is 0 whatever the value: 0 * inf would be NaN."""
    return (values * weights).masked_fill_(weights == 0, 0.0)


__all__ = ["Pixels", "Tokens", "View", "turned"]
