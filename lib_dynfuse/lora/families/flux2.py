"""Flux.2 (by Black Forest Labs): Klein 4B and 9B and dev, which differ in width and depth.

Its blocks are Flux's with a gated MLP, whose first layer has two halves of three widths each, and without modulations of their own:
linear1 is 3 + 6 ninths, and in diffusers it is fused as well. Layers and sizes: ai-toolkit's
extensions_built_in/diffusion_models/flux2/src/model.py, Forge Neo's backend/nn/flux.py, diffusers' transformer_flux2.py and
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .family import Layers, Shape
from .flux import ATTENTION_OF_DOUBLE, FUSED_IN_DOUBLE, HALVES, NORMS_OF_SINGLE, SPLIT_IN_DOUBLE, Flux, gated
from .transformer import AUTHORS, DIFFUSERS, Stack, layouts_of, within_of

_DOUBLE = {
    **ATTENTION_OF_DOUBLE,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {**NORMS_OF_SINGLE, "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_LINEAR1 = {"linear1": {"q": 1, "k": 1, "v": 1, "mlp": 6}}
_STACKS = (
    Stack("double_blocks", "transformer_blocks", "double", _DOUBLE, FUSED_IN_DOUBLE, SPLIT_IN_DOUBLE),
    Stack("single_blocks", "single_transformer_blocks", "single", _SINGLE, _LINEAR1),
)
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    **{f"{modulation}.lin": f"{modulation}.linear" for modulation in _MODULATIONS},
    "final_layer.linear": "proj_out",
}
_LAYOUTS = layouts_of("Flux BFL names", "Flux.2 diffusers names", _STACKS, _ENDS, HALVES)
_METADATA_4B = {"ss_base_model_version": "flux2_klein_4b", "modelspec.architecture": "flux-2-klein-4b/lora"}
_METADATA_9B = {"ss_base_model_version": "flux2_klein_9b", "modelspec.architecture": "flux-2-klein-9b/lora"}
_METADATA_DEV = {"ss_base_model_version": "flux2", "modelspec.architecture": "flux-2-dev/lora"}
_OWN = re.compile(
    r"(?:double|single)_stream_modulation|(?:single_)?transformer_blocks\.\d+\.(?:attn\.to_qkv_mlp_proj|ff(?:_context)?\.linear_(?:in|out))$"
)


class Flux2(Flux):
    """A model of Flux.2. text: width of what its text encoder gives. guided: whether it has a guidance embedding."""

    text: int
    guided = False

    kind = "a Flux.2 model"
    stacks = _STACKS
    ends = _ENDS
    layouts = _LAYOUTS
    within = within_of(_STACKS, _ENDS)
    labels = (*Flux.labels, (re.compile(r"(?:time_guidance_embed|(?:double|single)_stream_modulation)"), "embed"))
    text_blocks = ()
    marks = re.compile(r"flux[-_. ]?2")

    def layers(self) -> Iterator[tuple[str, Shape]]:
        width = self.width
        yield "img_in", (width, 128)
        yield "txt_in", (width, self.text)
        for name in ("time_in", "guidance_in") if self.guided else ("time_in",):
            yield f"{name}.in_layer", (width, 256)
            yield f"{name}.out_layer", (width, width)
        for modulation, number in zip(_MODULATIONS, (6, 6, 3)):
            yield f"{modulation}.lin", (number * width, width)
        yield from self.blocks_layers(modulated=False, up=6, down=3)
        yield "final_layer.adaLN_modulation.1", (2 * width, width)
        yield "final_layer.linear", (128, width)

    def scheme(self, layers: Layers) -> str | None:
        if not any(_OWN.match(name) for name in layers) and not gated(layers):
            return None
        return AUTHORS if any(name.startswith(("double_blocks.", "single_blocks.")) for name in layers) else DIFFUSERS


class _Klein4B(Flux2):
    name = "Flux.2 Klein 4B"
    width, double, single, text = 3072, 5, 20, 7680
    metadata = _METADATA_4B


class _Klein9B(Flux2):
    name = "Flux.2 Klein 9B"
    width, double, single, text = 4096, 8, 24, 12288
    metadata = _METADATA_9B


class _Dev(Flux2):
    name = "Flux.2 dev"
    width, double, single, text, guided = 6144, 8, 48, 15360, True
    metadata = _METADATA_DEV


FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2_DEV = _Klein4B(), _Klein9B(), _Dev()

__all__ = ["FLUX2_DEV", "FLUX2_KLEIN_4B", "FLUX2_KLEIN_9B", "Flux2"]
