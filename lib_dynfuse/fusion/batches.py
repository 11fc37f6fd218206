"""A model call that can be made again, for all of its rows or for some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .rows import RowIndices

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Adjust = Callable[[dict[str, Any], "tuple[int, ...]", int], "dict[str, Any] | None"]
"""(a call's keyword arguments with their tensors cut, positions, rows of the whole call) -> the same, with what else there says how the
rows are ordered put right; None where the call cannot be made for these rows alone."""


class ModelCall:
    """forward(*args, **kwargs), as FusionSession.predict wants it.

    What it returns is a tensor, or a tuple that begins with one, or an object with it under `sample` (diffusers' outputs); `of` gives
    this form to what predict makes of the tensor. A host may take things out of the lists and dictionaries that it hands over while it
    runs the model (ControlNet's residuals in Forge): each further call gets copies that were made before the first.
    """

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, adjust: Adjust | None = None
    ):
        """batch: rows of the call. adjust: see Adjust."""
        self._forward = forward
        self._arguments: Arguments = (args, kwargs)
        self._kept: Arguments = (_copied(args), _copied(kwargs))
        self._batch = batch
        self._adjust = adjust
        self._first = True
        self._result: Any = None
        self._indices: dict[torch.device, RowIndices] = {}

    def __call__(self, positions: tuple[int, ...] | None) -> Any:
        """The prediction of these rows, of all for None."""
        if self._first:
            self._first = False
            args, kwargs = self._arguments
            self._result = self._forward(*args, **kwargs)
            return _tensor_of(self._result)
        args, kwargs = _copied(self._kept[0]), _copied(self._kept[1])
        if positions is None:
            return _tensor_of(self._forward(*args, **kwargs))
        some = self._cut(kwargs, positions)
        if self._adjust is not None and (some := self._adjust(some, positions, self._batch)) is None:
            return self._rows(_tensor_of(self._forward(*args, **kwargs)), positions)
        return _tensor_of(self._forward(*self._cut(args, positions), **some))

    def of(self, prediction: Any) -> Any:
        """The first call's result with this prediction in it."""
        result = self._result
        if isinstance(result, tuple):
            return (prediction, *result[1:])
        if isinstance(result, Tensor) or not hasattr(result, "sample"):
            return prediction
        result.sample = prediction
        return result

    def _cut(self, value: Any, positions: tuple[int, ...]) -> Any:
        """Every tensor that has a row for each of the call's, with these rows only."""
        if isinstance(value, Tensor):
            return self._rows(value, positions) if value.dim() and value.shape[0] == self._batch else value
        if isinstance(value, Mapping):
            return {key: self._cut(item, positions) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cut(item, positions) for item in value)
        return value

    def _rows(self, tensor: Tensor, positions: tuple[int, ...]) -> Tensor:
        if tensor.device not in self._indices:
            self._indices[tensor.device] = RowIndices(tensor.device)
        return tensor.index_select(0, self._indices[tensor.device].numbers(positions))


def _copied(value: Any) -> Any:
    """The same things in containers of their own."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _tensor_of(result: Any) -> Any:
    if isinstance(result, tuple):
        return result[0]
    return result if isinstance(result, Tensor) else getattr(result, "sample", result)


__all__ = ["Adjust", "ModelCall"]
