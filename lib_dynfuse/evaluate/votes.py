"""Votes for pictures, of people (the study) and of models (the judge): votes/NAME.json in an evaluation's folder.

    {"kind": "study", "voter": "Anna", "question": "Which image ...?",
     "votes": [{"pair": "dog+ink", "prompt": 0, "seed": 3, "shown": ["direct", "default"], "chosen": "default"}, ...]}

Entries may hold more than that (a judge's answers, times); what is not named here is left to who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import write_whole
from .folder import VOTES, EvaluationError


@dataclass(frozen=True)
class Vote:
    """shown: the methods whose pictures were to be seen, in that order. chosen: one of them; None where there was no answer."""

    pair: str
    prompt: int
    seed: int
    shown: tuple[str, ...]
    chosen: str | None


@dataclass(frozen=True)
class Ballot:
    """What one voter said. kind: "study" or "judge". name: of the file, without .json."""

    name: str
    kind: str
    voter: str
    question: str
    votes: tuple[Vote, ...]


def read_ballots(folder: Path) -> list[Ballot]:
    """All of an evaluation's folder, in the order of their names. Raises EvaluationError for a file that holds none."""
    return [_read(path) for path in sorted((folder / VOTES).glob("*.json"))]


def write_ballot(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write votes/NAME.json, whole or not at all. content: as above. Raises OSError."""
    path = folder / VOTES / f"{name}.json"
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return path


def _read(path: Path) -> Ballot:
    try:
        content = json.loads(path.read_text("utf-8"))
        votes = tuple(_vote(entry) for entry in content["votes"])
        return Ballot(path.stem, str(content["kind"]), str(content["voter"]), str(content["question"]), votes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise EvaluationError(f"{path} cannot be read: it holds no votes of a study or a judge.") from None


def _vote(entry: Mapping[str, Any]) -> Vote:
    shown: Sequence[str] = tuple(map(str, entry["shown"]))
    chosen = entry["chosen"]
    if chosen is not None and chosen not in shown:
        raise ValueError("chosen is not among what was shown")
    return Vote(str(entry["pair"]), int(entry["prompt"]), int(entry["seed"]), tuple(shown), chosen)


__all__ = ["Ballot", "Vote", "read_ballots", "write_ballot"]
