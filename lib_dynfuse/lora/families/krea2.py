"""Krea 2: one stack of gated blocks behind two small ones, which mix and refine the text. Nothing is fused in either scheme.

Layers and sizes: Forge Neo's backend/nn/krea.py, modules_forge/packages/comfy/utils.py (krea2_to_diffusers) and
backend/huggingface/krea/Krea-2-Raw.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .family import Evidence, Layers, Shape
from .transformer import AUTHORS, DIFFUSERS, Stack, Transformer, layouts_of, named_as_sd3, within_of

_INSIDE = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_STACKS = (
    Stack("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", "mix", _INSIDE),
    Stack("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", "refine", _INSIDE),
    Stack("blocks", "transformer_blocks", "block", _INSIDE),
)
_ENDS = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
}
_LAYOUTS = layouts_of("Krea 2 names", "Krea 2 diffusers names", _STACKS, _ENDS)
_METADATA = {"ss_base_model_version": "krea2", "modelspec.architecture": "krea-2/lora"}
_OWN = re.compile(r"blocks\.\d+\.attn\.wq$|txtfusion\.")
_DIFFUSERS_OWN = re.compile(r"transformer_blocks\.\d+\.attn\.to_gate$|text_fusion\.")


class _Krea2(Transformer):
    name = "Krea 2"
    kind = "a Krea 2 model"
    unrecognised = "a transformer whose layers are named as Krea 2's"
    width = 6144
    stacks = _STACKS
    ends = _ENDS
    layouts = _LAYOUTS
    attention = frozenset(f"attn.w{letter}" for letter in "qkvo")
    within = within_of(_STACKS, _ENDS)
    variable_inputs = frozenset({"first", "img_in"})
    labels = (
        (re.compile(r"(?:txtfusion|text_fusion)\.layerwise_blocks\.(\d+)(?:\.|$)"), "mix {}"),
        (re.compile(r"(?:txtfusion|text_fusion)\.refiner_blocks\.(\d+)(?:\.|$)"), "refine {}"),
        (re.compile(r"(?:transformer_)?blocks\.(\d+)(?:\.|$)"), "block {}"),
        (re.compile(r"(?:tmlp|tproj|time_embed|time_mod_proj)(?:\.|$)"), "embed"),
        (re.compile(r"(?:first|img_in|txtmlp|txt_in|(?:txtfusion|text_fusion)\.projector)(?:\.|$)"), "first"),
        (re.compile(r"(?:last|final_layer)(?:\.|$)"), "last"),
    )
    flow = ("embed", "first", "mix", "refine", "block", "last")
    kohya_layout = "Krea 2 names"
    metadata = _METADATA
    marks = re.compile(r"krea[-_ ]?2")

    def layers(self) -> Iterator[tuple[str, Shape]]:
        width, text = self.width, 2560
        yield "tmlp.0", (width, 256)
        yield "tmlp.2", (width, width)
        yield "tproj.1", (6 * width, width)
        yield "first", (width, 64)
        yield "txtfusion.projector", (1, 12)
        yield "txtmlp.1", (width, text)
        yield "txtmlp.3", (width, width)
        for stack in ("layerwise_blocks", "refiner_blocks"):
            for index in range(2):
                yield from _block(f"txtfusion.{stack}.{index}", text, text, 6912)
        for index in range(28):
            yield from _block(f"blocks.{index}", width, width // 4, 16384)
        yield "last.linear", (64, width)

    def scheme(self, layers: Layers) -> str | None:
        if any(_OWN.match(name) for name in layers):
            return AUTHORS
        return DIFFUSERS if any(_DIFFUSERS_OWN.match(name) for name in layers) else None

    def rules_out(self, evidence: Evidence) -> bool:
        return named_as_sd3(evidence)

    def _proportional(self, layer: str, shape: Shape) -> bool:
        """The text's blocks are as wide as what the text encoder gives."""
        return layer.startswith(("txtfusion_", "text_fusion_")) or super()._proportional(layer, shape)


def _block(name: str, width: int, keys: int, middle: int) -> Iterator[tuple[str, Shape]]:
    """keys: rows of the keys, and of the values. middle: width of the gated MLP's."""
    for layer, rows in (("wq", width), ("wk", keys), ("wv", keys), ("gate", width), ("wo", width)):
        yield f"{name}.attn.{layer}", (rows, width)
    yield f"{name}.mlp.gate", (middle, width)
    yield f"{name}.mlp.up", (middle, width)
    yield f"{name}.mlp.down", (width, middle)


KREA2 = _Krea2()

__all__ = ["KREA2"]
