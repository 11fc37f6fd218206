"""Progress bars on the terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bars:
    """A progress bar for each of a series of things, one after the other."""

    def __init__(self, delay: float = 0.0) -> None:
        """delay: seconds before a bar appears."""
        self._bar: Any = None
        self._what = ""
        self._delay = delay

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def show(self, what: str, done: int, total: int, unit: str) -> None:
        """unit: "step", "layer", "picture", or "B" for bytes, whose bars stay."""
        if what != self._what or self._bar is None:
            self._close()
            self._what = what
            self._bar = tqdm(desc=what, total=total or None, unit=unit, unit_scale=unit == "B", leave=unit == "B", delay=self._delay)
        self._bar.total = total or None
        self._bar.update(done - self._bar.n)
        if total and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


__all__ = ["Bars"]
