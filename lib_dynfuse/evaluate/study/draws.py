"""Which pictures a participant is asked about, and in which order."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..folder import EvaluationError, Trial
from ..trials import comparable

QUESTION = "Which picture shows the given style {}, and is still the same subject?"
"""What the paper's participants were asked, in our words (arXiv 2602.15539, supplement 3): "better" of two, "best" of more."""
QUESTIONS = 30
"""Of each participant; the paper's number."""

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Setup:
    """What is asked. methods: those whose pictures are compared. pictures: how many are shown at once, 2 to 4. always: a method that is
    among them in every question, None for none. questions: of one participant, at most. own_question: in place of QUESTION. prompts:
    whether the page shows them."""

    methods: tuple[str, ...]
    pictures: int = 2
    always: str | None = None
    questions: int = QUESTIONS
    own_question: str | None = None
    prompts: bool = False

    @property
    def question(self) -> str:
        """What the page asks."""
        return self.own_question or QUESTION.format("better" if self.pictures == 2 else "best")


@dataclass(frozen=True)
class Asked:
    """One question to a participant. shown: the methods, in the order of their pictures on the page."""

    trial: Trial
    shown: tuple[str, ...]


def key_of(trial: Trial) -> Key:
    return trial.pair.name, trial.prompt, trial.seed


def usable(trials: Sequence[Trial], setup: Setup) -> list[Trial]:
    """The trials that the setup can ask about. Raises EvaluationError where there is none, or where the setup does not go together."""
    if setup.always is not None and setup.always not in setup.methods:
        raise EvaluationError(f"The method {setup.always}, which is to be shown always, is not among {', '.join(setup.methods)}.")
    if len(setup.methods) < setup.pictures:
        raise EvaluationError(
            f"{setup.pictures} pictures at once need as many methods; there {'is' if len(setup.methods) == 1 else 'are'} "
            f"{len(setup.methods)}: {', '.join(setup.methods)}."
        )
    found = [trial for trial in comparable(trials, setup.methods, setup.pictures) if selections(trial, setup)]
    if not found:
        raise EvaluationError(f"No pair, prompt and seed has a picture of {setup.always} beside {setup.pictures - 1} others.")
    return found


def selections(trial: Trial, setup: Setup) -> list[tuple[str, ...]]:
    """All sets of methods that may be shown together."""
    there = [method for method in setup.methods if method in trial.pictures]
    if setup.always is None:
        return list(itertools.combinations(there, setup.pictures))
    if setup.always not in there:
        return []
    others = [method for method in there if method != setup.always]
    return [(setup.always, *some) for some in itertools.combinations(others, setup.pictures - 1)]


def draw(trials: Sequence[Trial], setup: Setup, before: Counter[Key], chance: random.Random) -> list[Asked]:
    """Questions for one participant: those asked least before come first into the draw; their order, methods and places are random."""
    drawn = sorted(trials, key=lambda trial: (before[key_of(trial)], chance.random()))[: setup.questions]
    chance.shuffle(drawn)
    asked = []
    for trial in drawn:
        shown = list(chance.choice(selections(trial, setup)))
        chance.shuffle(shown)
        asked.append(Asked(trial, tuple(shown)))
    return asked


__all__ = ["QUESTION", "QUESTIONS", "Asked", "Key", "Setup", "draw", "key_of", "selections", "usable"]
