"""bench guidance: what the latent's correction costs in time and memory, as a share of a fused step of a real-size U-Net."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion import FusionSession
from ..guidance.correction import Schedule
from ..guidance.decode import SMALL_PIXELS, LatentDecoder, VaeDecoder
from ..guidance.encoders import Encoders
from ..guidance.guide import Guide
from ..guidance.score import Targets, score, similarities
from ..settings import FuseSettings
from . import networks, operations
from .denoisers import CONFIGURATIONS, ROWS, default_size, processor, random_lora, unet_inputs
from .memory import peak_above_before

_CFG_SCALE = 7.0
# A step in the middle of fifty, in sigma.
_LEVELS = tuple(14.6 * (0.03 / 14.6) ** (step / 49) for step in range(50))
_SIGMA = _LEVELS[25]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(CONFIGURATIONS), default="sd15", help="whose U-Net and VAE to build (default: sd15)")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the image in pixels (default: 256 for sd15, 512 for sdxl)")
    parser.add_argument("--rank", type=int, default=16, help="rank of both LoRAs (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each way takes (default: 3)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--without-exact", action="store_true", help="leave the exact gradient out, which needs by far the most memory")
    parser.add_argument("--operations", action="store_true", help="count operations and run nothing: any model and size, on any machine")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        import diffusers
        import open_clip  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(
            f"The benchmark builds its networks with {error.name}, which is not installed here: pip install {error.name}", file=sys.stderr
        )
        return 2
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = arguments.size or default_size(arguments.model)
    if size % 64 or size <= 0 or arguments.rank <= 0 or arguments.rounds <= 0:
        print("--size must be a positive multiple of 64, --rank and --rounds positive.", file=sys.stderr)
        return 2
    if arguments.operations:
        counted = operations.count(arguments.model, size)
        print(json.dumps(counted, indent=2) if arguments.json else operations.table(counted))
        return 0
    progress = (lambda text: None) if arguments.json else (lambda text: print(text, file=sys.stderr, flush=True))
    progress(f"Building {arguments.model}'s U-Net and VAE, TAESD, CLIP and DINO with random weights ...")
    load_before = _load()
    torch.manual_seed(0)
    with torch.device(device):
        unet = (
            diffusers.UNet2DConditionModel(sample_size=size // 8, **CONFIGURATIONS[arguments.model]).to(dtype).eval().requires_grad_(False)
        )
    inputs = unet_inputs(arguments.model, size, device, dtype)
    # SDXL's VAE leaves float16's range.
    vae_dtype = torch.bfloat16 if device.type == "cuda" and arguments.model == "sdxl" else dtype
    vae = networks.vae_decoder(device, vae_dtype)
    scale = networks.SCALING[arguments.model]
    decoders = [
        VaeDecoder(vae, scale=scale, dtype=vae_dtype, pixels=SMALL_PIXELS, name="vae-small"),
        VaeDecoder(networks.taesd_decoder(device, dtype), dtype=dtype, name="taesd"),
    ]
    if size > SMALL_PIXELS:  # else "vae" is the very same
        decoders.append(VaeDecoder(vae, scale=scale, dtype=vae_dtype, name="vae"))
    with tempfile.TemporaryDirectory() as folder:
        subject, style = (
            random_lora(unet, arguments.rank, seed, Path(folder) / f"{name}.safetensors") for seed, name in ((1, "subject"), (2, "style"))
        )
    work = GuidedStep(unet, inputs, FusionSession(unet, subject, style, FuseSettings()), networks.encoders(device))
    result = measure(work, decoders, arguments.rounds, progress, exact=not arguments.without_exact)
    result["setup"] = {
        "model": arguments.model,
        "size": size,
        "rank": arguments.rank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "clock": "processor time" if work.by_processor_time else "wall",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "vae_dtype": str(vae_dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "load_before_and_after": [load_before, _load()],
    }
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


@dataclass
class GuidedStep:
    """One denoiser step of one image with a negative prompt, fused, and its correction."""

    unet: nn.Module
    inputs: dict[str, Any]
    session: FusionSession
    encoders: Encoders

    def guide(self, decoder: LatentDecoder, gradient: str) -> Guide:
        settings = FuseSettings(guidance=True, gradient=gradient)
        return Guide(settings, self.targets(), self.encoders, [decoder], Schedule("vp", _LEVELS))

    def targets(self) -> Targets:
        generator = torch.Generator().manual_seed(0)
        size = self.encoders.clip.size
        pictures = torch.rand(2, 3, size, size, generator=generator).mul(2).sub(1)
        embeddings = self.encoders.embed(pictures)
        return Targets(embeddings.clip[0], embeddings.clip[1], embeddings.dino[1])

    @torch.no_grad()
    def unguided(self) -> Tensor:
        """D, (1, 4, h, w) float32."""
        return self._denoised(self.inputs["sample"])

    def exact(self, guide: Guide, after: Callable[[], None] = lambda: None) -> Tensor:
        """The shift of D. after: called when the denoiser has run."""
        with torch.enable_grad():
            leaf = self.inputs["sample"][:1].detach().clone().requires_grad_()
            denoised = self._denoised(torch.cat([leaf, leaf]))
            after()
            return guide.exact_shift(denoised, leaf, guide.schedule.level(_SIGMA), unit=(1 + _SIGMA**2) ** -0.5)

    def _denoised(self, rows: Tensor) -> Tensor:
        self.session.begin()
        with self.session.attached(ROWS):
            uncond, cond = self.unet(**{**self.inputs, "sample": rows}).sample.chunk(2)
        noise = uncond + _CFG_SCALE * (cond - uncond)
        return rows[:1].float() * (1 + _SIGMA**2) ** 0.5 - _SIGMA * noise.float()

    def wait(self) -> float:
        """The time, in seconds, once the device has done everything."""
        if self.inputs["sample"].device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.by_processor_time else time.perf_counter()

    @property
    def by_processor_time(self) -> bool:
        """On one thread of a CPU other programs then do not count. Of several threads it would count how long they wait for each other."""
        return self.inputs["sample"].device.type == "cpu" and torch.get_num_threads() == 1

    def parts(self, decoder: LatentDecoder, denoised: Tensor) -> dict[str, float]:
        """Seconds of a fast correction's stages, which are Guide's own, one by one."""
        targets = self.targets()
        with torch.enable_grad():
            latent = denoised.detach().clone().requires_grad_()
            moments = [self.wait()]
            pictures = decoder(latent)
            moments.append(self.wait())
            seen = pictures.detach().requires_grad_()
            clip = similarities(seen, targets, self.encoders, (True, True, False))
            moments.append(self.wait())
            dino = similarities(seen, targets, self.encoders, (False, False, True))
            moments.append(self.wait())
            (gradient,) = torch.autograd.grad(score(clip + dino, (1 / 3, 1 / 3, 1 / 3)).sum(), seen)
            moments.append(self.wait())
            torch.autograd.grad(pictures, latent, gradient)
            moments.append(self.wait())
        names = ("decode forward", "CLIP forward", "DINO forward", "encoders backward", "decode backward")
        return {name: later - earlier for name, earlier, later in zip(names, moments, moments[1:])}


def measure(
    work: GuidedStep, decoders: Iterable[LatentDecoder], rounds: int, progress: Callable[[str], None], *, exact: bool = True
) -> dict[str, Any]:
    """Time each way in turns. Returns seconds, added shares of that turn's unguided step, stages, and peak memory in bytes.

    decoders: the first is the one that exact uses. fast: the correction alone was timed, and is what comes on top of a step. exact: the
    whole guided step was, less the unguided one.
    """
    chosen: dict[str, LatentDecoder] = {decoder.name: decoder for decoder in decoders}
    guides = {f"fast/{name}": work.guide(decoder, "fast") for name, decoder in chosen.items()}
    level = next(iter(guides.values())).schedule.level(_SIGMA)
    smallest = next(iter(chosen.values()))
    seconds: dict[str, list[float]] = {name: [] for name in ("unguided", *guides, *(["exact"] if exact else []))}
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    through: dict[str, list[float]] = {}

    for turn in range(-1, rounds):  # the first turn warms up
        progress("Warming up ..." if turn < 0 else f"Turn {turn + 1} of {rounds} ...")
        elapsed: dict[str, float] = {}
        started = work.wait()
        denoised = work.unguided()
        elapsed["unguided"] = work.wait() - started
        for name, guide in guides.items():
            started = work.wait()
            guide.fast_shift(denoised, level)
            elapsed[name] = work.wait() - started
        if exact:
            moments = [work.wait()]
            work.exact(work.guide(smallest, "exact"), partial(_note_time, moments, work))
            moments.append(work.wait())
            elapsed["exact"] = moments[2] - moments[0]
        if turn < 0:
            continue
        for name, value in elapsed.items():
            seconds[name].append(value)
        if exact:
            through.setdefault("denoiser forward with graph", []).append(moments[1] - moments[0])
            through.setdefault("denoiser backward", []).append(moments[2] - moments[1] - elapsed[f"fast/{smallest.name}"])
        if turn in (0, rounds - 1):
            for name, decoder in chosen.items():
                for stage, value in work.parts(decoder, denoised).items():
                    stages[name].setdefault(stage, []).append(value)

    progress("Peak memory ...")
    device = denoised.device
    memory = {"unguided": peak_above_before(work.unguided, device)}
    for name, guide in guides.items():
        memory[name] = peak_above_before(partial(guide.fast_shift, denoised, level), device)
    if exact:
        memory["exact"] = peak_above_before(partial(work.exact, work.guide(smallest, "exact")), device)
    added = {
        name: [(s - p if name == "exact" else s) / p for s, p in zip(values, seconds["unguided"])]
        for name, values in seconds.items()
        if name != "unguided"
    }
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "added_share": {name: statistics.median(values) for name, values in added.items()},
        "added_share_range": {name: [min(values), max(values)] for name, values in added.items()},
        "stages_seconds": {name: {s: statistics.median(v) for s, v in each.items()} for name, each in stages.items()},
        "exact_stages_seconds": {name: statistics.median(values) for name, values in through.items()},
        "peak_bytes": memory,
        "encoders_bytes": work.encoders.memory,
    }


def _note_time(moments: list[float], work: GuidedStep) -> None:
    moments.append(work.wait())


def _load() -> float | None:
    """The machine's load average over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _table(result: dict[str, Any]) -> str:
    setup = result["setup"]
    load = setup["load_before_and_after"]
    lines = [
        f"{setup['model']}, {setup['size']} px, rank {setup['rank']}; {setup['device']}, {setup['threads']} threads, {setup['dtype']} "
        f"(VAE {setup['vae_dtype']}, encoders float32), torch {setup['torch']}, diffusers {setup['diffusers']}, Python {setup['python']}; "
        f"{setup['clock']}; load {load[0]} before, {load[1]} after",
        f"{'':16}{'s':>9}{'added':>9}{'range':>17}{'peak memory':>14}",
    ]
    for name, elapsed in result["median_seconds"].items():
        share = result["added_share"].get(name)
        low, high = result["added_share_range"].get(name, (None, None))
        lines.append(
            f"{name:16}{elapsed:9.3f}"
            + (f"{share:9.1%}{f'{low:.1%} - {high:.1%}':>17}" if share is not None else " " * 26)
            + f"{_mebibytes(result['peak_bytes'][name]):>14}"
        )
    lines.append("Peak memory: beyond what was in use before the step; the encoders' weights are " + _mebibytes(result["encoders_bytes"]))
    for name, stages in result["stages_seconds"].items():
        lines.append(f"fast/{name}: " + ", ".join(f"{stage} {elapsed:.3f} s" for stage, elapsed in stages.items()))
    if result["exact_stages_seconds"]:
        lines.append("exact: " + ", ".join(f"{stage} {elapsed:.3f} s" for stage, elapsed in result["exact_stages_seconds"].items()))
    return "\n".join(lines)


def _mebibytes(count: int | None) -> str:
    return "unknown here" if count is None else f"{count / (1 << 20):.0f} MiB"
