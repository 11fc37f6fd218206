"""Forge Neo (2.26, as in exo101/sd-webui-forge-neo-v3 5692d2d1; file and line numbers below are its): Forge's names, ComfyUI's patcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.decode import decoding_half
from .capabilities import Call, Value
from .comfy_patches import PatcherTextEncoders
from .forge import ForgeCheckpoints, ForgeDenoisers, ForgeSamplers, dequantised, engine_of, unet_of
from .references import JOB_ARGUMENTS
from .roles import HostVae, NotGuidable, Roles

_ADAPTERS = "modules_forge.packages.comfy.weight_adapter"


class NeoDenoisers(ForgeDenoisers):
    """LoRAs lie in patches, by parameter, until the model is loaded, or are applied on the fly."""

    def identity(self, cfg_denoiser: Any) -> object:
        from modules import sd_samplers_common

        # The fast refiner puts other weights into the same modules (sd_samplers_common.py:253).
        return super().identity(cfg_denoiser), getattr(sd_samplers_common, "ORIGINAL_CHECKPOINT", None)

    def merged_loras(self, cfg_denoiser: Any) -> object:
        return unet_of(cfg_denoiser).patches_uuid

    def weight_of(self, layer: nn.Module) -> Tensor:
        weight = _plain(layer.weight).to(torch.float32, copy=True)
        # LoRAs that are applied on the fly, or to weights that stay off the device (operations.py:124). They write in place.
        for function in getattr(layer, "weight_function", ()):
            weight = function(weight)
        return weight


class NeoSamplers(ForgeSamplers):
    """Forge's; UniPC is one of k-diffusion's kind."""

    def rectified_ancestral(self, cfg_denoiser: Any) -> bool:
        # Of every flow model (modules_forge/packages/k_diffusion/sampling.py:188).
        return self.kind(cfg_denoiser) == "flow"

    def vae(self, cfg_denoiser: Any) -> HostVae:
        patcher = engine_of(cfg_denoiser).forge_objects.vae
        model = patcher.first_stage_model
        latent = getattr(model, "latent_format", None)  # diffusion_engine/base.py:32; earlier ones have Forge's numbers on the VAE
        if not hasattr(model, "decoder") or hasattr(model, "bn") or hasattr(latent, "latents_mean"):
            raise NotGuidable("The picture was not guided: DynFuse cannot read the latents of this model.")
        scale, shift = (model.scaling_factor, model.shift_factor) if latent is None else (latent.scale_factor, latent_shift(latent))
        decoder = decoding_half(getattr(model, "post_quant_conv", None), model.decoder)
        return HostVae(decoder, scale=scale, shift=shift or 0.0, dtype=patcher.vae_dtype, identity=id(model))


def latent_shift(latent: Any) -> float:
    """Of a latent format: only flow models' have one."""
    return getattr(latent, "shift_factor", None) or 0.0


class NeoTextEncoders(PatcherTextEncoders):
    """Adapters of ComfyUI's."""

    def low_rank(self, up: Tensor, down: Tensor, alpha: float) -> Any:
        from modules_forge.packages.comfy.weight_adapter import LoRAAdapter

        adapter = LoRAAdapter(set(), (up, down, alpha, None, None, None))
        adapter.of_dynfuse = True
        return adapter

    def add_patches(self, clip: Any, patches: dict[str, Any], strength: float) -> None:
        clip.add_patches(patches=patches, strength_patch=strength, online_mode=False)

    def unmerged(self, clip: Any, parameter: Tensor, key: str) -> Tensor:
        return _plain(super().unmerged(clip, parameter, key))


NEEDS = (
    Call("backend.patcher.base", "ModelPatcher.add_patches", 1, ("patches", "strength_patch", "online_mode")),
    Call("backend.patcher.base", "ModelPatcher.clone", 1),
    Call("backend.patcher.clip", "CLIP.clone", 1),
    Call("backend.patcher.clip", "CLIP.add_patches", 1, ("patches", "strength_patch", "online_mode")),
    Call("backend.patcher.unet", "UnetPatcher.add_extra_preserved_memory_during_sampling", 2),
    Call(_ADAPTERS, "LoRAAdapter", 2),
    Call("modules.sd_models", "model_data.get_sd_model"),
    Value("modules.sd_models", "model_data.forge_loading_parameters"),
    Call("modules.sd_samplers_common", "store_latent", 1),
    Call("modules.processing", "StableDiffusionProcessingTxt2Img", keywords=(*JOB_ARGUMENTS, "distilled_cfg_scale")),
)

NEO = Roles("Forge Neo", NeoDenoisers(), NeoSamplers(), NeoTextEncoders(), ForgeCheckpoints(), NEEDS)


def _plain(weight: Tensor) -> Tensor:
    """A parameter's values; comfy_kitchen's quantised tensors unpack themselves (operations.py:117)."""
    if type(weight).__name__ == "QuantizedTensor":
        return weight.dequantize()
    return dequantised(weight)


__all__ = ["NEO", "NeoDenoisers", "NeoSamplers", "NeoTextEncoders"]
