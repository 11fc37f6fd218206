"""NP-LoRA (arXiv 2511.11051): the subject's changes leave the directions that the style's listen to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from ...lora.naming import Site
from .direct import Direct
from .rule import Member

MU = 0.5
"""The paper's; larger takes more of the subject away."""

# Of a style that is no product of thin matrices: singular values below this share of the largest are rounding.
_RANK = 1e-5


class NpLora(Direct):
    """y = y0 + sum of the styles' d + sum of the subjects' dW (I - mu / (1 + mu) Q Q^T) h.

    Q: an orthonormal basis of the row space of all the styles' dW at the site, of kernels flattened; with thin factors that of their
    down matrices (a thin QR of A_s^T). mu = 0.5, times the styles' factor of a tilt.
    """

    name = "np-lora"
    summary = "the sum, the subject's LoRA kept out of the directions that the style's uses (NP-LoRA)"
    rewrites = True

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], members: Sequence[Member], strengths: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        styles = [_rows(change) for change, member in zip(changes, members) if not member.subject]
        if not styles:
            return changes
        basis = row_space(torch.cat(styles))
        mu = MU * self.places.settings.tilted(subject=False)
        share = mu / (1 + mu)
        return [_projected(change, basis, share) if member.subject else change for change, member in zip(changes, members)]


def row_space(rows: Tensor) -> Tensor:
    """(in, r): an orthonormal basis of the space that rows (n, in) span."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > _RANK * values[0].clamp_min(1e-30)].t()


def _rows(change: LowRank | Dense) -> Tensor:
    """(n, in) float32, whose row space is that of dW. Each LoRA's as long as the others', or the rank would be a matter of loudness."""
    rows = (change.down if isinstance(change, LowRank) else change.weight).float().flatten(1)
    return rows / rows.norm().clamp_min(1e-30)


def _projected(change: LowRank | Dense, basis: Tensor, share: float) -> LowRank | Dense:
    matrix = change.down if isinstance(change, LowRank) else change.weight
    rows = matrix.float().flatten(1)
    kept = (rows - share * (rows @ basis.to(rows.device)) @ basis.to(rows.device).t()).reshape(matrix.shape)
    return replace(change, down=kept) if isinstance(change, LowRank) else replace(change, weight=kept)


__all__ = ["MU", "NpLora", "row_space"]
