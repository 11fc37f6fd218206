"""One layer of the denoiser with both branches: the fused forward.

A layer computes y = y0 + [B_c B_s] (mask * ([A_c; A_s] h)): its own output plus both branches' low-rank products under a 0/1 mask on
the stacked rank axis. The method is who writes the mask: `dynfuse` measures (or asks a Choice, where a session has one), `direct` lets
both through. Nothing here waits for the device: decisions are tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora.branch import Dense, LowRank
from ..lora.naming import Site
from ..settings import FuseSettings
from .divergence import token_divergences
from .policy import Choice, subject_wins
from .rows import Rows

SUBJECT, STYLE = 0, 1

Deltas = Callable[[int, int], Tensor]
"""(start, length) -> both branches' changes at those tokens: (2, N, length, C) or (2, N, C, length)."""


class Binding(Protocol):
    """A branch that knows how to fit a site (lora.matching.SiteBranch)."""

    def bind(self, site: Site, layer_weight: Callable[[], Tensor]) -> LowRank | Dense: ...


@dataclass(frozen=True)
class RowIndex:
    """Rows in the forms that the forward needs, made once per pattern and device so that no step copies indices to the device.

    conditional: positions of the conditional rows, a slice where they are contiguous. image_of_conditional, image_of_row: (n,) int64.
    direct: the conditional rows are exactly images 0 .. count - 1 in order, so per-row numbers are per-image numbers.
    repeats: (count,) float, conditional rows per image in this call (several with AND prompts).
    """

    rows: Rows
    conditional: slice | Tensor
    conditional_count: int
    image_of_conditional: Tensor
    image_of_row: Tensor
    direct: bool
    complete: bool
    repeats: Tensor
    present: Tensor

    @classmethod
    def make(cls, rows: Rows, device: torch.device) -> RowIndex:
        positions = [i for i, conditional in enumerate(rows.conditional) if conditional]
        contiguous = bool(positions) and positions == list(range(positions[0], positions[-1] + 1))
        images = [rows.images[i] for i in positions]
        repeats = [images.count(i) for i in range(rows.count)]
        return cls(
            rows=rows,
            conditional=slice(positions[0], positions[-1] + 1) if contiguous else torch.tensor(positions, dtype=torch.long, device=device),
            conditional_count=len(positions),
            image_of_conditional=torch.tensor(images, dtype=torch.long, device=device),
            image_of_row=torch.tensor(rows.images, dtype=torch.long, device=device),
            direct=images == list(range(rows.count)),
            complete=all(repeats),
            repeats=torch.tensor(repeats, dtype=torch.float32, device=device).clamp_min(1),
            present=torch.tensor([r > 0 for r in repeats], device=device),
        )

    def unconditional_only(self) -> RowIndex:
        """The same rows taken as conditional, for a host that runs them alone and first."""
        return RowIndex.make(Rows(self.rows.images, (True,) * len(self.rows.images), self.rows.count), self.image_of_row.device)


@dataclass
class StepState:
    """What the layers share during a call; owned by the session. choice: chooses in place of the measurement."""

    settings: FuseSettings
    choice: Choice | None = None
    rows: Rows | None = None
    gamma: Tensor | None = None
    active: bool = False
    fallbacks: int = 0
    _indices: dict[tuple[Rows, torch.device], RowIndex] = field(default_factory=dict)

    def row_index(self, batch: int, device: torch.device) -> tuple[RowIndex, int]:
        """The rows of a layer's input of this batch size, and how many consecutive entries of its first axis make up one row.

        A host may fold space into the batch (HyperTile: each row becomes k consecutive tiles). An input that does not
        divide into the rows is shared by all images; it is then decided on as it is.
        """
        rows = self.rows
        if rows is None:
            rows = Rows.separate(batch)
        elif batch % len(rows.images):
            rows = Rows((0,) * batch, (True,) * batch, rows.count)
        key = (rows, device)
        if key not in self._indices:
            self._indices[key] = RowIndex.make(rows, device)
        return self._indices[key], batch // len(rows.images)


@dataclass
class FusedSite:
    """A site's two branches, its decision in this step and what it measured.

    branches: subject's and style's; None where a LoRA does not touch the site. strengths: the user's, folded into the branches.
    decision: (count,) bool, this step's; decided: the images it holds for. divergence: (2, count) float32.
    """

    site: Site
    bindings: tuple[Binding | None, Binding | None]
    strengths: tuple[float, float]
    decision: Tensor | None = None
    known: frozenset[int] = frozenset()
    divergence: Tensor | None = None
    operators: Operators | None = None

    @property
    def two_sided(self) -> bool:
        return None not in self.bindings

    def forget(self) -> None:
        """Start a new step."""
        self.decision, self.known, self.divergence = None, frozenset(), None

    def bind(self, weight: Callable[[], Tensor]) -> list[LowRank | Dense | None]:
        return [binding.bind(self.site, weight) if binding is not None else None for binding in self.bindings]


@dataclass
class Operators:
    """A site's branches on one device in one dtype.

    Low-rank sites: down (K, in[, kh, kw]) with both branches' rows stacked (K = 2 r for two branches, the smaller rank padded with
    zeros), up (K, out): the stacked B's, strengths and scales folded in. masks: (2, K): which rows belong to which branch.
    Other sites: dense, a weight or a LowRank per branch. biases: per branch, (out,) or None.
    """

    device: torch.device
    dtype: torch.dtype
    out: int
    down: Tensor | None = None
    up: Tensor | None = None
    masks: Tensor | None = None
    dense: list[Tensor | None] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        branches: Sequence[LowRank | Dense | None],
        strengths: Sequence[float],
        convolution: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Operators:
        present = [b for b in branches if b is not None]
        out = present[0].shape[0]
        pairs = list(zip(branches, strengths))
        biases = [None if b is None or b.bias is None else (b.bias.to(device, torch.float32) * s).to(dtype) for b, s in pairs]
        if all(isinstance(b, LowRank) for b in present) and all(b is None for b in biases) and len({b.shape[2:] for b in present}) == 1:
            rank = max(b.down.shape[0] for b in present if isinstance(b, LowRank))
            downs, ups, owner = [], [], []
            for side, (branch, strength) in enumerate(pairs):
                if not isinstance(branch, LowRank):
                    continue
                # Half of the factor on each side, folded in float32: a small alpha / rank on one side alone could leave float16's range.
                factor = branch.scale * strength
                root = abs(factor) ** 0.5
                down = (_kernel_form(branch.down, convolution).to(device, torch.float32) * root).to(dtype)
                up = (branch.up.to(device, torch.float32).t() * math.copysign(root, factor)).to(dtype)
                missing = rank - down.shape[0]
                if missing:
                    down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
                    up = torch.cat([up, up.new_zeros(missing, out)])
                downs.append(down)
                ups.append(up)
                owner += [side] * rank
            masks = torch.tensor([[o == side for o in owner] for side in (SUBJECT, STYLE)], device=device).to(dtype)
            return cls(device, dtype, out, down=torch.cat(downs), up=torch.cat(ups).contiguous(), masks=masks)
        dense = [None if b is None else _kernel_form(b.delta_weight().to(device).mul(s), convolution).to(dtype) for b, s in pairs]
        return cls(device, dtype, out, dense=dense, biases=biases)


def _kernel_form(weight: Tensor, convolution: bool) -> Tensor:
    """(n, in) for a linear layer, (n, in, kh, kw) for a convolution: files write 1 x 1 convolutions both ways."""
    if convolution and weight.dim() == 2:
        return weight[:, :, None, None]
    if not convolution and weight.dim() == 4:
        return weight.flatten(1)
    return weight


class PatchedLayer(ABC):
    """A layer of the model whose forward is ours while a session is attached."""

    def __init__(self, name: str, module: nn.Module, state: StepState):
        self.name = name
        self.module = module
        self.state = state
        self._own_forward: Callable[..., Tensor] | None = None
        self._had_instance_forward = False

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What stands in for the layer's own forward."""

    def attach(self) -> None:
        """Put our forward on the module, as an attribute of the instance that shadows its class's."""
        if self._own_forward is not None:
            return  # still there, under a forward that somebody else put on top and did not take off
        instance = self.module.__dict__
        self._had_instance_forward = "forward" in instance
        self._own_forward = self.module.forward
        instance["forward"] = self.forward

    def detach(self) -> None:
        """Take it off again. A forward that somebody put on after us stays; if it calls ours, ours passes through."""
        instance = self.module.__dict__
        if self._own_forward is None or instance.get("forward") != self.forward:
            return
        if self._had_instance_forward:
            instance["forward"] = self._own_forward
        else:
            del instance["forward"]
        self._own_forward = None

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives without us."""
        if self._own_forward is None:  # called through a reference that outlived the attachment
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._own_forward(*args, **kwargs)


class FusedLayer(PatchedLayer):
    """A layer and the sites on it."""

    def __init__(self, name: str, module: nn.Module, sites: list[FusedSite], state: StepState, weight_of: Callable[[nn.Module], Tensor]):
        super().__init__(name, module, state)
        self.sites = sites
        self.weight_of = weight_of
        self.convolution = is_convolution(module)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the chosen branch added: same shape, dtype and device as the layer's own output.

        x: (N, ..., in) for a linear layer, (N, in, H, W) for a convolution.
        """
        y = self._base(x, *args, **kwargs)
        if not self.state.active:
            return y
        x = x.to(y.dtype)  # under autocast the layer's type is the output's
        if len(self.sites) == 1 and self.sites[0].site.part is None:
            return self._apply(self.sites[0], x, y)
        y = y.clone()
        for site in self.sites:
            part = site.site.part
            assert part is not None
            unit = y.shape[-1] // part.units
            piece = y.narrow(-1, part.start * unit, part.length * unit)
            piece.copy_(self._apply(site, x, piece))
        return y

    def _apply(self, site: FusedSite, x: Tensor, y: Tensor) -> Tensor:
        operators = site.operators
        if operators is None or operators.device != x.device or operators.dtype != y.dtype:
            # Bound at the first call, after the layer's own forward: hosts merge other LoRAs into the weight as late as that.
            branches = site.bind(lambda: self.weight_of(self.module))
            operators = site.operators = Operators.make(branches, site.strengths, self.convolution, x.device, y.dtype)
        decides = site.two_sided and self.state.settings.method == "dynfuse"
        if operators.down is not None:
            return self._apply_low_rank(site, operators, x, y, decides)
        return self._apply_dense(site, operators, x, y, decides)

    def _apply_low_rank(self, site: FusedSite, operators: Operators, x: Tensor, y: Tensor, decides: bool) -> Tensor:
        assert operators.down is not None and operators.up is not None and operators.masks is not None
        inner = self._linear(x, operators.down)  # (N, ..., K) or (N, K, H, W)
        if self.convolution:
            inner = inner.flatten(2)  # (N, K, T)
            if decides:
                mask = self._mask(site, operators, inner, y.flatten(2))  # (N, K) or (N, K, T)
                inner = inner * (mask if mask.dim() == 3 else mask.unsqueeze(2))
            delta = torch.matmul(operators.up.t(), inner)
            return y + delta.reshape(y.shape)
        shape = y.shape
        inner = inner.reshape(x.shape[0], -1, inner.shape[-1])  # (N, T, K)
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        if decides:
            mask = self._mask(site, operators, inner, y)  # (N, K) or (N, T, K)
            inner = inner * (mask if mask.dim() == 3 else mask.unsqueeze(1))
        flat, inner = y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1])
        if self._output_is_ours():
            return flat.addmm_(inner, operators.up).reshape(shape)
        return torch.addmm(flat, inner, operators.up).reshape(shape)

    def _output_is_ours(self) -> bool:
        """Whether the layer's output may be written to: it is the fresh result of its class's forward, and no gradient needs it.

        A fresh tensor for every layer's sum costs a third of the fusion's time on a CPU.
        """
        return not self._had_instance_forward and not torch.is_grad_enabled()

    def _mask(self, site: FusedSite, operators: Operators, inner: Tensor, y: Tensor) -> Tensor:
        """The 0/1 mask on the stacked rank axis, in y's dtype: (N, K), or per token (N, T, K) / (N, K, T)."""
        assert operators.up is not None and operators.masks is not None
        up = operators.up.reshape(2, -1, operators.out)
        axis = 1 if self.convolution else -1

        def deltas(pick: slice | Tensor) -> Deltas:
            chosen = inner[pick]
            if self.convolution:
                n, k, t = chosen.shape
                pairs = chosen.reshape(n, 2, k // 2, t).transpose(0, 1)
                transposed = up.transpose(1, 2).unsqueeze(1)
                return lambda start, length: torch.matmul(transposed, pairs.narrow(3, start, length))  # (2, n, out, length)
            n, t, k = chosen.shape
            pairs = chosen.reshape(n, t, 2, k // 2).permute(2, 0, 1, 3)
            if n == 1:
                flat = pairs.squeeze(1)
                return lambda start, length: torch.bmm(flat.narrow(1, start, length), up).unsqueeze(1)
            across = up.unsqueeze(1)
            return lambda start, length: torch.matmul(pairs.narrow(2, start, length), across)  # (2, n, length, out)

        wins = self._decide(site, y, deltas, axis)
        subject, style = operators.masks
        if wins.dim() == 1:
            return torch.where(wins.unsqueeze(1), subject, style)
        if self.convolution:
            return torch.where(wins.unsqueeze(1), subject[:, None], style[:, None])
        return torch.where(wins.unsqueeze(2), subject, style)

    def _apply_dense(self, site: FusedSite, operators: Operators, x: Tensor, y: Tensor, decides: bool) -> Tensor:
        present = []
        for weight, bias in zip(operators.dense, operators.biases):
            if weight is None:
                continue
            delta = self._linear(x, weight)
            if bias is not None:
                delta = delta + (bias[:, None, None] if self.convolution else bias)
            present.append(delta)
        if not decides:
            return y + present[0] if len(present) == 1 else y + present[0] + present[1]
        shape, n = y.shape, y.shape[0]
        axis = 1 if self.convolution else -1
        flat = (lambda t: t.flatten(2)) if self.convolution else (lambda t: t.reshape(n, -1, t.shape[-1]))
        y, pair = flat(y), torch.stack([flat(delta) for delta in present])
        wins = self._decide(site, y, lambda pick: pair[:, pick], axis)
        wins = wins.view(n, 1, 1) if wins.dim() == 1 else wins.unsqueeze(axis)
        return (y + torch.where(wins, pair[SUBJECT], pair[STYLE])).reshape(shape)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own linear map with another weight: a convolution keeps its stride, padding (also its mode) and dilation."""
        if not self.convolution:
            return F.linear(x, weight)
        own = getattr(self.module, "_conv_forward", None)
        if own is not None:
            return own(x, weight, None)
        module = self.module
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)

    def _decide(self, site: FusedSite, y: Tensor, deltas: Callable[[slice | Tensor], Deltas | Tensor], axis: int) -> Tensor:
        """Measure and choose, or ask for the choice.

        y: the base output, (N, T, C) or (N, C, T). Returns (N,) bool, or (N, T) when tokens choose.
        """
        settings, state = self.state.settings, self.state
        index, fold = state.row_index(y.shape[0], y.device)
        if state.choice is not None:
            return _per_row(state.choice(site.site).to(y.device), index, fold)
        everything = slice(0, y.shape[0])

        def measure(pick: slice | Tensor) -> Tensor:
            return token_divergences(settings.criterion, y[pick], deltas(pick), rms=settings.temperature == "rms", axis=axis)

        if settings.granularity == "image":
            if not index.conditional_count:
                if frozenset(index.rows.images) <= site.known and site.decision is not None:
                    return _per_row(site.decision, index, fold)
                index = index.unconditional_only()
                state.fallbacks += 1
            pick = _widen(index.conditional, fold)
            per_row = measure(pick).mean(-1)
            if fold > 1:
                per_row = per_row.reshape(2, -1, fold).mean(-1)
            divergence = _per_image(per_row, index)
            threshold = self._threshold()
            wins = subject_wins(divergence, threshold)
            self._remember(site, divergence, wins, index)
            assert site.decision is not None
            return _per_row(site.decision, index, fold)

        per_token = measure(everything)  # (2, N, T)
        per_entry = per_token.mean(-1)
        per_row = per_entry.reshape(2, -1, fold).mean(-1) if fold > 1 else per_entry
        own_rows = per_row[:, index.conditional] if index.conditional_count else per_row
        recorded = index if index.conditional_count else index.unconditional_only()
        threshold = self._threshold()
        divergence = _per_image(own_rows, recorded)
        if index.conditional_count or not site.known:
            self._remember(site, divergence, subject_wins(divergence, threshold), recorded)
        if isinstance(threshold, Tensor):
            threshold = threshold[index.image_of_row]
        if settings.granularity == "row":
            wins = subject_wins(per_row, threshold)
            return wins.repeat_interleave(fold) if fold > 1 else wins
        if isinstance(threshold, Tensor):
            threshold = threshold.repeat_interleave(fold).unsqueeze(-1)
        return subject_wins(per_token, threshold)

    def _threshold(self) -> Tensor | float:
        gamma = self.state.gamma
        return self.state.settings.bias if gamma is None else self.state.settings.bias * gamma

    def _remember(self, site: FusedSite, divergence: Tensor, wins: Tensor, index: RowIndex) -> None:
        if not index.complete and site.decision is not None and site.divergence is not None:
            wins = torch.where(index.present, wins, site.decision)
            divergence = torch.where(index.present, divergence, site.divergence)
        site.decision, site.divergence = wins, divergence
        present = frozenset(image for image, conditional in zip(index.rows.images, index.rows.conditional) if conditional)
        site.known = site.known | present


def _per_image(per_row: Tensor, index: RowIndex) -> Tensor:
    """(2, conditional rows) -> (2, count): the mean over an image's conditional rows; 0 for an image with none in this call."""
    if index.direct:
        return per_row
    total = per_row.new_zeros(per_row.shape[0], index.rows.count)
    return total.index_add_(1, index.image_of_conditional, per_row) / index.repeats


def _per_row(decision: Tensor, index: RowIndex, fold: int) -> Tensor:
    per_row = decision.expand(len(index.rows.images)) if index.rows.count == 1 else decision[index.image_of_row]
    return per_row.repeat_interleave(fold) if fold > 1 else per_row


def _widen(pick: slice | Tensor, fold: int) -> slice | Tensor:
    """The entries of the first axis that belong to these rows, when each row is `fold` consecutive entries."""
    if fold == 1:
        return pick
    if isinstance(pick, slice):
        return slice(pick.start * fold, pick.stop * fold)
    return (pick[:, None] * fold + torch.arange(fold, device=pick.device)).flatten()


def is_convolution(module: nn.Module) -> bool:
    return hasattr(module, "_conv_forward") or (hasattr(module, "stride") and hasattr(module, "padding") and hasattr(module, "dilation"))


class ShiftedNorm(PatchedLayer):
    """A normalisation layer with both LoRAs' gains and offsets summed in: y = y0 + xhat * dg + db, xhat the normalised input.

    There is nothing to choose between, so it takes no part in the selection.
    """

    def __init__(self, name: str, module: nn.Module, gain: Tensor | None, offset: Tensor | None, state: StepState):
        super().__init__(name, module, state)
        self.gain, self.offset = gain, offset

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (N, C, ...) for a group norm, (..., C) for a layer or RMS norm."""
        y = self._base(x, *args, **kwargs)
        if not self.state.active:
            return y
        groups = getattr(self.module, "num_groups", None)
        shape = (1, -1, *(1,) * (x.dim() - 2)) if groups is not None else (-1,)
        shift = torch.zeros((), device=y.device)
        if self.gain is not None:
            shift = shift + self._normalised(x.float(), groups) * self.gain.to(y.device, torch.float32).reshape(shape)
        if self.offset is not None:
            shift = shift + self.offset.to(y.device, torch.float32).reshape(shape)
        return y + shift.to(y.dtype)

    def _normalised(self, x: Tensor, groups: int | None) -> Tensor:
        eps = getattr(self.module, "eps", None)
        if groups is not None:
            return F.group_norm(x, groups, None, None, eps or 1e-5)
        if hasattr(self.module, "normalized_shape") and isinstance(self.module, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], None, None, eps or 1e-5)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (eps or 1e-6))
