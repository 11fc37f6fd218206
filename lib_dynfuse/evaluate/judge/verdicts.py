"""What a judge answered: votes/judge-MODEL-HASH.json, which `..votes` reads too. The hash is of all that shapes a question.

Beside what a ballot holds: "endpoint", its address; "asked", what shapes a question; "runs", how often each question is asked; and in each
vote "run", "kind" (protocol.VOTE and others), "text", what the model said, "raw", the whole answer, "seconds", "at".
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..folder import VOTES, EvaluationError
from ..votes import write_ballot
from .endpoint import Reply
from .protocol import VOTE, Task, choice_of, kind_of

KIND = "judge"

Key = tuple[str, int, int, int]
"""(pair, prompt, seed, run)"""


@dataclass
class Verdicts:
    """The answers of one model to one kind of question, by (pair, prompt, seed, run)."""

    folder: Path
    model: str
    url: str
    question: str
    methods: tuple[str, ...]
    size: int
    runs: int
    answers: dict[Key, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the file, without .json."""
        asked = json.dumps([self.model, self.url, self.question, sorted(self.methods), self.size])
        slug = re.sub(r"[^a-z0-9.]+", "-", self.model.lower()).strip("-.")[:40] or "model"
        return f"{KIND}-{slug}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    def load(self) -> None:
        """The answers that are there already. Raises EvaluationError for a file that cannot be read."""
        path = self.folder / VOTES / f"{self.name}.json"
        if not path.exists():
            return
        try:
            self.answers = {_key(entry): entry for entry in json.loads(path.read_text("utf-8"))["votes"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise EvaluationError(f"{path} cannot be read: it holds no answers of a judge.") from None

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        return [task for task in tasks if key_of(task) not in self.answers]

    def keep(self, task: Task, reply: Reply) -> str:
        """Write an answer; returns what it is. Raises OSError."""
        choice = choice_of(reply.text, len(task.shown))
        kind = kind_of(reply.text, choice, reply.finish, reply.refused)
        pair, prompt, seed, run = key_of(task)
        self.answers[pair, prompt, seed, run] = {
            **{"pair": pair, "prompt": prompt, "seed": seed, "shown": list(task.shown)},
            **{"chosen": task.shown[choice] if kind == VOTE and choice is not None else None, "run": run, "kind": kind},
            **{"text": reply.text, "seconds": round(reply.seconds, 2), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
            **{"sent": reply.sent, "received": reply.received, "raw": reply.raw},
        }
        asked = {"methods": list(self.methods), "size": self.size}
        content = {"kind": KIND, "voter": self.model, "endpoint": self.url, "question": self.question, "asked": asked, "runs": self.runs}
        write_ballot(self.folder, self.name, {**content, "votes": list(self.answers.values())})
        return kind

    def kinds(self) -> Counter[str]:
        """How many answers there are of each kind."""
        return Counter(str(answer["kind"]) for answer in self.answers.values())

    def tokens(self) -> tuple[int, int]:
        """(sent, received), of the answers whose endpoint told them."""
        sent, received = (sum(int(answer.get(name) or 0) for answer in self.answers.values()) for name in ("sent", "received"))
        return sent, received


def key_of(task: Task) -> Key:
    return task.trial.pair.name, task.trial.prompt, task.trial.seed, task.run


def runs_of(folder: Path, name: str) -> int:
    """How often the judge of votes/NAME.json is asked each question; 1 where the file does not say. Raises EvaluationError."""
    path = folder / VOTES / f"{name}.json"
    try:
        runs = json.loads(path.read_text("utf-8")).get("runs", 1)
    except (OSError, ValueError, AttributeError):
        raise EvaluationError(f"{path} cannot be read: it holds no answers of a judge.") from None
    return runs if type(runs) is int and runs > 0 else 1


def _key(entry: Mapping[str, Any]) -> Key:
    return str(entry["pair"]), int(entry["prompt"]), int(entry["seed"]), int(entry["run"])


__all__ = ["KIND", "Verdicts", "key_of", "runs_of"]
