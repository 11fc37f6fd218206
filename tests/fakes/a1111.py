"""A1111 1.10.1, as far as DynFuse touches it: LoRAs merged in place at a layer's first forward, conditional rows first."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .models import TextEncoder, UNet
from .webui import SCALE, FakeWebUI, decoder


class Network:
    def __init__(self, name, path, mapping):
        self.name, self.mentioned_name, self.bundle_embeddings, self.dyn_dim = name, name, {}, None
        self.network_on_disk = types.SimpleNamespace(name=name, shorthash="")
        tensors = load_file(path)
        self.modules = {}
        for key in {key.split(".")[0] for key in tensors}:
            layer = key.replace("lora_unet_", "diffusion_model_").replace("lora_te_", "transformer_")
            if layer in mapping:
                self.modules[layer] = Module(
                    self, layer, *(tensors[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
                )


class Module:
    def __init__(self, network, layer, up, down, alpha):
        self.network, self.layer, self.up, self.down, self.alpha = network, layer, up, down, alpha

    def calc_updown(self, weight):
        strength = self.network.te_multiplier if "transformer" in self.layer[:20] else self.network.unet_multiplier
        change = (self.up.flatten(1) @ self.down.flatten(1)).reshape(weight.shape)
        return strength * self.alpha / self.down.shape[0] * change, None


class FakeA1111(FakeWebUI):
    def __init__(self, files, **kwargs):
        super().__init__(files, **kwargs)
        run = self.run_layer

        class Linear(nn.Linear):
            def forward(self, x):
                return run(self, x, lambda: F.linear(x, self.weight, self.bias))

        class Conv2d(nn.Conv2d):
            def forward(self, x):
                return run(self, x, lambda: self._conv_forward(x, self.weight, self.bias))

        self.linear, self.convolution = Linear, Conv2d
        self.networks.network_apply_weights = self.merge
        self.networks.network_restore_weights_from_backup = restore
        self.networks.network_reset_cached_weight = forget
        self.networks.assign_network_names_to_compvis_modules = name_layers
        self.shared.sd_model = self.checkpoint("base", seed=0)

    def checkpoint(self, filename, seed, **kwargs):
        """A model as modules.sd_models loads it."""
        unet = UNet(seed, self.linear, self.convolution, **kwargs)
        model = types.SimpleNamespace(
            model=Wrapped(unet),
            first_stage_model=types.SimpleNamespace(post_quant_conv=nn.Identity(), decoder=decoder()),
            scale_factor=SCALE,
            cond_stage_model=TextEncoder(self.linear),
            sd_checkpoint_info=types.SimpleNamespace(filename=filename),
        )
        name_layers(model)
        return model

    def run_layer(self, layer, x, own):
        """networks.network_Linear_forward and the functional way (networks.py:528, 567)."""
        if not self.shared.opts.lora_functional:
            self.merge(layer)
            return own()
        if not self.networks.loaded_networks:
            return own()
        restore(layer)
        forget(layer)
        y = own()
        for net in self.networks.loaded_networks:
            if (module := net.modules.get(getattr(layer, "network_layer_name", None))) is not None:
                y = module.forward(x, y)
        return y

    def merge(self, layer):
        """networks.network_apply_weights (networks.py:411)."""
        name = getattr(layer, "network_layer_name", None)
        if name is None:
            return
        wanted = tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in self.networks.loaded_networks)
        if getattr(layer, "network_weights_backup", None) is None and wanted:
            layer.network_weights_backup = layer.weight.clone()
        if getattr(layer, "network_current_names", ()) == wanted:
            return
        restore(layer)
        for net in self.networks.loaded_networks:
            if name in net.modules:
                change, shift = net.modules[name].calc_updown(layer.weight)
                assert shift is None
                layer.weight.copy_(layer.weight + change)
        layer.network_current_names = wanted

    def load_networks(self, names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        networks = self.networks
        networks.loaded_networks.clear()
        for i, name in enumerate(names):
            entry = networks.available_network_aliases.get(name)
            if entry is None:
                continue  # "Lora not found", on the console
            net = Network(name, entry.filename, self.shared.sd_model.network_layer_mapping)
            net.te_multiplier, net.unet_multiplier = te_multipliers[i], unet_multipliers[i]
            networks.loaded_networks.append(net)

    def encode(self, texts):
        return torch.stack([self.shared.sd_model.cond_stage_model([text])[0] for text in texts])

    def switch_model(self, cfg_denoiser):
        p = cfg_denoiser.p
        cond = p.cached_c[1]
        cfg_denoiser.sampler.sampler_extra_args = {"cond": cond, "uncond": p.cached_uc[1]}

    def denoiser_class(self):
        return CFGDenoiser


def restore(layer):
    if getattr(layer, "network_weights_backup", None) is not None:
        layer.weight.copy_(layer.network_weights_backup)


def forget(layer):
    layer.network_current_names, layer.network_weights_backup = (), None


class Wrapped(nn.Module):
    """ldm's DiffusionWrapper."""

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet


def name_layers(model):
    """networks.assign_network_names_to_compvis_modules."""
    mapping = {}
    for root, prefix in ((model.cond_stage_model, ""), (model.model.diffusion_model, "diffusion_model_")):
        for name, module in root.named_modules():
            if name:
                module.network_layer_name = prefix + name.replace(".", "_")
                mapping[module.network_layer_name] = module
    model.network_layer_mapping = mapping


class CFGDenoiser(nn.Module):
    """modules/sd_samplers_cfg_denoiser.py: the same cutting of the rows into calls."""

    def __init__(self, webui, sampler, p):
        super().__init__()
        self.webui, self.sampler, self.p, self.step, self.total_steps = webui, sampler, p, 0, p.steps

    def inner_model(self, x, sigma, cond):
        return x - self.webui.shared.sd_model.model.diffusion_model(x, sigma, cond)

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        common = self.webui.modules["modules.sd_samplers_common"]
        if common.apply_refiner(self, sigma):
            cond, uncond = (self.sampler.sampler_extra_args[key] for key in ("cond", "uncond"))
        self.p.hook("cfg_denoiser")
        repeats = [len(parts) for parts in cond.batch]
        images = len(repeats)
        tensor = torch.stack([part for parts in cond.batch for part in parts])
        uncond = torch.stack(uncond)
        skip = (self.step % 2 or self.webui.shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond
        x_in = torch.cat([x[i : i + 1].expand(n, -1, -1, -1) for i, n in enumerate(repeats)] + ([] if skip else [x]))
        sigma_in = torch.cat([sigma[i : i + 1].expand(n) for i, n in enumerate(repeats)] + ([] if skip else [sigma]))
        together = self.webui.shared.opts.batch_cond_uncond
        if tensor.shape[1] == uncond.shape[1] or skip:
            cond_in = tensor if skip else torch.cat([tensor, uncond])
            size = x_in.shape[0] if together else images
            out = torch.cat(
                [self.inner_model(x_in[a : a + size], sigma_in[a : a + size], cond_in[a : a + size]) for a in range(0, x_in.shape[0], size)]
            )
        else:
            size = images * 2 if together else images
            total = tensor.shape[0]
            cuts = [(a, min(a + size, total)) for a in range(0, total, size)]
            calls = [self.inner_model(x_in[a:b], sigma_in[a:b], tensor[a:b]) for a, b in cuts]
            out = torch.cat([*calls, self.inner_model(x_in[total:], sigma_in[total:], uncond)])
        self.p.hook("cfg_denoised")
        first = [sum(repeats[:i]) for i in range(images)]
        base = out[first] if skip else out[-images:]
        denoised = base.clone()
        for i in range(images):
            for row in range(first[i], first[i] + repeats[i]):
                denoised[i] += (out[row] - base[i]) * (1.0 if skip else cond_scale)
        self.p.hook("cfg_after_cfg")
        self.step += 1
        return denoised
