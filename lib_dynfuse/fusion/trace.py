"""The record of a fusion: how much of each LoRA was used where and when, and what was measured. A few bytes per step, layer and image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..lora.branch import Dense, LowRank
from ..lora.naming import Site
from ..settings import FuseSettings
from .rules import RULES, Member, Places, Votes
from .step import Step


@dataclass(frozen=True)
class Trace:
    """What a session did, step by step.

    sites: the S places that any of the LoRAs changes, in the model's order. members: the B LoRAs.
    weights: (steps, S, images, B) float32, what each LoRA's change was multiplied by: the rule's weight times its strength there and then.
    divergences: (steps, S, images, B) float32, as measured in that step; 0 where nothing was.
    reached: (steps, S) bool, False for sites that a step did not run. measured: (steps, S) bool.
    present: (S, B) bool, whether the LoRA changes the site at all.
    ties, non_finite: measurements in which the largest divergence was two LoRAs', or one was not a finite number.
    fallbacks: decisions made on the negative prompt because the host ran it alone and first.
    strengths: (steps, B), the LoRAs' own strengths at each step, without factors on blocks; empty where nobody recorded them.
    learned: Rule.learned.
    """

    sites: tuple[Site, ...]
    members: tuple[Member, ...]
    weights: Tensor
    divergences: Tensor
    reached: Tensor
    measured: Tensor
    present: Tensor
    ties: int = 0
    non_finite: int = 0
    fallbacks: int = 0
    strengths: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    learned: Mapping[Site, Tensor] = field(default_factory=dict)

    @property
    def decided(self) -> Tensor:
        """(S,) bool: sites at which there was a choice."""
        return self.present.sum(-1) > 1

    @property
    def shares(self) -> Tensor:
        """(steps, S, images, B): each LoRA's part of what was used there, 0 to 1; all 0 where nothing was."""
        sizes = self.weights.abs()
        return sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def subject_shares(self) -> Tensor:
        """(steps, S, images): the part of all subjects together."""
        subjects = torch.tensor([member.subject for member in self.members], dtype=torch.bool)
        return self.shares[..., subjects].sum(-1)

    @property
    def winners(self) -> Tensor:
        """(steps, S, images) bool: where the subjects' part is half or more."""
        return self.subject_shares >= 0.5

    def subject_share(self) -> float:
        """The subjects' mean part over all steps, images and sites with a choice, 0 to 1; 0.5 where there was none."""
        chosen = self.reached & self.decided
        if not chosen.any() or not self.weights.shape[2]:
            return 0.5
        return self.subject_shares[chosen].mean().item()

    @property
    def uniform(self) -> list[float] | None:
        """Each LoRA's weight, where it was the same at all sites that it changes, steps and images; else None."""
        used = self.reached[:, :, None] & self.present[None]  # (steps, S, B)
        weights = []
        for member in range(len(self.members)):
            found = self.weights[..., member][used[..., member]]
            if found.numel() and not torch.equal(found, found[0, 0].expand_as(found)):
                return None
            weights.append(found[0, 0].item() if found.numel() else 0.0)
        return weights if self.reached.any() and self.weights.shape[2] else None

    def selected(self, settings: FuseSettings) -> Trace | None:
        """What the paper's selection would have used, by what was measured; None where nothing was. Whole weights: of who won.

        settings: bias, balance and tilt count.
        """
        if not self.measured.any():
            return None
        rule = RULES["dynfuse"]()

        def unknown(site: int, member: int) -> LowRank | Dense:
            raise AssertionError("a selection goes by what was measured")

        rule.prepare(Places(self.sites, self.members, self.present, settings, unknown))
        chosen = torch.zeros_like(self.weights)
        for number, measured in enumerate(self.measured):
            if measured.any():
                votes = Votes(self.divergences[number, measured], self.present[measured].unsqueeze(1))
                step = Step.of(number, len(self.measured))
                chosen[number, measured] = rule.weights(step, votes)
                rule.observe(step, votes)
        alone = self.reached & ~self.decided
        for number, sites in enumerate(alone):
            chosen[number, sites] = self.present[sites].float().unsqueeze(1)
        return replace(self, weights=chosen, reached=self.measured | alone)

    def of_image(self, image: int) -> Trace:
        """The record of one image of the batch."""
        some = slice(image, image + 1)
        return replace(self, weights=self.weights[:, :, some], divergences=self.divergences[:, :, some])


@dataclass(frozen=True)
class TraceStep:
    """One step's tensors, on their device.

    weights: (numbers of sites, (L, images or 1, B) the rule's weights there, None for all 1). measured: numbers of the sites that were
    measured; votes: (L, images, B) there. levels: of the LoRAs' strengths at this step, 1 for constant ones; strengths: constant or not.
    missing: (site, image) of what a count of votes lacked.
    """

    weights: list[tuple[tuple[int, ...], Tensor | None]]
    measured: tuple[int, ...]
    votes: Tensor | None
    levels: tuple[float, ...]
    strengths: tuple[float, ...]
    images: int
    missing: Sequence[tuple[int, int]] = ()


@dataclass
class TraceRecorder:
    """Collects each step's small tensors on the device and brings them to the host once, at the end.

    strengths: (S, B) float32 on the host, the constant part of what the weights are multiplied by.
    """

    sites: tuple[Site, ...]
    members: tuple[Member, ...]
    present: Tensor
    strengths: Tensor
    steps: list[TraceStep] = field(default_factory=list)

    def trace(self, fallbacks: int = 0) -> Trace:
        images = max((step.images for step in self.steps), default=0)
        shape = (len(self.steps), len(self.sites), images, len(self.members))
        weights, divergences = torch.zeros(shape), torch.zeros(shape)
        reached, measured = (torch.zeros(shape[:2], dtype=torch.bool) for _ in range(2))
        ties = non_finite = 0
        for number, step in enumerate(self.steps):
            levels = torch.tensor(step.levels)
            for numbers, weight in step.weights:
                used = list(numbers)
                reached[number, used] = True
                own = torch.ones(1, 1, 1) if weight is None else weight.detach().cpu().float()
                weights[number, used, : step.images] = own * (self.strengths[used] * self.present[used] * levels).unsqueeze(1)
            if step.votes is None:
                continue
            votes = step.votes.detach().cpu().float()
            places = list(step.measured)
            measured[number, places] = True
            divergences[number, places, : votes.shape[1]] = votes
            present = self.present[places].unsqueeze(1).expand_as(votes)
            compared = votes.masked_fill(~present, -torch.inf)
            ties += int((compared == compared.amax(-1, keepdim=True)).sum(-1).gt(1).sum()) - len(step.missing)
            non_finite += int((~torch.isfinite(votes) & present).any(-1).sum())
        own_strengths = torch.tensor([step.strengths for step in self.steps]).view(len(self.steps), len(self.members))
        return Trace(
            *(self.sites, self.members, weights, divergences, reached, measured, self.present),
            *(ties, non_finite, fallbacks, own_strengths),
        )


__all__ = ["Trace", "TraceRecorder", "TraceStep"]
