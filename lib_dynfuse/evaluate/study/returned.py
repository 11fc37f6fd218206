"""Votes that a page without a server saved, read back into the folder that the page was made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...printable import printable
from ..folder import EvaluationError, Trial
from .draws import Key, key_of
from .page import Hidden
from .sheets import LONGEST_ANSWER, Answer, Sheet, clean_name, is_participant, read_sheet

LARGEST = 1 << 24
"""Bytes of a file that is read at all."""
LONGEST_QUESTION = 300


def read_back(file: Path, folder: Path, trials: Sequence[Trial], hidden: Hidden) -> Sheet:
    """Keep the votes of one file as their participant's. A newer answer to the same question replaces the one that is there.

    Raises EvaluationError for a file that holds no votes, or votes of another folder; OSError where it cannot be read or nothing written.
    """
    if file.stat().st_size > LARGEST:
        raise EvaluationError(f"{file} is too large to be a page's votes.")
    try:
        content = json.loads(file.read_bytes())
        study, participant = content["study"], content["participant"]
        name, began, question = str(content["name"]), str(content["began"])[:40], printable(str(content["question"]), LONGEST_QUESTION)
        asked = [(str(entry["question"]), tuple(map(str, entry["shown"]))) for entry in content["asked"]]
        votes = [_vote(entry) for entry in content["votes"]]
        if not is_participant(participant) or any(about not in asked for about, _ in votes):
            raise ValueError("it contradicts itself")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise EvaluationError(f"{file} holds no votes of a page that study --out wrote.") from None
    if study != hidden.study:
        raise EvaluationError(f"{file} has votes about the pictures of another folder than {folder}.")
    known = _known(trials, hidden)
    try:
        questions = [known[about](shown) for about, shown in asked]
    except KeyError:
        raise EvaluationError(f"{file} has votes about pictures that are no longer in {folder}.") from None
    sheet = read_sheet(folder, participant) or Sheet(participant, question)
    sheet.name, sheet.began = clean_name(name), sheet.began or began
    sheet.asked += [one for one in questions if one not in sheet.asked]
    for (about, shown), (place, at, seconds) in votes:
        number = sheet.asked.index(known[about](shown))
        before = sheet.answers.get(number)
        if before is None or before.at <= at:  # times as sheets.now writes them, which sort as texts
            sheet.answers[number] = Answer(None if place is None else sheet.asked[number][1][place], at, seconds)
    sheet.save(folder)
    return sheet


class _Question:
    """Turns the numbers of pictures into methods."""

    def __init__(self, trial: Trial, hidden: Hidden) -> None:
        self.key = key_of(trial)
        self.methods = {hidden.picture(self.key, method): method for method in trial.pictures}

    def __call__(self, shown: Sequence[str]) -> tuple[Key, tuple[str, ...]]:
        return self.key, tuple(self.methods[number] for number in shown)


def _known(trials: Sequence[Trial], hidden: Hidden) -> dict[str, _Question]:
    return {hidden.question(key_of(trial)): _Question(trial, hidden) for trial in trials}


def _vote(entry: Mapping[str, Any]) -> tuple[tuple[str, tuple[str, ...]], tuple[int | None, str, float]]:
    shown = tuple(map(str, entry["shown"]))
    place, seconds = entry["place"], float(entry["seconds"])
    if place is not None and not (type(place) is int and 0 <= place < len(shown)):
        raise ValueError("no such picture")
    if not math.isfinite(seconds):
        raise ValueError("no time")
    return (str(entry["question"]), shown), (place, str(entry["at"])[:40], min(max(seconds, 0.0), LONGEST_ANSWER))


__all__ = ["read_back"]
