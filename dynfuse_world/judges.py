"""Judges of pictures of the miniature world: which object, and which style.

For measuring only. No method sees them; they are trained with other seeds than everything else (training/judges.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .model import WEIGHTS, load_network
from .painter import CLASSES, HELD_OUT_STYLES, PIXELS, STYLES, SUBJECTS

NONE = "none"
"""No object and no subject."""
OTHER = "other"
"""A style without a name, or a mixture."""
SUBJECT_NAMES = (*CLASSES, *SUBJECTS, NONE)
STYLE_NAMES = (*STYLES, *HELD_OUT_STYLES, OTHER)


@dataclass(frozen=True, eq=False)
class Scores:
    """Of B pictures. subject_probabilities (B, len(SUBJECT_NAMES)), style_probabilities (B, len(STYLE_NAMES)): 0 to 1."""

    subject_probabilities: Tensor
    style_probabilities: Tensor

    def subject(self, name: str) -> Tensor:
        """(B,): how probably each picture shows that class or subject."""
        return self.subject_probabilities[:, SUBJECT_NAMES.index(name)]

    def style(self, name: str) -> Tensor:
        """(B,): how probably each picture is in that style."""
        return self.style_probabilities[:, STYLE_NAMES.index(name)]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class _WhereItLies(nn.Module):
    """For questions about shapes: the last map keeps its places."""

    def __init__(self, widths: tuple[int, int, int], answers: int) -> None:
        super().__init__()
        narrow, middle, wide = widths
        self.layers = nn.Sequential(
            _convolution(3, narrow, 2),
            _convolution(narrow, middle, 2),
            _convolution(middle, middle),
            _convolution(middle, wide, 2),
            _convolution(wide, wide, 2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16 * wide, answers),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


class _Anywhere(nn.Module):
    """For questions about the whole surface: means and peaks of the last map, whatever lies where."""

    def __init__(self, widths: tuple[int, int, int], answers: int) -> None:
        super().__init__()
        narrow, middle, wide = widths
        self.layers = nn.Sequential(_convolution(3, narrow, 2), _convolution(narrow, middle, 2), _convolution(middle, wide, 2))
        self.answer = nn.Linear(2 * wide, answers)

    def forward(self, pictures: Tensor) -> Tensor:
        found = self.layers(pictures)
        return self.answer(torch.cat([found.mean((2, 3)), found.amax((2, 3))], 1))


class Judges(nn.Module):
    """Two networks that share nothing, so that no answer leans on the other."""

    subject_names = SUBJECT_NAMES
    style_names = STYLE_NAMES
    temperatures: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.of_subject, self.of_style = self._networks()
        # By which the answers are divided, so that what is said with 0.8 is true in 8 of 10 pictures.
        self.register_buffer("temperatures", torch.ones(2))

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        return _WhereItLies((24, 40, 64), len(SUBJECT_NAMES)), _Anywhere((16, 32, 56), len(STYLE_NAMES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits (B, subjects), (B, styles)."""
        subject, style = self.temperatures
        return self.of_subject(pictures) / subject, self.of_style(pictures) / style

    @torch.no_grad()
    def scores(self, pictures: Tensor) -> Scores:
        """pictures: (B, 3, 64, 64) in [-1, 1], any float dtype. Raises ValueError for pictures of another shape."""
        if pictures.ndim != 4 or pictures.shape[1:] != (3, PIXELS, PIXELS):
            raise ValueError(f"The judges take pictures of shape (B, 3, {PIXELS}, {PIXELS}), not {tuple(pictures.shape)}.")
        subject, style = self(pictures.float().clamp(-1, 1))
        return Scores(subject.softmax(1), style.softmax(1))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, found: Tensor) -> Tensor:
        return found + self.layers(found)


class _DeepAndAnywhere(nn.Module):
    """For questions about shapes: patches of 4 x 4 pixels, residual blocks, and the mean over all places."""

    def __init__(self, narrow: int, wide: int, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, narrow, 6, 4, 1),
            _Residual(narrow),
            _Residual(narrow),
            nn.Conv2d(narrow, wide, 3, 2, 1),
            _Residual(wide),
            _Residual(wide),
            nn.BatchNorm2d(wide),
            nn.SiLU(),
        )
        self.answer = nn.Linear(wide, answers)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.answer(self.layers(pictures).mean((2, 3)))


class _Together(nn.Module):
    """For questions about the whole surface: which features come together, as in Gram matrices, at two sizes."""

    def __init__(self, narrow: int, wide: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, narrow, 5, 2, 2, bias=False), nn.BatchNorm2d(narrow), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        pairs = (narrow * (narrow + 1) + wide * (wide + 1)) // 2
        self.answer = nn.Sequential(nn.BatchNorm1d(pairs), nn.Linear(pairs, hidden), nn.SiLU(), nn.Linear(hidden, answers))

    def forward(self, pictures: Tensor) -> Tensor:
        fine = self.fine(pictures)
        return self.answer(torch.cat([_gram(fine), _gram(self.coarse(fine))], 1))


def _gram(found: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C (C + 1) / 2): the mean over all places of each product of two features, its root with its sign."""
    features = found.flatten(2).float()
    means = features @ features.transpose(1, 2) / features.shape[2]
    row, column = torch.triu_indices(found.shape[1], found.shape[1])
    products = means[:, row, column]
    return products.sign() * (products.abs() + 1e-4).sqrt()


class SecondJudges(Judges):
    """The same questions to networks of other kinds, trained on other pictures by another rule: a check that no method pleases the first
    alone."""

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        return _DeepAndAnywhere(32, 56, len(SUBJECT_NAMES)), _Together(16, 24, 48, len(STYLE_NAMES))


def load_judges(path: Path = WEIGHTS / "judges.safetensors") -> Judges:
    """The judges, ready to use. Raises OSError where the file is missing."""
    judges = Judges()
    load_network(judges, path)
    return judges


def load_second_judges(path: Path = WEIGHTS / "judges2.safetensors") -> SecondJudges:
    """The second judges, ready to use. Raises OSError where the file is missing."""
    judges = SecondJudges()
    load_network(judges, path)
    return judges


__all__ = ["NONE", "OTHER", "STYLE_NAMES", "SUBJECT_NAMES", "Judges", "Scores", "SecondJudges", "load_judges", "load_second_judges"]
