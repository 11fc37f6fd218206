"""Qwen-Image and its editing models: double blocks only, nothing fused, and one scheme, which is diffusers' own.

Layers and sizes: diffusers' transformer_qwenimage.py, Forge Neo's backend/nn/qwen.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .family import Evidence, Layers, Shape
from .transformer import AUTHORS, Stack, Transformer, layouts_of, named_as_sd3, within_of

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_INSIDE = (
    *(f"attn.{name}" for name in (*_PROJECTIONS, *_NORMS)),
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
)
_STACKS = (Stack("transformer_blocks", "transformer_blocks", "double", {name: name for name in _INSIDE}),)
_OUTSIDE = (
    "img_in",
    "txt_in",
    "txt_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
_ENDS = {name: name for name in _OUTSIDE}
_LAYOUTS = layouts_of("Qwen-Image names", "Qwen-Image names", _STACKS, _ENDS)
_METADATA = {"ss_base_model_version": "qwen_image", "modelspec.architecture": "qwen-image/lora"}
_OWN = re.compile(r"transformer_blocks\.\d+\.(?:img|txt)_(?:mlp\.net\.|mod\.)")


class _QwenImage(Transformer):
    name = "Qwen-Image"
    kind = "a Qwen-Image model"
    unrecognised = "a transformer whose layers are named as Qwen-Image's"
    width = 3072
    stacks = _STACKS
    ends = _ENDS
    layouts = _LAYOUTS
    attention = frozenset(f"attn.{name}" for name in _PROJECTIONS)
    norms = re.compile(r"(?:.*_)?norm_(?:added_)?[qk]|txt_norm")
    within = within_of(_STACKS, _ENDS)
    variable_inputs = frozenset({"img_in"})
    labels = (
        (re.compile(r"transformer_blocks\.(\d+)(?:\.|$)"), "double {}"),
        (re.compile(r"time_text_embed(?:\.|$)"), "embed"),
        (re.compile(r"(?:img_in|txt_in|txt_norm)(?:\.|$)"), "first"),
        (re.compile(r"(?:norm_out|proj_out)(?:\.|$)"), "last"),
    )
    flow = ("embed", "first", "double", "last")
    kohya_layout = "Qwen-Image names"
    metadata = _METADATA
    marks = re.compile(r"qwen[-_ ]?image")

    def layers(self) -> Iterator[tuple[str, Shape]]:
        width = self.width
        yield "time_text_embed.timestep_embedder.linear_1", (width, 256)
        yield "time_text_embed.timestep_embedder.linear_2", (width, width)
        yield "txt_norm", (3584,)
        yield "img_in", (width, 64)
        yield "txt_in", (width, 3584)
        for index in range(60):
            block = f"transformer_blocks.{index}"
            for name in _PROJECTIONS:
                yield f"{block}.attn.{name}", (width, width)
            for name in _NORMS:
                yield f"{block}.attn.{name}", (128,)
            for stream in ("img", "txt"):
                yield f"{block}.{stream}_mod.1", (6 * width, width)
                yield f"{block}.{stream}_mlp.net.0.proj", (4 * width, width)
                yield f"{block}.{stream}_mlp.net.2", (width, 4 * width)
        yield "norm_out.linear", (2 * width, width)
        yield "proj_out", (64, width)

    def scheme(self, layers: Layers) -> str | None:
        return AUTHORS if any(_OWN.match(name) for name in layers) else None

    def rules_out(self, evidence: Evidence) -> bool:
        return named_as_sd3(evidence)


QWEN_IMAGE = _QwenImage()

__all__ = ["QWEN_IMAGE"]
