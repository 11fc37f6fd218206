"""A selection that does not silence those who lose: the setting `loser` under any rule that selects."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step import Step
from .rule import Places, Rule, Votes


def softened(rule: Rule) -> Rule:
    """The rule with the weight `loser` for the LoRAs that it does not choose: w + (1 - w) loser."""

    class Softened(Rule):
        name = rule.name
        summary = rule.summary
        measures = rule.measures
        compares = rule.compares
        constant = rule.constant

        def prepare(self, places: Places) -> None:
            super().prepare(places)
            rule.prepare(places)

        def weights(self, step: Step, votes: Votes | None) -> Tensor:
            rule.device, rule.similarity = self.device, self.similarity
            weights = rule.weights(step, votes)
            return torch.lerp(torch.full_like(weights, self.places.settings.loser), torch.ones_like(weights), weights)

        def observe(self, step: Step, votes: Votes) -> None:
            rule.observe(step, votes)

        def restart(self) -> None:
            rule.restart()

    return Softened()


__all__ = ["softened"]
