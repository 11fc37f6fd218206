"""Forge Neo (2.26, as in exo101/sd-webui-forge-neo-v3 5692d2d1; file and line numbers below are its): Forge's names, ComfyUI's patcher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guidance.decode import OneFrame, decoding_half
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
        if not hasattr(model, "decoder"):
            raise NotGuidable("The picture was not guided: DynFuse cannot read the latents of this model.")
        if hasattr(model, "conv2") and not hasattr(model, "post_quant_conv"):  # Wan's, of videos (backend/nn/wan_vae.py:405)
            decoder: nn.Module = OneFrame(model.conv2, model.decoder)
        else:
            decoder = decoding_half(getattr(model, "post_quant_conv", None), model.decoder)
        scale, shift, packing = latent_space(model)
        return HostVae(decoder, scale=scale, shift=shift, packing=packing, dtype=patcher.vae_dtype, identity=id(model))

    def taesd_decoder(self, cfg_denoiser: Any) -> nn.Module | None:
        model = engine_of(cfg_denoiser).forge_objects.vae.first_stage_model
        if hasattr(getattr(model, "latent_format", None), "latents_mean"):
            raise RuntimeError("the WebUI's one for this model is for videos")
        return super().taesd_decoder(cfg_denoiser)


def latent_space(vae: Any) -> tuple[float | Tensor, float | Tensor, int]:
    """scale, shift and packing of a VAE's latents, as guidance.decode.VaeDecoder takes them.

    Flux.2's are normalised by a batch norm in the VAE, whose channels are packed (backend/nn/vae.py:378); Mugen's latent is unpacked, but
    its statistics are not (:393). Wan's and Qwen-Image's have a mean and a spread for each channel (huggingface_guess/latent.py, Wan21).
    """
    latent = getattr(vae, "latent_format", None)  # diffusion_engine/base.py:32; earlier ones have Forge's numbers on the VAE
    if hasattr(vae, "bn"):
        scale = 1.0 / (_numbers(vae.bn.running_var) + vae.bn_eps).sqrt()
        shift = _numbers(vae.bn.running_mean)
        packing = int(vae.ps[0])
        if getattr(vae, "mugen", False):
            scale, shift = (F.pixel_shuffle(values.view(1, -1, 1, 1), packing)[0] for values in (scale, shift))
            packing = 1
        return scale, shift, packing
    if latent is not None and hasattr(latent, "latents_mean"):
        return latent.scale_factor / _numbers(latent.latents_std), _numbers(latent.latents_mean), 1
    if latent is None:
        return vae.scaling_factor, vae.shift_factor or 0.0, 1
    return latent.scale_factor, latent_shift(latent), 1


def _numbers(values: Tensor) -> Tensor:
    """By channel, as normal tensors: the host's may be inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        return values.detach().flatten().to(torch.float32, copy=True)


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


__all__ = ["NEO", "NeoDenoisers", "NeoSamplers", "NeoTextEncoders", "latent_space"]
