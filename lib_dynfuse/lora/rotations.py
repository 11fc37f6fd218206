"""Kinds that turn the layer's weight: OFT and BOFT, as sd-scripts and LyCORIS write them and as PEFT does.

All rotations are Cayley's of a skew-symmetric Q, R = (1 + Q)(1 - Q)^-1, or a series for it. sd-scripts and LyCORIS turn the rows of the
weight, so does PEFT before 0.14; later versions turn its columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .branch import FromWeight
from .checks import Tensors, checked_bias, need, number_of, size_text


def oft(tensors: Tensors) -> FromWeight:
    """OFT: W' = R^T W0 blockwise over the output rows, R = (1 + Q)(1 - Q)^-1 (Qiu et al. 2023, arXiv:2306.07280, Cayley form).

    oft_blocks: (blocks, size, size), Q = blocks - blocks^T, scaled down to the norm alpha * out where alpha > 0 (sd-scripts'
    networks/oft.py and LyCORIS' diag-oft). oft_diag: R itself (LyCORIS before 2.1). rescale: (out, 1[, 1, 1]), a factor per row.
    """
    stored = "oft_diag" not in tensors
    blocks = tensors["oft_blocks"] if stored else tensors["oft_diag"]
    need(blocks.dim() == 3 and blocks.shape[1] == blocks.shape[2], f"its rotations are {size_text(blocks)}, not square blocks")
    out = blocks.shape[0] * blocks.shape[1]
    rescale = _checked_rescale(tensors, out)
    limit = _limit(tensors, out)

    def make(weight: Tensor) -> Tensor:
        rotation = _rotation(blocks.to(weight.device).float(), limit) if stored else blocks.to(weight.device).float()
        turned = torch.einsum("knm,kn...->km...", rotation, weight.reshape(*blocks.shape[:2], *weight.shape[1:])).reshape(weight.shape)
        return _rescaled(turned, rescale) - weight

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), out), out)


def boft(tensors: Tensors) -> FromWeight:
    """BOFT: W' = R_m ... R_1 W0, block rotations between butterfly permutations (Liu et al. 2024, arXiv:2311.06243, section 4).

    oft_blocks: (m, blocks, size, size); constraint and rescale as in `oft`. In stage i, rows that are size/2 * 2^i apart are turned
    together (LyCORIS' "boft").
    """
    blocks = tensors["oft_blocks"]
    need(blocks.dim() == 4 and blocks.shape[2] == blocks.shape[3], f"its rotations are {size_text(blocks)}, not square blocks")
    stages, count, size, _ = blocks.shape
    out = count * size
    need(size % 2 == 0 and out % (size * 2 ** (stages - 1)) == 0, f"its rotations, {size_text(blocks)}, do not make up a butterfly")
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

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), out), out)


def peft_oft(tensors: Tensors) -> FromWeight:
    """PEFT's OFT, with one rotation for all blocks where only one is stored (block_share). Its bias is the layer's own.

    oft_r: (blocks, size, size), Q = (oft_r - oft_r^T) / 2: before 0.14 W' = R W0, blockwise over the rows, the last block cut off where
    they do not divide; with oft_s (out, 1) (0.14 and 0.15) W' = oft_s * (W0 R) blockwise over the columns.
    oft_R: (blocks, size (size - 1) / 2) (since 0.16), Q's upper triangle: W' = W0 R; series: the coefficients c of R = sum_k c_k (-Q)^k,
    none for the exact form. freedom: COFT's eps, which limits the length of what is stored.
    """
    scales, triangle = tensors.get("oft_s"), "oft_R" in tensors
    stored = tensors["oft_R"] if triangle else tensors["oft_r"]
    square = stored.dim() == 3 and stored.shape[1] == stored.shape[2]
    need(triangle or square, f"its rotations are {size_text(stored)}, not square blocks")
    size = _size_of_triangle(stored) if triangle else stored.shape[1]
    count = len(stored)
    need(count > 0 and size > 0, "it has no rotations")
    eps = number_of(tensors["freedom"]) if "freedom" in tensors else None
    series = [number_of(c) for c in tensors["series"]] if "series" in tensors else []
    by_rows = not triangle and scales is None
    out = None if scales is None else scales.numel()

    def make(weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        blocks = stored.to(weight.device).float()
        blocks = _skew_of_triangle(blocks, size) if triangle else blocks
        if eps is not None:
            # Before 0.16 eps was meant for one number of a block of out / r rows.
            blocks_in_layer = count if count > 1 else math.ceil(flat.shape[1] / size)
            rows = 1 if triangle else size if by_rows else math.ceil(flat.shape[0] / blocks_in_layer)
            blocks = _shortened(blocks, eps * rows**2 / math.sqrt(count))
        skew = blocks if triangle else (blocks - blocks.transpose(-1, -2)) / 2
        rotation = _series(-skew, series) if series else _cayley(skew)
        if by_rows:
            return _turned(rotation, flat).reshape(weight.shape) - weight
        turned = _turned(rotation.transpose(-1, -2), flat.T).T.reshape(weight.shape)
        return _rescaled(turned, None if scales is None else scales.flatten()) - weight

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), out), out)


def peft_boft(tensors: Tensors) -> FromWeight:
    """PEFT's BOFT: W' = boft_s * (W0 B_1^T ... B_m^T), B_i block rotations R^T between permutations.

    boft_R: (m, blocks, size, size), Q = (boft_R - boft_R^T) / 2; boft_s: (out, 1) or (1, out). In stage i, halves of blocks that are 2^i
    halves apart are turned together.
    """
    stored, scales = tensors["boft_R"], tensors.get("boft_s")
    need(stored.dim() == 4 and stored.shape[2] == stored.shape[3], f"its rotations are {size_text(stored)}, not square blocks")
    stages, count, size, _ = stored.shape
    columns, half = count * size, size // 2
    divides = stages == 1 or (size % 2 == 0 and size > 0 and count % 2 ** (stages - 1) == 0)
    need(columns > 0 and divides, f"its rotations, {size_text(stored)}, do not make up a butterfly")
    out = None if scales is None else scales.numel()

    def make(weight: Tensor) -> Tensor:
        blocks = stored.to(weight.device).float()
        rotation = _cayley((blocks.transpose(-1, -2) - blocks) / 2)
        turned = weight.flatten(1).T
        if turned.shape[0] != columns:
            raise RuntimeError(f"its rotations are for {columns} columns, where the layer has {turned.shape[0]}")
        rows = turned.shape[1]
        for stage in range(stages):
            apart = 2**stage
            if stage:
                turned = turned.reshape(-1, 2, apart, half, rows).transpose(1, 2)
            turned = torch.einsum("bij,bjn->bin", rotation[stage], turned.reshape(count, size, rows))
            if stage:
                turned = turned.reshape(-1, apart, 2, half, rows).transpose(1, 2)
            turned = turned.reshape(columns, rows)
        return _rescaled(turned.T.reshape(weight.shape), None if scales is None else scales.flatten()) - weight

    return FromWeight(make, None, checked_bias(tensors.get("diff_b"), out), out)


def _rotation(blocks: Tensor, limit: float | None) -> Tensor:
    """Cayley: (1 + Q)(1 - Q)^-1 of the skew-symmetric Q = blocks - blocks^T, whose overall norm is at most `limit`."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit is not None:
        length = torch.linalg.vector_norm(skew) + 1e-8
        skew = torch.where(length > limit, skew * (limit / length), skew)
    return _cayley(skew)


def _cayley(skew: Tensor) -> Tensor:
    one = torch.eye(skew.shape[-1], device=skew.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


def _series(skew: Tensor, coefficients: list[float]) -> Tensor:
    """sum_k coefficients[k] skew^k"""
    power = torch.eye(skew.shape[-1], device=skew.device).expand_as(skew)
    total = coefficients[0] * power
    for coefficient in coefficients[1:]:
        power = power @ skew
        total = total + coefficient * power
    return total


def _size_of_triangle(vectors: Tensor) -> int:
    """size of (n, size (size - 1) / 2), n upper triangles."""
    need(vectors.dim() == 2 and vectors.numel() > 0, f"its rotations are {size_text(vectors)}, not vectors")
    numbers = vectors.shape[1]
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    need(size * (size - 1) // 2 == numbers, f"its rotations have {numbers} numbers, which make up no triangle")
    return size


def _skew_of_triangle(vectors: Tensor, size: int) -> Tensor:
    """(n, size, size): the upper triangle row by row, and its negative below."""
    matrix = vectors.new_zeros(len(vectors), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    matrix[:, rows, columns] = vectors
    return matrix - matrix.transpose(-1, -2)


def _shortened(blocks: Tensor, longest: float) -> Tensor:
    """Blocks, each of at most this length (Frobenius)."""
    length = torch.linalg.vector_norm(blocks, dim=(-2, -1), keepdim=True)
    return torch.where(length > longest, blocks * (longest / length), blocks)


def _turned(rotation: Tensor, matrix: Tensor) -> Tensor:
    """blockdiag(rotation) @ matrix, cut to its rows. rotation: (blocks, size, size), or (1, size, size) for all blocks."""
    count, size, _ = rotation.shape
    rows = matrix.shape[0]
    whole = size * (count if count > 1 else math.ceil(rows / size))
    if not rows <= whole < rows + size:
        raise RuntimeError(f"its rotations are for {whole} rows or columns, where the layer has {rows}")
    blocks = pad(matrix, (0, 0, 0, whole - rows)).reshape(-1, size, matrix.shape[1])
    return torch.einsum("bij,bjn->bin", rotation.expand(len(blocks), -1, -1), blocks).reshape(whole, -1)[:rows]


def _limit(tensors: Tensors, out: int) -> float | None:
    """OFT stores its constraint as alpha; 0 means none."""
    constraint = number_of(tensors["alpha"]) if "alpha" in tensors else 0.0
    return constraint * out if constraint > 0 else None


def _checked_rescale(tensors: Tensors, out: int) -> Tensor | None:
    rescale = tensors.get("rescale")
    if rescale is None:
        return None
    need(rescale.numel() == out, f"it rescales {rescale.numel()} rows of {out}")
    return rescale.flatten()


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    if rescale is None:
        return weight
    return weight * rescale.to(weight.device).float().reshape(-1, *(1,) * (weight.dim() - 1))


__all__ = ["boft", "oft", "peft_boft", "peft_oft"]
