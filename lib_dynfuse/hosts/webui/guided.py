"""The guidance of one pass in a WebUI: every denoiser call's prediction is corrected before the sampler sees it.

What the call's numbers mean comes with it (facts.SamplingFacts); how to take gradients through the WebUI's own models differs between the
hosts (roles.Samplers).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...guidance.correction import Level
from ...guidance.decode import SMALL_PIXELS, LatentDecoder, VaeDecoder, private_copy
from ...guidance.encoders import Encoders
from ...guidance.guide import GuidanceRecord, Guide
from ...guidance.references import Reference
from ...guidance.score import Targets
from ...memory import is_out_of_memory
from ...settings import FuseSettings
from .facts import SamplingFacts
from .forge_autograd import has_backward
from .roles import NotGuidable, Samplers
from .seams import argument

log = logging.getLogger(__name__)

# Side of the picture that is decoded when the memory is too short for the usual one.
_SMALLEST_PIXELS = 128

# What autograd says about operations that other extensions may bring into the denoiser, in lower case.
_NOT_DIFFERENTIABLE = ("inference tensor", "requires grad", "in-place operation", "inplace operation", "overwritten")

# Bytes per decoded pixel and image that a decoder and its gradient take. docs/benchmarks.md: 1,688 MiB for a VAE and 352 MiB for TAESD
# at 256 x 256 in float32; half of it for the VAE, which runs in 16 bit where memory is short.
_VAE_BYTES_PER_PIXEL = 14 << 10
_TAESD_BYTES_PER_PIXEL = 6 << 10


@dataclass
class Decoders:
    """The copies of the VAE that a job has made, by what they are of. Gone with the job."""

    _copies: dict[object, nn.Module] = field(default_factory=dict)

    def copy_of(self, identity: object, module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The copy of this module in that dtype on that device."""
        key = (identity, dtype, device)
        if key not in self._copies:
            self._copies[key] = private_copy(module, dtype, device)
        return self._copies[key]

    def release(self) -> None:
        """Let go of them."""
        self._copies.clear()


class GuidedPass:
    """One pass's guidance. references: as they were found or made."""

    def __init__(self, samplers: Samplers, settings: FuseSettings, encoders: Encoders, references: Sequence[Reference], decoders: Decoders):
        self.references = list(references)
        self.settings = settings
        self._samplers = samplers
        self._encoders: Encoders | None = encoders
        self._decoders = decoders
        self._guide: Guide | None = None
        self._record: GuidanceRecord | None = None
        self._notes: list[str] = []
        self._stopped = False

    @property
    def encoders(self) -> Encoders | None:
        """None when the pass is over."""
        return self._encoders

    @property
    def record(self) -> GuidanceRecord | None:
        """The similarities over the steps so far; None before the first call. Asks the device."""
        if self._guide is not None:
            self._record = self._guide.record
        return self._record

    @property
    def notes(self) -> list[str]:
        """Sentences that the user should see."""
        record = self.record
        return [*self._notes, *(record.notes if record is not None else [])]

    def denoise(
        self,
        facts: SamplingFacts,
        cfg_denoiser: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: Callable[[], None],
    ) -> Any:
        """One CFGDenoiser.forward, corrected. call: it. again: to be called before it is called a second time."""
        if self._stopped:
            return call(*args, **kwargs)
        guide = self._guide_for(cfg_denoiser, facts)
        if guide is None or facts.level is None or not guide.wants(facts.sigma):
            return call(*args, **kwargs)
        if guide.gradient == "exact":
            step = cfg_denoiser.step
            try:
                return self._exact(guide, facts, facts.level, cfg_denoiser, call, args, kwargs)
            except RuntimeError as error:
                reason = _why_not_exact(error)
                if reason is None:
                    raise
            # Not in the except clause: the exception's frames hold on to the memory that ran out.
            guide.abandon_exact(reason)
            cfg_denoiser.step = step
            again()
        prediction = call(*args, **kwargs)
        if self._stopped:  # the refiner took over in this call
            return prediction
        shift = guide.fast_shift(facts.denoised(facts.latent, prediction), facts.level, facts.mask)
        return facts.shifted(prediction, shift)

    def stop(self, reason: str) -> None:
        """No guidance from now on. reason: a sentence for the user."""
        if not self._stopped:
            self._stopped = True
            self._notes.append(reason)

    def finish(self) -> None:
        """The pass is over: keep the record only."""
        self._record = self.record
        self._guide = None
        self._encoders = None

    def _exact(
        self,
        guide: Guide,
        facts: SamplingFacts,
        level: Level,
        cfg_denoiser: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self._samplers.differentiable(cfg_denoiser, args, kwargs) as (args, kwargs):
            x = argument(args, kwargs, 0, "x")
            prediction = call(*args, **kwargs)
            shift = guide.exact_shift(facts.denoised(x, prediction), x, level, unit=facts.unit, mask=facts.mask)
            prediction = prediction.detach()
        return facts.shifted(prediction, shift)

    def _guide_for(self, cfg_denoiser: Any, facts: SamplingFacts) -> Guide | None:
        if self._guide is None:
            if facts.schedule is None:
                self.stop("The picture was not guided: DynFuse does not know the noise levels of this sampler.")
                return None
            assert self._encoders is not None
            device = facts.latent.device
            if facts.latent.dim() == 5 and facts.latent.shape[2] > 1:
                self.stop("The picture was not guided: it is a video, of which the references are single pictures.")
                return None
            try:
                chain = self._chain(cfg_denoiser, device)
                targets = _targets(self.references).to(device)
                encoders = self._encoders.to(device)
            except NotGuidable as reason:
                self.stop(str(reason))
                return None
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.stop("The picture was not guided: there was no room for the decoder and the encoders.")
                return None
            self._guide = Guide(self.settings, targets, encoders, chain, facts.schedule)
            if self.settings.gradient == "exact" and getattr(cfg_denoiser.p, "refiner_checkpoint_info", None) is not None:
                self._guide.abandon_exact("a refiner takes over in this job")
            attention = self._samplers.attention() if self._guide.gradient == "exact" else None
            if attention is not None and not has_backward(attention, device):
                self._guide.abandon_exact("the WebUI's attention kernel has no backward pass")
        return self._guide

    def _chain(self, cfg_denoiser: Any, device: torch.device) -> list[LatentDecoder]:
        """The chosen decoder, then smaller ones."""
        vae = self._samplers.vae(cfg_denoiser)
        dtype = _decoder_dtype(vae.dtype, device)
        module = self._decoders.copy_of(vae.identity, vae.decoder, dtype, device)

        def small(pixels: int, name: str) -> LatentDecoder:
            return VaeDecoder(module, scale=vae.scale, shift=vae.shift, packing=vae.packing, dtype=dtype, pixels=pixels, name=name)

        chain = [small(SMALL_PIXELS, "vae-small"), small(_SMALLEST_PIXELS, f"vae-small at {_SMALLEST_PIXELS} pixels")]
        if self.settings.decoder == "vae":
            return [VaeDecoder(module, scale=vae.scale, shift=vae.shift, packing=vae.packing, dtype=dtype), *chain]
        if self.settings.decoder == "taesd":
            taesd = self._taesd(cfg_denoiser, device)
            return [taesd, *chain] if taesd is not None else chain
        return chain

    def _taesd(self, cfg_denoiser: Any, device: torch.device) -> LatentDecoder | None:
        try:
            module = self._samplers.taesd_decoder(cfg_denoiser)
            reason = "this WebUI has none for this model"
        except OSError as error:  # also what a download raises
            module, reason = None, f"the WebUI could not get its file: {getattr(error, 'reason', error)}"
        except Exception as error:
            module, reason = None, str(error) or type(error).__name__
        if module is None:
            self._notes.append(f"The decoder taesd could not be used ({reason.rstrip('.')}); vae-small was used instead.")
            return None
        try:
            return VaeDecoder(private_copy(module, torch.float32, device), name="taesd")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._notes.append("Memory ran out for the decoder taesd; vae-small was used instead.")
        return None


def _why_not_exact(error: RuntimeError) -> str | None:
    """A clause for the user, where the job can go on with the fast gradient; None for any other error."""
    if is_out_of_memory(error):
        return "the memory was too short for a gradient through the denoiser"
    text = str(error).lower()
    if any(sign in text for sign in _NOT_DIFFERENTIABLE):
        return "another extension's part of the denoiser cannot be differentiated"
    return None


def memory_needed(settings: FuseSettings, encoders: Encoders, width: int, height: int, images: int) -> int:
    """Bytes that a guided step takes on the device beside the model; for gradient fast. width, height: of the picture, in pixels."""
    whole = width * height
    small = min(whole, SMALL_PIXELS**2)
    decoding = {"vae": whole * _VAE_BYTES_PER_PIXEL, "taesd": whole * _TAESD_BYTES_PER_PIXEL}.get(
        settings.decoder, small * _VAE_BYTES_PER_PIXEL
    )
    # The encoders' own activations: about as much as their weights for one picture.
    return images * (decoding + encoders.memory) + encoders.memory


def _targets(references: Sequence[Reference]) -> Targets:
    by_side = {reference.side: reference.embeddings for reference in references}
    # A side that is not needed is compared with by no term.
    any_side = next(iter(by_side.values()))
    return Targets.of(by_side.get("subject", any_side), by_side.get("style", any_side))


def _decoder_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float16 overflows in SDXL's VAE, and its gradients underflow."""
    if device.type == "cpu" or dtype == torch.float32:
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


__all__ = ["Decoders", "GuidedPass", "memory_needed"]
