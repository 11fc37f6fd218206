"""What a rule is: from what was measured, the step and the LoRAs themselves to the weight of each LoRA in each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from ...lora.branch import Dense, LowRank
from ...lora.naming import Site
from ...settings import FuseSettings
from ..calibration import Correlations
from ..step import Step


@dataclass(frozen=True)
class Member:
    """One of the LoRAs that are fused. subject: it shows what is in the picture; else it says how the picture is drawn."""

    name: str
    subject: bool


@dataclass(frozen=True)
class Places:
    """What a rule knows before the first step.

    sites: S. members: B, the subjects before the styles. present: (S, B) bool on the CPU, whether the LoRA changes the site at all.
    change: (site, member) -> the LoRA's change there at strength 1; may only be asked once the first step is under way,
    since some kinds depend on the layer's weight.
    """

    sites: tuple[Site, ...]
    members: tuple[Member, ...]
    present: Tensor
    settings: FuseSettings
    change: Callable[[int, int], LowRank | Dense]

    @property
    def tilts(self) -> tuple[float, ...]:
        """What the setting tilt multiplies each LoRA by. It is in the strengths; a rule that goes by something else multiplies that."""
        return tuple(self.settings.tilted(subject=member.subject) for member in self.members)


@dataclass(frozen=True)
class Votes:
    """What was measured at L sites, one by one in the layers or all at once.

    values: (L, I, B) float32, one divergence per site, image and LoRA. present: (L, 1, B) bool, whether the LoRA changes the site at all:
    else its value means nothing. None where all do.
    """

    values: Tensor
    present: Tensor | None = None


class Rule(ABC):
    """A fusion method. Subclasses name themselves, and give one formula.

    name: the value of the setting `method`. summary: one line for the panel. measures: its weights follow from votes, the divergences of
    the setting `criterion`. selects: exactly one LoRA has a weight at each site of each image. constant: its weights are the same at
    every step. uniform: all its weights are 1. composes: the prediction is the mean of one for each LoRA alone, and the weights only say
    so to the record. compares: it goes by the similarity of two pictures, one made with each side's LoRAs alone. rewrites: it changes the
    LoRAs' matrices before the first step (see rewritten). calibrates: it goes by what the layers are given with each side alone (see
    learn); calibrated: it has been told; learned: what it then knows of sites, which the record keeps. contrast: how much of it goes with
    the method where the setting leaves it to that. similarity: cosine of the DINO embeddings of the pictures that it compares, told before
    the first step. device: where weights without votes are wanted.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    measures: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    constant: ClassVar[bool] = False
    uniform: ClassVar[bool] = False
    composes: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    contrast: ClassVar[float] = 0.0

    places: Places
    similarity: float = 0.0
    calibrated: bool = False
    learned: Mapping[Site, Tensor] = MappingProxyType({})
    device: torch.device = torch.device("cpu")

    def prepare(self, places: Places) -> None:
        """Once for a session: what follows from the LoRAs and the layers' names alone."""
        self.places = places

    @abstractmethod
    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        """The weights of the coming sums, float32; nothing in here may wait for the device.

        votes: of any number of sites; None for a rule that does not measure. Returns (L, I, B) on the votes' device; without votes
        (S, 1, B), for all images alike, on self.device.
        """

    def rewritten(
        self, site: Site, changes: Sequence[LowRank | Dense], members: Sequence[Member], strengths: Sequence[float]
    ) -> Sequence[LowRank | Dense]:
        """What takes the place of the LoRAs' changes at a site that several change, in the same order; only where `rewrites` says so.

        members: whose they are. strengths: what each is multiplied by afterwards, as constant as it is (weights over the steps, and the
        rule's own, act on the result).
        """
        return changes

    def learn(self, subject: Correlations, style: Correlations) -> None:
        """What the layers were given with each side alone, before the first step; only where `calibrates` says so."""
        return

    def observe(self, step: Step, votes: Votes) -> None:
        """A step is over: its votes, of all sites measured in it. For rules that look at a whole step at once."""
        return

    def restart(self) -> None:
        """Another picture begins: forget what was observed, or learned."""
        self.calibrated = False


__all__ = ["Member", "Places", "Rule", "Votes"]
