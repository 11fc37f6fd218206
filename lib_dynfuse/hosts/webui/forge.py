"""Stable Diffusion WebUI Forge (dfdcbab6; file and line numbers below are its)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...fusion import Rows
from ...guidance.correction import Kind
from ...guidance.decode import decoding_half
from ...lora.branch import Branch, Dense, LowRank, bound
from ..wrapping import wrapped
from .capabilities import Call, Value, held
from .forge_autograd import graph_through_inference_tensors
from .references import JOB_ARGUMENTS, BaseIdentity, file_identity
from .roles import Checkpoints, Denoisers, HostVae, Roles, RowLayout, Samplers, TextEncoders, refuse_replaced_denoiser
from .text_parts import TextPart, TextParts

# Names under which our patches stand in a patcher begin with this.
PATCH_PREFIX = "dynfuse:"

# Encoder of a LoRA -> the text encoders that it may mean, by their names in Forge's CLIP object (diffusion_engine/*.py).
ENCODERS = {"te1": ("clip_l", "clip_h"), "te2": ("clip_g",), "t5": ("t5xxl",)}

CONDITIONAL = 0  # an entry of cond_or_uncond (sampling_function.py:153)


class ForgeDenoisers(Denoisers):
    """LoRAs lie in patches, by file, until the model is loaded; unconditional rows come first."""

    def denoiser(self, cfg_denoiser: Any) -> nn.Module:
        refuse_replaced_denoiser()
        return unet_of(cfg_denoiser).model.diffusion_model

    def loaded(self) -> nn.Module | None:
        from modules import sd_models

        data = sd_models.model_data
        # Another checkpoint was chosen, and is loaded with the next picture (sd_models.py, forge_model_reload).
        if getattr(data, "forge_hash", None) not in (None, str(getattr(data, "forge_loading_parameters", None))):
            return None
        # Before the first picture it is a stand-in without parts (sd_models.py, FakeInitialModel).
        parts = getattr(data.sd_model, "forge_objects", None)
        return parts.unet.model.diffusion_model if parts is not None else None

    def identity(self, cfg_denoiser: Any) -> object:
        return id(unet_of(cfg_denoiser).model.diffusion_model)

    def merged_loras(self, cfg_denoiser: Any) -> object:
        return tuple(unet_of(cfg_denoiser).lora_patches)

    def weight_of(self, layer: nn.Module) -> Tensor:
        from backend.operations import get_weight_and_bias

        # Online patches (fp8 and GGUF bases) and fp8's scale are applied in there; float32, because fp8 cannot be computed with.
        weight, _ = get_weight_and_bias(layer, weight_args={"dtype": torch.float32}, weight_fn=dequantised)
        return weight

    def own_weight(self, layer: nn.Module) -> Tensor | None:
        # Patches that are added in each forward (backend/operations.py: get_weight_and_bias; Neo and the ldm forks: weight_function).
        added = any(getattr(layer, name, None) for name in ("forge_online_loras", "weight_function", "scale_weight"))
        return None if added else getattr(layer, "weight", None)

    def row_layout(self, cfg_denoiser: Any, cond: Any) -> RowLayout:
        images = len(cond.batch)
        return lambda x, arguments: rows_of_call(x.shape[0], images, arguments.get("transformer_options") or {})

    def adjusted_rows(self, arguments: dict[str, Any], positions: tuple[int, ...], batch: int) -> dict[str, Any] | None:
        options = arguments.get("transformer_options")
        if not options or not options.get("cond_or_uncond"):
            return arguments
        entries = options["cond_or_uncond"]
        conditional = [entry for entry in entries if entry == CONDITIONAL]
        if len(positions) * len(entries) != len(conditional) * batch:
            return None  # a part of a stretch
        rows = {"cond_or_uncond": conditional, "cond_indices": list(range(len(positions))), "uncond_indices": []}
        return {**arguments, "transformer_options": {**options, **{key: rows[key] for key in rows if key in options}}}

    def model_calls(self, around: Callable[..., Any]) -> AbstractContextManager[None]:
        from modules import sd_samplers_cfg_denoiser

        # CFGDenoiser.forward finds it under this name at each step (sd_samplers_cfg_denoiser.py:199).
        if not hasattr(sd_samplers_cfg_denoiser, "sampling_function"):
            return nullcontext()
        return wrapped(sd_samplers_cfg_denoiser, "sampling_function", around)

    def reserve(self, p: Any, elements: int, bytes_: int) -> None:
        # Else a model that just fits would be loaded whole, and ours run out of memory. Lost with the next reset of
        # forge_objects (processing.py:1522), after which the host asks again.
        unet = p.sd_model.forge_objects.unet
        size = elements * torch.empty((), dtype=self.computation_dtype(unet)).element_size() + bytes_
        unet = unet.clone()
        unet.add_extra_preserved_memory_during_sampling(size)
        p.sd_model.forge_objects.unet = unet

    def computation_dtype(self, unet: Any) -> torch.dtype:
        """The type that the denoiser computes in. unet: its patcher."""
        return unet.model.computation_dtype


class ForgeSamplers(Samplers):
    """Every sampler takes D but DDIM and PLMS, which hand over timesteps and take the noise."""

    def noise_levels(self, cfg_denoiser: Any, values: Tensor) -> Tensor:
        if not self.works_on_eps(cfg_denoiser):
            return values
        # Timesteps, rounded as Forge rounds them (sd_samplers_cfg_denoiser.py:164).
        alphas = engine_of(cfg_denoiser).alphas_cumprod.to(values.device)
        levels = ((1.0 - alphas) / alphas) ** 0.5
        return levels[values.round().long().clip(0, len(levels) - 1)]

    def works_on_eps(self, cfg_denoiser: Any) -> bool:
        return bool(getattr(cfg_denoiser, "classic_ddim_eps_estimation", False))

    def denoised(self, cfg_denoiser: Any, x: Tensor, s: float, prediction: Tensor) -> Tensor:
        if self.works_on_eps(cfg_denoiser) and getattr(cfg_denoiser, "mask", None) is not None:
            # x had the kept part of the picture put in, noised anew, before it was denoised (sd_samplers_cfg_denoiser.py:176).
            return cfg_denoiser.sampler.last_latent
        return super().denoised(cfg_denoiser, x, s, prediction)

    def kind(self, cfg_denoiser: Any) -> Kind:
        # "const" is Forge's word for x = (1 - t) x0 + t noise (backend/modules/k_prediction.py:100).
        return "flow" if getattr(_predictor(cfg_denoiser), "prediction_type", None) == "const" else "vp"

    def rectified_ancestral(self, cfg_denoiser: Any) -> bool:
        from backend.modules.k_prediction import PredictionFlux

        # Of the flow models, Flux only (k_diffusion/sampling.py:143, 251).
        return isinstance(_predictor(cfg_denoiser), PredictionFlux)

    def vae(self, cfg_denoiser: Any) -> HostVae:
        patcher = engine_of(cfg_denoiser).forge_objects.vae
        model = patcher.first_stage_model
        decoder = decoding_half(model.post_quant_conv, model.decoder)  # as IntegratedAutoencoderKL.decode, backend/nn/vae.py:304
        return HostVae(decoder, scale=model.scaling_factor, shift=model.shift_factor, dtype=patcher.vae_dtype, identity=id(model))

    def attention(self) -> Callable[..., Tensor] | None:
        return held("backend.attention", "attention_function")

    @contextmanager
    def differentiable(
        self, cfg_denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        x = args[0] if args else kwargs["x"]
        with graph_through_inference_tensors(), _previews_without_gradient():
            leaf = x.detach().clone().requires_grad_()
            try:
                yield ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "x": leaf})
            finally:
                leaf.requires_grad_(False)
                sampler = cfg_denoiser.sampler
                if isinstance(sampler.last_latent, Tensor):
                    sampler.last_latent = sampler.last_latent.detach()


class ForgeTextEncoders(TextEncoders):
    """The parts are patches of the text encoders, under names of our own."""

    def __init__(self) -> None:
        # A model that a refiner, or another checkpoint for the hires pass, took over from may stay loaded (reForge: sd_checkpoints_limit).
        self._given: list[weakref.ref[Any]] = []

    def objects_with_parts(self, model: Any) -> list[Any]:
        """Where the patchers are that may have our parts: of this model, and of every one that was given some."""
        models = {id(one): one for one in (model, *(given() for given in self._given)) if one is not None}
        return [objects for one in models.values() for objects in objects_in_use(one)]

    def give(self, model: Any, clip: Any) -> None:
        """Put a clip with our parts wherever this model's is taken from.

        Not by way of current_lora_hash: the other LoRAs' patches stay, and a plain load finds the store as it left it. Tags are sometimes
        activated with no reset of forge_objects after it (processing.py:1585, hires), so both places are set.
        """
        self._given = [given for given in self._given if given() not in (None, model)] + [weakref.ref(model)]
        for objects in objects_in_use(model):
            objects.clip = clip

    def add(self, text: TextParts) -> list[str]:
        model = current_model()
        if model is None:
            return []
        clip = model.forge_objects_after_applying_lora.clip.clone()
        names = dict(clip.cond_stage_model.named_parameters())
        unmatched: list[str] = []
        for part in text.parts:
            patches, missing = text_patches(part, names, lambda key: self._text_weight(clip, names[key], key))
            unmatched += [f"{layer} of {part.name}" for layer in missing]
            if patches:
                clip.add_patches(
                    filename=f"{PATCH_PREFIX}{text.label}: {part.name}",
                    patches=patches,
                    strength_patch=part.strength,
                    online_mode=_merges_online(model),
                )
        self.give(model, clip)
        return unmatched

    def remove(self) -> None:
        for objects in self.objects_with_parts(current_model()):
            if any(_is_ours(key) for key in objects.clip.patcher.lora_patches):
                objects.clip = objects.clip.clone()
                patcher = objects.clip.patcher
                patcher.lora_patches = {key: patches for key, patches in patcher.lora_patches.items() if not _is_ours(key)}
        self._given = []

    @staticmethod
    def _text_weight(clip: Any, parameter: Tensor, key: str) -> Tensor:
        """The weight before any LoRA: a merge of the last job may still be in the parameter (backend/patcher/lora.py:300)."""
        return dequantised(clip.patcher.lora_loader.backup.get(key, parameter))


class ForgeCheckpoints(Checkpoints):
    """Text encoders and VAE may come from files of their own."""

    def arguments(self, p: Any) -> dict[str, Any]:
        return {"distilled_cfg_scale": p.distilled_cfg_scale}

    def identity(self, p: Any) -> BaseIdentity:
        from modules import sd_models

        loaded = sd_models.model_data.forge_loading_parameters
        modules = [file_identity(path) for path in loaded.get("additional_modules") or []]
        base = super().identity(p)
        # The weights may be rounded on loading; modules are text encoders and VAEs alike.
        checkpoint = f"{base.checkpoint} {loaded.get('unet_storage_dtype')}"
        return BaseIdentity(checkpoint, "; ".join([base.vae, *modules]))


NEEDS = (
    # The store of patches by file that this loader merges; Forge Neo has the same names around another one.
    Value("backend.patcher.lora", "LoraLoader"),
    Call("backend.patcher.base", "ModelPatcher.add_patches", 1, ("filename", "patches", "strength_patch", "online_mode")),
    Call("backend.patcher.base", "ModelPatcher.clone", 1),
    Call("backend.patcher.clip", "CLIP.clone", 1),
    Call("backend.patcher.clip", "CLIP.add_patches", 1, ("filename", "patches", "strength_patch", "online_mode")),
    Call("backend.patcher.unet", "UnetPatcher.add_extra_preserved_memory_during_sampling", 2),
    Call("backend.operations", "get_weight_and_bias", 1, ("weight_args", "weight_fn")),
    Value("backend.modules.k_prediction", "PredictionFlux"),
    Value("backend.args", "dynamic_args"),
    Call("modules.sd_models", "model_data.get_sd_model"),
    Value("modules.sd_models", "model_data.forge_loading_parameters"),
    Call("modules.sd_samplers_common", "store_latent", 1),
    Call("modules.processing", "StableDiffusionProcessingTxt2Img", keywords=(*JOB_ARGUMENTS, "distilled_cfg_scale")),
)

FORGE = Roles("Forge", ForgeDenoisers(), ForgeSamplers(), ForgeTextEncoders(), ForgeCheckpoints(), NEEDS)


def engine_of(cfg_denoiser: Any) -> Any:
    """The diffusion engine that a CFGDenoiser calls."""
    return cfg_denoiser.inner_model.inner_model


def unet_of(cfg_denoiser: Any) -> Any:
    """The patcher of the denoiser that a CFGDenoiser calls."""
    return engine_of(cfg_denoiser).forge_objects.unet


def _predictor(cfg_denoiser: Any) -> Any:
    return unet_of(cfg_denoiser).model.predictor


def current_model() -> Any:
    """The loaded engine; None if there is none, or something else is in its place."""
    from modules import sd_models

    model = sd_models.model_data.get_sd_model()
    return model if hasattr(model, "forge_objects") else None


@contextmanager
def _previews_without_gradient() -> Iterator[None]:
    """Forge shows the last latent, and turns it into a picture in ways that a tensor with a graph does not allow."""
    from modules import sd_samplers_common

    original = sd_samplers_common.store_latent

    def store_latent(decoded: Tensor) -> None:
        with torch.inference_mode():
            original(decoded.detach())

    sd_samplers_common.store_latent = store_latent
    try:
        yield
    finally:
        sd_samplers_common.store_latent = original


def rows_of_call(rows: int, images: int, options: Mapping[str, Any]) -> Rows:
    """The rows of one model call (sampling_function.py:145-270).

    cond_or_uncond has one entry per stretch of the batch, each with one row per image. The built-in MultiDiffusion repeats all of
    that for every tile (tiled_diffusion.py:437). In any other cut every row counts as conditional: which is which cannot be told.
    """
    entries = options.get("cond_or_uncond") or [CONDITIONAL]
    image_of_row = tuple(row % images for row in range(rows))
    tiles, rest = divmod(rows, len(entries) * images)
    if rest:
        return Rows(image_of_row, (True,) * rows, images)
    return Rows(image_of_row, tuple(entry == CONDITIONAL for entry in entries for _ in range(images)) * tiles, images)


def text_patches(
    part: TextPart, names: Mapping[str, Tensor], weight: Any, form: Callable[[Branch, Callable[[], Tensor]], Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Patches as ModelPatcher.add_patches takes them, by parameter name, and the layers that this model does not have.

    names: the text encoders' parameters. weight: parameter name -> the layer's weight, dequantised. form: (branch, its layer's weight)
    -> the patch; None: Forge's.
    """
    form = form or _patch

    def later(key: str) -> Callable[[], Tensor]:
        return lambda: weight(key)

    by_layer = {}
    for key in names:
        encoder, _, path = key.partition(".transformer.")
        if path.endswith(".weight"):
            by_layer[encoder, path[: -len(".weight")].replace(".", "_")] = key
    patches: dict[str, Any] = {}
    unmatched: list[str] = []
    for encoder, layer, branch in part.branches():
        found = [by_layer[name, layer] for name in ENCODERS.get(encoder, ()) if (name, layer) in by_layer]
        if not found:
            unmatched.append(f"{encoder} {layer}")
            continue
        key = found[0]
        patches[key] = form(branch, later(key))
        bias_key = key[: -len("weight")] + "bias"
        if branch.bias is not None and bias_key in names:
            patches[bias_key] = form(Dense(branch.bias.float()), later(bias_key))
    return patches, unmatched


def _patch(branch: Branch, weight: Any) -> tuple[str, tuple[Any, ...]]:
    """A branch in the form of backend/patcher/lora.py:84. Thin matrices stay thin: CLIP-G's full ones would take 2.5 GB."""
    applied = bound(branch, weight)
    if isinstance(applied, LowRank):
        alpha = applied.scale * applied.rank  # divided by the rank there
        return "lora", (applied.up, applied.down, alpha, None, None)
    return "diff", (applied.delta_weight(),)


def _is_ours(key: tuple[Any, ...]) -> bool:
    """key: (filename, strength, strength of the model, online), as in ModelPatcher.lora_patches."""
    return str(key[0]).startswith(PATCH_PREFIX)


def objects_in_use(model: Any) -> list[Any]:
    """Where Forge keeps the patchers in use: of this sampling, and of the samplings to come."""
    places = ("forge_objects", "forge_objects_after_applying_lora")
    return [objects for objects in (getattr(model, place, None) for place in places) if objects is not None]


def _merges_online(model: Any) -> bool:
    """Whether Forge itself would leave LoRAs unmerged now (sd_forge_lora/networks.py:119)."""
    from backend.args import dynamic_args

    plain = model.forge_objects.unet.model.storage_dtype in (torch.float32, torch.float16, torch.bfloat16)
    return bool(dynamic_args.get("online_lora", False)) and not plain


def dequantised(weight: Tensor) -> Tensor:
    """A parameter's values: GGUF and bitsandbytes parameters hold packed blocks."""
    quantisation = getattr(weight, "gguf_cls", None)
    if quantisation is not None:
        from backend.operations_gguf import dequantize_tensor

        if not weight.baked:  # type: ignore[attr-defined]
            weight = weight.copy_with_data(weight.data.clone())  # type: ignore[attr-defined]
            quantisation.bake(weight)
        return dequantize_tensor(weight)
    if getattr(weight, "bnb_quantized", False):
        from backend.operations_bnb import functional_dequantize_4bit

        return functional_dequantize_4bit(weight)
    return weight


__all__ = [
    "FORGE",
    "ForgeCheckpoints",
    "ForgeDenoisers",
    "ForgeSamplers",
    "ForgeTextEncoders",
    "current_model",
    "dequantised",
    "engine_of",
    "objects_in_use",
    "rows_of_call",
    "text_patches",
    "unet_of",
]
