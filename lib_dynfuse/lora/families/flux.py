"""Flux (FLUX.1 by Black Forest Labs), in two schemes: as its authors published it ("double_blocks.0.img_attn.qkv", BFL here) and
in diffusers ("transformer_blocks.0.attn.to_q").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .encoders import CLIP_L, T5
from .family import Evidence, Layers, Shape
from .transformer import AUTHORS, DIFFUSERS, Stack, Transformer, layouts_of, named_as_sd3, within_of

# BFL -> diffusers.
ATTENTION_OF_DOUBLE = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
NORMS_OF_SINGLE = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_QKV = {"q": 1, "k": 1, "v": 1}
FUSED_IN_DOUBLE = {"img_attn.qkv": _QKV, "txt_attn.qkv": _QKV}
SPLIT_IN_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_MLP = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
MODULATION_OF_DOUBLE = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
# linear1 holds q, k, v and the MLP's first layer, which is four times as wide as the model.
FUSED_IN_SINGLE = {"linear1": {**_QKV, "mlp": 4}}
SPLIT_IN_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def flux_stacks(modulated: bool) -> tuple[Stack, ...]:
    """Flux's blocks. modulated: each has a modulation of its own."""
    double = {**(MODULATION_OF_DOUBLE if modulated else {}), **ATTENTION_OF_DOUBLE, **_MLP}
    single = {**({"modulation.lin": "norm.linear"} if modulated else {}), **NORMS_OF_SINGLE, "linear2": "proj_out"}
    return (
        Stack("double_blocks", "transformer_blocks", "double", double, FUSED_IN_DOUBLE, SPLIT_IN_DOUBLE),
        Stack("single_blocks", "single_transformer_blocks", "single", single, FUSED_IN_SINGLE, SPLIT_IN_SINGLE),
    )


_STACKS = flux_stacks(modulated=True)
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# The last modulation: (shift, scale) in BFL's layer, (scale, shift) in diffusers'.
HALVES = ("final_layer.adaLN_modulation.1", "norm_out.linear")
_LAYOUTS = layouts_of("Flux BFL names", "Flux diffusers names", _STACKS, _ENDS, HALVES)
_ENCODERS = {"te1": CLIP_L, "t5": T5}

# sd-webui-lora-block-weight's 61 numbers: CLIP, T5, IN, D00 to D18, S00 to S37, OUT.
FORMS = {
    61: ("base", "t5", "embed-first", *(f"double{n}" for n in range(19)), *(f"single{n}" for n in range(38)), "last"),
}
PRESETS = {"DOUBLE": ("base", "t5", "double0-double18"), "SINGLE": ("base", "t5", "single0-single37")}
_KOHYA_TEXT = {"te1": "lora_te1_", "t5": "lora_te3_"}
_METADATA = {"ss_base_model_version": "flux1", "ss_v2": "False", "modelspec.architecture": "flux-1-dev/lora"}
_SYNONYMS = {"clip": "base", "d": "double", "s": "single"}
# What other models have that share Flux's blocks: Chroma's modulations, Flux.2's, Qwen-Image's MLPs.
_OTHERS = re.compile(
    r"distilled_guidance_layer\.|(?:double|single)_stream_modulation|"
    r"(?:single_)?transformer_blocks\.\d+\.(?:attn\.to_qkv_mlp_proj|ff\.linear_in|(?:img|txt)_mlp\.|(?:img|txt)_mod\.)"
)


class Flux(Transformer):
    """A family whose denoiser has Flux's double and single blocks. double, single: numbers of blocks."""

    double: int
    single: int

    kind = "a Flux model"
    unrecognised = "a transformer whose layers are named as Flux's"
    stacks = _STACKS
    ends = _ENDS
    halves: tuple[str, str] | None = HALVES
    layouts = _LAYOUTS
    attention = frozenset({"img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "linear1"})
    norms = re.compile(r"(?:.*_)?(?:(?:query|key)_norm|norm_(?:added_)?[qk])")
    within = within_of(_STACKS, _ENDS)
    variable_inputs = frozenset({"img_in", "x_embedder"})
    labels: tuple[tuple[re.Pattern[str], str], ...] = (
        (re.compile(r"(?:double_blocks|transformer_blocks)\.(\d+)(?:\.|$)"), "double {}"),
        (re.compile(r"(?:single_blocks|single_transformer_blocks)\.(\d+)(?:\.|$)"), "single {}"),
        (re.compile(r"(?:time_in|time_text_embed|vector_in|guidance_in)(?:\.|$)"), "embed"),
        (re.compile(r"(?:img_in|txt_in|x_embedder|context_embedder)(?:\.|$)"), "first"),
        (re.compile(r"(?:final_layer|norm_out|proj_out)(?:\.|$)"), "last"),
    )
    flow = ("embed", "first", "double", "single", "last")
    block_synonyms = _SYNONYMS
    text_blocks: tuple[str, ...] = ("t5",)
    kohya_layout = "Flux BFL names"

    def scheme(self, layers: Layers) -> str | None:
        first = {name.split(".", 1)[0] for name in layers}
        if first & {"double_blocks", "single_blocks"}:
            return AUTHORS
        split = "single_transformer_blocks" in first or any(".attn.add_q_proj" in name for name in layers)
        return DIFFUSERS if split else None

    def sizes(self, fused: Mapping[str, int], shape: Shape | None) -> Mapping[str, int]:
        """Query, key and value are as wide as the model, and linear1's MLP is what is left."""
        if shape is None or "mlp" not in fused or shape[0] <= 3 * shape[1]:
            return fused
        return dict.fromkeys("qkv", shape[1]) | {"mlp": shape[0] - 3 * shape[1]}

    def rules_out(self, evidence: Evidence) -> bool:
        return named_as_sd3(evidence)

    def inner_label(self, inside: str, part: str | None) -> str:
        """ "img.q", "mlp" (of linear1), "linear2"."""
        if inside == "linear1" and part:
            return part
        if inside.startswith(("img_", "txt_")) and "." in inside:
            inside = inside.replace("_attn.qkv", "").replace("_attn.", ".").replace("_", ".")
        elif inside.startswith("norm."):
            inside = inside.replace("_", ".")
        return f"{inside}.{part}" if part else inside

    def blocks_layers(self, modulated: bool, up: int = 4, down: int = 4) -> Iterator[tuple[str, Shape]]:
        """The layers of all blocks; heads of 128. up, down: widths of the MLP after its first and before its last layer, in widths."""
        width = self.width
        for index in range(self.double):
            for stream in ("img", "txt"):
                block = f"double_blocks.{index}.{stream}"
                if modulated:
                    yield f"{block}_mod.lin", (6 * width, width)
                yield f"{block}_attn.qkv", (3 * width, width)
                yield f"{block}_attn.norm.query_norm", (128,)
                yield f"{block}_attn.norm.key_norm", (128,)
                yield f"{block}_attn.proj", (width, width)
                yield f"{block}_mlp.0", (up * width, width)
                yield f"{block}_mlp.2", (width, down * width)
        for index in range(self.single):
            block = f"single_blocks.{index}"
            if modulated:
                yield f"{block}.modulation.lin", (3 * width, width)
            yield f"{block}.linear1", ((3 + up) * width, width)
            yield f"{block}.linear2", (width, (1 + down) * width)
            yield f"{block}.norm.query_norm", (128,)
            yield f"{block}.norm.key_norm", (128,)


class _Flux1(Flux):
    name = "Flux"
    width, double, single = 3072, 19, 38
    encoders = _ENCODERS
    forms = FORMS
    presets = PRESETS
    kohya_text = _KOHYA_TEXT
    metadata = _METADATA
    marks = re.compile(r"flux(?:[-_.]?1(?!\d)|$|/)")

    def layers(self) -> Iterator[tuple[str, Shape]]:
        """As of FLUX.1 [dev], the guidance embedding included."""
        width = self.width
        yield "img_in", (width, 64)
        yield "txt_in", (width, 4096)
        for name, source in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
            yield f"{name}.in_layer", (width, source)
            yield f"{name}.out_layer", (width, width)
        yield from self.blocks_layers(modulated=True)
        yield "final_layer.adaLN_modulation.1", (2 * width, width)
        yield "final_layer.linear", (64, width)

    def scheme(self, layers: Layers) -> str | None:
        if any(_OTHERS.match(name) for name in layers) or gated(layers):
            return None
        return super().scheme(layers)

    def rules_out(self, evidence: Evidence) -> bool:
        # SD 3 has CLIP-G too, and so does HiDream.
        return super().rules_out(evidence) or "te2" in evidence.text

    def certainty_by_text(self, text: Mapping[str, int | None]) -> int:
        return 0 if "t5" not in text or "te2" in text else 3 if "te1" in text else 2


def gated(layers: Layers) -> bool:
    """Whether a model's single blocks have Flux.2's gated MLP, whose first layer is six times as wide as the model."""
    shapes = (shape for name, shape in layers.items() if name.startswith("single_blocks.") and name.endswith(".linear1"))
    return any(shape is not None and len(shape) == 2 and shape[0] == 9 * shape[1] for shape in shapes)


FLUX = _Flux1()

__all__ = ["FLUX", "FORMS", "PRESETS", "Flux", "flux_stacks", "gated"]
