"""`python -m lib_dynfuse evaluate PLAN`: a plan's pictures, scores and report."""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..bars import Bars
from ..guidance.encoders import load_encoders
from ..guidance.guide import wants_guidance
from ..guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderSources, Progress
from ..home import encoders_folder
from .claims import Claims
from .folder import REFERENCES, Evaluation, EvaluationError
from .makers import Maker, MakerGoneError
from .metrics import Metric, Shelf, metric_class
from .plan import Plan, read_plan
from .plans import copy_plan, shipped_plans


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="TOML file: docs/evaluation.md has its keys; with --new, where it is written")
    add("--out", type=Path, metavar="DIR", help="folder for pictures, scores and report, in place of the plan's")
    add(
        "--check", action="store_true", help="say what is wrong with the plan, how many pictures there are and how many are left; make none"
    )
    add("--report", action="store_true", help="make no pictures: score those that are finished, and write the report")
    add("--new", choices=shipped_plans(), metavar="NAME", help=f"write one of the plans that come along: {', '.join(shipped_plans())}")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises EvaluationError, and what makers and metrics raise."""
    if options.new:
        for path in copy_plan(options.new, options.plan):
            print(path)
        return 0
    plan = read_plan(options.plan, options.out)
    if options.check:
        return _check(plan)
    return evaluate(plan, make=not options.report)


def evaluate(plan: Plan, *, make: bool = True) -> int:
    """make: whether pictures are made. Prints the report's files on standard output. Returns the exit code."""
    from .making import make_pictures
    from .record import recorded
    from .scores import score_pictures

    show = _is_first()
    with Claims() as claims:
        makers, notes = _makers(plan) if make else ([], [])
        evaluation = recorded(plan, claims)
        if make:
            if show and _left(plan):
                _prepare(plan)
            notes += make_pictures(plan, evaluation.folder, makers, claims, show=show)
            for note in notes if show else ():
                print(f"Note: {note}", file=sys.stderr)
        metrics = _metrics(plan, _device(plan))
        score_pictures(evaluation, metrics, claims, show=show)
        with claims.held(evaluation.folder / f"{plan.name}.html") as mine:
            files = _write_report(plan, evaluation, metrics) if mine else []
    for path in files:
        print(path)
    return 0


def _is_first() -> bool:
    """Of the processes that a launcher started on this machine: the one that talks."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _makers(plan: Plan) -> tuple[list[Callable[[], Maker]], list[str]]:
    """What makes the pictures, and notes about those that do not. Raises EvaluationError where there is nothing that can."""
    if not plan.make.webuis:
        from .makers.with_diffusers import DiffusersMaker

        def loaded() -> Maker:
            maker = DiffusersMaker(plan.make, _guidance_sources(plan), plan.out / REFERENCES / "guidance")
            if problems := maker.problems(plan) if _is_first() else []:
                raise EvaluationError("\n".join(problems))
            return maker

        return [loaded], []
    from .makers.with_webui import WebUIMaker

    makers, gone, problems = [], [], []
    for address in plan.make.webuis:
        maker = WebUIMaker(address, plan.make)
        try:
            problems += maker.problems(plan)
            makers.append(maker)
        except MakerGoneError as error:
            gone.append(str(error))
    if problems or not makers:
        raise EvaluationError("\n".join([*problems, *gone]))
    return [functools.partial(_itself, maker) for maker in makers], gone


def _itself(maker: Maker) -> Maker:
    return maker


def _guidance_sources(plan: Plan) -> EncoderSources:
    names = plan.encoders.names
    folder = plan.encoders.folder or encoders_folder()
    return EncoderSources(folder, names.get("clip", CLIP_DEFAULT), names.get("dino", DINO_DEFAULT), plan.encoders.download)


def _left(plan: Plan) -> int:
    from .making import jobs_of

    return sum(not (plan.out / job.picture.file).is_file() for job in jobs_of(plan))


def _prepare(plan: Plan) -> None:
    """Encoders that cannot be had are told of before hours are spent."""
    with Bars() as bars:
        for metric in _metrics(plan, "cpu", lambda what, done, total: bars.show(what, done, total, "B")):
            metric.prepare()
        if not plan.make.webuis and any(wants_guidance(method.settings) for method in plan.methods):
            load_encoders(_guidance_sources(plan), lambda what, done, total: bars.show(what, done, total, "B"))


def _metrics(plan: Plan, device: str, progress: Progress | None = None) -> list[Metric]:
    shelf = Shelf(plan.encoders, device, progress)
    return [metric_class(name)(shelf) for name in plan.metrics]


def _device(plan: Plan) -> str:
    """Where the encoders compute: beside a WebUI its memory is left alone."""
    from .makers.with_diffusers import device_of

    if plan.encoders.device or plan.make.webuis:
        return plan.encoders.device or "cpu"
    if torch.cuda.is_available():  # the pipeline is no longer used
        gc.collect()
        torch.cuda.empty_cache()
    return device_of(plan.make) or ("cuda" if torch.cuda.is_available() else "cpu")


def _write_report(plan: Plan, evaluation: Evaluation, metrics: Sequence[Metric]) -> list[Path]:
    from .report import Report, about_pictures, write_report
    from .results import judge_results, study_result
    from .scores import ScoreBook
    from .summary import summarised

    kinds = [type(metric) for metric in metrics]
    scores = {metric.name: ScoreBook(evaluation.folder, metric).read() for metric in metrics}
    summary = summarised(evaluation, kinds, scores)
    votes = study_result(evaluation.folder), judge_results(evaluation.folder)
    return write_report(Report(plan, evaluation, kinds, scores, summary, *votes, about_pictures(evaluation)))


def _check(plan: Plan) -> int:
    from .making import jobs_of
    from .report import seconds_of

    _, notes = _makers(plan)
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    jobs = jobs_of(plan)
    left = [job for job in jobs if not (plan.out / job.picture.file).is_file()]
    print(
        f"{plan.title}: {len(plan.pairs)} pairs, {len(plan.methods)} methods, {len(plan.make.seeds)} seeds: {len(jobs)} pictures, ", end=""
    )
    print(f"{len(left)} of them to be made into {plan.out}.")
    seconds = [taken for job in jobs if (taken := seconds_of(plan.out / job.picture.file))]
    if seconds and left:
        mean = sum(seconds) / len(seconds)
        print(f"The finished ones took {mean:.1f} s each: one GPU needs about {len(left) * mean / 3600:.1f} hours more.")
    return 0


__all__ = ["add_arguments", "evaluate", "run"]
