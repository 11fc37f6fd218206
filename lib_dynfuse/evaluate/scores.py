"""Scores of pictures: scores/METRIC-VERSION/WRITER.jsonl in an evaluation's folder, a line for each picture.

Every process writes to a file of its own, and all are read: a metric that is added later scores what it has not scored yet, and nobody
waits for a lock. VERSION stands for the metric's computation and its networks.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .claims import Claims
from .folder import SCORES, Evaluation, EvaluationError, Picture
from .metrics import Metric
from .metrics.encoders import digest

_CHUNK = 16
_POLL = 2.0


class ScoreBook:
    """The scores of one metric in one folder."""

    def __init__(self, folder: Path, metric: Metric) -> None:
        self.folder = folder / SCORES / f"{metric.name}-{digest(f'{metric.revision} {metric.identity}')}"
        self._own = self.folder / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"

    def read(self) -> dict[Picture, float]:
        """All that there are; a line that a killed process did not finish does not count."""
        found: dict[Picture, float] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text("utf-8", "replace").splitlines():
                try:
                    entry = json.loads(line)
                    picture = Picture(entry["pair"], entry["method"], int(entry["prompt"]), int(entry["seed"]))
                    found[picture] = float(entry["score"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def add(self, scores: dict[Picture, float]) -> None:
        """Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {"pair": picture.pair, "method": picture.method, "prompt": picture.prompt, "seed": picture.seed, "score": score},
                ensure_ascii=False,
            )
            for picture, score in scores.items()
        ]
        with open(self._own, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def score_pictures(evaluation: Evaluation, metrics: Sequence[Metric], claims: Claims, *, show: bool = True, poll: float = _POLL) -> None:
    """Until every finished picture has every score, whoever made it.

    Raises EncoderError; EvaluationError for a picture that cannot be read, or scores that are not finite; OSError.
    """
    pictures = [picture for picture in evaluation.pictures() if evaluation.path(picture).is_file()]
    books = {metric: ScoreBook(evaluation.folder, metric) for metric in metrics}
    with tqdm(
        total=len(pictures) * len(metrics), unit=" scores", desc="scores", disable=not show, file=sys.stderr, dynamic_ncols=True
    ) as bar:
        for metric, book in books.items():
            _score(evaluation, metric, book, pictures, claims, bar, poll)


def _score(
    evaluation: Evaluation, metric: Metric, book: ScoreBook, pictures: Sequence[Picture], claims: Claims, bar: Any, poll: float
) -> None:
    bar.set_postfix_str(metric.name)
    done = 0
    while True:
        known = book.read()
        missing = [picture for picture in pictures if picture not in known]
        bar.update(len(pictures) - len(missing) - done)
        done = len(pictures) - len(missing)
        if not missing:
            return
        worked = False
        for pair in evaluation.pairs:
            if not any(picture.pair == pair.name for picture in missing):
                continue
            with claims.held(book.folder / pair.name) as mine:
                if not mine:
                    continue
                worked, known = True, book.read()
                left = [picture for picture in pictures if picture.pair == pair.name and picture not in known]
                for start in range(0, len(left), _CHUNK):
                    chunk = left[start : start + _CHUNK]
                    book.add(_scores(evaluation, metric, chunk))
                    bar.update(len(chunk))
                    done += len(chunk)
        if not worked:
            time.sleep(poll)


def _scores(evaluation: Evaluation, metric: Metric, pictures: Sequence[Picture]) -> dict[Picture, float]:
    paths = [evaluation.path(picture) for picture in pictures]
    try:
        scores = metric.scores(evaluation.pair(pictures[0].pair), paths)
    except OSError as error:
        raise EvaluationError(
            f"{error.filename or 'A picture'} cannot be read ({error.strerror or error}): remove it, and start the command again."
        ) from None
    if bad := [str(path) for path, score in zip(paths, scores) if not abs(score) < float("inf")]:
        raise EvaluationError(f"The metric {metric.name} gives no finite score for {bad[0]}.")
    return dict(zip(pictures, map(float, scores)))


__all__ = ["ScoreBook", "score_pictures"]
