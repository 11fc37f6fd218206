"""ZipLoRA (arXiv 2311.13600): of each LoRA's change every column times a coefficient that is learned.

    dW = s_c dW_c diag(m_c) + s_s dW_s diag(m_s)                                                     at every site that both change
    L = |D(x_c, p_c; dW) - D(x_c, p_c; dW_c)|^2 + |D(x_s, p_s; dW) - D(x_s, p_s; dW_s)|^2 + lambda * sum over sites of |cos(m_c, m_s)|

A column is what one input of the layer does (of a convolution: one input channel, all places of the kernel). The coefficients begin at 1:
the plain sum. The squares are means over the elements of the prediction. A product of thin matrices stays one: B A diag(m) = B (A diag(m)).
Where one LoRA alone changes a site, it stays as it is; normalisation layers are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora.branch import Dense, LowRank
from ..lora.naming import Site
from .call import FusionState
from .layer import FusedLayer, FusedSite, is_convolution
from .norm import ShiftedNorm
from .patching import PatchedLayer, argument
from .rules.direct import Direct
from .session import FusionSession


class Mergers:
    """The coefficients of a subject's and a style's LoRA on a model, and the model with the LoRAs under them.

    columns: site that both change -> (2, in) float32, m_c and m_s, on the layer's device.
    """

    def __init__(self, session: FusionSession, weight_of: Callable[[nn.Module], Tensor] = lambda module: module.weight):
        """session: of one subject and one style that are added up, at constant strengths. weight_of: as of a session."""
        state = FusionState(session.settings, Direct(), (*session.settings.subject_schedules, *session.settings.style_schedules))
        state.active = True
        self.columns: dict[Site, nn.Parameter] = {}
        self._layers: list[PatchedLayer] = []
        for layer in session.layers:
            if isinstance(layer, FusedLayer):
                self._layers.append(_ZippedLayer(layer.name, layer.module, [self._site(layer, site, weight_of) for site in layer.sites]))
            elif isinstance(layer, ShiftedNorm):
                self._layers.append(ShiftedNorm(layer.name, layer.module, layer.shifts, state))

    def _site(self, layer: FusedLayer, site: FusedSite, weight_of: Callable[[nn.Module], Tensor]) -> _ZippedSite:
        device = layer.module.weight.device
        changes = [_moved(change, device) for change in site.bind(lambda: weight_of(layer.module))]
        columns = None
        if len(changes) > 1:
            columns = self.columns[site.site] = nn.Parameter(torch.ones(len(changes), changes[0].shape[1], device=device))
        return _ZippedSite(site.site, changes, site.strengths, columns)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The LoRAs under the coefficients on the model, with gradients to `columns`; they are off again whatever happens."""
        try:
            for layer in self._layers:
                layer.attach()
            yield
        finally:
            for layer in self._layers:
                layer.detach()

    def similarity(self) -> Tensor:
        """Sum over the sites of |cos(m_c, m_s)|."""
        return torch.stack([F.cosine_similarity(own[0], own[1], dim=0).abs() for own in self.columns.values()]).sum()

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], numbers: Sequence[int], factors: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        """The changes under the coefficients, as lora.export.Rewrite. numbers: 0 for the subject's, 1 for the style's."""
        columns = self.columns[site].detach().cpu()
        return [_by_column(change, columns[number]) for change, number in zip(changes, numbers)]


class _ZippedSite:
    """columns: (2, in), None where there is one LoRA."""

    def __init__(self, site: Site, changes: Sequence[LowRank | Dense], strengths: Sequence[float], columns: Tensor | None):
        self.site, self.changes, self.strengths, self.columns = site, changes, strengths, columns

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the LoRAs add to the output of the site's rows, in x's type."""
        total: Tensor | None = None
        for number, (change, strength) in enumerate(zip(self.changes, self.strengths)):
            scaled = change if self.columns is None else _by_column(change, self.columns[number])
            part = _applied(module, x, scaled) * strength
            total = part if total is None else total + part
        assert total is not None
        return total


class _ZippedLayer(PatchedLayer):
    def __init__(self, name: str, module: nn.Module, sites: Sequence[_ZippedSite]):
        super().__init__(name, module)
        self.sites = sites

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self._base(*args, **kwargs)
        x = argument(args, kwargs).to(y.dtype)
        for zipped in self.sites:
            part, added = zipped.site.part, zipped.added(self.module, x)
            if part is not None:
                unit = y.shape[-1] // part.units
                start = part.start * unit
                added = F.pad(added, (start, y.shape[-1] - start - added.shape[-1]))
            y = y + added
        return y


def _applied(module: nn.Module, x: Tensor, change: LowRank | Dense) -> Tensor:
    weight = (change.down if isinstance(change, LowRank) else change.weight).to(x.dtype)
    bias = None if change.bias is None else change.bias.to(x.dtype)
    if not is_convolution(module):
        y = F.linear(x, weight.flatten(1))
        y = F.linear(y, change.scale * change.up.to(x.dtype)) if isinstance(change, LowRank) else y
        return y if bias is None else y + bias
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    own: Any = module
    forward = getattr(own, "_conv_forward", None)
    y = forward(x, weight, None) if forward else F.conv2d(x, weight, None, own.stride, own.padding, own.dilation)
    if isinstance(change, LowRank):
        y = F.conv2d(y, change.scale * change.up.to(x.dtype)[:, :, None, None])
    return y if bias is None else y + bias[:, None, None]


def _by_column(change: LowRank | Dense, columns: Tensor) -> LowRank | Dense:
    """dW diag(m). columns: (in,)."""
    matrix = (change.down if isinstance(change, LowRank) else change.weight).float()
    scaled = matrix * columns.to(matrix.device).view(1, -1, *[1] * (matrix.dim() - 2))
    return replace(change, down=scaled) if isinstance(change, LowRank) else replace(change, weight=scaled)


def _moved(change: LowRank | Dense, device: torch.device) -> LowRank | Dense:
    bias = None if change.bias is None else change.bias.to(device)
    if isinstance(change, LowRank):
        return replace(change, down=change.down.to(device), up=change.up.to(device), bias=bias)
    return replace(change, weight=change.weight.to(device), bias=bias)


__all__ = ["Mergers"]
