"""How far a branch moves a layer's features: the criteria of feature-level selection (paper, Eqs. 11-12 and Table 4).

Every function takes the layer's base output y0 and a branch's change d of it and returns one number per token: large means "this
branch changes more". All are written in terms of d, never of a rounded y0 + d: in bfloat16 that sum loses the very digits that
decide close calls. Inputs are float32 or float64; the softmax runs over the channel axis.

The functions may overwrite `delta`, and take the rest of their memory from a workspace: fresh pages are what they would otherwise
spend half of their time on.

Shapes: base (..., T, C), delta (..., T, C) with leading axes that broadcast, result (..., T). With `axis` another axis is the channels'
(1 for a convolution's (N, C, T) output); the result then lacks that axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Nats. exp(80) times any change that float32 features can have is still a float32.
_LARGEST_EXPONENT = 80.0


class Workspace:
    """Memory for what lives only while some tokens are measured: on a CPU the same at every time. A GPU's allocator keeps its own."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Contiguous, with anything in it; what was under this name before is overwritten."""
        if device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        size = math.prod(shape)
        held = self._memory.get((name, dtype))
        if held is None or held.numel() < size:
            with torch.inference_mode(False):
                held = self._memory[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(tuple(shape))

    def like(self, name: str, tensor: Tensor) -> Tensor:
        return self.room(name, tensor.shape, tensor.dtype, tensor.device)


def _excess(change: Tensor, axis: int) -> Tensor:
    """How far a token's largest change goes beyond what exp can take, (..., T, 1): zero but for far too strong LoRAs."""
    return F.softshrink(change.amax(axis, keepdim=True), _LARGEST_EXPONENT)  # amax - 80 above 80, else 0; never below -80


def kullback_leibler(base: Tensor, delta: Tensor, axis: int = -1, workspace: Workspace | None = None) -> Tensor:
    """KL(q || p) with p = softmax(y0), q = softmax(y0 + d): paper, Eqs. 11 and 12.

    With the mean E_p[d] taken out of d (softmax does not see it), u = exp(d - s) - 1 and z = E_p[u], log(q/p) = d - s - log(1 + z), so
    KL = E_q[d] - s - log(1 + z) = E_p[u d] / (1 + z) - s - log(1 + z). Taking the mean out first makes both terms second order
    in d, so that float32 keeps its digits for small changes. s is zero unless exp(d) would leave float32.
    """
    workspace = workspace or Workspace()
    p = torch.softmax(base, axis, out=workspace.like("p", base))
    weighted = torch.mul(p, delta, out=workspace.like("weighted", delta))
    change = delta.sub_(weighted.sum(axis, keepdim=True))
    excess = _excess(change, axis)
    torch.sub(change, excess, out=weighted)
    z = weighted.expm1_().mul_(p).sum(axis)
    return weighted.mul_(change).sum(axis).div_(1 + z).sub_(torch.log1p(z)).sub_(excess.squeeze(axis))


def jensen_shannon(base: Tensor, delta: Tensor, axis: int = -1, workspace: Workspace | None = None) -> Tensor:
    """(KL(p || r) + KL(q || r)) / 2 with r = (p + q) / 2; paper, Table 4.

    With e = log(q/p) and u = exp(e) - 1 it is half of E_p[(1 + u) e - (2 + u) log(1 + u/2)].
    """
    p = torch.softmax(base, axis)
    change = delta.sub_((p * delta).sum(axis, keepdim=True))
    change.sub_(_excess(change, axis))
    z = torch.expm1(change).mul_(p).sum(axis, keepdim=True)
    log_ratio = change.sub_(torch.log1p(z)).clamp_max_(_LARGEST_EXPONENT)
    u = torch.expm1(log_ratio)
    integrand = (1 + u).mul_(log_ratio).sub_((2 + u) * torch.log1p(u / 2))
    return (p * integrand).sum(axis) / 2


def cosine_distance(base: Tensor, delta: Tensor, axis: int = -1, workspace: Workspace | None = None) -> Tensor:
    """1 - cos(y0 + d, y0); paper, Table 4. Zero where y0 is zero, because no direction changes there.

    1 - cos = sin^2 / (1 + cos), and sin^2 = |d_perp|^2 / |y0 + d|^2 with d_perp the part of d that is orthogonal to y0: no
    difference of nearly equal numbers is taken.
    """
    square = (base * base).sum(axis, keepdim=True)
    along = (base * delta).sum(axis, keepdim=True) / square.clamp_min(torch.finfo(base.dtype).tiny)
    across = delta - along * base
    across_square = (across * across).sum(axis)
    parallel = (1 + along).squeeze(axis)
    square = square.squeeze(axis)
    moved_square = parallel.square() * square + across_square
    cosine = parallel * square.sqrt() / moved_square.sqrt()
    distance = across_square / moved_square / (1 + cosine)
    # Turned about by more than a right angle, 1 + cos may vanish: there the direct form is the exact one.
    distance = torch.where(cosine < 0, 1 - cosine, distance)
    return torch.where((square > 0) & (moved_square > 0), distance, torch.zeros_like(distance))


def dot_fall(base: Tensor, delta: Tensor, axis: int = -1, workspace: Workspace | None = None) -> Tensor:
    """<y0, y0> - <y0 + d, y0> = -<d, y0>: how much less the changed features agree with the base's; paper, Table 4. May be negative."""
    return -(base * delta).sum(axis)


CRITERIA: dict[str, Callable[[Tensor, Tensor, int, Workspace | None], Tensor]] = {
    "kl": kullback_leibler,
    "js": jensen_shannon,
    "cosine": cosine_distance,
    "dot": dot_fall,
}

# Elements worked on at a time: enough to keep a CPU's vector units busy within its second-level cache (measured on an AMD EPYC
# with 1 MiB a core: a third faster than whole layers), and a bound on temporary memory on a GPU (32 Mi float32 = 128 MiB each).
_CPU_CHUNK = 1 << 17
_GPU_CHUNK = 1 << 25


def largest_chunk(device: torch.device) -> int:
    """Elements of a layer's output that are best measured at once."""
    return _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK


@torch.no_grad()
def measured(criterion: str, base: Tensor, delta: Tensor, *, rms: bool = False, workspace: Workspace | None = None) -> Tensor:
    """Divergence of every token, in float32. base, delta: (..., T, C) with leading axes that broadcast, any float dtype; delta may be
    overwritten. rms: divide both by the base's standard deviation over the channels of each token. Returns (..., T).
    """
    y0, d = base.float(), delta.float()
    if rms:
        spread = y0.std(-1, keepdim=True, unbiased=False).clamp_min(torch.finfo(torch.float32).tiny)
        y0, d = y0 / spread, d / spread
    return CRITERIA[criterion](y0, d, -1, workspace)


@torch.no_grad()
def token_divergences(
    criterion: str,
    base: Tensor,
    delta: Tensor | Callable[[int, int], Tensor],
    *,
    rms: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """The same for one layer, in stretches of tokens.

    base: (N, T, C). delta: (B, N, T, C), one slice per branch; or a function of (start, length) that makes those tokens' slice, to be
    overwritten, so that no whole delta need ever be in memory. Returns (B, N, T).
    """
    if isinstance(delta, Tensor):
        whole = delta

        def delta(start: int, length: int) -> Tensor:
            return whole.narrow(2, start, length).to(torch.float32, copy=True)

    tokens = base.shape[1]
    chunk = max(1, tokens * largest_chunk(base.device) // max(1, base.numel()))
    pieces = []
    for start in range(0, tokens, chunk):
        length = min(chunk, tokens - start)
        some = base.narrow(1, start, length)
        pieces.append(measured(criterion, some, delta(start, length), rms=rms, workspace=workspace))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
