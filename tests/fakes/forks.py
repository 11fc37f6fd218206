"""WebUIs with ComfyUI's patcher: Forge Neo, reForge, Forge Classic, as far as they differ from the fake of Forge.

What their modules have and lack is theirs (Neo 2.26, reForge 3b56b26, Forge Classic 1f95d71); the pictures are made as Forge's are.
"""

from __future__ import annotations

import types
import uuid

import torch
from safetensors.torch import load_file
from torch import nn

from . import forge
from .forge import FakeForge, clip_keys, set_parameter, unet_keys
from .webui import SCALE, KDiffusionSampler, StableDiffusionProcessingTxt2Img, decoder


class LoRAAdapter:
    """ComfyUI's comfy/weight_adapter/lora.py."""

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def change(self, shape):
        up, down, alpha, mid, dora_scale, reshape = self.weights
        assert (mid, dora_scale, reshape) == (None, None, None)
        # In float32, as the WebUIs merge: torch 2.1 has no half-precision product on a CPU.
        return alpha / down.shape[0] * (up.float().flatten(1) @ down.float().flatten(1)).reshape(shape)


def changed(weight, entries):
    """backend/patcher/lora.py:58, ldm_patched/modules/lora.py: the weight with its patches."""
    merged = weight.clone()
    for strength, patch, *_ in entries:
        if isinstance(patch, LoRAAdapter):
            merged += strength * patch.change(weight.shape)
        else:
            kind, (tensor,) = patch
            assert kind == "diff"
            merged += strength * tensor
    return merged


class ModelPatcher:
    """Patches by parameter name, without the file they are from; no lora_patches, no lora_loader."""

    def __init__(self, model, backup=None):
        self.model, self.patches, self.backup = model, {}, {} if backup is None else backup
        self.patches_uuid = uuid.uuid4()
        self.model_options = {"transformer_options": {}}

    def clone(self):
        copy = type(self)(self.model, self.backup)
        copy.patches = {key: list(entries) for key, entries in self.patches.items()}
        copy.patches_uuid = self.patches_uuid
        return copy

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0, *, filename=None, online_mode=None):
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, None, None, online_mode))
        self.patches_uuid = uuid.uuid4()

    def load(self):
        """Merge, if the patches are others than those that are merged."""
        if getattr(self.model, "current_weight_patches_uuid", None) == self.patches_uuid:
            return
        for key, kept in self.backup.items():
            set_parameter(self.model, key, kept.weight)
        self.backup.clear()
        for key, entries in self.patches.items():
            weight = self.model.get_parameter(key)
            self.backup[key] = types.SimpleNamespace(weight=weight)
            set_parameter(self.model, key, nn.Parameter(changed(weight, entries), requires_grad=False))
        self.model.current_weight_patches_uuid = self.patches_uuid


class UnetPatcher(ModelPatcher):
    extra_preserved_memory_during_sampling = 0

    def add_extra_preserved_memory_during_sampling(self, memory_in_bytes):
        self.extra_preserved_memory_during_sampling += memory_in_bytes


class CLIP:
    def __init__(self, cond_stage_model, patcher):
        self.cond_stage_model, self.patcher = cond_stage_model, patcher

    def clone(self):
        return type(self)(self.cond_stage_model, self.patcher.clone())

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0, **kwargs):
        return self.patcher.add_patches(patches, strength_patch, strength_model, **kwargs)


class Decoder(nn.Module):
    """backend/nn/vae.py:258: its forward takes no gradient."""

    def __init__(self):
        super().__init__()
        self.layers = decoder()

    @torch.inference_mode()
    def forward(self, z):
        return self.layers(z)


class AutoencoderKL(nn.Module):
    """backend/nn/vae.py, with what diffusion_engine/base.py:32 puts on it instead of two numbers."""

    latent_format = types.SimpleNamespace(scale_factor=SCALE)

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.post_quant_conv = nn.Identity(), Decoder(), None


class FakeNeo(FakeForge):
    """Forge's package names around ComfyUI's patcher."""

    patchers = (UnetPatcher, ModelPatcher, CLIP)
    autoencoder = AutoencoderKL

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        vars(self.modules["backend.patcher.lora"]).pop("LoraLoader")
        self.modules["backend.patcher.base"].ModelPatcher = ModelPatcher
        self.modules["backend.patcher.unet"].UnetPatcher = UnetPatcher
        self.modules["backend.patcher.clip"].CLIP = CLIP
        self.modules["backend.operations"].get_weight_and_bias = lambda layer: (layer.weight, layer.bias)
        self.module("modules_forge.packages.comfy.weight_adapter", LoRAAdapter=LoRAAdapter)
        self.modules["modules.sd_samplers_common"].apply_refiner = self.apply_refiner_at
        self.modules["modules.sd_samplers_common"].ORIGINAL_CHECKPOINT = None

    @torch.inference_mode()
    def checkpoint(self, filename, seed, **kwargs):
        model = super().checkpoint(filename, seed, **kwargs)
        unet, encoders, clip = self.patchers
        model.forge_objects.unet = unet(self.prepared(model.forge_objects.unet.model))
        stage = model.forge_objects.clip.cond_stage_model
        model.forge_objects.clip = clip(stage, encoders(stage))
        model.forge_objects.vae.first_stage_model = self.autoencoder()
        for place in ("forge_objects_original", "forge_objects_after_applying_lora"):
            setattr(model, place, model.forge_objects.shallow_copy())
        return model

    def prepared(self, model):
        return model

    def apply_refiner_at(self, cfg_denoiser, x, sigma):
        return self.apply_refiner(cfg_denoiser, x)

    def load_networks(self, names, te_multipliers=None, unet_multipliers=None):
        """sd_forge_lora/networks.py:98."""
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
                    key: self.patch(*(tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")))
                    for name, key in keys.items()
                    if f"{name}.alpha" in tensors
                }
                if patches:
                    patcher.add_patches(patches, strength)
            model.forge_objects.unet, model.forge_objects.clip = unet, clip
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()

    @staticmethod
    def patch(up, down, alpha):
        return LoRAAdapter(set(), (up, down, alpha.item(), None, None, None))

    def call_load_networks(self, names, strengths):
        self.networks.load_networks(names, strengths, strengths)

    def before_sampling(self, p):
        self.shared.sd_model.forge_objects.unet.load()

    def encode(self, texts):
        clip = self.shared.sd_model.forge_objects.clip
        clip.patcher.load()
        return torch.stack([clip.cond_stage_model["clip_l"]([text])[0] for text in texts])

    def denoiser_class(self):
        return NeoDenoiser


class NeoDenoiser(forge.CFGDenoiser):
    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond, **kwargs):
        return super().forward(x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond)

    def switched(self, common, x, sigma):
        return common.apply_refiner(self, x, sigma[0])  # sd_samplers_cfg_denoiser.py:117


class ForgeSD:
    """modules_forge/forge_loader.py."""

    def __init__(self, unet, clip, vae, clipvision): ...


def flat(*classes):
    """A class with what all of these have, the last before the others, and without bases: what is taken away is gone."""
    held = {name: value for each in classes for name, value in vars(each).items() if name not in ("__dict__", "__weakref__")}
    return type(classes[-1].__name__, (), held)


class WithoutFiles:
    """ldm_patched/modules/model_patcher.py, sd.py: neither file names nor a choice of how to merge."""

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return ModelPatcher.add_patches(self, patches, strength_patch, strength_model)


class WithoutFilesInCLIP:
    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return self.patcher.add_patches(patches, strength_patch, strength_model)


LdmModelPatcher = flat(ModelPatcher, WithoutFiles)
LdmUnetPatcher = flat(ModelPatcher, UnetPatcher, WithoutFiles)
LdmCLIP = flat(CLIP, WithoutFilesInCLIP)


class ScriptRunner:
    """modules/scripts.py, before any script is in it."""

    def __init__(self):
        self.alwayson_scripts = []


class AlterSampler(KDiffusionSampler):
    """modules_forge/forge_alter_samplers.py: DDPM and many more of reForge's, some of Forge Classic's."""

    def get_sigmas(self, p, steps):
        return torch.tensor([1.5 * (steps - step) for step in range(steps)] + [0.0])


class EPS:
    """A kind of ldm_patched.modules.model_sampling."""


class FakeReForge(FakeNeo):
    """The first Forge's modules on a newer ComfyUI: no `backend`, A1111's names for everything else."""

    patchers = (LdmUnetPatcher, LdmModelPatcher, LdmCLIP)
    autoencoder = forge.IntegratedAutoencoderKL

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        for name in [name for name in self.modules if name.partition(".")[0] in ("backend", "modules_forge")]:
            del self.modules[name]
        del self.modules["modules.sd_models"].model_data.forge_loading_parameters
        del self.modules["modules.sd_samplers_common"].ORIGINAL_CHECKPOINT
        unet, encoders, clip = self.patchers
        self.module("modules_forge.forge_loader", ForgeSD=ForgeSD)
        self.module("modules_forge.forge_sampler")
        self.module("modules_forge.forge_alter_samplers", AlterSampler=flat(KDiffusionSampler, AlterSampler))
        self.module("ldm_patched.ldm.modules.attention", optimized_attention=forge.attention)
        self.module("modules.scripts", ScriptRunner=ScriptRunner)
        self.module("modules_forge.unet_patcher", UnetPatcher=unet)
        self.module("ldm_patched.modules.model_patcher", ModelPatcher=encoders)
        self.module("ldm_patched.modules.sd", CLIP=clip)
        self.module("ldm_patched.modules.model_management", current_loaded_models=[])
        self.module("ldm_patched.modules.weight_adapter", LoRAAdapter=LoRAAdapter)
        self.modules["modules.sd_samplers_common"].apply_refiner = self.apply_refiner
        self.modules["modules.sd_samplers_cfg_denoiser"].sampling_function = sampling_function
        # A1111's functions of the Lora extension, which do nothing here (extensions-builtin/Lora/networks.py:28).
        self.networks.assign_network_names_to_compvis_modules = lambda sd_model: None
        self.networks.network_apply_weights = lambda self: None

    def sampler_class(self, p):
        if p.sampler_name == "DDPM":
            return self.modules["modules_forge.forge_alter_samplers"].AlterSampler
        return super().sampler_class(p)

    def process_images_inner(self, p):
        if isinstance(p, StableDiffusionProcessingTxt2Img):
            assert p.scripts.alwayson_scripts == []  # it is looked into (processing.py:1065)
        return super().process_images_inner(p)

    def prepared(self, model):
        model.model_sampling, model.latent_format = EPS(), types.SimpleNamespace(scale_factor=SCALE)
        model.manual_cast_dtype, model.get_dtype = None, lambda: torch.float32
        return model

    def load_networks(self, names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        super().load_networks(names, te_multipliers, unet_multipliers)

    def call_load_networks(self, names, strengths):
        self.networks.load_networks(names, strengths, strengths, [None] * len(names))

    def denoiser_class(self):
        return ReForgeDenoiser


def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed):
    """ldm_patched/modules/samplers.py:413. model: of the fake, the CFGDenoiser."""
    params = types.SimpleNamespace(x=x, sigma=timestep, text_cond=cond, text_uncond=uncond)
    return forge.sampling_function(model, params, cond_scale, None)


class ReForgeDenoiser(forge.CFGDenoiser):
    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond, **kwargs):
        return super().forward(x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond)

    def sampled(self, params, cond_scale):
        function = self.webui.modules["modules.sd_samplers_cfg_denoiser"].sampling_function
        return function(self, params.x, params.sigma, params.text_uncond, params.text_cond, cond_scale, {}, 0)  # :245


class OldPatcher:
    """ldm_patched/modules/model_patcher.py of Forge Classic: another patcher object is another merge, and keeps its own backup."""

    def __init__(self, model, backup=None):
        self.model, self.patches, self.backup = model, {}, {}
        self.model_options = {"transformer_options": {}}

    def clone(self):
        copy = type(self)(self.model)
        copy.patches = {key: list(entries) for key, entries in self.patches.items()}
        return copy

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model))

    def load(self):
        current = getattr(self.model, "loaded_by", None)
        if current is self:
            return
        if current is not None:
            for key, weight in current.backup.items():
                set_parameter(self.model, key, weight)
            current.backup = {}
        for key, entries in self.patches.items():
            weight = self.backup[key] = self.model.get_parameter(key)
            entries = [(strength, adapted(patch), *rest) for strength, patch, *rest in entries]
            set_parameter(self.model, key, nn.Parameter(changed(weight, entries), requires_grad=False))
        object.__setattr__(self.model, "loaded_by", self)


OldUnetPatcher = flat(OldPatcher, UnetPatcher)


def adapted(patch):
    """Its own kinds are tuples: ("lora", (up, down, alpha, mid, DoRA))."""
    kind, tensors = patch
    return LoRAAdapter(set(), (*tensors, None)) if kind == "lora" else patch


class FakeClassic(FakeReForge):
    """The same on an older ComfyUI."""

    def process_images_inner(self, p):
        return FakeNeo.process_images_inner(self, p)

    patchers = (OldUnetPatcher, OldPatcher, LdmCLIP)

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        del self.modules["ldm_patched.modules.weight_adapter"]
        for name in ("assign_network_names_to_compvis_modules", "network_apply_weights"):
            delattr(self.networks, name)
        del self.modules["modules.sd_samplers_cfg_denoiser"].sampling_function
        self.modules["modules_forge.forge_sampler"].forge_sample = forge_sample

    @staticmethod
    def patch(up, down, alpha):
        return "lora", (up, down, alpha.item(), None, None)

    def denoiser_class(self):
        return ClassicDenoiser


def forge_sample(self, denoiser_params, cond_scale, cond_composition):
    return forge.sampling_function(self, denoiser_params, cond_scale, cond_composition)


class ClassicDenoiser(forge.CFGDenoiser):
    hires_scale = False

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        return super().forward(x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond)

    def sampled(self, params, cond_scale):
        sampler = self.webui.modules["modules_forge.forge_sampler"]
        return sampler.forge_sample(self, denoiser_params=params, cond_scale=cond_scale, cond_composition=None)
