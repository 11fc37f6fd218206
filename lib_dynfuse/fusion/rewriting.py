"""Rules that change the LoRAs' matrices before the first step: the bindings through which a site's LoRAs are then bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..lora.branch import Dense, LowRank
from ..lora.naming import Site
from .rules import Member, Rule


class Binding(Protocol):
    """A branch that knows how to fit a site (lora.matching.SiteBranch)."""

    def bind(self, site: Site, layer_weight: Callable[[], Tensor]) -> LowRank | Dense: ...


class Rewriting:
    """A site's LoRAs as a rule rewrites them, all at once, however many of them are then asked for.

    members, strengths: of the LoRAs that change the site, as in Rule.rewritten.
    """

    def __init__(self, rule: Rule, bindings: Sequence[Binding], members: Sequence[Member], strengths: Sequence[float]):
        self._rule, self._bindings, self._members, self._strengths = rule, bindings, members, strengths
        self._made: dict[int, LowRank | Dense] = {}

    def bindings(self) -> list[Binding]:
        return [Rewritten(self, place) for place in range(len(self._bindings))]

    def take(self, place: int, site: Site, layer_weight: Callable[[], Tensor]) -> LowRank | Dense:
        if place not in self._made:
            changes = [binding.bind(site, layer_weight) for binding in self._bindings]
            self._made = dict(enumerate(self._rule.rewritten(site, changes, self._members, self._strengths)))
        return self._made.pop(place)  # not kept: whole matrices of all layers would not fit twice


class Rewritten:
    """One of the site's LoRAs."""

    def __init__(self, all_of_them: Rewriting, place: int):
        self._all, self._place = all_of_them, place

    def bind(self, site: Site, layer_weight: Callable[[], Tensor]) -> LowRank | Dense:
        return self._all.take(self._place, site, layer_weight)


__all__ = ["Binding", "Rewriting"]
