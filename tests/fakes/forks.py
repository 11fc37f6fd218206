"""WebUIs that look like A1111 or Forge and are neither: Forge Neo, reForge, Forge Classic, as far as they differ from the fake of Forge.

What their modules have and lack is theirs (Neo 2.26, reForge 3b56b26, Forge Classic 1f95d71); the pictures are made as Forge's are.
"""

from __future__ import annotations

import uuid

import torch
from safetensors.torch import load_file
from torch import nn

from . import forge
from .forge import FakeForge, clip_keys, set_parameter, unet_keys


class ModelPatcher:
    """ComfyUI's: patches by parameter name, without the file they are from; no lora_patches, no lora_loader."""

    extra_preserved_memory_during_sampling = 0

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

    def add_extra_preserved_memory_during_sampling(self, memory_in_bytes):
        self.extra_preserved_memory_during_sampling += memory_in_bytes

    def load(self):
        """Merge, if the patches are others than those that are merged."""
        if getattr(self.model, "current_weight_patches_uuid", None) == self.patches_uuid:
            return
        for key, weight in self.backup.items():
            set_parameter(self.model, key, weight)
        self.backup.clear()
        for key, entries in self.patches.items():
            weight = self.backup[key] = self.model.get_parameter(key)
            merged = weight.clone()
            for strength, (up, down, alpha), *_ in entries:
                merged += strength * alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            set_parameter(self.model, key, nn.Parameter(merged, requires_grad=False))
        self.model.current_weight_patches_uuid = self.patches_uuid


class CLIP:
    def __init__(self, cond_stage_model, patcher=None):
        self.cond_stage_model, self.patcher = cond_stage_model, patcher or ModelPatcher(cond_stage_model)

    def clone(self):
        return CLIP(self.cond_stage_model, self.patcher.clone())

    def add_patches(self, *args, **kwargs):
        return self.patcher.add_patches(*args, **kwargs)


class FakeNeo(FakeForge):
    """Forge's package names around ComfyUI's patcher."""

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        vars(self.modules["backend.patcher.lora"]).pop("LoraLoader")
        self.modules["backend.patcher.base"].ModelPatcher = self.modules["backend.patcher.unet"].UnetPatcher = ModelPatcher
        self.modules["backend.patcher.clip"].CLIP = CLIP
        self.modules["backend.operations"].get_weight_and_bias = lambda layer: (layer.weight, layer.bias)
        self.modules["modules.sd_samplers_common"].apply_refiner = self.apply_refiner_at
        self.networks.load_networks = self.load_three

    def checkpoint(self, filename, seed, **kwargs):
        model = super().checkpoint(filename, seed, **kwargs)
        for place in ("forge_objects", "forge_objects_original", "forge_objects_after_applying_lora"):
            objects = getattr(model, place)
            objects.unet, objects.clip = ModelPatcher(objects.unet.model), CLIP(objects.clip.cond_stage_model)
        return model

    def apply_refiner_at(self, cfg_denoiser, x, sigma):
        return self.apply_refiner(cfg_denoiser, x)

    def load_three(self, names, te_multipliers=None, unet_multipliers=None):
        model = self.shared.sd_model
        model.forge_objects = model.forge_objects_original.shallow_copy()
        for name, text_strength, unet_strength in zip(names, te_multipliers, unet_multipliers):
            unet, clip = model.forge_objects.unet.clone(), model.forge_objects.clip.clone()
            tensors = load_file(self.networks.available_network_aliases[name].filename)
            for patcher, keys, strength in ((unet, unet_keys(unet), unet_strength), (clip, clip_keys(clip), text_strength)):
                parts = ("lora_up.weight", "lora_down.weight", "alpha")
                patcher.add_patches({key: [tensors[f"{name}.{part}"] for part in parts] for name, key in keys.items()}, strength)
            model.forge_objects.unet, model.forge_objects.clip = unet, clip
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()

    def activate(self, p, extra_network_data):
        params = extra_network_data.get("lora", [])
        strengths = [float(x.positional[1]) if len(x.positional) > 1 else 1.0 for x in params]
        self.networks.load_networks([x.positional[0] for x in params], strengths, strengths)

    def before_sampling(self, p):
        self.shared.sd_model.forge_objects.unet.load()

    def encode(self, texts):
        clip = self.shared.sd_model.forge_objects.clip
        clip.patcher.load()
        return torch.stack([clip.cond_stage_model["clip_l"]([text])[0] for text in texts])

    def denoiser_class(self):
        return CFGDenoiser


class CFGDenoiser(forge.CFGDenoiser):
    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond, **kwargs):
        return super().forward(x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond)

    def switched(self, common, x, sigma):
        return common.apply_refiner(self, x, sigma[0])  # sd_samplers_cfg_denoiser.py:117


class FakeClassic(FakeNeo):
    """The first Forge's modules: no `backend`, A1111's names for everything else."""

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        for name in [name for name in self.modules if name.partition(".")[0] == "backend"]:
            del self.modules[name]
        self.module("modules_forge.forge_loader", ForgeSD=object)
        self.modules["modules.sd_samplers_common"].apply_refiner = self.apply_refiner
        self.networks.load_networks = self.load_four

    def load_four(self, names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        self.load_three(names, te_multipliers, unet_multipliers)

    def denoiser_class(self):
        return forge.CFGDenoiser


class FakeReForge(FakeClassic):
    """Classic's, with A1111's functions of the Lora extension, which do nothing here (extensions-builtin/Lora/networks.py:28)."""

    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        self.networks.assign_network_names_to_compvis_modules = lambda sd_model: None
        self.networks.network_apply_weights = lambda self: None
