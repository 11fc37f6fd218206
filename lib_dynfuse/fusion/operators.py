"""The LoRAs of one site in the form in which they are applied, and sites of the same shape side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..lora.branch import Dense, LowRank


@dataclass
class Operators:
    """A site's P LoRAs on one device in one dtype; their constant strengths and scales are folded in.

    Low-rank sites: downs (P, r, in), for kernels (P, r, in, kh, kw), and ups (P, r, out); smaller ranks are padded with zeros.
    Other sites: dense, (P, out, in[, kh, kw]); biases (P, out) or None.
    """

    device: torch.device
    dtype: torch.dtype
    out: int
    downs: Tensor | None = None
    ups: Tensor | None = None
    dense: Tensor | None = None
    biases: Tensor | None = None

    @property
    def kernel(self) -> tuple[int, int] | None:
        """The kernel's size, None for a linear layer and a 1 x 1 convolution."""
        weight = self.downs if self.downs is not None else self.dense
        assert weight is not None
        return (weight.shape[3], weight.shape[4]) if weight.dim() == 5 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """What sites that are measured together have in common; low-rank only."""
        assert self.downs is not None and self.ups is not None
        return (*self.downs.shape, self.out)

    def of_members(self, span: slice) -> Operators:
        """Of these of the P LoRAs alone; the same memory."""
        parts = (part if part is None else part[span] for part in (self.downs, self.ups, self.dense, self.biases))
        return Operators(self.device, self.dtype, self.out, *parts)

    @classmethod
    def make(cls, branches: Sequence[LowRank | Dense], strengths: Sequence[float], device: torch.device, dtype: torch.dtype) -> Operators:
        """strengths: one for each branch. Makes normal tensors, also under inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            out = branches[0].shape[0]
            thin = [b for b in branches if isinstance(b, LowRank)]
            if len(thin) == len(branches) and all(b.bias is None for b in branches) and len({_kernel(b.down).shape[1:] for b in thin}) == 1:
                rank = max(b.rank for b in thin)
                pairs = [_thin(b, s, rank, device, dtype) for b, s in zip(thin, strengths)]
                return cls(device, dtype, out, torch.stack([d for d, _ in pairs]), torch.stack([u for _, u in pairs]).contiguous())
            dense = [_kernel(b.delta_weight().to(device).mul(s)).to(dtype) for b, s in zip(branches, strengths)]
            biases = None
            if any(b.bias is not None for b in branches):
                zero = torch.zeros(out, device=device)
                shifts = [zero if b.bias is None else b.bias.to(device, torch.float32) * s for b, s in zip(branches, strengths)]
                biases = torch.stack(shifts).to(dtype)
            return cls(device, dtype, out, dense=torch.stack(dense), biases=biases)


def _kernel(weight: Tensor) -> Tensor:
    """(n, in), or (n, in, kh, kw) for a true kernel: files write 1 x 1 convolutions both ways."""
    return weight.flatten(1) if weight.dim() == 4 and weight.shape[2:] == (1, 1) else weight


def _thin(branch: LowRank, strength: float, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Half of the factor on each side, folded in float32: a small alpha / rank on one side alone could leave float16's range.
    factor = branch.scale * strength
    root = abs(factor) ** 0.5
    down = (_kernel(branch.down).to(device, torch.float32) * root).to(dtype)
    up = (branch.up.to(device, torch.float32).t() * math.copysign(root, factor)).to(dtype)
    missing = rank - down.shape[0]
    if missing:
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(missing, up.shape[1])])
    return down, up


@dataclass
class Group:
    """G sites whose low-rank operators have one rank and one output's width.

    members: P numbers of the LoRAs. operators: of the sites, those of one input's shape side by side; their matrices become views of the
    stacks here, ups (G, P, r, out) and, for each shape of input, downs (g, P, r, in[, kh, kw]). spans: its sites among the G.
    """

    members: tuple[int, ...]
    operators: Sequence[Operators]
    downs: list[Tensor] = field(init=False)
    ups: Tensor = field(init=False)
    spans: list[slice] = field(init=False)
    _chosen: tuple[list[Tensor], Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.ups = torch.stack([_present(operators.ups) for operators in self.operators])
            alike = itertools.groupby((_present(operators.downs) for operators in self.operators), key=lambda down: down.shape)
            self.downs = [torch.stack(list(downs)) for _, downs in alike]
            ends = list(itertools.accumulate(downs.shape[0] for downs in self.downs))
            self.spans = [slice(start, end) for start, end in zip([0, *ends], ends)]
            for operators, down, up in zip(self.operators, self.each(self.downs), self.ups):
                operators.downs, operators.ups = down, up

    @property
    def size(self) -> int:
        return len(self.operators)

    @staticmethod
    def each(stacks: Sequence[Tensor]) -> list[Tensor]:
        """The sites' own of what is stacked for each shape of input."""
        return [own for stack in stacks for own in stack]

    def chosen(self) -> tuple[list[Tensor], Tensor]:
        """Room for one LoRA's matrices at each site, (g, r, in[, kh, kw]) each and (G, r, out): the same tensors at every step."""
        if self._chosen is None:
            with torch.inference_mode(False), torch.no_grad():
                self._chosen = [torch.empty_like(downs[:, 0]) for downs in self.downs], torch.empty_like(self.ups[:, 0])
        return self._chosen

    def choose(self, ups: Tensor, downs: Tensor, levels: Tensor | None) -> None:
        """Gather matrices into `chosen`. ups, downs: (G,) int64, where the winner's lie in the stacks, the first two axes as one; levels:
        (G,) what they are multiplied by.
        """
        chosen, up = self.chosen()
        for span, stack, down in zip(self.spans, self.downs, chosen):
            torch.index_select(stack.flatten(0, 1), 0, downs[span], out=down)
        torch.index_select(self.ups.flatten(0, 1), 0, ups, out=up)
        if levels is not None:
            up.mul_(levels.to(up.dtype)[:, None, None])


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


__all__ = ["Group", "Operators"]
