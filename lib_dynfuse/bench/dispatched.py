"""Dispatched operations of a step, counted without running anything: on a fast GPU their number decides, whatever they compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..fusion import FusionSession, Step
from ..fusion.layer import FusedLayer
from .denoisers import Denoiser

# They make room or another look at what is there: no kernel runs.
_NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_WARM_UP, _STEPS = 3, 20


class Dispatched(TorchDispatchMode):
    """Counts the operations that run a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in _NO_KERNEL and not _is_view(function):
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))


def _is_view(function: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)


@dataclass(frozen=True)
class Added:
    """What a session adds to a step without it. per_layer: mean over its layers, in them; per_step: before and after the call."""

    plain: int
    layers: int
    in_layers: Counter[str]
    outside: Counter[str]

    @property
    def per_layer(self) -> float:
        return self.in_layers.total() / max(1, self.layers)

    @property
    def per_step(self) -> int:
        return self.outside.total()


@torch.no_grad()
def added(denoiser: Denoiser, session: FusionSession) -> Added:
    """Of a step of one call, after the first steps, in which a contrast keeps its direction."""
    with Dispatched() as plain:
        denoiser.run()
    for index in range(_WARM_UP):
        denoiser.step(session, Step.of(index, _STEPS))
    call = Dispatched()

    def run(positions: tuple[int, ...] | None) -> Any:
        with call:
            return denoiser.run(positions)

    with Dispatched() as whole:
        denoiser.step(session, Step.of(_WARM_UP, _STEPS), run)
    layers = sum(isinstance(layer, FusedLayer) for layer in session.layers)
    return Added(plain.operations.total(), layers, call.operations - plain.operations, whole.operations - call.operations)


__all__ = ["Added", "Dispatched", "added"]
