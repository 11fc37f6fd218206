"""Guidance inside a diffusers pipeline: the correction of each step, between its denoiser and its scheduler.

The pipelines compute the model output, apply classifier-free guidance to it, and hand it to scheduler.step with the sample. There D is
worked out of both, corrected, and turned back into a model output: schedulers that keep a history of outputs keep the corrected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.decode import SMALL_PIXELS, LatentDecoder, VaeDecoder, decoding_half, private_copy
from ...guidance.encoders import Encoders
from ...guidance.guide import GuidanceRecord, Guide
from ...guidance.references import ReferenceCache
from ...guidance.score import Targets
from ...guidance.weights import EncoderSources, Progress
from ...home import encoders_folder, references_folder
from ...memory import is_out_of_memory
from ...settings import FuseSettings
from ..wrapping import wrapped
from .schedulers import SchedulerStep, SchedulerSteps, packed, unpacking


@dataclass(frozen=True)
class GuidanceSources:
    """What a guided pipeline takes from outside.

    encoders: where they come from, or both ready to use. cache: keeps the references. taesd: a diffusers AutoencoderTiny for the
    pipeline's latents, for the decoder "taesd". go_on: make the picture without guidance, with a note, where the encoders cannot be
    had, instead of raising EncoderError. progress: of their download.
    """

    encoders: EncoderSources | Encoders = field(default_factory=lambda: EncoderSources(encoders_folder()))
    cache: ReferenceCache = field(default_factory=lambda: ReferenceCache(references_folder()))
    taesd: nn.Module | None = None
    go_on: bool = False
    progress: Progress | None = None


class GuidedCall:
    """The guidance of one call of a pipeline. One image is one row of the latent, and has as many rows of the denoiser as CFG needs."""

    def __init__(
        self,
        pipeline: Any,
        denoiser: nn.Module,
        settings: FuseSettings,
        targets: Targets,
        encoders: Encoders,
        decoders: Sequence[LatentDecoder],
    ):
        """decoders: as guidance_decoders makes them. Raises SchedulerError where the pipeline's scheduler is not known."""
        self._pipeline = pipeline
        self._denoiser = denoiser
        self._steps = SchedulerSteps(pipeline.scheduler)
        self._make_guide = lambda: Guide(settings, targets, encoders, decoders, self._steps.schedule())
        self._made: Guide | None = None
        self._encoders = encoders
        self._leaf: Tensor | None = None
        self._calls = 0
        self._token_rows = 0

    @property
    def record(self) -> GuidanceRecord | None:
        """What was done; None before the first step. Waits for the device."""
        return self._made.record if self._made is not None else None

    @property
    def _guide(self) -> Guide:
        """Made at the first step: only then the scheduler knows its levels."""
        if self._made is None:
            self._made = self._make_guide()
        return self._made

    @contextmanager
    def during_denoising(self) -> Iterator[None]:
        """Correct what the scheduler is handed, for as long as the with-block lasts."""
        grad_enabled = torch.is_grad_enabled()
        try:
            with ExitStack() as stack:
                stack.enter_context(_without_weight_gradients(self._denoiser, self._pipeline.vae))
                stack.enter_context(wrapped(self._pipeline.scheduler, "step", self._step))
                yield
        finally:
            torch.set_grad_enabled(grad_enabled)
            self._leaf = None
            self._encoders.to("cpu")

    def denoise(self, forward: Callable[..., Any], latent: Tensor, arguments: dict[str, Any], images: int) -> Any:
        """Call forward(latent), with a graph from the latent to the coming D where the exact gradient is wanted.

        latent: the denoiser's input, the rows of all images once or twice. arguments: its others, by name.
        """
        if (ids := arguments.get("img_ids")) is not None and not self._token_rows:
            self._token_rows = int(ids[..., 1].max()) + 1  # Flux: (tokens, 3), the second column is the row
        timestep = self._pipeline.scheduler.timesteps[self._calls]
        if self._guide.gradient != "exact" or not self._guide.wants(self._steps.level(timestep)):
            return forward(latent)
        leaf = self._as_picture(latent[:images].detach()).clone().requires_grad_()
        grad_enabled = torch.is_grad_enabled()
        # Stays on until the scheduler is reached: the pipeline applies classifier-free guidance on the way.
        torch.set_grad_enabled(True)
        try:
            rows = self._as_rows(leaf)
            output = forward(torch.cat([rows] * (latent.shape[0] // images)))
        except (RuntimeError, MemoryError) as error:
            torch.set_grad_enabled(grad_enabled)
            if not is_out_of_memory(error):
                raise
        else:
            self._leaf = leaf
            return output
        # Not in the except clause: the exception's frames hold on to the memory that ran out.
        if latent.device.type == "cuda":
            torch.cuda.empty_cache()
        self._guide.abandon_exact("memory ran out in the denoiser with gradients")
        return forward(latent)

    def _step(self, step: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        leaf, self._leaf = self._leaf, None
        if leaf is not None:
            torch.set_grad_enabled(False)
        self._calls += 1
        coming = self._steps.step(timestep, kwargs.get("eta", 0.0))
        corrected = output.detach()
        if self._guide.wants(coming.level.s):
            corrected = self._corrected(output, sample, coming, leaf)
        del output, leaf
        return step(corrected, timestep, sample, *args, **kwargs)

    def _corrected(self, output: Tensor, sample: Tensor, step: SchedulerStep, leaf: Tensor | None) -> Tensor:
        if leaf is not None and not output.requires_grad:
            self._guide.abandon_exact("something in the pipeline keeps no gradient")
        if leaf is None or self._guide.gradient == "fast":
            denoised = self._as_picture(step.denoised(sample, output.detach()))
            shift = self._guide.fast_shift(denoised, step.level)
        else:
            with torch.enable_grad():
                moved = sample + self._as_rows(leaf - leaf.detach()) / step.input_scale  # the sample, to the bit, with a graph
                denoised = self._as_picture(step.denoised(moved, output))
            unit = 1.0 if step.level.kind == "flow" else (1 + step.level.s**2) ** -0.5
            shift = self._guide.exact_shift(denoised, leaf, step.level, unit=unit)
        return step.output(output.detach(), self._as_rows(shift))

    def _as_picture(self, rows: Tensor) -> Tensor:
        return unpacking(self._token_rows)(rows) if self._token_rows else rows

    def _as_rows(self, latent: Tensor) -> Tensor:
        return packed(latent) if self._token_rows else latent


class NoDecoderError(RuntimeError):
    """The decoder that was asked for is not there. One sentence for the user."""


def guidance_decoders(pipeline: Any, choice: str, taesd: nn.Module | None) -> list[LatentDecoder]:
    """The decoder of FuseSettings.decoder, and smaller ones to go on with when memory runs out. Raises NoDecoderError."""
    if choice == "taesd" and taesd is None:
        raise NoDecoderError("The decoder taesd is not part of a pipeline: name a folder with one (--taesd), or use vae-small.")
    vae: Any = pipeline.vae if choice != "taesd" else taesd
    network, dtype = _differentiable_decoder(vae, pipeline._execution_device)
    smallest = SMALL_PIXELS // 2
    small: dict[str, int | None] = {"vae-small": SMALL_PIXELS, f"vae-small at {smallest} pixels": smallest}
    sizes: dict[str, dict[str, int | None]] = {
        "vae": {"vae": None, **small},
        "vae-small": small,
        "taesd": {"taesd": None, f"taesd at {SMALL_PIXELS} pixels": SMALL_PIXELS},
    }
    return [
        VaeDecoder(
            network,
            scale=vae.config.scaling_factor,
            shift=getattr(vae.config, "shift_factor", None) or 0.0,
            dtype=dtype,
            pixels=pixels,
            factor=2 ** (len(vae.config.block_out_channels) - 1),
            name=name,
        )
        for name, pixels in sizes[choice].items()
    ]


def _differentiable_decoder(vae: Any, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """The VAE's decoding part, from its own units to pictures, on that device and in a type that it can be computed in."""
    weight = next(vae.decoder.parameters())
    dtype = weight.dtype
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    elif dtype == torch.float16 and getattr(vae.config, "force_upcast", False):  # SDXL's leaves float16's range
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    network = decoding_half(getattr(vae, "post_quant_conv", None), vae.decoder)
    if dtype != weight.dtype or device != weight.device:  # offloaded, or not to be computed in its own type
        network = private_copy(network, dtype, device)
    return network, dtype


@contextmanager
def _without_weight_gradients(*networks: nn.Module) -> Iterator[None]:
    """Only the latent's gradient is wanted: what the weights' would need is not kept."""
    trained = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


__all__ = ["GuidanceSources", "GuidedCall", "NoDecoderError", "guidance_decoders"]
