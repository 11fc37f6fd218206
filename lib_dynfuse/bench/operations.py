"""Operations of a guided step, counted without running anything: shares that no machine's load or kernels colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..guidance.decode import SMALL_PIXELS
from . import networks
from .denoisers import CONFIGURATIONS, unet_inputs

_META = torch.device("meta")


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions that `work` runs (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def there_and_back(network: Callable[[Tensor], Tensor], *shape: int) -> int:
    """Operations of a network and of the way back to its input."""
    # Not a leaf: the counter's hooks on a module's inputs refuse those from torch 2.11 on.
    inputs = torch.empty(*shape, device=_META, requires_grad=True).clone()

    def work() -> None:
        output = network(inputs)
        torch.autograd.grad(output, inputs, torch.empty_like(output))

    return operations(work)


def count(model: str, size: int) -> dict[str, Any]:
    """Operations of an unguided step (a conditional and an unconditional row, without LoRAs), and what each kind of guidance adds."""
    import diffusers

    with _META:
        unet = diffusers.UNet2DConditionModel(sample_size=size // 8, **CONFIGURATIONS[model]).eval().requires_grad_(False)
    inputs = unet_inputs(model, size, _META, torch.float32)

    def denoise(rows: Tensor) -> Tensor:
        return unet(**{**inputs, "sample": rows}).sample

    with torch.no_grad():
        unguided = operations(lambda: denoise(inputs["sample"]))
    both_ways = there_and_back(denoise, *inputs["sample"].shape)
    encoders = networks.encoders(_META)
    seen = sum(there_and_back(encoder.network, 1, 3, encoder.size, encoder.size) for encoder in (encoders.clip, encoders.dino))
    vae, taesd = networks.vae_decoder(_META, torch.float32), networks.taesd_decoder(_META, torch.float32)

    def decoded(network: nn.Module, pixels: int) -> int:
        return there_and_back(network, 1, 4, pixels // 8, pixels // 8) + seen

    small = decoded(vae, min(size, SMALL_PIXELS))
    added = {
        "fast/vae-small": small,
        "fast/taesd": decoded(taesd, size),
        "fast/vae": decoded(vae, size),
        "exact": both_ways - unguided + small,
    }
    return {
        "setup": {"model": model, "size": size, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "operations": {"unguided": unguided, "encoders": seen, **added},
        "added_share": {name: value / unguided for name, value in added.items()},
    }


def table(result: dict[str, Any]) -> str:
    setup = result["setup"]
    lines = [f"{setup['model']}, {setup['size']} px: operations, counted; torch {setup['torch']}, diffusers {setup['diffusers']}"]
    for name, value in result["operations"].items():
        share = result["added_share"].get(name)
        lines.append(f"{name:16}{value / 1e12:9.3f} TFLOP" + (f"{share:9.1%} added" if share is not None else ""))
    return "\n".join(lines)


__all__ = ["count", "operations", "table", "there_and_back"]
