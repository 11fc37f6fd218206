"""bench fusion: one denoiser step of a real-size U-Net with random weights: plain, direct, fused, and the paper taken literally."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion import FusionSession, Rows
from ..lora import LoraFile, read_lora
from ..settings import FuseSettings
from .literal import literally_fused

# The published U-Net configurations of Stable Diffusion 1.5 and SDXL base 1.0 (their model cards' unet/config.json).
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_DEFAULT_SIZE = {"sd15": 256, "sdxl": 512}


def default_size(model: str) -> int:
    """Pixels."""
    return _DEFAULT_SIZE[model]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(CONFIGURATIONS), default="sd15", help="whose U-Net to build (default: sd15)")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the image in pixels (default: 256 for sd15, 512 for sdxl)")
    parser.add_argument("--rank", type=int, default=16, help="rank of both LoRAs (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each way takes (default: 5)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        import diffusers
    except ImportError:
        print("The benchmark builds its U-Net with diffusers, which is not installed here: pip install diffusers", file=sys.stderr)
        return 2
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = arguments.size or default_size(arguments.model)
    if size % 64 or size <= 0 or arguments.rank <= 0 or arguments.rounds <= 0:
        print("--size must be a positive multiple of 64, --rank and --rounds positive.", file=sys.stderr)
        return 2
    progress = (lambda text: None) if arguments.json else (lambda text: print(text, file=sys.stderr, flush=True))
    progress(f"Building a {arguments.model} U-Net with random weights ...")
    torch.manual_seed(0)
    with torch.device(device):
        unet = (
            diffusers.UNet2DConditionModel(sample_size=size // 8, **CONFIGURATIONS[arguments.model]).to(dtype).eval().requires_grad_(False)
        )
    inputs = unet_inputs(arguments.model, size, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        subject, style = (
            random_lora(unet, arguments.rank, seed, Path(folder) / f"{name}.safetensors") for seed, name in ((1, "subject"), (2, "style"))
        )
    result = measure(unet, inputs, subject, style, arguments.rounds, progress)
    result["setup"] = {
        "model": arguments.model,
        "size": size,
        "rank": arguments.rank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def measure(
    unet: nn.Module, inputs: dict[str, Any], subject: LoraFile, style: LoraFile, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time one step each way, in turns. Returns seconds (all turns, medians) and ratios of medians to the plain step's."""
    rows = Rows((0, 0), (False, True), 1)
    fused = FusionSession(unet, subject, style, FuseSettings())
    direct = FusionSession(unet, subject, style, FuseSettings(method="direct"))

    def session_step(session: FusionSession) -> None:
        session.begin()
        with session.attached(rows):
            unet(**inputs)

    def literal_step() -> float:
        with literally_fused(fused) as seconds_of_merging:
            _wait(inputs)
            started = time.perf_counter()
            unet(**inputs)
            _wait(inputs)
            return time.perf_counter() - started - sum(seconds_of_merging)

    def timed(step: Callable[[], Any]) -> Callable[[], float]:
        def run_once() -> float:
            _wait(inputs)
            started = time.perf_counter()
            step()
            _wait(inputs)
            return time.perf_counter() - started

        return run_once

    ways: dict[str, Callable[[], float]] = {
        "plain": timed(lambda: unet(**inputs)),
        "direct": timed(lambda: session_step(direct)),
        "fused": timed(lambda: session_step(fused)),
        "literal": literal_step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(-1, rounds):  # the first turn warms up: it moves branches to the device
            progress("Warming up ..." if turn < 0 else f"Turn {turn + 1} of {rounds} ...")
            for name, step in ways.items():
                elapsed = step()
                if turn >= 0:
                    seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    per_turn = {name: [s / p for s, p in zip(values, seconds["plain"])] for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_seconds": medians,
        "ratio_to_plain": {name: statistics.median(values) for name, values in per_turn.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in per_turn.items()},
        "literal_over_fused": statistics.median(li / fu for li, fu in zip(seconds["literal"], seconds["fused"])),
        "layers": len(fused.report.matched),
    }


def _wait(inputs: dict[str, Any]) -> None:
    if inputs["sample"].device.type == "cuda":
        torch.cuda.synchronize()


def unet_inputs(model: str, size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A batch of one image: an unconditional and a conditional row."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs: dict[str, Any] = {
        "sample": noise(2, 4, size // 8, size // 8),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": noise(2, 77, CONFIGURATIONS[model]["cross_attention_dim"]),
    }
    if model == "sdxl":
        inputs["added_cond_kwargs"] = {
            "text_embeds": noise(2, 1280),
            "time_ids": torch.full((2, 6), float(size), device=device, dtype=dtype),
        }
    return inputs


def random_lora(unet: nn.Module, rank: int, seed: int, path: Path) -> LoraFile:
    """A kohya LoRA on the linear layers and 1 x 1 convolutions of every transformer block, as its trainer makes by default."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        weight = getattr(module, "weight", None)
        if ".attentions." not in name or weight is None or weight.dim() < 2:
            continue
        out, width, *kernel = weight.shape
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = (torch.randn(rank, width, *kernel, generator=generator) / width**0.5).half()
        tensors[f"{key}.lora_up.weight"] = (0.05 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)).half()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, str(path))
    return read_lora(path)


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _table(result: dict[str, Any]) -> str:
    setup = result["setup"]
    lines = [
        f"{setup['model']}, {setup['size']} px, rank {setup['rank']}, {result['layers']} layers fused; {setup['device']}, "
        f"{setup['threads']} threads, {setup['dtype']}, torch {setup['torch']}, Python {setup['python']}",
        f"{'':10}{'s / step':>10}{'x plain':>10}{'range':>16}",
    ]
    for name, seconds in result["median_seconds"].items():
        low, high = result["ratio_range"][name]
        lines.append(f"{name:10}{seconds:10.3f}{result['ratio_to_plain'][name]:10.3f}{f'{low:.3f}-{high:.3f}':>16}")
    lines.append(f"fused is {result['literal_over_fused']:.2f} x faster than the literal form")
    return "\n".join(lines)
