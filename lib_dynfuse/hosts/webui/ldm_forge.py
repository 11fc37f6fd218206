"""WebUIs with the first Forge's backend, ComfyUI's modules as `ldm_patched`: reForge (3b56b268) and Forge Classic (1f95d717).

Forge's object names on a newer (reForge) and an older (Classic) ComfyUI, without the package `backend`. Most else is A1111's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.correction import Kind
from ...guidance.decode import decoding_half
from ..wrapping import wrapped
from .capabilities import Call, Seam, held
from .comfy_patches import OurPatch, PatcherTextEncoders
from .forge import ForgeDenoisers, ForgeSamplers, engine_of, unet_of
from .roles import Checkpoints, HostVae, Roles


class LdmDenoisers(ForgeDenoisers):
    """LoRAs lie in patches, by parameter, until the model is loaded."""

    def weight_of(self, layer: nn.Module) -> Tensor:
        weight = layer.weight.to(torch.float32, copy=True)
        # reForge's low VRAM (model_patcher.py:559): applied at each forward, in place.
        for function in getattr(layer, "weight_function", None) or ():
            weight = function(weight)
        return weight

    def computation_dtype(self, unet: Any) -> torch.dtype:
        dtype: torch.dtype = getattr(unet.model, "manual_cast_dtype", None) or unet.model.get_dtype()
        return dtype


class ReForgeDenoisers(LdmDenoisers):
    """A merge is known by a number."""

    def merged_loras(self, cfg_denoiser: Any) -> object:
        return unet_of(cfg_denoiser).patches_uuid

    def scale_of_calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        # sampling_function(model, x, sigma, uncond, cond, cond_scale, ...), sd_samplers_cfg_denoiser.py:241.
        return args[5] if len(args) > 5 else super().scale_of_calls(args, kwargs)


class ClassicDenoisers(LdmDenoisers):
    """A merge has no number; the host knows its LoRAs by file and strength (extensions-builtin/Lora/networks.py:62)."""

    def merged_loras(self, cfg_denoiser: Any) -> object:
        patches = unet_of(cfg_denoiser).patches
        strengths = tuple((key, *(entry[0] for entry in entries)) for key, entries in patches.items())
        return engine_of(cfg_denoiser).current_lora_hash, strengths

    def model_calls(self, around: Callable[..., Any]) -> AbstractContextManager[None]:
        from modules_forge import forge_sampler

        # CFGDenoiser.forward finds it there (sd_samplers_cfg_denoiser.py:133).
        return wrapped(forge_sampler, "forge_sample", around)


class LdmSamplers(ForgeSamplers):
    """Forge's, with the predictor and the latents' scale on the model."""

    def attention(self) -> Callable[..., Tensor] | None:
        return held("ldm_patched.ldm.modules.attention", "optimized_attention")

    def kind(self, cfg_denoiser: Any) -> Kind:
        # CONST of ldm_patched.modules.model_sampling is Forge's "const"; Classic has none.
        sampling = getattr(unet_of(cfg_denoiser).model, "model_sampling", None)
        return "flow" if any(base.__name__ == "CONST" for base in type(sampling).__mro__) else "vp"

    def rectified_ancestral(self, cfg_denoiser: Any) -> bool:
        return self.kind(cfg_denoiser) == "flow"

    def vae(self, cfg_denoiser: Any) -> HostVae:
        objects = engine_of(cfg_denoiser).forge_objects
        model = objects.vae.first_stage_model
        latent = objects.unet.model.latent_format
        decoder = decoding_half(getattr(model, "post_quant_conv", None), model.decoder)
        shift = getattr(latent, "shift_factor", None) or 0.0
        return HostVae(decoder, scale=latent.scale_factor, shift=shift, dtype=objects.vae.vae_dtype, identity=id(model))


class ReForgeTextEncoders(PatcherTextEncoders):
    """Adapters of ComfyUI's."""

    def low_rank(self, up: Tensor, down: Tensor, alpha: float) -> Any:
        from ldm_patched.modules.weight_adapter import LoRAAdapter

        adapter = LoRAAdapter(set(), (up, down, alpha, None, None, None))
        adapter.of_dynfuse = True
        return adapter


class ReForgeCheckpoints(Checkpoints):
    """A job without scripts has a runner of none: processing.py:1065 looks for one among them."""

    def prepare(self, job: Any) -> None:
        from modules.scripts import ScriptRunner

        job.scripts = ScriptRunner()


class ClassicTextEncoders(PatcherTextEncoders):
    """Tuples (model_patcher.py:271)."""

    def low_rank(self, up: Tensor, down: Tensor, alpha: float) -> Any:
        return OurPatch(("lora", (up, down, alpha, None, None)))

    def unmerged(self, clip: Any, parameter: Tensor, key: str) -> Tensor:
        from ldm_patched.modules import model_management

        # Each patcher keeps its own: the one whose patches are merged now is among the loaded models.
        for loaded in model_management.current_loaded_models:
            if loaded.model.model is clip.cond_stage_model:
                return loaded.model.backup.get(key, parameter)
        return parameter


# The samplers that these WebUIs add have a schedule of their own.
ALTER_SIGMAS = Seam("modules_forge.forge_alter_samplers", "AlterSampler.get_sigmas", ("self", "p", "steps"))

_NEEDS = (
    ALTER_SIGMAS,
    Call("modules_forge.forge_loader", "ForgeSD", 4),
    Call("ldm_patched.modules.model_patcher", "ModelPatcher.add_patches", 3),
    Call("ldm_patched.modules.model_patcher", "ModelPatcher.clone", 1),
    Call("ldm_patched.modules.sd", "CLIP.clone", 1),
    Call("ldm_patched.modules.sd", "CLIP.add_patches", 3),
    Call("modules_forge.unet_patcher", "UnetPatcher.add_extra_preserved_memory_during_sampling", 2),
    Call("modules.sd_models", "model_data.get_sd_model"),
    Call("modules.sd_samplers_common", "store_latent", 1),
)

REFORGE = Roles(
    "reForge",
    ReForgeDenoisers(),
    LdmSamplers(),
    ReForgeTextEncoders(),
    ReForgeCheckpoints(),
    (*_NEEDS, Call("ldm_patched.modules.weight_adapter", "LoRAAdapter", 2), Call("modules.scripts", "ScriptRunner")),
    schedules=(ALTER_SIGMAS,),
)

CLASSIC = Roles(
    "Forge Classic",
    ClassicDenoisers(),
    LdmSamplers(),
    ClassicTextEncoders(),
    Checkpoints(),
    (*_NEEDS, Call("modules_forge.forge_sampler", "forge_sample", 4)),
    schedules=(ALTER_SIGMAS,),
)


__all__ = ["CLASSIC", "REFORGE"]
