"""Branches: what a LoRA adds to one layer's output, independent of file dialects and hosts.

A branch is a change dW of a layer's weight (and possibly db of its bias); its delta on an input h is dW h + db.
Two forms are enough for the forward pass: a product of two thin matrices, and a full matrix. A full matrix that small tensors
make up (LoHa, LoKr) is multiplied out when it is needed, so that reading a file stays cheap; kinds whose change depends on
the layer's own weight (DoRA, IA3, OFT, ...) become a full matrix once the weight is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..printable import printable


class LoraError(ValueError):
    """A LoRA file that cannot be used. The message is one sentence with the file and the reason, fit to be printed."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence, 800))


@dataclass(frozen=True)
class LowRank:
    """dW = scale * up @ down, with the convolution's kernel in `down`.

    down: (rank, in) or (rank, in, kh, kw). up: (out, rank). bias: (out,) or None, not scaled by `scale`.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta_weight(self) -> Tensor:
        """dW in float32, of the layer's weight's shape: the form in which it is merged."""
        product = self.up.float() @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

    def rows(self, start: int, length: int) -> LowRank:
        """The branch of output rows start .. start + length of a fused layer."""
        bias = None if self.bias is None else self.bias[start : start + length]
        return replace(self, up=self.up[start : start + length], bias=bias)


@dataclass(frozen=True)
class Dense:
    """dW as a full matrix. weight: (out, in) or (out, in, kh, kw). bias: (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None

    rank = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def delta_weight(self) -> Tensor:
        """dW in float32, of the layer's weight's shape: the form in which it is merged."""
        return self.weight.float()

    def rows(self, start: int, length: int) -> Dense:
        """The branch of output rows start .. start + length of a fused layer."""
        bias = None if self.bias is None else self.bias[start : start + length]
        return Dense(self.weight[start : start + length], bias)


@dataclass(frozen=True)
class Composed:
    """dW put together from small tensors when it is needed (LoHa, LoKr), and not while the file is read.

    make: -> dW float32, of `shape` or flattened. thin: -> the same change as a product of two thin matrices of rank thin_rank; None
    where those would be larger than dW. shape: (out, in[, kh, kw]). rank: of the factors, None without one.
    """

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    rank: int | None = None
    bias: Tensor | None = None
    thin: Callable[[], LowRank] | None = None
    thin_rank: int = 0

    def delta_weight(self) -> Tensor:
        """dW in float32, of the layer's weight's shape: the form in which it is merged."""
        return self.make().reshape(self.shape)

    def composed(self) -> LowRank | Dense:
        """The same change in the smaller of the two forms that can be applied, float32."""
        if self.thin is None:
            return Dense(self.delta_weight(), self.bias)
        thin = self.thin()
        return replace(thin, down=thin.down.reshape(-1, *self.shape[1:]))


@dataclass(frozen=True)
class FromWeight:
    """A change that depends on the layer's own weight W0 (DoRA, IA3, OFT, BOFT, GLoRA).

    make: W0 float32 (out, in[, kh, kw]) -> dW float32 of the same shape and device, at strength 1.
    out: number of output rows that `make` expects, None where any fits.
    shape: shape of the layer's weight where the tensors tell it, else None.
    only_bias: dW is 0 whatever the weight; `bias` is the whole change.
    """

    make: Callable[[Tensor], Tensor]
    rank: int | None = None
    bias: Tensor | None = None
    out: int | None = None
    shape: tuple[int, ...] | None = None
    only_bias: bool = False

    def bind(self, weight: Tensor) -> Dense:
        """The branch for a layer of this weight, (out, in[, kh, kw]), any float dtype, already dequantised."""
        return Dense(self.make(weight.detach().float()), self.bias)


@dataclass(frozen=True)
class NormShift:
    """Change of a normalisation layer's gain and offset, each (channels,) or None. It has no branch to choose: it is summed."""

    weight: Tensor | None
    bias: Tensor | None


Branch = LowRank | Dense | Composed | FromWeight


def bound(branch: Branch, weight: Callable[[], Tensor]) -> LowRank | Dense:
    """The branch in a form that can be applied; `weight` is called only if the kind depends on the layer's weight."""
    if isinstance(branch, FromWeight):
        return branch.bind(weight())
    return branch.composed() if isinstance(branch, Composed) else branch


def applied_size(branch: Branch) -> int:
    """Number of elements that the branch holds in the form in which it is applied; 0 where only the layer's weight would tell."""
    if branch.shape is None:
        return 0
    thin = branch.rank if isinstance(branch, LowRank) else branch.thin_rank if isinstance(branch, Composed) and branch.thin else None
    return math.prod(branch.shape) if thin is None else thin * (branch.shape[0] + math.prod(branch.shape[1:]))


def merged(weight: Tensor, branch: Branch, strength: float) -> Tensor:
    """W0 + strength * dW in float32: what a host that merges would compute with."""
    delta = bound(branch, lambda: weight).delta_weight()
    return weight.float() + strength * delta.reshape(weight.shape).to(weight.device)


__all__ = ["Branch", "Composed", "Dense", "FromWeight", "LoraError", "LowRank", "NormShift", "applied_size", "bound", "merged"]
