"""Wrapping functions of a WebUI, with a way back.

    seams = Seams()
    seams.wrap(networks, "load_networks", around)      # around(original, *args, **kwargs)
    seams.undo()

A wrapper that another extension has wrapped in turn cannot be taken out again. It then only passes calls on, and is put
to work again by the next wrap of the same function, so that reloading the UI any number of times leaves one wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]


class Seam:
    """One wrapped function of a module or class."""

    def __init__(self, owner: Any, name: str, around: Around):
        self.owner = owner
        self.name = name
        self.around: Around | None = around
        self.original = getattr(owner, name)

        @functools.wraps(self.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.around is None:
                return self.original(*args, **kwargs)
            return self.around(self.original, *args, **kwargs)

        self.wrapper = wrapper
        setattr(owner, name, wrapper)

    @property
    def outermost(self) -> bool:
        return getattr(self.owner, self.name) is self.wrapper

    @property
    def gone(self) -> bool:
        """Somebody has put the original back behind our back."""
        return getattr(self.owner, self.name) is self.original


class Seams:
    """The wrapped functions of one host. wrap and undo may be called any number of times."""

    def __init__(self) -> None:
        self._seams: dict[tuple[int, str], Seam] = {}

    def wrap(self, owner: Any, name: str, around: Around) -> None:
        """Let around(original, *args, **kwargs) answer every call of owner.name."""
        key = (id(owner), name)
        seam = self._seams.get(key)
        if seam is None or seam.gone:
            self._seams[key] = Seam(owner, name, around)
        else:
            seam.around = around

    def undo(self) -> None:
        """Put the originals back; wrappers that others have wrapped pass calls on from now."""
        for key, seam in list(self._seams.items()):
            seam.around = None
            if seam.outermost:
                setattr(seam.owner, seam.name, seam.original)
                del self._seams[key]


__all__ = ["Around", "Seams"]
