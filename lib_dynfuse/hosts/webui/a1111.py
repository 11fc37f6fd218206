"""AUTOMATIC1111's WebUI (1.10.1; file and line numbers below are its)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...fusion import Rows
from ...guidance.decode import decoding_half
from ...lora.branch import Branch, Dense, LowRank, bound
from .capabilities import Call, Value
from .roles import Checkpoints, Denoisers, HostVae, Roles, RowLayout, Samplers, TextEncoders, refuse_replaced_denoiser
from .text_parts import TextParts


class A1111Denoisers(Denoisers):
    """LoRAs are merged lazily into the layers; conditional rows come first."""

    def denoiser(self, cfg_denoiser: Any) -> nn.Module:
        from modules import shared

        refuse_replaced_denoiser()
        return shared.sd_model.model.diffusion_model

    def loaded(self) -> nn.Module | None:
        from modules import sd_models

        # shared.sd_model would load one.
        model = sd_models.model_data.sd_model
        return model.model.diffusion_model if model is not None else None

    def identity(self, cfg_denoiser: Any) -> object:
        from modules import shared

        # Another checkpoint of the same kind is loaded into the same modules (sd_models.reload_model_weights).
        return id(shared.sd_model.model.diffusion_model), shared.sd_model.sd_checkpoint_info.filename

    def merged_loras(self, cfg_denoiser: Any) -> object:
        import networks

        return tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in networks.loaded_networks)

    def weight_of(self, layer: nn.Module) -> Tensor:
        import networks
        from modules import shared

        # Other LoRAs are merged lazily, in each layer's first forward (networks.py:411): do it now.
        if not getattr(shared.opts, "lora_functional", False):
            networks.network_apply_weights(layer)
        return cast(Tensor, layer.weight)

    def own_weight(self, layer: nn.Module) -> Tensor | None:
        from modules import shared

        # Its forward restores the weight from a backup (networks.py:508).
        return None if getattr(shared.opts, "lora_functional", False) else self.weight_of(layer)

    def row_layout(self, cfg_denoiser: Any, cond: Any) -> RowLayout:
        return CondFirst([len(prompts) for prompts in cond.batch])


class A1111Samplers(Samplers):
    """k-diffusion samplers hand over sigmas and take D; DDIM, PLMS and UniPC hand over timesteps and take the noise."""

    def noise_levels(self, cfg_denoiser: Any, values: Tensor) -> Tensor:
        if not self.works_on_eps(cfg_denoiser):
            return values
        # Timesteps; UniPC's lie between whole ones. On the CPU: not every device has float64.
        alphas, values = cfg_denoiser.alphas.cpu().double(), values.cpu().double()
        levels = ((1.0 - alphas) / alphas).sqrt().log()
        at = values.clamp(0, len(levels) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(levels) - 1)
        return torch.lerp(levels[below], levels[above], at - below).exp()

    def works_on_eps(self, cfg_denoiser: Any) -> bool:
        # Only the denoiser of DDIM, PLMS and UniPC has a table of alphas (sd_samplers_timesteps.py:48).
        return hasattr(cfg_denoiser, "alphas")

    def denoised(self, cfg_denoiser: Any, x: Tensor, s: float, prediction: Tensor) -> Tensor:
        mask = getattr(cfg_denoiser, "mask", None)
        if mask is not None and self.works_on_eps(cfg_denoiser):
            # These put the kept part of the picture in before they denoise (sd_samplers_cfg_denoiser.py:187).
            x = x * cfg_denoiser.nmask + cfg_denoiser.init_latent * mask
        return super().denoised(cfg_denoiser, x, s, prediction)

    def cfg_scale(self, cfg_denoiser: Any, sigma: Tensor, scale: float, s_min_uncond: float) -> float:
        from modules import shared

        # Steps without the negative prompt (sd_samplers_cfg_denoiser.py:218): the prompt's rows are the picture's.
        early = getattr(shared.opts, "skip_early_cond", 0.0)
        if early != 0 and cfg_denoiser.step / cfg_denoiser.total_steps <= early:
            return 1.0
        every = getattr(shared.opts, "s_min_uncond_all", False)
        if (cfg_denoiser.step % 2 or every) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            return 1.0
        return scale * getattr(cfg_denoiser, "cond_scale_miltiplier", 1.0)

    def vae(self, cfg_denoiser: Any) -> HostVae:
        from modules import sd_vae, shared

        model = shared.sd_model
        stage = model.first_stage_model
        identity = (id(stage), model.sd_checkpoint_info.filename, sd_vae.loaded_vae_file)
        # decode_first_stage takes no gradients (ldm ddpm.py:817).
        return HostVae(
            decoding_half(getattr(stage, "post_quant_conv", None), stage.decoder),
            float(model.scale_factor),
            0.0,
            next(stage.decoder.parameters()).dtype,
            identity,
        )

    @contextlib.contextmanager
    def differentiable(self, cfg_denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        from modules import shared

        # The Lora extension merges in place and lazily, in the first forward that it sees (networks.py:383).
        learning = [parameter for parameter in shared.sd_model.model.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        latent = args[0] if args else kwargs["x"]
        with torch.enable_grad():
            leaf = latent.detach().clone().requires_grad_()
            try:
                yield ((leaf, *args[1:]), kwargs) if args else ((), {**kwargs, "x": leaf})
            finally:
                for parameter in learning:
                    parameter.requires_grad_(True)
                # What the previews show would hold on to the whole graph.
                sampler = cfg_denoiser.sampler
                if isinstance(sampler.last_latent, Tensor):
                    sampler.last_latent = sampler.last_latent.detach()
                if isinstance(shared.state.current_latent, Tensor):
                    shared.state.current_latent = shared.state.current_latent.detach()
                if isinstance(getattr(cfg_denoiser, "last_noise_uncond", None), Tensor):
                    cfg_denoiser.last_noise_uncond = cfg_denoiser.last_noise_uncond.detach()


class A1111TextEncoders(TextEncoders):
    """The parts are one more network of the Lora extension, which merges it with its own."""

    def __init__(self) -> None:
        self._labels: set[str] = set()  # of all that may still be in a layer

    def add(self, text: TextParts) -> list[str]:
        import networks
        from modules import shared

        mapping = getattr(shared.sd_model, "network_layer_mapping", None)
        if mapping is None:
            networks.assign_network_names_to_compvis_modules(shared.sd_model)
            mapping = shared.sd_model.network_layer_mapping
        modules, unmatched = text_modules(text, mapping)
        if modules:
            networks.loaded_networks.append(TextNetwork(text.label, modules))
            self._labels.add(text.label)
        return unmatched

    def remove(self) -> None:
        self._take_out()

    def _take_out(self) -> None:
        import networks

        # In place: the other parts of the Lora extension hold the same list.
        networks.loaded_networks[:] = [net for net in networks.loaded_networks if not getattr(net, "is_dynfuse", False)]

    def take_leftovers_back(self, of_others: bool) -> None:
        """Layers give up what was merged into them when they are next run; not so under the option lora_functional where no LoRA is asked
        for any more (networks.py:533): their weights then are those of the last job before the option was set.
        """
        import networks
        from modules import shared

        if not getattr(shared.opts, "lora_functional", False) or not (of_others or self._labels):
            return
        for layer in (getattr(shared.sd_model, "network_layer_mapping", None) or {}).values():
            merged = getattr(layer, "network_current_names", ())
            if merged and (of_others or any(name in self._labels for name, *_ in merged)):
                networks.network_restore_weights_from_backup(layer)
                networks.network_reset_cached_weight(layer)
        self._labels.clear()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A network makes every layer that is run keep a copy of its weight and restore it, also those that it does not change
        (networks.py:411): of the text encoders' that would be a second U-Net in memory.
        """
        import networks

        ours = [net for net in networks.loaded_networks if getattr(net, "is_dynfuse", False)]
        self._take_out()
        try:
            yield
        finally:
            networks.loaded_networks.extend(ours)


NEEDS = (
    Value("networks", "loaded_networks"),
    Call("networks", "network_apply_weights", 1),
    Call("networks", "network_restore_weights_from_backup", 1),
    Call("networks", "network_reset_cached_weight", 1),
    Call("networks", "assign_network_names_to_compvis_modules", 1),
)

A1111 = Roles(
    "A1111",
    A1111Denoisers(),
    A1111Samplers(),
    A1111TextEncoders(),
    Checkpoints(),
    NEEDS,
    # WebUIs with the first Forge's backend (reForge, Forge Classic) have the same modules, but other rows and another store of LoRAs.
    barred=("modules_forge",),
)


class CondFirst:
    """The rows of one denoiser step, in order over its model calls (sd_samplers_cfg_denoiser.py:198-268).

    First each image's prompts (several with AND), image after image, then one unconditional row per image. The rows come in one
    call or in several, cut anywhere; the unconditional ones may be missing. InstructPix2Pix models have two per image. Extensions
    that cut the picture into tiles make such calls again and again, and several tiles in one.
    """

    def __init__(self, prompts: Sequence[int]):
        """prompts: number of conditional rows of each image."""
        self._conditional = [image for image, count in enumerate(prompts) for _ in range(count)]
        self._images = len(prompts)
        self._next = 0

    def __call__(self, x: Tensor, arguments: Mapping[str, Any]) -> Rows:
        rows = list(range(self._next, self._next + x.shape[0]))
        self._next += x.shape[0]
        total = len(self._conditional)
        whole = total + self._images
        if rows[0] % whole == 0 and len(rows) % whole == 0:
            rows = [row % whole for row in rows]
        images = tuple(self._conditional[row] if row < total else (row - total) % self._images for row in rows)
        return Rows(images, tuple(row < total for row in rows), self._images)


class TextNetwork:
    """The text-encoder parts as a network of the Lora extension (network.py:95): it merges whatever calc_updown gives it.

    The extension merges anew when a network's (name, multipliers) differ from what a layer carries (networks.py:423).
    """

    is_dynfuse = True

    def __init__(self, name: str, modules: dict[str, TextModule]):
        self.name = name
        self.modules = modules
        self.te_multiplier = 1.0
        self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.bundle_embeddings: dict[str, Any] = {}
        self.mtime = 0.0
        self.mentioned_name = None  # keeps it out of the infotext's "Lora hashes"
        self.network_on_disk = SimpleNamespace(name=name, alias=name, filename="", hash="", shorthash="", metadata={})


class TextModule:
    """The change of one text-encoder layer, or of one part of a packed attention."""

    def __init__(self, layer: nn.Module):
        self.parts: list[tuple[Branch, float]] = []
        self._layer = weakref.ref(layer)

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(change of the weight, change of the bias or None) for a weight (out, in), on its device, float32."""
        change = torch.zeros(weight.shape, device=weight.device)
        shift: Tensor | None = None
        for branch, strength in self.parts:
            applied = _on_device(bound(branch, lambda: weight), weight.device)
            change += strength * applied.delta_weight().reshape(weight.shape)
            if applied.bias is not None:
                offset = strength * applied.bias.float()
                shift = offset if shift is None else shift + offset
        return change, shift

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y with this change added: asked for under the option lora_functional (networks.py:551)."""
        layer = self._layer()
        assert layer is not None, "the text encoder was unloaded"
        change, shift = self.calc_updown(cast(Tensor, layer.weight))
        return y + nn.functional.linear(x, change.to(x.dtype), None if shift is None else shift.to(x.dtype))


def text_modules(text: TextParts, layers: Mapping[str, nn.Module]) -> tuple[dict[str, TextModule], list[str]]:
    """The modules of a TextNetwork by layer name, and the names that fit no layer.

    layers: the Lora extension's network_layer_mapping.
    """
    modules: dict[str, TextModule] = {}
    unmatched: list[str] = []
    for part in text.parts:
        for encoder, name, branch in part.branches():
            found = _find_layer(encoder, name, layers)
            if found is None:
                unmatched.append(f"{encoder} {name} of {part.name}")
                continue
            key, layer, siblings = found
            for sibling in siblings:
                modules.setdefault(sibling, TextModule(layer))
            modules.setdefault(key, TextModule(layer)).parts.append((branch, part.strength))
    return modules, unmatched


def _find_layer(encoder: str, name: str, layers: Mapping[str, nn.Module]) -> tuple[str, nn.Module, list[str]] | None:
    """(key, layer, keys that must exist beside it) of a text-encoder layer named as in transformers."""
    # SD 1 and SD 2 have one encoder, not numbered; SDXL's are 0 and 1; its refiner has the second alone, as 0 (networks.py:135-153).
    for prefix in ("transformer_", "0_transformer_") if encoder == "te1" else ():
        if prefix + name in layers:
            return prefix + name, layers[prefix + name], []
    for number in ("",) if encoder == "te1" else ("1_", "0_"):
        key = number + _open_clip_name(name)
        if key in layers:
            return key, layers[key], []
        attention, part = _packed_attention(key)
        if part and attention in layers:
            # q, k, v are one matrix: merged only if all four of q, k, v, out are there (networks.py:487).
            return key, layers[attention], [f"{attention}_{p}_proj" for p in ("q", "k", "v", "out")]
    return None


def _open_clip_name(name: str) -> str:
    """text_model_encoder_layers_3_mlp_fc1 (transformers) -> model_transformer_resblocks_3_mlp_c_fc (open_clip)."""
    for theirs, ours in (
        ("text_model_encoder_layers_", "model_transformer_resblocks_"),
        ("_mlp_fc1", "_mlp_c_fc"),
        ("_mlp_fc2", "_mlp_c_proj"),
        ("_self_attn_", "_attn_"),
        ("_layer_norm1", "_ln_1"),
        ("_layer_norm2", "_ln_2"),
    ):
        name = name.replace(theirs, ours)
    return name


def _packed_attention(key: str) -> tuple[str, str]:
    for part in ("q", "k", "v", "out"):
        if key.endswith(f"_attn_{part}_proj"):
            return key[: -len(f"_{part}_proj")], part
    return key, ""


def _on_device(branch: LowRank | Dense, device: torch.device) -> LowRank | Dense:
    bias = None if branch.bias is None else branch.bias.to(device)
    if isinstance(branch, LowRank):
        return replace(branch, down=branch.down.to(device), up=branch.up.to(device), bias=bias)
    return replace(branch, weight=branch.weight.to(device), bias=bias)


__all__ = ["A1111", "A1111Denoisers", "A1111Samplers", "A1111TextEncoders", "CondFirst", "TextModule", "TextNetwork", "text_modules"]
