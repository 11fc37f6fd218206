"""Wrapping functions of a WebUI, all of them or none, with a way back.

    seams = Seams()
    seams.install([Wrapping(Seam("networks", "load_networks", ("names",)), around)])      # around(original, *args, **kwargs)
    seams.undo()

A wrapper that another extension has wrapped in turn cannot be taken out again. It then only passes calls on, and is put
to work again by the next install, so that reloading the UI any number of times leaves one wrapper.

An error of ours does no harm: unless the call belongs to a fused job, which must stop, it is logged once, and the caller gets what
the original gives. An error of the original passes untouched, and in a plain job the original is called once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .capabilities import Seam

log = logging.getLogger(__name__)

Around = Callable[..., Any]


@dataclass(frozen=True)
class Wrapping:
    """around(original, *args, **kwargs) answers a seam's calls. stops(*args, **kwargs): whether an error of ours must stop this one."""

    seam: Seam
    around: Around
    stops: Callable[..., bool] | None = None


class _Watched:
    """The original, for one call of the wrapper."""

    def __init__(self, original: Callable[..., Any]):
        self._original = original
        self.called = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called, self.error = True, None
        try:
            self.result = self._original(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.result


class _Installed:
    """One wrapped function of a module or class."""

    def __init__(self, owner: Any, name: str, wrapping: Wrapping):
        self.owner = owner
        self.name = name
        self.wrapping: Wrapping | None = wrapping
        self.original = getattr(owner, name)
        self._failed = False

        @functools.wraps(self.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.wrapping is None:
                return self.original(*args, **kwargs)
            return self._guarded(self.wrapping, args, kwargs)

        self.wrapper = wrapper
        setattr(owner, name, wrapper)

    def _guarded(self, wrapping: Wrapping, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = _Watched(self.original)
        try:
            return wrapping.around(original, *args, **kwargs)
        except Exception as error:
            if original.error is error:
                raise
            if original.error is not None:  # ours came after it, and is the smaller one
                raise original.error from None
            if self._stops(wrapping, args, kwargs):
                raise _sentence(error) from error
            if not self._failed:
                self._failed = True
                log.exception("DynFuse failed in %s; the WebUI goes on as if it were not there", wrapping.seam.name)
        return original.result if original.called else self.original(*args, **kwargs)

    @staticmethod
    def _stops(wrapping: Wrapping, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        try:
            return wrapping.stops is not None and wrapping.stops(*args, **kwargs)
        except Exception:
            return False

    @property
    def outermost(self) -> bool:
        return getattr(self.owner, self.name, None) is self.wrapper

    @property
    def gone(self) -> bool:
        """Somebody has put the original, or another function, in our place."""
        return getattr(self.owner, self.name, None) is self.original


class Seams:
    """The wrapped functions of one host. install and undo may be called any number of times."""

    def __init__(self) -> None:
        self._installed: dict[tuple[int, str], _Installed] = {}

    def install(self, wrappings: Sequence[Wrapping]) -> None:
        """Wrap all of them. Where one of them cannot be wrapped, none is; then raises what stood in the way."""
        try:
            for wrapping in wrappings:
                self._wrap(*wrapping.seam.place(), wrapping)
        except Exception:
            self.undo()
            raise

    def _wrap(self, owner: Any, name: str, wrapping: Wrapping) -> None:
        key = (id(owner), name)
        installed = self._installed.get(key)
        if installed is None or installed.gone:
            self._installed[key] = _Installed(owner, name, wrapping)
        else:
            installed.wrapping = wrapping

    def undo(self) -> None:
        """Put the originals back; wrappers that others have wrapped pass calls on from now."""
        for key, installed in list(self._installed.items()):
            installed.wrapping = None
            if installed.outermost:
                setattr(installed.owner, installed.name, installed.original)
                del self._installed[key]


def argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument that may have come by position or by name. Raises KeyError if it came by neither."""
    return args[position] if len(args) > position else kwargs[name]


def _sentence(error: Exception) -> Exception:
    """What a job stops with: a RuntimeError, whose text reaches the user."""
    if isinstance(error, RuntimeError):
        return error
    return RuntimeError(f"DynFuse could not fuse this picture: {type(error).__name__}: {error}")


__all__ = ["Around", "Seams", "Wrapping", "argument"]
