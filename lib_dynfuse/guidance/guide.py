"""The guidance of one sampling pass: per step, what to add to the denoised prediction D (paper, section 4.2, Eqs. 16-20).

D is decoded to pictures, which are compared with the references; the gradient of the score R goes back the same way. Between pictures,
D and the noisy latent the backward passes are separate, so that each stage's memory is free before the next, and so that the
gradient can be brought into float16's range on the way: per pixel it is far below the smallest number that a decoder or a denoiser in
half precision knows. Nothing here waits for the device until the record is read, and nothing keeps a graph.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..memory import is_out_of_memory
from ..settings import FuseSettings
from .correction import Level, Schedule, effective_m, exact_factor, fast_factor, limited
from .decode import LatentDecoder
from .encoders import Encoders, without_autocast
from .score import TERMS, Targets, score, similarities

log = logging.getLogger(__name__)

# Fractions of the steps come from sliders: 0.30000000000000004 is 0.3.
_FRACTION_NOISE = 1e-6


@dataclass
class GuidanceRecord:
    """What the guidance of one pass saw and did.

    steps: the guided steps, from 0 for the pass's first. similarities: (steps, 3, images) float32 on the CPU, in the order of
    score.TERMS, each measured before the step's correction; zero for a term without weight. wanted: the terms with a weight.
    total_steps: steps of the pass, guided or not. bites: how many corrections the limit scaled down, over steps and images.
    non_finite: how many were dropped because their gradient was not finite. notes: sentences for the user.
    """

    steps: list[int]
    similarities: Tensor
    wanted: tuple[bool, bool, bool]
    total_steps: int
    bites: int = 0
    non_finite: int = 0
    notes: list[str] = field(default_factory=list)


def wants_guidance(settings: FuseSettings) -> bool:
    """Whether these settings would ever move anything."""
    return settings.guidance and settings.m > 0 and any(settings.guidance_weights)


class Guide:
    """Guidance of one pass (a hires pass is another) towards one pair of references.

    targets: embeddings of the references. decoders: the chosen one first, then those to go on with when memory runs out. schedule: of
    the whole sampling, also where an image-to-image pass takes only its end. The encoders and the decoder in use are moved to the
    latent's device at the first guided step; the host moves them away when the job ends.
    """

    def __init__(self, settings: FuseSettings, targets: Targets, encoders: Encoders, decoders: Sequence[LatentDecoder], schedule: Schedule):
        if not decoders:
            raise ValueError("guidance needs a decoder")
        self.settings = settings
        self.encoders = encoders
        self.schedule = schedule
        self.gradient = settings.gradient
        self.weights = settings.guidance_weights
        self.wanted = (self.weights[0] > 0, self.weights[1] > 0, self.weights[2] > 0)
        self._decoders = list(decoders)
        self._targets = _normal(targets)
        self._device: torch.device | None = None
        self._first_step: int | None = None
        self._seen: dict[int, Tensor] = {}
        self._bites: list[Tensor] = []
        self._non_finite: list[Tensor] = []
        self._notes: list[str] = []

    @property
    def decoder(self) -> LatentDecoder | None:
        """The one in use; None once memory ran out with the last."""
        return self._decoders[0] if self._decoders else None

    def wants(self, s: float) -> bool:
        """Whether a call at noise level s is to be corrected. The first call tells where in the schedule the pass begins."""
        step, total = self._place(s)
        if self.settings.m <= 0 or not any(self.wanted) or not self._decoders:
            return False
        first = math.ceil(self.settings.start * total - _FRACTION_NOISE)
        if step < first or (step - first) % self.settings.every:
            return False
        return self.settings.end >= 1 or step < self.settings.end * total - _FRACTION_NOISE

    def fast_shift(self, denoised: Tensor, level: Level, mask: Tensor | None = None) -> Tensor:
        """What to add to D, from the gradient of R with respect to D.

        denoised: (B, C, h, w) in the model's latent units. mask: broadcasts with it, 0 where the picture is kept; applied after the
        limit. Returns D's shape and dtype. May be called under no_grad and under inference mode, with D an inference tensor.
        """
        with _gradients(denoised.device.type):
            gradient = self._latent_gradient(denoised, level)
            if gradient is None:
                return torch.zeros_like(denoised)
            return self._shift(gradient, fast_factor(level), denoised, mask)

    def exact_shift(self, denoised: Tensor, x: Tensor, level: Level, *, unit: float = 1.0, mask: Tensor | None = None) -> Tensor:
        """What to add to D, from the gradient of R with respect to the noisy latent, through the denoiser.

        denoised: (B, C, h, w) with its graph, which is used up. x: the leaf of that graph, (B, C, h, w). unit: x is the latent in the
        host's units (see correction.exact_factor) times this; 1/sqrt(1 + s^2) for a leaf in VP units. Otherwise as fast_shift, whose
        shift is returned where there is no way back through the denoiser, or no memory for it.
        """
        with _gradients(denoised.device.type):
            gradient = self._latent_gradient(denoised, level)
            if gradient is None:
                return torch.zeros_like(denoised)
            through, reason = None, "the denoiser's prediction does not depend on the noisy latent"
            if denoised.requires_grad:
                try:
                    through = _pulled_back(gradient, denoised, x)
                except (RuntimeError, MemoryError) as error:
                    reason = "memory ran out on the way back through the denoiser"
                    if not is_out_of_memory(error):
                        # A kernel without a backward pass, which torch tells of in many words.
                        log.info("DynFuse found no way back through the denoiser", exc_info=True)
                        reason = "a part of the denoiser has no backward pass"
            if through is None:
                # Not in the except clause: the exception's frames hold on to the memory that ran out.
                _free_memory(denoised.device)
                self.abandon_exact(reason)
                return self._shift(gradient, fast_factor(level), denoised, mask)
            return self._shift(through, exact_factor(level) * unit, denoised, mask)

    def abandon_exact(self, reason: str) -> None:
        """The rest of the pass uses the fast gradient. reason: a clause for the note to the user."""
        if self.gradient == "fast":
            return
        self.gradient = "fast"
        self._notes.append(f"The exact gradient was given up for the fast one: {reason}.")

    @property
    def record(self) -> GuidanceRecord:
        """What was seen and done so far. Waits for the device."""
        seen = [similarity.cpu() for similarity in self._seen.values()]
        non_finite = sum(int(count) for count in self._non_finite)
        dropped = [f"{non_finite} corrections were left out, because their gradient was not a finite number."] if non_finite else []
        return GuidanceRecord(
            steps=list(self._seen),
            similarities=torch.stack(seen) if seen else torch.zeros(0, len(TERMS), 0),
            wanted=self.wanted,
            total_steps=self.schedule.steps - (self._first_step or 0),
            bites=sum(int(count) for count in self._bites),
            non_finite=non_finite,
            notes=[*self._notes, *dropped],
        )

    def _place(self, s: float) -> tuple[int, int]:
        """The step of the pass that s lies in, and the number of its steps."""
        step = self.schedule.step_of(s)
        if self._first_step is None:
            self._first_step = step
        return max(0, step - self._first_step), self.schedule.steps - self._first_step

    def _latent_gradient(self, denoised: Tensor, level: Level) -> Tensor | None:
        """grad_D of the sum of R over the images, (B, C, h, w) in at least float32; None where there is no memory for any decoder.

        The sum, never the mean: an image's correction must not depend on how many others are made with it.
        """
        while self._decoders:
            try:
                return self._decoded_gradient(self._decoders[0], denoised, level)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the except clause: the exception's frames hold on to the memory that ran out.
            _free_memory(denoised.device)
            self._next_decoder()
        return None

    def _decoded_gradient(self, decoder: LatentDecoder, denoised: Tensor, level: Level) -> Tensor:
        self._move(denoised.device)
        latent = _wide(denoised.detach().clone()).requires_grad_()
        pictures = decoder(latent)
        seen = pictures.detach().requires_grad_()
        similarity = similarities(seen, self._targets, self.encoders, self.wanted)
        (gradient,) = torch.autograd.grad(score(similarity, self.weights).sum(), seen)
        gradient = _pulled_back(gradient, pictures, latent)
        self._seen[self._place(level.s)[0]] = similarity.detach().float()
        return gradient

    def _shift(self, gradient: Tensor, factor: float, denoised: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            gradient, dropped = _finite(_wide(gradient))
            m = effective_m(self.settings.m, self.schedule.steps)
            shift, bites = limited(gradient * (-m * factor), denoised.detach(), self.settings.limit)
            self._non_finite.append(dropped.sum())
            self._bites.append(bites.sum())
            if mask is not None:
                shift = shift * mask.to(shift)
            return shift.to(denoised.dtype)

    def _move(self, device: torch.device) -> None:
        if device == self._device:
            return
        self.encoders.to(device)
        self._decoders[0].to(device)
        self._targets = self._targets.to(device)
        self._device = device

    def _next_decoder(self) -> None:
        """Memory ran out with the first decoder: the next takes over."""
        failed = self._decoders.pop(0).name
        self._device = None
        outcome = f"it goes on with {self._decoders[0].name}" if self._decoders else "the rest of the picture was made without it"
        self._notes.append(f"Memory ran out in the guidance with the decoder {failed}: {outcome}.")


def _normal(targets: Targets) -> Targets:
    """Targets whose tensors may take part in autograd: a host may have made them under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return Targets(**{f.name: getattr(targets, f.name).detach().clone() for f in fields(targets)})


@contextlib.contextmanager
def _gradients(device_type: str) -> Iterator[None]:
    """Gradients whatever the host runs under, and its autocast off: encoders and loss are float32's business (and decoders cast)."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(device_type):
        yield


def _pulled_back(gradient: Tensor, output: Tensor, leaf: Tensor) -> Tensor:
    """The gradient with respect to `leaf`, from that with respect to `output` (both batches of the same images).

    On the way it has, for each image, a largest element between 1/2 and 1, by a power of two that is taken out again: the way back is
    linear, image by image. Frees the graph.
    """
    scale = _power_of_two(gradient)
    scaled = (gradient * scale).to(output.dtype)
    (back,) = torch.autograd.grad(output, leaf, scaled, allow_unused=True)
    if back is None:
        return torch.zeros_like(_wide(leaf))
    return _wide(back) / scale


def _power_of_two(gradient: Tensor) -> Tensor:
    """Per image, (B, 1, 1, 1), the power of two that brings the largest element into [1/2, 1); 1 for none, infinity and NaN."""
    largest = gradient.detach().flatten(1).abs().amax(1)
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.log2(torch.where(usable, largest, torch.full_like(largest, 0.5))).floor().add(1).clamp(-100, 100)
    return torch.exp2(-exponent).reshape(-1, *[1] * (gradient.dim() - 1))


def _finite(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zero for every image in which it is not finite throughout, and (B,) bool of those."""
    dropped = ~torch.isfinite(gradient).flatten(1).all(1)
    return torch.where(dropped.reshape(-1, *[1] * (gradient.dim() - 1)), torch.zeros_like(gradient), gradient), dropped


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


__all__ = ["GuidanceRecord", "Guide", "wants_guidance"]
