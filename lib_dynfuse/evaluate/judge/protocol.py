"""What a judge is shown and asked, and what its answer says (arXiv 2602.15539, supplement 3; the words are ours)."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..folder import EvaluationError, Trial
from ..shown import png_url
from ..trials import comparable

LETTERS = "ABCD"
QUESTION = "Which picture balances both best: true to the style, and still the same subject?"
RUNS = 3
QUESTIONS = 100
SIZE = 512
ANSWER_TOKENS = 10
"""Of an answer without thoughts: {"choice": "A"}."""

VOTE, REFUSAL, NONSENSE, CUT = "vote", "refusal", "nonsense", "cut off"

Content = list[dict[str, Any]]
"""A message's parts, as the protocol of chat completions has them."""


@dataclass(frozen=True)
class Task:
    """One request. run counts from 0. shown: the methods in the order of their pictures."""

    trial: Trial
    run: int
    shown: tuple[str, ...]


def tasks(trials: Sequence[Trial], methods: Sequence[str], questions: int, runs: int) -> list[Task]:
    """All requests: the questions drawn by lot, each asked `runs` times with its pictures in an order of its own, which is random.

    The same folder, methods and question make the same draw again, and more questions or runs add to it. Raises EvaluationError.
    """
    if not 2 <= len(methods) <= len(LETTERS):
        raise EvaluationError(f"A judge chooses between 2 to 4 methods, not {len(methods)}: name them with --methods.")
    found = comparable(trials, methods, len(methods))
    named = ", ".join(sorted(methods))
    drawn = sorted(found, key=lambda trial: random.Random(f"which {named} {_name(trial)}").random())[:questions]
    return [Task(trial, run, _order(trial, methods, run)) for trial in drawn for run in range(runs)]


def _order(trial: Trial, methods: Sequence[str], run: int) -> tuple[str, ...]:
    shown = sorted(methods)
    random.Random(f"order {', '.join(shown)} {_name(trial)} {run}").shuffle(shown)
    return tuple(shown)


def _name(trial: Trial) -> str:
    return json.dumps([trial.pair.name, trial.prompt, trial.seed])


def instruction(pictures: int, question: str) -> str:
    """The text after the pictures."""
    letters = ", ".join(LETTERS[:pictures])
    return (
        f"Each of the pictures {letters} is meant to show the subject above in the style above. {question} Answer with JSON and nothing "
        f'else, with the letter of one picture, such as {{"choice": "{LETTERS[0]}"}}.'
    )


def message(task: Task, question: str, size: int) -> Content:
    """What is sent for a task: subject, style, pictures, question. size: most pixels a side. Raises EvaluationError for a bad picture."""
    parts: Content = []
    for title, path in _pictures(task):
        parts += [{"type": "text", "text": f"{title}:"}, {"type": "image_url", "image_url": {"url": png_url(path, size)}}]
    return [*parts, {"type": "text", "text": instruction(len(task.shown), question)}]


def _pictures(task: Task) -> list[tuple[str, Path]]:
    """With their titles; of several references the first one, as the paper shows one."""
    pair = task.trial.pair
    shown = [(f"Picture {letter}", task.trial.pictures[method]) for letter, method in zip(LETTERS, task.shown)]
    return [("The subject", pair.subject_references[0]), ("The style", pair.style_references[0]), *shown]


def tokens(task: Task, question: str, size: int) -> int:
    """An estimate of what a task's message costs: a token for four letters, and pictures as GPT-4o counts them. Raises EvaluationError.

    85 for a picture and 170 for each 512 x 512 tile of it, once it fits 2048 x 2048 and its shorter side 768 pixels (OpenAI, "Images and
    vision"). Other models count otherwise.
    """
    text = sum(len(title) + 1 for title, _ in _pictures(task)) + len(instruction(len(task.shown), question))
    return math.ceil(text / 4) + sum(_picture_tokens(path, size) for _, path in _pictures(task))


def _picture_tokens(path: Path, size: int) -> int:
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Exception as error:  # a damaged picture raises whatever its bytes happen to mean
        raise EvaluationError(f"{path} is no picture.") from error
    scale = min(1.0, min(size, 2048) / max(width, height))
    scale *= min(1.0, 768 / (scale * min(width, height)))
    return 85 + 170 * math.ceil(scale * width / 512) * math.ceil(scale * height / 512)


_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)
_SORRY = re.compile(
    r"\W*(sorry|i(['’]?m| am) (very )?sorry|i (can['’]?t|cannot|can not|won['’]?t|will not)|i(['’]?m| am) (unable|not able))\b", re.I
)


def choice_of(text: str, pictures: int) -> int | None:
    """The place of the picture that an answer chooses: a letter alone, or a JSON object whose "choice" is one, if need be in a code fence.

    None for anything else: a letter somewhere in a sentence is no vote.
    """
    body = text.strip()
    if fenced := _FENCED.fullmatch(body):
        body = fenced[1]
    letter: Any = body
    if len(body) > 1:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return None
        letter = found.get("choice") if isinstance(found, dict) else None
    places = {name: place for place, name in enumerate(LETTERS[:pictures])}
    return places.get(letter.strip().upper()) if isinstance(letter, str) else None


def kind_of(text: str, choice: int | None, finish: str, refused: bool) -> str:
    """What an answer is: VOTE, REFUSAL, CUT where the limit of tokens ended it, or NONSENSE. finish: the protocol's finish_reason."""
    if refused or finish == "content_filter":
        return REFUSAL
    if choice is not None:
        return VOTE
    if finish == "length":
        return CUT
    return REFUSAL if _SORRY.match(text) else NONSENSE


__all__ = [
    "ANSWER_TOKENS",
    "CUT",
    "LETTERS",
    "NONSENSE",
    "QUESTION",
    "QUESTIONS",
    "REFUSAL",
    "RUNS",
    "SIZE",
    "VOTE",
    "Content",
    "Task",
    "choice_of",
    "instruction",
    "kind_of",
    "message",
    "tasks",
    "tokens",
]
