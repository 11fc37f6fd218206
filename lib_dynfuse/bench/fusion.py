"""bench fusion: a denoiser's step without LoRAs, with their sum, fused, and as the paper is written; and how the cost grows."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..fusion import FusionSession, Step
from ..fusion.rules import RULES
from ..settings import FuseSettings
from . import sweep
from .denoisers import CONFIGURATIONS, WORLD, Denoiser, Loras, NoDenoiser, build, default_size, loras, processor
from .dispatched import Added, added
from .host_time import host_microseconds
from .literal import literally_fused

MODELS = (*sorted(CONFIGURATIONS), WORLD)
_RANK = 16
_ROUNDS, _ROUNDS_OF_THE_WORLD = 5, 41
_LORAS = (1, 4)
_META = torch.device("meta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=MODELS, default="sd15", help="whose U-Net to build, or world: the miniature model with its own LoRAs "
        "(default: sd15)")  # fmt: skip
    add("--size", type=int, metavar="PX", help="side of the image in pixels (default: 256 for sd15, 512 for sdxl, 64 for world)")
    add("--rank", "--branches-rank", dest="rank", type=int, metavar="R", help=f"rank of the random LoRAs (default: {_RANK})")
    add("--loras", type=int, default=2, metavar="N", help="LoRAs, 1 to 4: one half subjects, the other styles (default: 2)")
    add("--method", choices=tuple(RULES), default=FuseSettings().method, help="of `fused` (default: the settings' default)")
    add("--decide", choices=("now", "next"), default=FuseSettings().decide, help="how a method decides that measures (default: the "
        "settings' default)")  # fmt: skip
    add("--sweep", choices=sweep.AXES, help="print how the cost grows with the rank, the number of LoRAs, of pixels or of layers")
    add("--operations", action="store_true", help="only count dispatched operations, without running anything")
    add("--rounds", type=int, metavar="N", help=f"turns that each way takes (default: {_ROUNDS}; {_ROUNDS_OF_THE_WORLD} for world)")
    add("--threads", type=int, metavar="N", help="threads that PyTorch may use on a CPU (default: its own choice)")
    add("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    add("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    reason = _refusal(arguments)
    if reason:
        print(reason, file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        result = _result(arguments)
    except NoDenoiser as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if arguments.json else _text(result))
    return 0


def _refusal(arguments: argparse.Namespace) -> str:
    numbers = [value for value in (arguments.size, arguments.rank, arguments.rounds, arguments.threads) if value is not None]
    if any(value <= 0 for value in numbers) or (arguments.size or 64) % 64:
        return "--size must be a positive multiple of 64; --rank, --rounds and --threads must be positive."
    if not _LORAS[0] <= arguments.loras <= _LORAS[1]:
        return f"--loras must be {_LORAS[0]} to {_LORAS[1]}."
    if arguments.model == WORLD and (arguments.rank is not None or arguments.sweep in ("rank", "layers")):
        return "The miniature world has LoRAs of its own, whose rank and layers are what they are: leave --rank and such sweeps out."
    return ""


def _result(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = arguments.model
    size = arguments.size or default_size(model)
    rank = None if model == WORLD else arguments.rank or _RANK
    rounds = arguments.rounds or (_ROUNDS_OF_THE_WORLD if model == WORLD else _ROUNDS)
    fused = FuseSettings(method=arguments.method, decide=arguments.decide)

    def progress(text: str) -> None:
        if not arguments.json:
            print(text, file=sys.stderr, flush=True)

    setup = {
        "model": model,
        "size": size,
        "rank": rank,
        "loras": arguments.loras,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    what = "the miniature model" if model == WORLD else f"a {model} U-Net with random weights"
    if arguments.operations:
        return {"setup": setup, "operations": _operations(model, size, arguments.loras, rank, fused)}
    progress(f"Building {what} ...")
    denoiser = build(model, size, device, dtype)
    if arguments.sweep:
        rows = sweep.measure(arguments.sweep, denoiser, arguments.loras, rank, fused, partial(timed, rounds=rounds, progress=progress), way)
        return {"setup": setup, "sweep": arguments.sweep, "rows": rows}
    result = measure(denoiser, loras(denoiser, arguments.loras, rank), fused, rounds, progress)
    progress("Counting operations ...")
    operations = _operations(model, size, arguments.loras, rank, fused)
    host = host_microseconds(_settings(fused))
    return {"setup": setup, **result, "operations": operations, "host_microseconds_per_layer": host}


def _settings(fused: FuseSettings) -> dict[str, FuseSettings]:
    """The ways that are sessions. now, next: the paper's selection."""
    return {
        "direct": FuseSettings(method="direct"),
        "fused": fused,
        "now": FuseSettings(method="dynfuse", decide="now"),
        "next": FuseSettings(method="dynfuse", decide="next"),
    }


def measure(
    denoiser: Denoiser, branches: Loras, fused: FuseSettings, rounds: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Time one step each way, in turns. Returns seconds (all turns, medians) and medians of the ratios to the plain step of the turn."""
    settings = _settings(fused)
    # The same settings are not timed twice.
    same = next((name for name, own in settings.items() if name != "fused" and own == fused), None)
    sessions = {name: branches.session(denoiser, own) for name, own in settings.items() if name != "fused" or same is None}
    sessions["one LoRA"] = branches.first.session(denoiser, settings["direct"])
    ways: dict[str, Callable[[], Any]] = {"plain": denoiser.run}
    ways.update({name: way(denoiser, session) for name, session in sessions.items()})
    ways["literal"] = lambda: _literal_seconds(denoiser, sessions["now"])
    result = timed(denoiser, ways, rounds, progress)
    if same is not None:
        for measured in result.values():
            measured["fused"] = measured[same]
    seconds = result["seconds"]
    return {
        **result,
        "literal_over_now": statistics.median(li / now for li, now in zip(seconds["literal"], seconds["now"])),
        "layers": len(sessions["now"].report.matched) + len(sessions["now"].report.one_sided),
    }


def way(denoiser: Denoiser, session: FusionSession) -> Callable[[], Any]:
    """A step of the session, with the share of it that a contrast's further prediction has."""
    if not session.contrasts:
        return partial(denoiser.step, session)
    every = session.settings.contrast_every

    def seconds() -> float:
        """Mean of a step that makes the direction and of those that keep it."""
        taken = []
        for index in range(min(2, every)):
            denoiser.wait()
            started = time.perf_counter()
            denoiser.step(session, Step.of(index, every))
            denoiser.wait()
            taken.append(time.perf_counter() - started)
        return (taken[0] + (every - 1) * taken[-1]) / every

    return seconds


def _literal_seconds(denoiser: Denoiser, session: FusionSession) -> float:
    with literally_fused(session) as seconds_of_merging:
        denoiser.wait()
        started = time.perf_counter()
        denoiser.run()
        denoiser.wait()
        return time.perf_counter() - started - sum(seconds_of_merging)


@torch.no_grad()
def timed(
    denoiser: Denoiser, ways: dict[str, Callable[[], Any]], rounds: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """Each way once in each turn, after turns that warm up: the first binds LoRAs, the second brings them together. A way may tell its
    seconds itself. Returns seconds, median_seconds, ratio_to_plain and ratio_range, by way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, rounds):
        progress("Warming up ..." if turn < 0 else f"Turn {turn + 1} of {rounds} ...")
        for name, way in ways.items():
            denoiser.wait()
            started = time.perf_counter()
            told = way()
            denoiser.wait()
            elapsed = told if isinstance(told, float) else time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(elapsed)
    per_turn = {name: [s / p for s, p in zip(values, seconds["plain"])] for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_plain": {name: statistics.median(values) for name, values in per_turn.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in per_turn.items()},
    }


def _operations(model: str, size: int, count: int, rank: int | None, fused: FuseSettings) -> dict[str, dict[str, float]]:
    """Dispatched operations by way, in half precision and in pieces as large as a GPU takes them."""
    denoiser = build(model, size, _META, torch.float16)
    branches = loras(denoiser, count, rank)
    counts = {name: added(denoiser, branches.session(denoiser, settings)) for name, settings in _settings(fused).items()}
    return {name: _told(count) for name, count in counts.items()}


def _told(count: Added) -> dict[str, float]:
    return {"plain": count.plain, "layers": count.layers, "added_per_layer": count.per_layer, "added_per_step": count.per_step}


def _text(result: dict[str, Any]) -> str:
    setup = result["setup"]
    rank = f", rank {setup['rank']}" if setup["rank"] else ""
    lines = [
        f"{setup['model']}, {setup['size']} px, {setup['loras']} LoRAs{rank}; {setup['device']}, {setup['threads']} threads, "
        f"{setup['dtype']}, torch {setup['torch']}, Python {setup['python']}"
    ]
    if "sweep" in result:
        return "\n".join([*lines, *sweep.table(result["sweep"], result["rows"])])
    if "median_seconds" in result:
        lines += [f"{result['layers']} layers", *_times(result, ("plain", "one LoRA", "direct", "fused", "now", "next", "literal"))]
        lines.append(f"now is {result['literal_over_now']:.2f} x faster than the literal form")
    lines += ["dispatched operations", f"{'':10}{'plain':>10}{'+ per layer':>13}{'+ per step':>12}"]
    for name, count in result["operations"].items():
        lines.append(f"{name:10}{count['plain']:10.0f}{count['added_per_layer']:13.2f}{count['added_per_step']:12.0f}")
    if "host_microseconds_per_layer" in result:
        host = ", ".join(f"{name} {value:.0f}" for name, value in result["host_microseconds_per_layer"].items())
        lines.append(f"host time of a tiny layer, and what is added to it, in microseconds: {host}")
    return "\n".join(lines)


def _times(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    lines = [f"{'':10}{'s / step':>10}{'x plain':>10}{'range':>16}"]
    for name in names:
        low, high = result["ratio_range"][name]
        lines.append(f"{name:10}{result['median_seconds'][name]:10.3f}{result['ratio_to_plain'][name]:10.3f}{f'{low:.3f}-{high:.3f}':>16}")
    return lines


__all__ = ["MODELS", "add_arguments", "measure", "run", "timed", "way"]
