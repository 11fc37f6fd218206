"""`python -m lib_dynfuse bench`: what fusion and guidance cost, as ratios taken in turns in one process, and whether guidance steers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..program import program


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; returns the exit code."""
    from . import fusion, guidance, methods

    run = {"fusion": fusion.run, "methods": methods.run, "guidance": guidance.run}

    parser = argparse.ArgumentParser(prog=f"{program()} bench", description="Measure what DynFuse costs on this machine.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    fusion.add_arguments(benchmarks.add_parser("fusion", help="a fused step beside a plain one, and beside the paper's written out"))
    methods.add_arguments(benchmarks.add_parser("methods", help="every fusion method beside a plain step"))
    guidance.add_arguments(benchmarks.add_parser("guidance", help="what the correction of a step costs, in time and memory"))
    try:
        from dynfuse_world import steering
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "dynfuse_world":
            raise
    else:
        steering.add_arguments(
            benchmarks.add_parser("steering", help="whether guided pictures come closer to their references, over seeds")
        )
        run["steering"] = steering.run
    arguments = parser.parse_args(argv)
    return run[arguments.benchmark](arguments)
