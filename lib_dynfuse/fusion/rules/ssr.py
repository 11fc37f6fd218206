"""SSR-Merge (arXiv 2606.10617): signals are led to the LoRA that they belong to, by what the layers are given with each side alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from ...lora.naming import Site
from ..calibration import Correlations
from .direct import Direct
from .rule import Member, Places

RIDGE = 1e-4
"""The authors' (the default of their code)."""


class Ssr(Direct):
    """y = y0 + B R A h: A = [A_1; ..; A_K] the LoRAs' down matrices one below the other, B = [s_1 B_1, .., s_K B_K] their up matrices.

    R = Q (G / N + ridge)^-1 / N: the least squares by which R A x is A x in the rows of one side's LoRAs and 0 in the other's, where x is
    what the layer is given while that side is alone, under a prompt of its own, at the first step. With Z = A X of a side, G = sum of Z Z^T
    over the sides, Q each side's rows of its own Z Z^T. N: inputs in all. Several LoRAs of a side are one task together. Where both sides
    are shown the same, R is about half of the identity: the mean of both, and not their sum.

    The ridge is on the diagonal of the correlations (G brought to a diagonal of ones), so that nothing depends on how a file divides its
    strength between its two matrices; the paper's is on G / N as it is. Where a LoRA is no product of thin matrices, the sum.
    """

    name = "ssr"
    summary = "the sum, each side's signals kept apart by what the layers are given with each side alone (SSR-Merge)"
    rewrites = True
    calibrates = True

    def prepare(self, places: Places) -> None:
        super().prepare(places)
        self.restart()

    def learn(self, subject: Correlations, style: Correlations) -> None:
        common = {site: own for site, own in subject.items() if site in style}
        self.learned = {site: router(own.matrix, style[site].matrix, own.of_subject) for site, own in common.items()}
        self.calibrated = True

    def restart(self) -> None:
        super().restart()
        self.learned = {}

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], members: Sequence[Member], strengths: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        routes = self.learned.get(site)
        thin = [change for change in changes if isinstance(change, LowRank)]
        # Fewer LoRAs than were seen: a tilt silences one side.
        if routes is None or len(thin) < len(changes) or sum(change.rank for change in thin) != len(routes):
            return changes
        ups = torch.cat([strength * change.scale * change.up.float() for change, strength in zip(thin, strengths)], 1)
        led = (ups @ routes.to(ups.device)).split([change.rank for change in thin], 1)
        return [replace(change, up=up / strength, scale=1.0) if strength else change for change, up, strength in zip(thin, led, strengths)]


def router(subject: Tensor, style: Tensor, of_subject: Tensor) -> Tensor:
    """R of a site, (R, R) float32. subject, style: (R, R), Z Z^T of each side alone; of_subject: (R,) bool, whose rows they are."""
    total = (subject + style).double()
    guide = torch.where(of_subject[:, None], subject, style).double()
    spread = total.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny ** 0.25)
    # In units of each row's spread the diagonal is 1; R = D R' D^-1 in those of the file.
    total, guide = (matrix / spread / spread[:, None] for matrix in (total, guide))
    solved = torch.linalg.solve(total + RIDGE * torch.eye(len(total), dtype=total.dtype), guide.t()).t()
    return (spread[:, None] * solved / spread).float()


__all__ = ["RIDGE", "Ssr", "router"]
