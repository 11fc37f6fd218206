"""`python -m lib_dynfuse toy train | check | export | plan | bench`: the miniature world's own commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib_dynfuse.program import program

from .lora_sets import PLAIN, TRAINED
from .model import WEIGHTS


def main(arguments: Sequence[str]) -> int:
    """Run a command; arguments: what follows `toy`. Returns the exit code."""
    if arguments[:1] == ["bench"]:  # has options of its own
        from . import benchmark

        return benchmark.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog=f"{program()} toy", description="A small text-to-image model of our own, to try and to measure fusion with."
    )
    commands = parser.add_subparsers(required=True, metavar="train | check | export | plan | bench")
    _add_train(commands)
    check = commands.add_parser("check", help="what the model can do before anything is fused with it: two minutes")
    check.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder of weights (default: the shipped ones)")
    check.add_argument("--set", choices=TRAINED, default=PLAIN, help="LoRAs of another set, after toy train loras --set ...")
    check.add_argument("--pictures", type=Path, metavar="DIR", help="write contact sheets there")
    check.add_argument("--json", action="store_true", help="print figures for programs")
    check.set_defaults(run=_check)
    export = commands.add_parser("export", help="a checkpoint, LoRAs and encoders for a WebUI's model folders")
    export.add_argument("folder", type=Path, help="the WebUI's folder, or any other")
    export.set_defaults(run=_export)
    plan = commands.add_parser("plan", help="the model, LoRAs and a plan for the command evaluate")
    plan.add_argument("folder", type=Path, help="where they are written")
    plan.set_defaults(run=_plan)
    commands.add_parser("bench", help="which fusion is better here: subject and style of thousands of pictures")
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _add_train(commands: Any) -> None:
    from .training.steps import STEPS

    train = commands.add_parser("train", help="make all weights from nothing: hours on two CPU cores, can be interrupted")
    train.add_argument("steps", nargs="*", type=_step, metavar="STEP", help=f"only these: {', '.join(STEPS)}")
    train.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights are written (default: where they are shipped)")
    train.add_argument(
        "--work", type=Path, help="checkpoints and records (default: out/toy-training; with --weights DIR, DIR-training beside it)"
    )
    train.add_argument(
        "--set",
        choices=TRAINED,
        default=PLAIN,
        help="of the step loras: LoRAs as users' files differ (docs/quality.md), into a folder of their own beside the plain ones",
    )
    train.set_defaults(run=_train)


def _step(name: str) -> str:
    from .training.steps import STEPS

    if name not in STEPS:
        raise argparse.ArgumentTypeError(f"{name} is no step; the steps are {', '.join(STEPS)}")
    return name


def _train(options: argparse.Namespace) -> int:
    from .training.steps import STEPS, train

    shipped = options.weights.resolve() == WEIGHTS.resolve()
    if options.set != PLAIN and options.steps != ["loras"]:
        print(f"--set {options.set} is for the step loras alone: toy train loras --set {options.set}.", file=sys.stderr)
        return 2
    beside = options.weights.with_name(f"{options.weights.resolve().name}-training")
    work = options.work or (Path("out/toy-training") if shipped else beside)
    return train(work, options.weights, options.steps or tuple(STEPS), kind=options.set)


def _check(options: argparse.Namespace) -> int:
    from . import check

    return check.run(options.weights, options.pictures, options.json, options.set)


def _export(options: argparse.Namespace) -> int:
    from .export import run

    return run(options.folder)


def _plan(options: argparse.Namespace) -> int:
    from .evaluation import run

    return run(options.folder)


__all__ = ["main"]
