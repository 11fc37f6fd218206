"""Two LoRAs beside each other: how loud each is, and whether both listen to the same directions of the features."""

from __future__ import annotations

import torch

from .branch import Dense, FromWeight, LowRank, bound
from .matching import SiteBranch
from .naming import Site
from .reader import LoraFile

_LAYERS = 24  # that the overlap is measured on


def loudness(file: LoraFile) -> float | None:
    """sqrt of the sum over the denoiser's layers of |dW|_F^2, at strength 1; None where it depends on the model's own weights."""
    branches = list(file.denoiser.values())
    if not branches or any(isinstance(branch, FromWeight) for branch in branches):
        return None
    return float(sum(square_norm(bound(branch, torch.Tensor)).double() for branch in branches)) ** 0.5


def square_norm(branch: LowRank | Dense, device: torch.device | str = "cpu") -> torch.Tensor:
    """|dW|_F^2, () float32 on the device; of a product of thin matrices by their Gram matrices: tr(U^T U D D^T)."""
    if isinstance(branch, Dense):
        return branch.weight.to(device, torch.float32).square().sum()
    up, down = branch.up.to(device, torch.float32), branch.down.to(device, torch.float32).flatten(1)
    return branch.scale**2 * ((up.t() @ up) * (down @ down.t())).sum()


def overlap(a: dict[Site, SiteBranch], b: dict[Site, SiteBranch]) -> tuple[float, float] | None:
    """How much of the smaller space of inputs lies in the other's, 0 to 1: the mean over layers in common, and what chance would give.

    Of |Q_a^T Q_b|_F^2 / min(r_a, r_b), Q an orthonormal basis of the rows of `down`. Near 1: both were trained from the same random
    numbers, and meet in every layer. None where there are no thin matrices in common.
    """
    common = [site for site in a if site in b and all(isinstance(at[site].branch, LowRank) for at in (a, b))]
    found, chance = [], []
    for site in common[:: max(1, len(common) // _LAYERS)]:
        one, other = (_basis(at[site]) for at in (a, b))
        if one.shape[0] != other.shape[0] or not one.shape[1] or not other.shape[1]:
            continue
        smaller, larger = sorted((one.shape[1], other.shape[1]))
        found.append(float((one.t() @ other).square().sum()) / smaller)
        chance.append(larger / one.shape[0])
    return (sum(found) / len(found), sum(chance) / len(chance)) if found else None


def _basis(binding: SiteBranch) -> torch.Tensor:
    """(in, r)"""
    assert isinstance(binding.branch, LowRank)
    return torch.linalg.qr(binding.branch.down.float().flatten(1).t())[0]


__all__ = ["loudness", "overlap", "square_norm"]
