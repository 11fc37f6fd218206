"""`python -m lib_dynfuse bench`: what fusion and guidance cost, as ratios taken in turns in one process, and whether guidance steers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; returns the exit code."""
    from dynfuse_world import steering

    from . import fusion, guidance

    parser = argparse.ArgumentParser(prog="python -m lib_dynfuse bench", description="Measure what DynFuse costs on this machine.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    fusion.add_arguments(benchmarks.add_parser("fusion", help="feature-level selection against a plain and a literally fused step"))
    guidance.add_arguments(benchmarks.add_parser("guidance", help="what the correction of a step costs, in time and memory"))
    steering.add_arguments(benchmarks.add_parser("steering", help="whether guided pictures come closer to their references, over seeds"))
    arguments = parser.parse_args(argv)
    return {"fusion": fusion.run, "guidance": guidance.run, "steering": steering.run}[arguments.benchmark](arguments)
