"""A layer of the model whose forward is ours while a session is attached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class PatchedLayer(ABC):
    """Put on with attach, taken off with detach: nothing of ours is on the module in between."""

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self.module = module
        self._own_forward: Callable[..., Tensor] | None = None
        self._had_instance_forward = False

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What stands in for the layer's own forward."""

    def attach(self) -> None:
        """Put our forward on the module, as an attribute of the instance that shadows its class's."""
        if self._own_forward is not None:
            return  # still there, under a forward that somebody else put on top and did not take off
        instance = self.module.__dict__
        self._had_instance_forward = "forward" in instance
        self._own_forward = self.module.forward
        instance["forward"] = self.forward

    def detach(self) -> None:
        """Take it off again. A forward that somebody put on after us stays; if it calls ours, ours passes through."""
        instance = self.module.__dict__
        if self._own_forward is None or instance.get("forward") != self.forward:
            return
        if self._had_instance_forward:
            instance["forward"] = self._own_forward
        else:
            del instance["forward"]
        self._own_forward = None

    @property
    def patched_by_others(self) -> bool:
        """Whether somebody put a forward on this very module before us; told while attached."""
        return self._had_instance_forward

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives without us."""
        if self._own_forward is None:  # called through a reference that outlived the attachment
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._own_forward(*args, **kwargs)


class Uncompiled:
    """torch.compile's programs in a model, taken out of the way while ours is on its layers: they were made of the layers' own forwards."""

    def __init__(self, model: nn.Module):
        self._wrappers = [_Uncompiled(name, part) for name, part in model.named_modules() if is_compiled(part)]
        self._in_place = [part for part in model.modules() if getattr(part, "_compiled_call_impl", None) is not None]
        self._programs: list[Any] | None = None

    def attach(self) -> None:
        """Run the model as it is written."""
        for wrapper in self._wrappers:
            wrapper.attach()
        if self._programs is None:
            self._programs = [part._compiled_call_impl for part in self._in_place]
            for part in self._in_place:
                part._compiled_call_impl = None

    def detach(self) -> None:
        """Put the programs back."""
        for part, program in zip(self._in_place, self._programs or ()):
            part._compiled_call_impl = program
        self._programs = None
        for wrapper in self._wrappers:
            wrapper.detach()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs as it is written."""
    programs = Uncompiled(model)
    programs.attach()
    try:
        yield
    finally:
        programs.detach()


class _Uncompiled(PatchedLayer):
    """A module that torch.compile has put around another one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module._orig_mod(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile has put around another one."""
    return "_orig_mod" in module._modules


def own_name(name: str) -> str:
    """A part's name in its model without what torch.compile adds to it."""
    return ".".join(piece for piece in name.split(".") if piece != "_orig_mod")


def hooked_by_others(model: nn.Module) -> bool:
    """Whether somebody has hooks or a forward of their own on the model, or on a part of it: they may count on calls that have the rows
    that the host gives them. To be asked while nothing of ours is attached.
    """
    return any(
        ("forward" in part.__dict__ and not is_compiled(part)) or part._forward_hooks or part._forward_pre_hooks for part in model.modules()
    )


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward's first argument, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


__all__ = ["PatchedLayer", "Uncompiled", "argument", "hooked_by_others", "is_compiled", "own_name", "uncompiled"]
