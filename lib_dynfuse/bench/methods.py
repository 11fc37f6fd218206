"""bench methods: what a step costs under each method that there is, beside a plain step, in turns in one process."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..fusion import FusionError, FusionSession
from ..fusion.rules import RULES
from ..settings import FuseSettings
from .denoisers import WORLD, Denoiser, Loras, NoDenoiser, build, default_size, loras, processor
from .fusion import MODELS, timed, way

_RANK = 16
_ROUNDS, _ROUNDS_OF_THE_WORLD = 3, 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=MODELS, default="sd15", help="as of bench fusion (default: sd15)")
    add("--size", type=int, metavar="PX", help="as of bench fusion")
    add("--rank", type=int, metavar="R", help=f"rank of the random LoRAs (default: {_RANK})")
    add("--only", nargs="+", choices=tuple(RULES), metavar="METHOD", help=f"of {', '.join(RULES)} (default: all)")
    add("--rounds", type=int, metavar="N", help=f"turns that each takes (default: {_ROUNDS}; {_ROUNDS_OF_THE_WORLD} for world)")
    add("--threads", type=int, metavar="N", help="threads that PyTorch may use on a CPU (default: its own choice)")
    add("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    add("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    numbers = [value for value in (arguments.size, arguments.rank, arguments.rounds, arguments.threads) if value is not None]
    if any(value <= 0 for value in numbers) or (arguments.size or 64) % 64:
        print("--size must be a positive multiple of 64; --rank, --rounds and --threads must be positive.", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model, size = arguments.model, arguments.size or default_size(arguments.model)
    rank = None if model == WORLD else arguments.rank or _RANK
    try:
        denoiser = build(model, size, device, dtype)
    except NoDenoiser as error:
        print(error, file=sys.stderr)
        return 2
    rounds = arguments.rounds or (_ROUNDS_OF_THE_WORLD if model == WORLD else _ROUNDS)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result = {
        "setup": {
            **{"model": model, "size": size, "rank": rank, "loras": 2, "rounds": rounds, "threads": torch.get_num_threads()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            **{"dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "python": platform.python_version()},
        },
        "methods": measure(denoiser, loras(denoiser, 2, rank), arguments.only or tuple(RULES), rounds, progress),
    }
    print(json.dumps(result, indent=2) if arguments.json else _text(result))
    return 0


def measure(
    denoiser: Denoiser, branches: Loras, names: Sequence[str], rounds: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """By method: plain_seconds, seconds, ratio, range of the turns' ratios, before; or refused, a sentence.

    One method after the other, each in turns with plain steps of its own, so that no two have their matrices in memory at once.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        progress(f"{name} ...")
        try:
            session = branches.session(denoiser, FuseSettings(method=name))
        except FusionError as reason:
            found[name] = {"refused": str(reason)}
            continue
        prepare(denoiser, branches, session)
        times = timed(denoiser, {"plain": denoiser.run, name: way(denoiser, session)}, rounds)
        session.release()
        rule = RULES[name]
        found[name] = {
            "plain_seconds": times["median_seconds"]["plain"],
            "seconds": times["median_seconds"][name],
            "ratio": times["ratio_to_plain"][name],
            "range": times["ratio_range"][name],
            "before": "a picture with each side alone" if rule.compares else "a step with each side alone" if rule.calibrates else "",
        }
    return found


@torch.no_grad()
def prepare(denoiser: Denoiser, branches: Loras, session: FusionSession) -> None:
    """What a host tells a method before the first step."""
    if session.calibrates:
        seen = []
        for side in ("subject", "style"):
            showing = branches.session(denoiser, session.settings)
            showing.show(side)
            denoiser.step(showing)
            seen.append(showing.shown)
            showing.release()
        session.learn(*seen)


def _text(result: dict[str, Any]) -> str:
    """Markdown."""
    setup = result["setup"]
    rank = f", rank {setup['rank']}" if setup["rank"] else ""
    lines = [
        f"{setup['model']}, {setup['size']} px, two LoRAs{rank}; {setup['device']}, {setup['threads']} threads, {setup['dtype']}, torch "
        f"{setup['torch']}, Python {setup['python']}; {setup['rounds']} turns",
        "",
        "| `method` | times plain | range | s / step | plain, s / step | before a picture |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in result["methods"].items():
        if "refused" in own:
            lines.append(f"| `{name}` | | | | | {own['refused']} |")
            continue
        low, high = own["range"]
        seconds = f"{own['seconds']:.3f} | {own['plain_seconds']:.3f}"
        lines.append(f"| `{name}` | {own['ratio']:.3f} | {low:.3f} - {high:.3f} | {seconds} | {own['before']} |")
    return "\n".join(lines)


__all__ = ["add_arguments", "measure", "prepare", "run"]
