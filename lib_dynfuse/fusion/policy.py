"""From divergences to decisions (paper, Eq. 13, with the decisions on ties, balance and bias that the paper leaves open)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..lora.naming import Site

Choice = Callable[[Site], Tensor]
"""A choice that is not measured: site -> (images,) bool, True where the subject's branch is used. Asked at every step."""


def subject_wins(divergences: Tensor, threshold: Tensor | float) -> Tensor:
    """True where the subject's branch is used: D_c >= threshold * D_s (paper, Eq. 13, with threshold 1).

    divergences: (2, ...) subject's and style's. threshold: bias times gamma, a number or a tensor that broadcasts to (...).
    A tie goes to the subject, and so does a divergence that is not finite: the comparison is turned round so that NaN falls there too.
    """
    subject, style = divergences[0], divergences[1]
    style = style.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    if not isinstance(threshold, float) or threshold != 1.0:
        style = threshold * style
    return (subject < style).logical_not_()


def gamma(divergences: Tensor) -> Tensor:
    """The factor on D_s that makes both LoRAs equally loud: sum |D_c| / sum |D_s| over the layers, for every image apart.

    divergences: (L, 2, I), one step's, of all layers decided. Returns (I,); 1 where a sum is zero or not finite. Absolute values,
    because the dot-product criterion may be negative.
    """
    finite = torch.where(torch.isfinite(divergences), divergences, torch.zeros_like(divergences)).abs()
    subject, style = finite.sum(0)
    ratio = subject / style
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
