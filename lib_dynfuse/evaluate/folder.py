"""An evaluation's folder: what lies where.

    evaluation.json                        the pairs, methods, prompts and seeds of all plans that were run in it
    references/subject/DOG/01.png          reference pictures, copied from where the plan found them
    references/style/INK/01.png
    pictures/PAIR/METHOD/PROMPT-SEED.png   PROMPT counts a pair's prompts from 0; the PNG's text "parameters" has the settings
    scores/METRIC-VERSION/*.jsonl          a line for each picture (scores.py)
    votes/*.json                           of people and of judges (votes.py)
    PLAN.html, PLAN.csv, PLAN-means.csv    the report of each plan

A picture that is there is whole: it is written under another name first. All paths that evaluation.json has are relative to the folder,
so that it can be moved or sent to somebody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reasons import first_line
from .atomic import write_whole

RECORD = "evaluation.json"
PICTURES = "pictures"
REFERENCES = "references"
SCORES = "scores"
VOTES = "votes"
FORMAT = 1

_NAME = re.compile(r"\w[\w .,+=()-]{0,79}")


class EvaluationError(RuntimeError):
    """An evaluation that cannot be run or read. Sentences for the user."""


def is_name(text: str) -> bool:
    """Whether a pair, method or metric may be called so: what every file system takes as a folder's name."""
    return _NAME.fullmatch(text) is not None and not text.endswith((".", " "))


@dataclass(frozen=True)
class Pair:
    """A subject and a style. prompts: the texts that pictures are made of. references: paths of pictures, of the one and of the other."""

    name: str
    subject: str
    style: str
    prompts: tuple[str, ...]
    subject_references: tuple[Path, ...] = ()
    style_references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Method:
    """What is compared.

    loras: "both", or "subject", "style", "none": which of them are used; "merged": one file of both. settings: of the fusion, those that
    differ from the defaults.
    """

    name: str
    loras: str = "both"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Picture:
    """Which picture: prompt counts the pair's prompts from 0."""

    pair: str
    method: str
    prompt: int
    seed: int

    @property
    def file(self) -> str:
        """Below the evaluation's folder, with "/" between."""
        return f"{PICTURES}/{self.pair}/{self.method}/{self.prompt}-{self.seed}.png"


@dataclass(frozen=True)
class Trial:
    """The same question to every method. pictures: method -> path of those that are finished, in the methods' order."""

    pair: Pair
    prompt: int
    seed: int
    pictures: Mapping[str, Path]

    @property
    def text(self) -> str:
        """The prompt."""
        return self.pair.prompts[self.prompt]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's folder holds. title: of the plan that was run first. make: how pictures are made, as the plan says it."""

    folder: Path
    title: str
    pairs: tuple[Pair, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    make: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Evaluation:
        """Raises EvaluationError where there is none, or one that cannot be read."""
        path = folder / RECORD
        try:
            return cls._of_record(folder, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            raise EvaluationError(f"{folder} is no evaluation's folder: it holds no {RECORD}.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path} cannot be read: {first_line(error)}.") from None

    @classmethod
    def _of_record(cls, folder: Path, record: Mapping[str, Any]) -> Evaluation:
        if record["format"] != FORMAT:
            raise ValueError(f"it is of another version of this program (format {record['format']})")
        pairs = [
            Pair(
                *(entry["name"], entry["subject"], entry["style"], tuple(entry["prompts"])),
                *(tuple(folder / file for file in entry[f"{side}_references"]) for side in ("subject", "style")),
            )
            for entry in record["pairs"]
        ]
        methods = [Method(entry["name"], entry["loras"], entry["settings"]) for entry in record["methods"]]
        return cls(folder, record["title"], tuple(pairs), tuple(methods), tuple(record["seeds"]), record["make"])

    def save(self) -> None:
        """Write evaluation.json. Raises OSError."""
        pairs = [
            {
                **{"name": pair.name, "subject": pair.subject, "style": pair.style, "prompts": pair.prompts},
                "subject_references": self._relative(pair.subject_references),
                "style_references": self._relative(pair.style_references),
            }
            for pair in self.pairs
        ]
        methods = [{"name": method.name, "loras": method.loras, "settings": dict(method.settings)} for method in self.methods]
        record = {"format": FORMAT, "title": self.title, "make": dict(self.make), "pairs": pairs, "methods": methods, "seeds": self.seeds}
        write_whole(self.folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False).encode())

    def _relative(self, paths: Iterable[Path]) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in paths]

    @property
    def method_names(self) -> tuple[str, ...]:
        """In the order of the plans."""
        return tuple(method.name for method in self.methods)

    def pair(self, name: str) -> Pair:
        """Raises KeyError."""
        return {pair.name: pair for pair in self.pairs}[name]

    def path(self, picture: Picture) -> Path:
        """Where it lies when it is finished."""
        return self.folder / picture.file

    def pictures(self, methods: Sequence[str] | None = None) -> Iterator[Picture]:
        """All that there are to be, finished or not. methods: only these."""
        for pair in self.pairs:
            for prompt in range(len(pair.prompts)):
                for seed in self.seeds:
                    for method in self.method_names if methods is None else methods:
                        yield Picture(pair.name, method, prompt, seed)

    def trials(self, methods: Sequence[str] | None = None) -> list[Trial]:
        """One for each pair, prompt and seed that has finished pictures. methods: only of these."""
        found: dict[tuple[str, int, int], dict[str, Path]] = {}
        for picture in self.pictures(methods):
            if (path := self.path(picture)).is_file():
                found.setdefault((picture.pair, picture.prompt, picture.seed), {})[picture.method] = path
        return [Trial(self.pair(pair), prompt, seed, pictures) for (pair, prompt, seed), pictures in found.items()]


__all__ = ["Evaluation", "EvaluationError", "Method", "Pair", "Picture", "Trial", "is_name"]
