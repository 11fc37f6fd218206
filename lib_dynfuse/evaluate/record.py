"""A plan written into its folder. Several plans may share one: what they have in common is made and scored once.

What is there is never made to mean something else: a plan that calls other settings, LoRAs, prompts or references by a name that the
folder knows is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..generate import lora_hash
from .atomic import write_whole
from .claims import Claims
from .folder import RECORD, REFERENCES, Evaluation, EvaluationError, Method, Pair
from .plan import SIDES, Plan, PlannedPair, Side

_WAIT = 1.0


def recorded(plan: Plan, claims: Claims) -> Evaluation:
    """Add the plan to its folder, with copies of its references. Returns the plan's own part of what the folder then holds.

    Raises EvaluationError where the two contradict each other; OSError where the folder cannot be written to.
    """
    path = plan.out / RECORD
    while True:
        with claims.held(path) as mine:
            if mine:
                there = Evaluation.open(plan.out) if path.is_file() else None
                joined = _joined(plan, there)
                joined.save()
                write_whole(plan.out / f"{plan.name}.toml", plan.text.encode())
                return part_of(plan, joined)
        time.sleep(_WAIT)


def part_of(plan: Plan, evaluation: Evaluation) -> Evaluation:
    """The plan's pairs, methods and seeds alone."""
    pairs = {pair.name: pair for pair in evaluation.pairs}
    methods = {method.name: method for method in evaluation.methods}
    return replace(
        evaluation,
        title=plan.title,
        pairs=tuple(pairs[pair.name] for pair in plan.pairs),
        methods=tuple(methods[method.name] for method in plan.methods),
        seeds=plan.make.seeds,
    )


def _joined(plan: Plan, there: Evaluation | None) -> Evaluation:
    known = there.make if there else {}
    problems: list[str] = []
    make = plan.make.record()
    for key, value in make.items():
        if key in known and known[key] != value:
            problems.append(f"make: {key} is {value!r} here and {known[key]!r} there.")
    make["model file"] = _file(plan.make.model, known.get("model file"), _checksum, problems)
    make["sides"] = _sides(plan, known.get("sides", {}), problems)
    make["merged files"] = _merged(plan, known.get("merged files", {}), problems)
    pairs = {pair.name: pair for pair in there.pairs} if there else {}
    for planned in plan.pairs:
        pair = _pair(plan.out, planned, problems)
        if pairs.setdefault(pair.name, pair) != pair:
            problems.append(f"The pair {pair.name} has other prompts or reference pictures there.")
    methods = {method.name: method for method in there.methods} if there else {}
    for one in plan.methods:
        method = Method(one.name, one.loras, one.settings.non_default())
        if methods.setdefault(method.name, method) != method:
            problems.append(f"The method {method.name} has other settings there.")
    if problems:
        head = f"The folder {plan.out} holds pictures that were made in another way: name another folder (out), or other names."
        raise EvaluationError("\n".join([head, *problems]))
    seeds = dict.fromkeys([*(there.seeds if there else ()), *plan.make.seeds])
    title = there.title if there else plan.title
    return Evaluation(plan.out, title, tuple(pairs.values()), tuple(methods.values()), tuple(seeds), make)


def _pair(folder: Path, planned: PlannedPair, problems: list[str]) -> Pair:
    copies = {side: _copied(folder, side, getattr(planned, side), problems) for side in SIDES}
    return Pair(planned.name, planned.subject.name, planned.style.name, planned.prompts, copies["subject"], copies["style"])


def _copied(folder: Path, kind: str, side: Side, problems: list[str]) -> tuple[Path, ...]:
    """The references in the folder: numbered, in the plan's order."""
    copies = []
    for number, reference in enumerate(side.references, 1):
        copy = folder / REFERENCES / kind / side.name / f"{number:02d}{reference.suffix.lower()}"
        content = reference.read_bytes()
        if not copy.is_file():
            write_whole(copy, content)
        elif copy.read_bytes() != content:
            problems.append(f"The {kind} {side.name} has another reference picture in place of {reference.name} there.")
        copies.append(copy)
    return tuple(copies)


def _sides(plan: Plan, known: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Of each subject and style what its pictures depend on."""
    sides = dict(known)
    found = {f"{kind} {side.name}": side for pair in plan.pairs for kind, side in (("subject", pair.subject), ("style", pair.style))}
    for name, side in found.items():
        before = known.get(name, {})
        own: dict[str, Any] = {"loras": list(side.lora_names), "weight": side.weight, "alone": side.alone}
        if before and any(before[key] != value for key, value in own.items()):
            problems.append(f"The {name} has other LoRAs, another weight or another prompt of its own there.")
            continue
        files = before.get("files") or [None] * len(side.loras)
        own["files"] = [] if plan.make.webuis else [_file(path, was, lora_hash, problems) for path, was in zip(side.loras, files)]
        sides[name] = own
    return sides


def _merged(plan: Plan, known: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Of each method with a file for each pair, that file."""
    files = dict(known)
    for method, pair in itertools.product(plan.methods, plan.pairs):
        if method.files and not plan.make.webuis:
            name = f"{method.name}, {pair.name}"
            files[name] = _file(method.of(pair).subject.loras[0], known.get(name), lora_hash, problems)
    return files


def _file(
    path: Path | None, before: Mapping[str, Any] | None, hash_of: Callable[[Path], str], problems: list[str]
) -> dict[str, Any] | None:
    """Which file it is. Hashed only where its size or time is not as it was: a checkpoint takes half a minute."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    found = {"name": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}
    if before and all(before.get(key) == value for key, value in found.items()):
        return dict(before)
    found["hash"] = hash_of(path)
    if before and before.get("hash") != found["hash"]:
        problems.append(f"The file {path.name} is not the one that pictures there were made with.")
    return found


def _checksum(path: Path) -> str:
    """The short hash under which WebUIs know a checkpoint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:10]


__all__ = ["part_of", "recorded"]
