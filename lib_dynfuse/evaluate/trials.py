"""The questions for a study or a judge: of an evaluation's folder, or of a folder of pictures that were made elsewhere.

    PAIR/subject.png, PAIR/style.png     the references; several: subject-1.png, subject-2.png
    PAIR/prompt.txt                      may be there: a prompt in each line
    PAIR/METHOD/SEED.png                 or PROMPT-SEED.png, PROMPT counting the prompts from 0; the pictures of one name are compared

Pictures may be PNG, JPEG or WebP files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .folder import RECORD, VOTES, Evaluation, EvaluationError, Pair, Trial
from .plan import MERGED

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERS = re.compile(r"(?:(\d{1,9})-)?(\d{1,18})")


def open_trials(folder: Path) -> tuple[list[Trial], tuple[str, ...]]:
    """All trials of a folder, and the methods that it compares: those with both LoRAs, or one file of both.

    Raises EvaluationError where there is none.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}.")
    if (folder / RECORD).exists():
        evaluation = Evaluation.open(folder)
        trials = evaluation.trials()
        methods = tuple(method.name for method in evaluation.methods if method.loras in ("both", MERGED))
    else:
        trials = _plain(folder)
        methods = tuple(sorted({method for trial in trials for method in trial.pictures}))
    if not trials:
        raise EvaluationError(
            f"{folder} holds no pictures to compare: neither an evaluation's, nor folders PAIR/METHOD/SEED.png with PAIR/subject.png and "
            "PAIR/style.png beside them."
        )
    there = {method for trial in trials for method in trial.pictures}
    return trials, tuple(method for method in methods if method in there)


def comparable(trials: Sequence[Trial], methods: Sequence[str], least: int) -> list[Trial]:
    """Those with both references and pictures of at least `least` of the methods.

    Raises EvaluationError where there is none, and for a method that no trial has.
    """
    known = {method for trial in trials for method in trial.pictures}
    for method in methods:
        if method not in known:
            raise EvaluationError(f"There is no picture of the method {method}; there are of {', '.join(sorted(known))}.")
    with_references = [trial for trial in trials if trial.pair.subject_references and trial.pair.style_references]
    if not with_references:
        raise EvaluationError("No pair has reference pictures of both its subject and its style, which voters are to see.")
    found = [trial for trial in with_references if sum(method in trial.pictures for method in methods) >= least]
    if not found:
        raise EvaluationError(f"No pair, prompt and seed has pictures of {least} of the methods {', '.join(methods)}.")
    return found


def _plain(folder: Path) -> list[Trial]:
    trials = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != VOTES and path.name[0] != "."):
        subject, style = (_references(place, side) for side in ("subject", "style"))
        methods = [path for path in sorted(place.iterdir()) if path.is_dir() and path.name[0] != "."]
        pictures: dict[tuple[int, int], dict[str, Path]] = {}
        for method in methods:
            for path in _pictures(method):
                if numbers := _NUMBERS.fullmatch(path.stem):
                    pictures.setdefault((int(numbers[1] or 0), int(numbers[2])), {})[method.name] = path
        prompts = _prompts(place / "prompt.txt", 1 + max((prompt for prompt, _ in pictures), default=0))
        pair = Pair(place.name, "", "", prompts, subject, style)
        trials += [Trial(pair, prompt, seed, pictures[prompt, seed]) for prompt, seed in sorted(pictures)]
    return trials


def _references(place: Path, side: str) -> tuple[Path, ...]:
    return tuple(path for path in _pictures(place) if re.fullmatch(rf"{side}(-\d+)?", path.stem))


def _pictures(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _prompts(path: Path, count: int) -> tuple[str, ...]:
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    return (*lines, *[""] * (count - len(lines)))


__all__ = ["SUFFIXES", "comparable", "open_trials"]
