"""Gradients through a model whose tensors were made under inference mode, as all of Forge's are (loader.py:497, patcher/lora.py:351).

    with graph_through_inference_tensors():
        x = latent.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x)

Autograd refuses to keep an inference tensor for the way back, whatever mode it is used under. So every torch function called inside
is given an alias instead: a normal tensor on the same memory. This holds for weights, buffers, conditionings, LoRAs that are applied on
the fly, and what other extensions bring along; no module is touched, so there is nothing to put back.

What the graph keeps is copied when, and only when, it is about to be overwritten: Forge adds in place (`x += n`, backend/nn/unet.py:240).

Forge Neo's transformers turn queries and keys by operators of the package comfy_kitchen that have no backward pass (backend/nn/flux.py:8,
ernie.py:128). Inside, the same is computed by operators that have one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

WRITING_OPERATORS = frozenset(
    f"__{operator}__"
    for operator in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "ilshift",
        "irshift",
        "setitem",
    )
)


@contextmanager
def graph_through_inference_tensors() -> Iterator[None]:
    """Have autograd record what is computed inside, also in the middle of an inference mode.

    Take the gradient inside, too. Afterwards no tensor that was made inside and is still held by somebody has a graph; views are
    the exception, they cannot be cut off.
    """
    recording = _Recording()
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(recording.keep, recording.kept):
        try:
            with recording:
                yield
        finally:
            recording.cut()


def has_backward(attention: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether gradients pass an attention function, (q, k, v, heads) -> (B, tokens, channels).

    A kernel made for inference hands back a tensor without a graph, as SageAttention's do, and what goes through attention would be missing
    from the gradient without a word; or it refuses on the way back, as Neo's own flash attention does (backend/attention.py:64). One that
    does not take these tokens tells nothing, and counts as having one.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    with torch.inference_mode(False), torch.enable_grad():
        tokens = torch.linspace(-1.0, 1.0, 64 * 64, device=device, dtype=dtype).reshape(1, 64, 64).requires_grad_()
        try:
            result = attention(tokens, tokens, tokens, 1)
        except Exception:
            return True
        if not result.requires_grad:
            return False
        try:
            torch.autograd.grad(result.float().square().sum(), tokens)
        except (RuntimeError, NotImplementedError):
            return False
        return True


class _Kept:
    """A tensor that the graph needs on the way back."""

    def __init__(self, tensor: Tensor):
        # Not the tensor itself: a graph that holds its own output is never freed.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def copy(self) -> None:
        self.tensor = self.tensor.clone()
        self.version = self.tensor._version


class _Recording(TorchFunctionMode):
    """What is recorded of one prediction. Several thousand torch functions pass through here: a check costs more than it looks."""

    def __init__(self) -> None:
        super().__init__()
        # By identity, with the tensor itself: while it is held its id is not given to another.
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}
        # By the address of their memory: what an in-place operation on it would change.
        self._kept: dict[int, list[weakref.ref[_Kept]]] = {}
        self._made: list[TensorWeakRef] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        given = kwargs or {}
        if name == "__set__":  # an attribute such as data: it is the tensor itself that should have it
            return func(*args, **given)
        # A function that goes back to inference mode makes inference tensors anyway (merge_lora_to_weight, patcher/lora.py:84).
        if not torch.is_inference_mode_enabled():
            args = tuple([self._usable(value) for value in args])
            if given:
                given = {key: self._usable(value) for key, value in given.items()}
        if _writes(name) or (given and (given.get("inplace") or given.get("out") is not None)):
            for tensor in _written(args, given):
                self._copy_what_is_kept_of(tensor)
        rotate = _ROTATIONS.get(str(func)) if name.startswith("apply_rope") and not given else None
        result = func(*args, **given) if rotate is None else rotate(*args)
        if isinstance(result, Tensor):
            if result.requires_grad:
                self._made.append(TensorWeakRef(result))
        elif isinstance(result, (tuple, list)):
            self._made += [TensorWeakRef(item) for item in result if isinstance(item, Tensor) and item.requires_grad]
        return result

    def _usable(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._alias(value) if value.is_inference() else value
        if type(value) in (tuple, list):
            return type(value)(self._usable(item) for item in value)
        return value

    def _alias(self, tensor: Tensor) -> Tensor:
        """One alias per tensor, so that what is written into a buffer is seen, with its graph, when the buffer is read."""
        known = self._aliases.get(id(tensor))
        if known is None:
            alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            known = self._aliases[id(tensor)] = tensor, alias
        return known[1]

    def keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        address = tensor.untyped_storage().data_ptr()
        others = self._kept.get(address)
        if others is None:
            others = self._kept[address] = []
        others.append(weakref.ref(kept))
        return kept

    @staticmethod
    def kept(kept: _Kept) -> Tensor:
        if kept.tensor._version != kept.version:
            raise RuntimeError("A tensor that the gradient needs was overwritten in a way that could not be foreseen.")
        return kept.tensor

    def _copy_what_is_kept_of(self, tensor: Tensor) -> None:
        for reference in self._kept.pop(tensor.untyped_storage().data_ptr(), ()):
            kept = reference()
            if kept is not None:
                kept.copy()

    def cut(self) -> None:
        """Let go of everything. Hosts keep results: the last latent, a tile buffer, what was measured."""
        for reference in self._made:
            tensor = reference()
            if tensor is not None and not tensor._is_view():
                tensor.detach_()
        self._made.clear()
        self._aliases.clear()
        self._kept.clear()


def _rotated(x: Tensor, turns: Tensor, halves: bool) -> Tensor:
    """x: (..., tokens, channels). turns: (..., tokens, channels / 2, 2, 2), a matrix for each pair of channels, for as many tokens or more.

    halves: a pair is a channel of the first half and its like in the second, not two neighbours.
    """
    if turns.dim() == x.dim() + 2 and 1 < x.shape[-2] < turns.shape[-4]:
        turns = turns[..., : x.shape[-2], :, :, :]
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))
    turned = (turns * pairs.to(turns.dtype).unsqueeze(-2)).sum(-1)
    return (turned.transpose(-1, -2) if halves else turned).flatten(-2).type_as(x)


def _rotation(halves: bool) -> Callable[..., Any]:
    """As comfy_kitchen's operators: of one tensor, or of queries and keys."""

    def rotate(*args: Tensor) -> Any:
        *tensors, turns = args
        rotated = tuple([_rotated(x, turns, halves) for x in tensors])
        return rotated if len(rotated) > 1 else rotated[0]

    return rotate


_ROTATIONS = {
    f"comfy_kitchen.{name}{count}": _rotation(halves)
    for name, halves in (("apply_rope", False), ("apply_rope_split_half", True))
    for count in ("", "1")
}


@functools.cache
def _writes(name: str) -> bool:
    """Whether a torch function of this name overwrites its first argument."""
    return name in WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _written(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a writing function's arguments that it may overwrite."""
    targets = [*args[:1], kwargs.get("input"), kwargs.get("out")]
    flat = [item for target in targets for item in (target if isinstance(target, (tuple, list)) else [target])]
    return [target for target in flat if isinstance(target, Tensor)]


__all__ = ["graph_through_inference_tensors", "has_backward"]
