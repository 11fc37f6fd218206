"""Calls of an object's method, routed through a function of ours for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Route calls of owner.name through `around(original, ...)`; the owner is as it was afterwards."""
    had = name in vars(owner)
    original = getattr(owner, name)

    # diffusers' pipelines look at the signature to see what a scheduler's step takes (prepare_extra_step_kwargs).
    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, routed)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


__all__ = ["wrapped"]
