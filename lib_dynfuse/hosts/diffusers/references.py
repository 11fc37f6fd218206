"""The references of a guided pipeline: the user's pictures, cached ones, or made by the pipeline with one LoRA alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...guidance.references import ReferenceKey
from ...lora import LoraFile
from ...settings import FuseSettings
from ..references import activation_texts, full_weight

# Values of each weight tensor that go into a model's fingerprint: a finetune or a merged LoRA changes nearly all of them.
_VALUES_PER_TENSOR = 1024

# Arguments of a pipeline that say what is returned, or that belong to the rows of one batch.
_OF_THE_JOB_ALONE = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "latents", "generator")


@dataclass(frozen=True)
class Job:
    """What a reference has in common with the pictures it is for. width, height: pixels. more: further arguments of the pipeline."""

    negative_prompt: str
    seed: int
    steps: int
    cfg_scale: float | None
    width: int | None
    height: int | None
    more: Mapping[str, Any]


def reference_prompt(side: str, settings: FuseSettings, loras: Sequence[LoraFile], prompt: str) -> str:
    """The side's own prompt, else its LoRAs' activation texts, else the job's prompt."""
    return getattr(settings, f"{side}_prompt") or activation_texts([str(lora.path) for lora in loras]) or prompt


def reference_key(
    side: str, settings: FuseSettings, loras: Sequence[LoraFile], prompt: str, job: Job, pipeline: Any, encoders: str
) -> ReferenceKey:
    """Everything that the side's reference depends on. encoders: Encoders.identity."""
    networks = {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}
    own = {name for name in networks if name != "vae"}
    strength = full_weight(settings, side)
    blocks = getattr(settings, f"{side}_blocks")
    size = pixels_of(pipeline)
    return ReferenceKey(
        side=side,
        checkpoint=_digest(*(fingerprint(networks[name]) for name in sorted(own))),
        vae=fingerprint(pipeline.vae),
        lora="+".join(hashlib.sha256(lora.path.read_bytes()).hexdigest() for lora in loras),
        strength=strength,
        te_strength=settings.te_weight,
        others="",
        prompt=prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        sampler=type(pipeline.scheduler).__name__,
        scheduler=_digest(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str)),
        steps=job.steps,
        cfg_scale=-1.0 if job.cfg_scale is None else job.cfg_scale,
        width=job.width or size,
        height=job.height or size,
        clip_skip=job.more.get("clip_skip") or 0,
        encoders=encoders,
        more=(("blocks", blocks),) * bool(blocks)
        + tuple(
            (name, value if isinstance(value, str) else repr(value))
            for name, value in sorted(job.more.items())
            if name not in (*_OF_THE_JOB_ALONE, "clip_skip")
        ),
    )


def influential(more: Mapping[str, Any]) -> dict[str, Any]:
    """Of a pipeline's further arguments, those that a reference is made with as well."""
    return {name: value for name, value in more.items() if name not in _OF_THE_JOB_ALONE}


def pixels_of(pipeline: Any) -> int:
    """Side of the model's own picture, in pixels."""
    return int(pipeline.vae_scale_factor * denoiser_sample_size(pipeline))


def denoiser_sample_size(pipeline: Any) -> int:
    """Side of the model's own latent, in latent pixels as the pipeline counts them."""
    size = getattr(pipeline, "default_sample_size", None)
    return size if isinstance(size, int) else pipeline.unet.config.sample_size


@torch.no_grad()
def fingerprint(network: nn.Module) -> str:
    """Stands for a network's weights: names, shapes, and evenly spaced values of each."""
    digest = hashlib.sha256()
    samples = []
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and tensor.device.type != "meta":
            flat = tensor.reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].float())
    for device in {sample.device for sample in samples}:
        together = torch.cat([sample for sample in samples if sample.device == device])
        digest.update(together.cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


__all__ = [
    "Job",
    "fingerprint",
    "influential",
    "pixels_of",
    "reference_key",
    "reference_prompt",
]
