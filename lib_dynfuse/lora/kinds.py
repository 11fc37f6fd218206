"""Kinds of LoRA: one pure function each, from the tensors that a file holds for one layer to a branch.

The formulas are those that the training libraries (sd-scripts, LyCORIS, PEFT) define and that the WebUIs merge with; where a WebUI
departs from the definition, the docstring says so. lycoris-lora has most of them as functions, but no released version is fit to be
a dependency at run time: 4.x does not import below torch 2.4 (it needs torch.library.custom_op; A1111 has 2.1.2 and Forge 2.3.1),
3.4.0 does, but it is superseded, brings its training package along, has no functional form of DoRA, IA3, GLoRA or norms, and its OFT
with a rescaling fails. It serves the tests as an independent reference.

`tensors` maps roles (naming.KeyName.role) to tensors of any float type; nothing is converted before it is computed with.
Every function raises LoraError, with a reason that the reader completes by file and layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .branch import Branch, Composed, Dense, FromWeight, LoraError, LowRank, NormShift

Tensors = Mapping[str, Tensor]

# Roles that may stand beside the tensors of several kinds.
_COMMON = frozenset({"alpha", "scale", "dora_scale", "magnitude", "diff_b"})


def lora(tensors: Tensors) -> LowRank:
    """LoRA and LoCon: dW = alpha/rank * up @ down (Hu et al. 2021, arXiv:2106.09685; LyCORIS for convolutions).

    down: (rank, in[, kh, kw]); up: (out, rank[, 1, 1]). With `mid` (rank, rank, kh, kw), LoCon's CP (Tucker) form, the kernel
    dW[o, i] = sum_nm up[o, n] mid[n, m] down[m, i] is composed into `down`. PEFT's bias of lora_B is scaled as the product is.
    """
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    _need(down.dim() in (2, 4) and up.dim() in (2, 4), f"its tensors are {_size(up)} and {_size(down)}, neither matrices nor kernels")
    _need(up.dim() == 2 or tuple(up.shape[2:]) == (1, 1), f"its second factor is a kernel, {_size(up)}, which no LoRA has")
    up, rank = up.flatten(1), down.shape[0]
    scale = _scale(tensors, rank)
    if mid is not None:
        _need(
            mid.dim() == 4 and tuple(mid.shape[:2]) == (up.shape[1], rank) and down.flatten(1).shape[1] == down.shape[1],
            f"its three tensors do not fit each other: {_size(up)}, {_size(mid)}, {_size(down)}",
        )
        down = torch.einsum("nmkl,mi->nikl", mid.float(), down.flatten(1).float())
    _need(up.shape[1] == down.shape[0], f"its two halves differ in rank: {_size(up)} and {_size(down)}")
    bias = tensors.get("bias")
    bias = None if bias is None else scale * bias.float()
    if "diff_b" in tensors:
        bias = tensors["diff_b"] if bias is None else bias + tensors["diff_b"].float()
    return LowRank(down, up, scale, _checked_bias(bias, up.shape[0]))


def loha(tensors: Tensors) -> Composed:
    """LoHa: dW = alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise product (Hyeon-Woo et al. 2022, arXiv:2108.06098, eq. 2).

    w_a: (out, rank), w_b: (rank, in[*kh*kw]). In the Tucker form (arXiv:2108.06098, proposition 3) w_a: (rank, out), w_b: (rank, in),
    t: (rank, rank, kh, kw), and a factor is sum_ij t[i, j] w_a[i, o] w_b[j, i'].
    An elementwise product of two matrices of rank r is a product of rank r * r: two thin matrices instead of a full one where
    they are smaller.
    """
    first, second = (_Factor(tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")) for n in (1, 2))
    _need(
        first.shape == second.shape,
        f"its two factors make up {_times(first.shape)} and {_times(second.shape)}, which cannot be multiplied",
    )
    scale = _scale(tensors, first.rank or 0)
    shape, bias = first.shape, _checked_bias(tensors.get("diff_b"), first.shape[0])

    def make() -> Tensor:
        return scale * first.made().mul_(second.made())

    def thin() -> LowRank:
        a1, b1, a2, b2 = (t.flatten(1).float() for t in (first.a, first.b, second.a, second.b) if t is not None)
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
        return LowRank(down.reshape(-1, *shape[1:]), up, scale, bias)

    matrices = first.t is None and second.t is None
    thin_rank = (first.rank or 0) * (second.rank or 0)
    return Composed(make, shape, first.rank, bias, thin if matrices and _is_thin(thin_rank, shape) else None, thin_rank)


def lokr(tensors: Tensors) -> Composed:
    """LoKr: dW = scale * kron(w1, w2), each of w1 and w2 whole or as w_a @ w_b (LyCORIS, arXiv:2309.14859, section 3.3).

    w1: (l, m); w2: (k, n[, kh, kw]); dW: (l*k, m*n[, kh, kw]). w2 may be in Tucker form with t2: w2_a (rank, k), w2_b (rank, n).
    The scale is alpha/rank with the rank of a decomposed factor (w2's where both are, as in A1111 and Forge), and 1 if none is.
    With a decomposed w2, kron(w1, a @ b) = kron(w1, a) @ kron(1, b): two small products instead of a full matrix where they are smaller.
    """
    first, second = _Factor.of(tensors, "w1", "first"), _Factor.of(tensors, "w2", "second")
    _need(
        len(first.shape) == 2 and len(second.shape) in (2, 4),
        f"its factors are {_times(first.shape)} and {_times(second.shape)}, which make up no weight",
    )
    rank = second.rank or first.rank
    scale = _scale(tensors, rank) if rank is not None else 1.0 if "scale" not in tensors else _number(tensors["scale"])
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
    bias = _checked_bias(tensors.get("diff_b"), shape[0])

    def make() -> Tensor:
        left, right = first.made(), second.made().contiguous()
        return scale * torch.kron(left.reshape(*left.shape, *(1,) * (right.dim() - 2)), right)

    def thin() -> LowRank:
        assert second.b is not None
        up = torch.kron(first.made(), second.a.flatten(1).float())
        down = torch.kron(torch.eye(first.shape[1]), second.b.flatten(1).float())
        return LowRank(down.reshape(-1, *shape[1:]), up, scale, bias)

    thin_rank = first.shape[1] * (second.rank or 0)
    matrices = second.b is not None and second.t is None
    return Composed(make, shape, rank, bias, thin if matrices and _is_thin(thin_rank, shape) else None, thin_rank)


def _is_thin(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether two matrices of this rank are smaller than the weight, (out, in[, kh, kw]), that they make up."""
    return rank * (shape[0] + math.prod(shape[1:])) < math.prod(shape)


def full(tensors: Tensors) -> Dense | FromWeight | NormShift:
    """Full difference: dW = diff, db = diff_b (LyCORIS' "full", extracted differences). One-dimensional: a normalisation layer's."""
    diff, bias = tensors.get("diff"), tensors.get("diff_b")
    if diff is None:
        assert bias is not None
        return FromWeight(torch.zeros_like, bias=bias, out=bias.shape[0], only_bias=True)
    if diff.dim() == 1:
        return NormShift(diff, bias)
    _need(diff.dim() in (2, 4), f"its difference is {_size(diff)}, neither a matrix nor a kernel")
    return Dense(diff, _checked_bias(bias, diff.shape[0]))


def norm(tensors: Tensors) -> NormShift:
    """Differences of a normalisation layer's gain and offset, each (channels,) (LyCORIS' "norm")."""
    gain, offset = tensors.get("w_norm"), tensors.get("b_norm")
    for tensor in (gain, offset):
        _need(tensor is None or tensor.dim() == 1, "its gain or offset is no vector")
    _need(gain is None or offset is None or gain.shape == offset.shape, "its gain and its offset differ in length")
    return NormShift(gain, offset)


def dora(base: LowRank | Dense | Composed, magnitude: Tensor, on_output: bool | None = None) -> FromWeight:
    """DoRA: W' = m * V / ||V|| with V = W0 + dW of another kind, so dW' = W' - W0 (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The norm runs over all of V but one axis, which the shape of m tells: (out, 1[, 1, 1]) or (out,) one magnitude per output row,
    (1, in[, 1, 1]) one per input column (LyCORIS before 3.1). on_output: True for PEFT's vectors, which are always per output row.
    A1111 takes the norm per input column whatever the shape of m; Forge, per output row, takes that of W0 instead of V. Followed is
    the definition, which is what the files were trained with.
    """
    rows, columns = base.shape[0], base.shape[1]
    if on_output is None:
        on_output = magnitude.dim() == 1 or (magnitude.shape[0] == rows and not (magnitude.shape[0] == 1 and magnitude.shape[1] == columns))
    # LoHa and LoKr may hold a convolution's kernel flattened into the columns.
    fits = magnitude.numel() == rows if on_output else columns % magnitude.numel() == 0
    _need(fits, f"its magnitudes are {_size(magnitude)}, but its matrices make up {_times(base.shape)}")

    def make(weight: Tensor) -> Tensor:
        moved = weight + base.delta_weight().to(weight.device).reshape(weight.shape)
        axis = 0 if on_output else 1
        others = [d for d in range(weight.dim()) if d != axis]
        length = moved.pow(2).sum(others, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
        size = [1] * weight.dim()
        size[axis] = -1
        return moved * (magnitude.to(weight.device).float().reshape(size) / length) - weight

    return FromWeight(make, base.rank, base.bias, rows, tuple(base.shape))


def ia3(tensors: Tensors) -> FromWeight:
    """IA3: dW = W0 * w, one factor per input column or per output row (Liu et al. 2022, arXiv:2205.05638; LyCORIS' "ia3").

    weight: (n,) or (1, n, 1, 1); on_input: 1 for columns, 0 for rows.
    """
    factors = tensors["weight"].flatten()
    on_input = bool(_number(tensors["on_input"]))
    scale = _scale(tensors, 1) if "scale" in tensors else 1.0

    def make(weight: Tensor) -> Tensor:
        size = [1] * weight.dim()
        size[1 if on_input else 0] = -1
        return weight * (scale * factors.to(weight.device).float()).reshape(size)

    return FromWeight(make, None, _checked_bias(tensors.get("diff_b"), None), None if on_input else factors.numel())


def oft(tensors: Tensors) -> FromWeight:
    """OFT: W' = R^T W0 blockwise over the output rows, R = (1 + Q)(1 - Q)^-1 (Qiu et al. 2023, arXiv:2306.07280, Cayley form).

    oft_blocks: (blocks, size, size), Q = blocks - blocks^T, scaled down to the norm alpha * out where alpha > 0 (sd-scripts'
    networks/oft.py and LyCORIS' diag-oft). oft_diag: R itself (LyCORIS before 2.1). rescale: (out, 1[, 1, 1]), a factor per row.
    """
    stored = "oft_diag" not in tensors
    blocks = tensors["oft_blocks"] if stored else tensors["oft_diag"]
    _need(blocks.dim() == 3 and blocks.shape[1] == blocks.shape[2], f"its rotations are {_size(blocks)}, not square blocks")
    out = blocks.shape[0] * blocks.shape[1]
    rescale = _checked_rescale(tensors, out)
    limit = _limit(tensors, out)

    def make(weight: Tensor) -> Tensor:
        rotation = _rotation(blocks.to(weight.device).float(), limit) if stored else blocks.to(weight.device).float()
        turned = torch.einsum("knm,kn...->km...", rotation, weight.reshape(*blocks.shape[:2], *weight.shape[1:])).reshape(weight.shape)
        return _rescaled(turned, rescale) - weight

    return FromWeight(make, None, _checked_bias(tensors.get("diff_b"), out), out)


def boft(tensors: Tensors) -> FromWeight:
    """BOFT: W' = R_m ... R_1 W0, block rotations between butterfly permutations (Liu et al. 2024, arXiv:2311.06243, section 4).

    oft_blocks: (m, blocks, size, size); constraint and rescale as in `oft`. In stage i, rows that are size/2 * 2^i apart are turned
    together (LyCORIS' "boft").
    """
    blocks = tensors["oft_blocks"]
    _need(blocks.dim() == 4 and blocks.shape[2] == blocks.shape[3], f"its rotations are {_size(blocks)}, not square blocks")
    stages, count, size, _ = blocks.shape
    out = count * size
    _need(size % 2 == 0 and out % (size * 2 ** (stages - 1)) == 0, f"its rotations, {_size(blocks)}, do not make up a butterfly")
    rescale = _checked_rescale(tensors, out)
    limit = _limit(tensors, out)

    def make(weight: Tensor) -> Tensor:
        rotation = _rotation(blocks.to(weight.device).float(), limit)
        turned = weight.flatten(1)
        columns = turned.shape[1]
        for stage in range(stages):
            apart = size // 2 * 2**stage
            # (c, 2, apart) -> (c, apart, 2): the two rows that a rotation mixes become neighbours.
            mixed = turned.reshape(-1, 2, apart, columns).transpose(1, 2).reshape(count, size, columns)
            mixed = torch.einsum("bij,bjn->bin", rotation[stage], mixed)
            turned = mixed.reshape(-1, apart, 2, columns).transpose(1, 2).reshape(out, columns)
        return _rescaled(turned.reshape(weight.shape), rescale) - weight

    return FromWeight(make, None, _checked_bias(tensors.get("diff_b"), out), out)


def glora(tensors: Tensors) -> FromWeight:
    """GLoRA: dW = alpha/rank * (W0 A + B) with low-rank A and B (Chavan et al. 2023, arXiv:2306.07967; LyCORIS' "glora").

    a1: (in, rank), a2: (rank, in), b1: (out, rank), b2: (rank, in[, kh, kw]), A = a1 a2, B = b1 b2; with bm (rank, rank, kh, kw)
    B is in Tucker form. LyCORIS before 3.0 wrote the two halves of each in the other order, which the shapes tell. A1111 leaves
    alpha/rank out; followed are LyCORIS and Forge.
    """
    a1, a2, b1 = (tensors[name].flatten(1) for name in ("a1", "a2", "b1"))
    b2, bm = tensors["b2"], tensors.get("bm")
    rank = a2.shape[0]
    if not rank == a1.shape[1] == b1.shape[1] == b2.shape[0]:
        rank = a1.shape[0]
        _need(
            rank == a2.shape[1] == tensors["b1"].shape[0] == b2.flatten(1).shape[1],
            f"its tensors do not fit each other: {', '.join(_size(tensors[name]) for name in ('a1', 'a2', 'b1', 'b2'))}",
        )
        a1, a2, b1, b2 = a2, a1, b2.flatten(1), tensors["b1"]
    _need(a1.shape[0] == a2.shape[1] == b2.shape[1], f"its halves differ in width: {a1.shape[0]}, {a2.shape[1]} and {b2.shape[1]}")
    scale = _scale(tensors, rank)
    kernel = tuple(b2.shape[2:]) if bm is None else tuple(bm.shape[2:])
    shape = (b1.shape[0], a2.shape[1], *kernel)

    def make(weight: Tensor) -> Tensor:
        first, second, third = (t.to(weight.device).float() for t in (a1, a2, b1))
        own = torch.einsum("oi...,ij->oj...", weight, first @ second)
        last = b2.to(weight.device).float()
        if bm is not None:
            last = torch.einsum("nmkl,mi->nikl", bm.to(weight.device).float(), last.flatten(1))
        return scale * (own + (third @ last.flatten(1)).reshape(weight.shape))

    return FromWeight(make, rank, _checked_bias(tensors.get("diff_b"), shape[0]), shape[0], shape)


# Which tensors make up a kind: (name, those it must have, those it may have, function).
_KINDS: tuple[tuple[str, frozenset[str], frozenset[str], Callable[[Tensors], Branch | NormShift]], ...] = (
    ("LoRA", frozenset({"down", "up"}), frozenset({"mid", "bias"}), lora),
    ("LoHa", frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), frozenset({"hada_t1", "hada_t2"}), loha),
    ("LoKr", frozenset(), frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}), lokr),
    ("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), frozenset({"bm"}), glora),
    ("IA3", frozenset({"weight", "on_input"}), frozenset(), ia3),
    ("OFT", frozenset({"oft_diag"}), frozenset({"rescale"}), oft),
    ("OFT", frozenset({"oft_blocks"}), frozenset({"rescale"}), oft),
    ("norm", frozenset(), frozenset({"w_norm", "b_norm"}), norm),
    ("full", frozenset(), frozenset({"diff", "diff_b"}), full),
)


def branch_of(tensors: Tensors) -> tuple[str, Branch | NormShift] | None:
    """(kind, branch) of one layer's tensors; None if there is nothing that changes a layer (a lone alpha, a plain weight).

    Raises LoraError for tensors that are incomplete, do not fit each other or belong to two kinds.
    """
    for name, needed, optional, function in _KINDS:
        own = needed | optional
        present = own & tensors.keys()
        # A plain "weight" without IA3's "on_input" is a whole layer's, as in a checkpoint.
        if not (present & needed if needed else present) or (name == "IA3" and "on_input" not in present):
            continue
        missing = needed - tensors.keys()
        _need(not missing, f"it has {_listing(present)} but no {_listing(missing)}")
        strange = tensors.keys() - own - _COMMON
        _need(not strange, f"it mixes the tensors of two kinds, {_listing(present)} and {_listing(strange)}")
        whole = {role for role in present - {"on_input"} if not tensors[role].is_floating_point()}
        _need(not whole, f"{_listing(whole)} holds whole numbers, as a quantised file does")
        if name == "OFT" and "oft_blocks" in present and tensors["oft_blocks"].dim() == 4:
            name, function = "BOFT", boft
        try:
            branch = function(tensors)
            magnitude = tensors.get("dora_scale", tensors.get("magnitude"))
            if magnitude is None:
                return _refined(name, branch), branch
            if not isinstance(branch, (LowRank, Dense, Composed)):
                raise LoraError(f"it has magnitudes (DoRA), which {name} cannot have")
            return f"DoRA ({_refined(name, branch)})", dora(branch, magnitude, True if "magnitude" in tensors else None)
        except (IndexError, RuntimeError, ZeroDivisionError):
            # Tensors of shapes that no trainer writes, such as a vector for a matrix.
            sizes = ", ".join(f"{_listing({role})} {_size(tensor)}" for role, tensor in sorted(tensors.items()))
            raise LoraError(f"its tensors do not fit each other: {sizes}") from None
    return None


def _refined(name: str, branch: Branch | NormShift) -> str:
    if name == "LoRA" and isinstance(branch, LowRank) and len(branch.shape) == 4 and tuple(branch.shape[2:]) != (1, 1):
        return "LoCon"
    return "norm" if isinstance(branch, NormShift) else name


@dataclass(frozen=True)
class _Factor:
    """A matrix or kernel that is stored whole (a), as a product a @ b, or as a Tucker product of a, b and the kernel t.

    a: (n, rank), b: (rank, m[, kh, kw]); with t (rank, rank, kh, kw): a (rank, n), b (rank, m), summed over both ranks.
    """

    a: Tensor
    b: Tensor | None = None
    t: Tensor | None = None

    @classmethod
    def of(cls, tensors: Tensors, name: str, which: str) -> _Factor:
        """LoKr's w1 or w2. Raises LoraError if it is incomplete."""
        whole, a, b = (tensors.get(f"lokr_{name}{ending}") for ending in ("", "_a", "_b"))
        if whole is not None:
            return cls(whole)
        if a is None or b is None:
            raise LoraError(f"its {which} factor is incomplete")
        return cls(a, b, tensors.get("lokr_t2") if name == "w2" else None)

    def __post_init__(self) -> None:
        a, b, t = self.a, self.b, self.t
        if b is None:
            return
        if t is None:
            fits = a.dim() in (2, 4) and b.dim() in (2, 4) and a.flatten(1).shape[1] == b.shape[0]
            _need(fits, f"its two halves differ in rank: {_size(a)} and {_size(b)}")
        else:
            fits = a.dim() == 2 and b.dim() == 2 and t.dim() == 4 and tuple(t.shape[:2]) == (a.shape[0], b.shape[0])
            _need(fits, f"its three tensors do not fit each other: {_size(a)}, {_size(t)}, {_size(b)}")

    @property
    def rank(self) -> int | None:
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.b is None:
            return tuple(self.a.shape)
        if self.t is None:
            return (self.a.shape[0], *self.b.shape[1:])
        return (self.a.shape[1], self.b.shape[1], *self.t.shape[2:])

    def made(self) -> Tensor:
        """The factor in float32."""
        if self.b is None:
            return self.a.float()
        if self.t is None:
            return (self.a.flatten(1).float() @ self.b.flatten(1).float()).reshape(self.shape)
        return torch.einsum("ijkl,jr,ip->prkl", self.t.float(), self.b.float(), self.a.float())


def _rotation(blocks: Tensor, limit: float | None) -> Tensor:
    """Cayley: (1 + Q)(1 - Q)^-1 of the skew-symmetric Q = blocks - blocks^T, whose overall norm is at most `limit`."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit is not None:
        length = torch.linalg.vector_norm(skew) + 1e-8
        skew = torch.where(length > limit, skew * (limit / length), skew)
    one = torch.eye(skew.shape[-1], device=skew.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


def _limit(tensors: Tensors, out: int) -> float | None:
    """OFT stores its constraint as alpha; 0 means none."""
    constraint = _number(tensors["alpha"]) if "alpha" in tensors else 0.0
    return constraint * out if constraint > 0 else None


def _checked_rescale(tensors: Tensors, out: int) -> Tensor | None:
    rescale = tensors.get("rescale")
    if rescale is None:
        return None
    _need(rescale.numel() == out, f"it rescales {rescale.numel()} rows of {out}")
    return rescale.flatten()


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    if rescale is None:
        return weight
    return weight * rescale.to(weight.device).float().reshape(-1, *(1,) * (weight.dim() - 1))


def _scale(tensors: Tensors, rank: int) -> float:
    """alpha / rank; 1 without alpha; `scale`, which a few old files have, overrides both."""
    _need(rank > 0, "its rank is 0")
    if "scale" in tensors:
        return _number(tensors["scale"])
    return _number(tensors["alpha"]) / rank if "alpha" in tensors else 1.0


def _number(tensor: Tensor) -> float:
    _need(tensor.numel() == 1, f"a tensor that should be one number is {_size(tensor)}")
    number = float(tensor.item())
    _need(math.isfinite(number), f"its alpha is {number}")
    return number


def _checked_bias(bias: Tensor | None, out: int | None) -> Tensor | None:
    if bias is not None:
        _need(bias.dim() == 1 and out in (None, bias.shape[0]), f"its bias is {_size(bias)} for {out} rows")
    return bias


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise LoraError(reason)


def _size(tensor: Tensor) -> str:
    return _times(tensor.shape)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape else "a single number"


def _listing(roles: frozenset[str] | set[str]) -> str:
    names = {"down": "lora_down", "up": "lora_up", "mid": "lora_mid"}
    return ", ".join(sorted(names.get(role, role) for role in roles))


__all__ = ["boft", "branch_of", "dora", "full", "glora", "ia3", "loha", "lokr", "lora", "norm", "oft"]
