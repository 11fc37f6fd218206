"""What one participant was asked and answered: votes/study-PARTICIPANT.json, which `..votes` reads too.

Beside what a ballot holds: "participant", who it is; "began"; "asked", all questions in their order, {"pair", "prompt", "seed",
"shown"}; and in each vote "at", when, and "seconds", how long it took. A question that was skipped is a vote whose "chosen" is null.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...printable import printable
from ..folder import VOTES, EvaluationError
from ..votes import write_ballot
from .draws import Key

KIND = "study"
PREFIX = "study-"
LONGEST_NAME = 60
LONGEST_ANSWER = 86400.0
"""Seconds; a page that was open over night says nothing about how long somebody thought."""

_PARTICIPANT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Answer:
    """chosen: a method, None for a question that was skipped. at: the time, as 2026-11-29T13:08:24Z. seconds: that it took."""

    chosen: str | None
    at: str
    seconds: float


@dataclass
class Sheet:
    """asked: (pair, prompt, seed) and the methods in the order of their pictures. answers: by the question's number, from 0."""

    participant: str
    question: str
    name: str = ""
    began: str = ""
    asked: list[tuple[Key, tuple[str, ...]]] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def voter(self) -> str:
        """Whom a result names."""
        return self.name or f"participant {self.participant[:6]}"

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        questions = [_entry(key, shown) for key, shown in self.asked]
        votes = [
            {**questions[number], "chosen": answer.chosen, "at": answer.at, "seconds": round(answer.seconds, 2)}
            for number, answer in sorted(self.answers.items())
        ]
        write_ballot(
            folder,
            PREFIX + self.participant,
            {
                **{"kind": KIND, "voter": self.voter, "name": self.name, "participant": self.participant, "began": self.began},
                **{"question": self.question, "votes": votes, "asked": questions},
            },
        )


def is_participant(text: object) -> bool:
    """Whether a text is a participant's number: 32 hexadecimal digits, which nobody guesses."""
    return isinstance(text, str) and _PARTICIPANT.fullmatch(text) is not None


def new_participant() -> str:
    return secrets.token_hex(16)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def clean_name(text: str) -> str:
    """A name that somebody gave, fit to be shown."""
    return printable(text.strip(), LONGEST_NAME)


def read_sheet(folder: Path, participant: str) -> Sheet | None:
    """None for a participant who has not begun. Raises EvaluationError for a file that cannot be read."""
    path = folder / VOTES / f"{PREFIX}{participant}.json"
    if not is_participant(participant) or not path.exists():
        return None
    return _read(path)


def read_sheets(folder: Path) -> list[Sheet]:
    """Of all participants. Raises EvaluationError for a file that cannot be read."""
    return [_read(path) for path in sorted((folder / VOTES).glob(f"{PREFIX}*.json"))]


def times_asked(sheets: list[Sheet]) -> Counter[Key]:
    return Counter(key for sheet in sheets for key, _ in sheet.asked)


def _read(path: Path) -> Sheet:
    try:
        content: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        asked = [_question(entry) for entry in content["asked"]]
        numbers = {question: number for number, question in enumerate(asked)}
        answers = {numbers[_question(vote)]: Answer(vote["chosen"], str(vote["at"]), float(vote["seconds"])) for vote in content["votes"]}
        return Sheet(content["participant"], content["question"], content["name"], content["began"], asked, answers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise EvaluationError(f"{path} cannot be read: it is no participant's file of a study.") from None


def _entry(key: Key, shown: tuple[str, ...]) -> dict[str, Any]:
    pair, prompt, seed = key
    return {"pair": pair, "prompt": prompt, "seed": seed, "shown": list(shown)}


def _question(entry: Mapping[str, Any]) -> tuple[Key, tuple[str, ...]]:
    return (str(entry["pair"]), int(entry["prompt"]), int(entry["seed"])), tuple(map(str, entry["shown"]))


__all__ = [
    "KIND",
    "LONGEST_ANSWER",
    "LONGEST_NAME",
    "PREFIX",
    "Answer",
    "Sheet",
    "clean_name",
    "is_participant",
    "new_participant",
    "now",
    "read_sheet",
    "read_sheets",
    "times_asked",
]
