"""Rows: which image each row of a denoiser batch belongs to, and whether it is conditional."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """One model call's batch, row by row.

    images: image index of each row, 0 <= index < count. conditional: True for a row that sees the prompt, False for one that
    sees the negative prompt. count: images of the whole job's batch; a split call may hold only some of them.
    """

    images: tuple[int, ...]
    conditional: tuple[bool, ...]
    count: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.conditional):
            raise ValueError(f"{len(self.images)} image indices but {len(self.conditional)} conditional flags")
        if self.images and not 0 <= min(self.images) <= max(self.images) < self.count:
            raise ValueError(f"image indices {self.images} do not fit {self.count} images")

    @classmethod
    def separate(cls, rows: int) -> Rows:
        """Every row an image of its own: what is assumed when no host says otherwise."""
        return cls(tuple(range(rows)), (True,) * rows, rows)
