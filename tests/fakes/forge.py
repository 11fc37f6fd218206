"""Forge dfdcbab, as far as DynFuse touches it: LoRAs kept as patches until a model is loaded, unconditional rows first, and every weight
an inference tensor."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .models import TextEncoder, UNet
from .webui import SCALE, FakeWebUI, decoder

COND, UNCOND = 0, 1


class Linear(nn.Module):
    """backend.operations.ForgeOperations.Linear: no nn.Linear."""

    def __init__(self, inputs, outputs):
        super().__init__()
        made = nn.Linear(inputs, outputs)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class LoraLoader:
    """backend.patcher.lora.LoraLoader: merges when the set of patches has changed, from a backup."""

    def __init__(self, model):
        self.model, self.backup, self.loaded_hash = model, {}, "[]"

    def refresh(self, lora_patches):
        wanted = str(list(lora_patches))
        if wanted == self.loaded_hash:
            return
        for key, weight in self.backup.items():
            set_parameter(self.model, key, weight)
        self.backup = {}
        for patches in lora_patches.values():
            for key, entries in patches.items():
                weight = self.model.get_parameter(key)
                self.backup.setdefault(key, weight)
                merged = weight.clone()
                for strength, (kind, tensors), _model_strength, _offset, _function in entries:
                    if kind == "diff":
                        change = tensors[0]
                    else:
                        up, down, alpha, _mid, _dora = tensors
                        change = alpha / down.shape[0] * (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
                    merged += strength * change
                set_parameter(self.model, key, nn.Parameter(merged, requires_grad=False))
        self.loaded_hash = wanted


def set_parameter(model, key, value):
    path, _, name = key.rpartition(".")
    setattr(model.get_submodule(path), name, value)


class ModelPatcher:
    def __init__(self, model, loader=None):
        self.model, self.lora_patches, self.model_options = model, {}, {"transformer_options": {}}
        self.lora_loader = loader or LoraLoader(model)

    def clone(self):
        copy = ModelPatcher(self.model, self.lora_loader)
        copy.lora_patches = self.lora_patches.copy()
        return copy

    def add_patches(self, *, filename, patches, strength_patch=1.0, strength_model=1.0, online_mode=False):
        known = {key for key, _ in self.model.named_parameters()}
        kept = {key: [[strength_patch, patch, strength_model, None, None]] for key, patch in patches.items() if key in known}
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = kept
        return set(kept)


class UnetPatcher(ModelPatcher):
    extra_preserved_memory_during_sampling = 0

    def clone(self):
        copy = UnetPatcher(self.model, self.lora_loader)
        copy.lora_patches = self.lora_patches.copy()
        copy.extra_preserved_memory_during_sampling = self.extra_preserved_memory_during_sampling
        return copy

    def add_extra_preserved_memory_during_sampling(self, memory_in_bytes):
        self.extra_preserved_memory_during_sampling += memory_in_bytes


class CLIP:
    def __init__(self, encoders=None):
        if encoders is not None:
            self.cond_stage_model = nn.ModuleDict(encoders)
            self.patcher = ModelPatcher(self.cond_stage_model)

    def clone(self):
        copy = CLIP()
        copy.cond_stage_model, copy.patcher = self.cond_stage_model, self.patcher.clone()
        return copy

    def add_patches(self, **kwargs):
        return self.patcher.add_patches(**kwargs)


class Engine(types.SimpleNamespace):
    """A loaded model."""


class ForgeObjects(types.SimpleNamespace):
    def shallow_copy(self):
        return ForgeObjects(unet=self.unet, clip=self.clip, vae=self.vae)


class Prediction(nn.Module):
    prediction_type = "epsilon"


class PredictionDiscreteFlow(nn.Module):
    prediction_type = "const"


class PredictionFlux(nn.Module):
    prediction_type = "const"


class KModel(nn.Module):
    storage_dtype = computation_dtype = torch.float32

    def __init__(self, diffusion_model, predictor):
        super().__init__()
        self.diffusion_model, self.predictor = diffusion_model, predictor


class IntegratedAutoencoderKL(nn.Module):
    """backend/nn/vae.py: an encoder too, which nobody here needs."""

    scaling_factor, shift_factor = SCALE, 0.0

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.post_quant_conv = nn.Identity(), decoder(), None


class FakeForge(FakeWebUI):
    guard = staticmethod(torch.inference_mode)

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        self.memory_is_short = False
        self.module("backend.patcher.base", ModelPatcher=ModelPatcher)
        self.module("backend.patcher.lora", LoraLoader=LoraLoader)
        self.module("backend.patcher.clip", CLIP=CLIP)
        self.module("backend.patcher.unet", UnetPatcher=UnetPatcher)
        self.module("backend.operations", get_weight_and_bias=get_weight_and_bias)
        self.module("backend.attention", attention_function=attention)
        self.module("backend.args", dynamic_args={})
        self.modules["modules.sd_samplers_cfg_denoiser"].sampling_function = sampling_function
        self.module("backend.modules.k_prediction", PredictionFlux=PredictionFlux)
        self.modules["modules.sd_samplers_common"].store_latent = self.store_latent
        self.modules["modules.sd_models"].model_data.forge_loading_parameters = {"additional_modules": [], "unet_storage_dtype": None}
        self.shared.sd_model = self.checkpoint("base", seed=0)

    @torch.inference_mode()
    def checkpoint(self, filename, seed, predictor=Prediction, **kwargs):
        """A diffusion engine as modules.sd_models loads it."""
        unet, clip = UnetPatcher(KModel(UNet(seed, Linear, **kwargs), predictor())), CLIP({"clip_l": TextEncoder(Linear)})
        vae = types.SimpleNamespace(first_stage_model=IntegratedAutoencoderKL(), vae_dtype=torch.float32)
        objects = ForgeObjects(unet=unet, clip=clip, vae=vae)
        return Engine(
            sd_checkpoint_info=types.SimpleNamespace(filename=filename),
            forge_objects=objects,
            forge_objects_original=objects.shallow_copy(),
            forge_objects_after_applying_lora=objects.shallow_copy(),
            current_lora_hash="[]",
        )

    def load_networks(self, names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        """sd_forge_lora/networks.py: fails on an unknown name, and returns early when nothing has changed."""
        model = self.shared.sd_model
        entries = [self.networks.available_network_aliases.get(name) for name in names]
        targets = [[entry.filename, a, b] for entry, a, b in zip(entries, unet_multipliers, te_multipliers)]
        if model.current_lora_hash == str(targets):
            return
        model.current_lora_hash = str(targets)
        model.forge_objects.unet, model.forge_objects.clip = model.forge_objects_original.unet, model.forge_objects_original.clip
        for filename, unet_strength, text_strength in targets:
            unet, clip = model.forge_objects.unet.clone(), model.forge_objects.clip.clone()
            tensors = load_file(filename)
            for patcher, keys, strength in ((unet, unet_keys(unet), unet_strength), (clip, clip_keys(clip), text_strength)):
                patches = {
                    key: (
                        "lora",
                        (
                            tensors[f"{name}.lora_up.weight"],
                            tensors[f"{name}.lora_down.weight"],
                            tensors[f"{name}.alpha"].item(),
                            None,
                            None,
                        ),
                    )
                    for name, key in keys.items()
                    if f"{name}.alpha" in tensors
                }
                if patches:
                    patcher.add_patches(filename=filename, patches=patches, strength_patch=strength)
            model.forge_objects.unet, model.forge_objects.clip = unet, clip
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()

    def begin_batch(self, p):
        self.shared.sd_model.forge_objects = self.shared.sd_model.forge_objects_original.shallow_copy()

    def after_activate(self, p):
        self.shared.sd_model.forge_objects = self.shared.sd_model.forge_objects_after_applying_lora.shallow_copy()

    def before_sampling(self, p):
        unet = self.shared.sd_model.forge_objects.unet
        unet.lora_loader.refresh(unet.lora_patches)

    def switch_model(self, cfg_denoiser):
        p = cfg_denoiser.p
        if not p.disable_extra_networks:
            self.modules["modules.extra_networks"].activate(p, p.extra_network_data)
        cfg_denoiser.sampler.sampler_extra_args = {"cond": p.cached_c[1], "uncond": p.cached_uc[1]}
        self.before_sampling(p)

    def encode(self, texts):
        clip = self.shared.sd_model.forge_objects.clip
        clip.patcher.lora_loader.refresh(clip.patcher.lora_patches)
        return torch.stack([clip.cond_stage_model["clip_l"]([text])[0] for text in texts])

    def store_latent(self, decoded):
        """modules/sd_samplers_common.py, with previews: they go by way of numpy."""
        self.state.current_latent = decoded
        self.state.preview = decoded.numpy().copy()

    def denoiser_class(self):
        return CFGDenoiser


def get_weight_and_bias(layer, weight_args=None, bias_args=None, weight_fn=None, bias_fn=None):
    weight = weight_fn(layer.weight) if weight_fn is not None else layer.weight
    return weight.to(**(weight_args or {})), layer.bias


def unet_keys(unet):
    names = [key for key, _ in unet.model.named_parameters() if key.endswith(".weight")]
    return {"lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_"): key for key in names}


def clip_keys(clip):
    names = [key for key, _ in clip.cond_stage_model.named_parameters() if key.endswith(".weight")]
    return {"lora_te_" + key.removeprefix("clip_l.transformer.").removesuffix(".weight").replace(".", "_"): key for key in names}


def attention(q, k, v, heads, mask=None):
    """backend/attention.py: attention_function; reForge's and Classic's optimized_attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class CFGDenoiser(nn.Module):
    """modules/sd_samplers_cfg_denoiser.py."""

    hires_scale = True  # the hires pass has a CFG scale of its own (:188)

    def __init__(self, webui, sampler, p):
        super().__init__()
        self.webui, self.sampler, self.p, self.step, self.total_steps = webui, sampler, p, 0, p.steps
        self.mask = self.nmask = None
        self.classic_ddim_eps_estimation = False

    @property
    def inner_model(self):
        return types.SimpleNamespace(inner_model=self.webui.shared.sd_model)

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        common = self.webui.modules["modules.sd_samplers_common"]
        if self.switched(common, x, sigma):
            cond, uncond = (self.sampler.sampler_extra_args[key] for key in ("cond", "uncond"))
        self.p.hook("cfg_denoiser")
        if self.p.is_hr_pass and self.hires_scale:
            cond_scale = self.p.hr_cfg
        if (self.step % 2 or self.webui.shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            cond_scale = 1.0
        denoised = self.sampled(types.SimpleNamespace(x=x, sigma=sigma, text_cond=cond, text_uncond=uncond), cond_scale)
        self.sampler.last_latent = denoised
        common.store_latent(denoised)
        self.p.hook("cfg_after_cfg")
        self.step += 1
        return denoised

    def sampled(self, params, cond_scale):
        return self.webui.modules["modules.sd_samplers_cfg_denoiser"].sampling_function(
            self, denoiser_params=params, cond_scale=cond_scale, cond_composition=None
        )

    def switched(self, common, x, sigma):
        return common.apply_refiner(self, x)


def sampling_function(denoiser, denoiser_params, cond_scale, cond_composition):
    """backend/sampling/sampling_function.py: the same batches of the model's calls. D after CFG."""
    x, sigma, cond, uncond = denoiser_params.x, denoiser_params.sigma, denoiser_params.text_cond, denoiser_params.text_uncond
    parts = max(len(image) for image in cond.batch)
    to_run = [(torch.stack([image[part] for image in cond.batch]), COND) for part in range(parts)]
    if cond_scale != 1.0:
        to_run.append((torch.stack(uncond), UNCOND))
    sums = {COND: torch.zeros_like(x), UNCOND: torch.zeros_like(x)}
    while to_run:
        together = [i for i, (context, _) in enumerate(to_run) if context.shape == to_run[0][0].shape][::-1]
        if denoiser.webui.memory_is_short:
            together = together[:1]
        batch = [to_run.pop(i) for i in together]
        kinds = [kind for _, kind in batch]
        model = denoiser.inner_model.inner_model.forge_objects.unet.model
        options = {"cond_or_uncond": kinds, "sigmas": sigma}
        latents, times = torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch))
        out = model.diffusion_model(latents, times, context=torch.cat([c for c, _ in batch]), control=None, transformer_options=options)
        for kind, rows in zip(kinds, (latents - out).chunk(len(batch))):
            sums[kind] += rows / (parts if kind == COND else 1)
    return sums[COND] if cond_scale == 1.0 else sums[UNCOND] + cond_scale * (sums[COND] - sums[UNCOND])
