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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .branch import Branch, Composed, Dense, FromWeight, LoraError, LowRank, NormShift
from .checks import Tensors, checked_bias, listing, need, number_of, scale_of, size_text, times
from .rotations import boft, oft, peft_boft, peft_oft

# Roles that may stand beside the tensors of several kinds.
_COMMON = frozenset({"alpha", "scale", "dora_scale", "magnitude", "diff_b"})


def lora(tensors: Tensors) -> LowRank:
    """LoRA and LoCon: dW = alpha/rank * up @ down (Hu et al. 2021, arXiv:2106.09685; LyCORIS for convolutions).

    down: (rank, in[, kh, kw]); up: (out, rank[, 1, 1]). With `mid` (rank, rank, kh, kw), LoCon's CP (Tucker) form, the kernel
    dW[o, i] = sum_nm up[o, n] mid[n, m] down[m, i] is composed into `down`. PEFT's bias of lora_B is scaled as the product is.
    """
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    need(
        down.dim() in (2, 4) and up.dim() in (2, 4), f"its tensors are {size_text(up)} and {size_text(down)}, neither matrices nor kernels"
    )
    need(up.dim() == 2 or tuple(up.shape[2:]) == (1, 1), f"its second factor is a kernel, {size_text(up)}, which no LoRA has")
    up, rank = up.flatten(1), down.shape[0]
    scale = scale_of(tensors, rank)
    if mid is not None:
        need(mid.dim() != 4 or max(mid.shape[2:]) <= 16, f"its kernel is {size_text(mid)}, larger than any layer's")
        need(
            mid.dim() == 4 and tuple(mid.shape[:2]) == (up.shape[1], rank) and down.flatten(1).shape[1] == down.shape[1],
            f"its three tensors do not fit each other: {size_text(up)}, {size_text(mid)}, {size_text(down)}",
        )
        down = torch.einsum("nmkl,mi->nikl", mid.float(), down.flatten(1).float())
    need(up.shape[1] == down.shape[0], f"its two halves differ in rank: {size_text(up)} and {size_text(down)}")
    bias = tensors.get("bias")
    bias = None if bias is None else scale * bias.float()
    if "diff_b" in tensors:
        bias = tensors["diff_b"] if bias is None else bias + tensors["diff_b"].float()
    return LowRank(down, up, scale, checked_bias(bias, up.shape[0]))


def loha(tensors: Tensors) -> Composed:
    """LoHa: dW = alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise product (Hyeon-Woo et al. 2022, arXiv:2108.06098, eq. 2).

    w_a: (out, rank), w_b: (rank, in[*kh*kw]). In the Tucker form (arXiv:2108.06098, proposition 3) w_a: (rank, out), w_b: (rank, in),
    t: (rank, rank, kh, kw), and a factor is sum_ij t[i, j] w_a[i, o] w_b[j, i'].
    An elementwise product of two matrices of rank r is a product of rank r * r: two thin matrices instead of a full one where
    they are smaller.
    """
    first, second = (_Factor(tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")) for n in (1, 2))
    need(
        first.shape == second.shape,
        f"its two factors make up {times(first.shape)} and {times(second.shape)}, which cannot be multiplied",
    )
    scale = scale_of(tensors, first.rank or 0)
    shape, bias = first.shape, checked_bias(tensors.get("diff_b"), first.shape[0])

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
    need(
        len(first.shape) == 2 and len(second.shape) in (2, 4),
        f"its factors are {times(first.shape)} and {times(second.shape)}, which make up no weight",
    )
    rank = second.rank or first.rank
    scale = scale_of(tensors, rank) if rank is not None else 1.0 if "scale" not in tensors else number_of(tensors["scale"])
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
    bias = checked_bias(tensors.get("diff_b"), shape[0])

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
    need(diff.dim() in (2, 4), f"its difference is {size_text(diff)}, neither a matrix nor a kernel")
    return Dense(diff, checked_bias(bias, diff.shape[0]))


def norm(tensors: Tensors) -> NormShift:
    """Differences of a normalisation layer's gain and offset, each (channels,) (LyCORIS' "norm")."""
    gain, offset = tensors.get("w_norm"), tensors.get("b_norm")
    for tensor in (gain, offset):
        need(tensor is None or tensor.dim() == 1, "its gain or offset is no vector")
    need(gain is None or offset is None or gain.shape == offset.shape, "its gain and its offset differ in length")
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
    need(fits, f"its magnitudes are {size_text(magnitude)}, but its matrices make up {times(base.shape)}")

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
    on_input = bool(number_of(tensors["on_input"]))
    scale = scale_of(tensors, 1) if "scale" in tensors else 1.0

    def make(weight: Tensor) -> Tensor:
        size = [1] * weight.dim()
        size[1 if on_input else 0] = -1
        return weight * (scale * factors.to(weight.device).float()).reshape(size)

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), None), None if on_input else factors.numel())


def peft_ia3(tensors: Tensors) -> FromWeight:
    """PEFT's IA3: W' = l * W0, dW = W0 * (l - 1).

    ia3_l: (1, in) scales columns, (out, 1) rows; a convolution's is (1, n, 1, 1) for both, and then the shape of its weight tells, or
    scales_input. Scaled rows mean a scaled bias too, which a branch does not reach: a convolution's are refused here, a linear layer's by
    the reader.
    """
    factors = tensors["ia3_l"]
    need(factors.dim() in (2, 4) and max(factors.shape, default=0) == factors.numel() > 0, f"its factors are {size_text(factors)}")
    linear, count = factors.dim() == 2, factors.numel()
    said = bool(number_of(tensors["scales_input"])) if "scales_input" in tensors else None
    by_rows = linear and factors.shape[1] == 1 and not (count == 1 and said)

    def make(weight: Tensor) -> Tensor:
        if not linear and (said is False or count != weight.shape[1] or (said is None and weight.shape[0] == count)):
            raise RuntimeError("its factors (IA3) are for the outputs of a convolution, or may be, and the bias there cannot be scaled")
        size = [1] * weight.dim()
        size[0 if by_rows else 1] = -1
        return weight * (factors.flatten().to(weight.device).float() - 1).reshape(size)

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), None), count if by_rows else None)


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
        need(
            rank == a2.shape[1] == tensors["b1"].shape[0] == b2.flatten(1).shape[1],
            f"its tensors do not fit each other: {', '.join(size_text(tensors[name]) for name in ('a1', 'a2', 'b1', 'b2'))}",
        )
        a1, a2, b1, b2 = a2, a1, b2.flatten(1), tensors["b1"]
    need(a1.shape[0] == a2.shape[1] == b2.shape[1], f"its halves differ in width: {a1.shape[0]}, {a2.shape[1]} and {b2.shape[1]}")
    scale = scale_of(tensors, rank)
    kernel = tuple(b2.shape[2:]) if bm is None else tuple(bm.shape[2:])
    shape = (b1.shape[0], a2.shape[1], *kernel)

    def make(weight: Tensor) -> Tensor:
        first, second, third = (t.to(weight.device).float() for t in (a1, a2, b1))
        own = torch.einsum("oi...,ij->oj...", weight, first @ second)
        last = b2.to(weight.device).float()
        if bm is not None:
            last = torch.einsum("nmkl,mi->nikl", bm.to(weight.device).float(), last.flatten(1))
        return scale * (own + (third @ last.flatten(1)).reshape(weight.shape))

    return FromWeight(make, rank, checked_bias(tensors.get("diff_b"), shape[0]), shape[0], shape)


# Which tensors make up a kind: (name, those it must have, those it may have, function).
_KINDS: tuple[tuple[str, frozenset[str], frozenset[str], Callable[[Tensors], Branch | NormShift]], ...] = (
    ("LoRA", frozenset({"down", "up"}), frozenset({"mid", "bias"}), lora),
    ("LoHa", frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), frozenset({"hada_t1", "hada_t2"}), loha),
    ("LoKr", frozenset(), frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}), lokr),
    ("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), frozenset({"bm"}), glora),
    ("IA3", frozenset({"weight", "on_input"}), frozenset(), ia3),
    ("OFT", frozenset({"oft_diag"}), frozenset({"rescale"}), oft),
    ("OFT", frozenset({"oft_blocks"}), frozenset({"rescale"}), oft),
    ("OFT", frozenset({"oft_r"}), frozenset({"oft_s", "freedom"}), peft_oft),
    ("OFT", frozenset({"oft_R", "series"}), frozenset({"freedom"}), peft_oft),
    ("BOFT", frozenset({"boft_R"}), frozenset({"boft_s"}), peft_boft),
    ("IA3", frozenset({"ia3_l"}), frozenset({"scales_input"}), peft_ia3),
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
        if not (present & needed if needed else present) or (function is ia3 and "on_input" not in present):
            continue
        missing = needed - tensors.keys()
        need(not missing, f"it has {listing(present)} but no {listing(missing)}")
        strange = tensors.keys() - own - _COMMON
        need(not strange, f"it mixes the tensors of two kinds, {listing(present)} and {listing(strange)}")
        whole = {role for role in present - {"on_input"} if not tensors[role].is_floating_point()}
        need(not whole, f"{listing(whole)} holds whole numbers, as a quantised file does")
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
        except LoraError:
            raise
        except (ArithmeticError, IndexError, RuntimeError, ValueError):
            # Tensors of shapes that no trainer writes, such as a vector for a matrix.
            sizes = ", ".join(f"{listing({role})} {size_text(tensor)}" for role, tensor in sorted(tensors.items()))
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
            need(fits, f"its two halves differ in rank: {size_text(a)} and {size_text(b)}")
        else:
            fits = a.dim() == 2 and b.dim() == 2 and t.dim() == 4 and tuple(t.shape[:2]) == (a.shape[0], b.shape[0])
            need(fits, f"its three tensors do not fit each other: {size_text(a)}, {size_text(t)}, {size_text(b)}")

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


__all__ = ["branch_of", "dora", "full", "glora", "ia3", "loha", "lokr", "lora", "norm", "peft_ia3"]
