"""The record of a fusion: which branch won where and when, and by how much. Small: a few bytes per step, layer and image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..lora.naming import Site


@dataclass(frozen=True)
class Trace:
    """What a session decided, step by step.

    sites: the S places that both or one of the LoRAs touch, in the model's order.
    winners: (steps, S, images) bool, True where the subject's branch was used.
    divergences: (steps, S, images, 2) float32, subject's and style's; 0 where nothing was measured.
    measured: (steps, S) bool, False for one-sided sites and for those a step did not reach.
    subject_only, style_only: (S,) bool, the one-sided sites.
    ties, non_finite: decisions in which both divergences were equal, or one was not a finite number.
    fallbacks: decisions made on the negative prompt because the host ran it alone and first.
    """

    sites: tuple[Site, ...]
    winners: Tensor
    divergences: Tensor
    measured: Tensor
    subject_only: Tensor
    style_only: Tensor
    ties: int = 0
    non_finite: int = 0
    fallbacks: int = 0

    @property
    def decided(self) -> Tensor:
        """(S,) bool: sites at which there was a choice."""
        return ~(self.subject_only | self.style_only)

    def subject_share(self) -> float:
        """Share of the measured decisions that the subject won, 0 to 1; 0.5 when nothing was measured."""
        if not self.measured.any():
            return 0.5
        return self.winners[self.measured].float().mean().item()


@dataclass
class TraceRecorder:
    """Collects each step's small tensors on the device and brings them to the host once, at the end."""

    sites: tuple[Site, ...]
    subject_only: tuple[bool, ...]
    style_only: tuple[bool, ...]
    steps: list[tuple[Tensor, Tensor, tuple[bool, ...]]] = field(default_factory=list)

    def add(self, divergences: list[Tensor | None], decisions: list[Tensor | None]) -> Tensor | None:
        """One step. divergences: per site (2, images) or None. decisions: per site (images,) bool or None.

        Returns the measured sites' divergences, (L, 2, images), or None when the step measured nothing.
        """
        measured = tuple(d is not None for d in decisions)
        kept = [d for d in divergences if d is not None]
        if not kept:
            return None
        stacked = torch.stack([d.to(kept[0].device) for d in kept])
        self.steps.append((stacked, torch.stack([d.to(kept[0].device) for d in decisions if d is not None]), measured))
        return stacked

    def trace(self, fallbacks: int = 0) -> Trace:
        images = max((divergences.shape[2] for divergences, _, _ in self.steps), default=0)
        shape = (len(self.steps), len(self.sites), images)
        winners, measured = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.bool)
        divergences = torch.zeros(*shape, 2)
        ties = non_finite = 0
        for step, (values, decisions, reached) in enumerate(self.steps):
            values, mask = values.cpu(), torch.tensor(reached)
            count = values.shape[2]
            measured[step] = mask
            winners[step, mask, :count] = decisions.cpu()
            divergences[step, mask, :count] = values.transpose(1, 2)
            ties += int((values[:, 0] == values[:, 1]).sum())
            non_finite += int((~torch.isfinite(values)).any(1).sum())
        subject_only, style_only = torch.tensor(self.subject_only, dtype=torch.bool), torch.tensor(self.style_only, dtype=torch.bool)
        winners[:, subject_only] = True
        return Trace(self.sites, winners, divergences, measured, subject_only, style_only, ties, non_finite, fallbacks)
