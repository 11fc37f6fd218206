"""Chroma: Flux's blocks without modulations of their own, which one small network makes for all of them (distilled_guidance_layer).

Layers and sizes: Forge Neo's backend/nn/chroma.py, diffusers' transformer_chroma.py and single_file_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .encoders import T5
from .family import Evidence, Layers, Shape
from .flux import FORMS, PRESETS, Flux, flux_stacks
from .transformer import layouts_of, within_of

_STACKS = flux_stacks(modulated=False)
_APPROXIMATOR = 5
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    **{f"distilled_guidance_layer.{end}": f"distilled_guidance_layer.{end}" for end in ("in_proj", "out_proj")},
    **{f"distilled_guidance_layer.norms.{n}": f"distilled_guidance_layer.norms.{n}" for n in range(_APPROXIMATOR)},
    **{
        f"distilled_guidance_layer.layers.{n}.{old}": f"distilled_guidance_layer.layers.{n}.{new}"
        for n in range(_APPROXIMATOR)
        for old, new in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}
_LAYOUTS = layouts_of("Flux BFL names", "Flux diffusers names", _STACKS, _ENDS)
_ENCODERS = {"t5": T5}
_KOHYA_TEXT = {"t5": "lora_te3_"}
_METADATA = {"ss_base_model_version": "chroma", "ss_v2": "False", "modelspec.architecture": "chroma/lora"}


class _Chroma(Flux):
    name = "Chroma"
    kind = "a Chroma model"
    width, double, single = 3072, 19, 38
    stacks = _STACKS
    ends = _ENDS
    halves = None
    layouts = _LAYOUTS
    norms = re.compile(r"(?:.*_)?(?:(?:query|key)_norm|norm_(?:added_)?[qk])|distilled_guidance_layer_norms_\d+")
    within = within_of(_STACKS, _ENDS)
    labels = (*Flux.labels, (re.compile(r"distilled_guidance_layer(?:\.|$)"), "embed"))
    relatives = frozenset({"Flux"})
    encoders = _ENCODERS
    forms = FORMS
    presets = PRESETS
    kohya_text = _KOHYA_TEXT
    metadata = _METADATA
    marks = re.compile(r"chroma(?:$|/|[-_.]?1)")

    def layers(self) -> Iterator[tuple[str, Shape]]:
        width, hidden = self.width, 5120
        yield "distilled_guidance_layer.in_proj", (hidden, 64)
        for index in range(_APPROXIMATOR):
            yield f"distilled_guidance_layer.layers.{index}.in_layer", (hidden, hidden)
            yield f"distilled_guidance_layer.layers.{index}.out_layer", (hidden, hidden)
            yield f"distilled_guidance_layer.norms.{index}", (hidden,)
        yield "distilled_guidance_layer.out_proj", (width, hidden)
        yield "img_in", (width, 64)
        yield "txt_in", (width, 4096)
        yield from self.blocks_layers(modulated=False)
        yield "final_layer.linear", (64, width)

    def scheme(self, layers: Layers) -> str | None:
        return super().scheme(layers) if any(name.startswith("distilled_guidance_layer.") for name in layers) else None

    def rules_out(self, evidence: Evidence) -> bool:
        """It has no CLIP."""
        return super().rules_out(evidence) or bool(evidence.text.keys() - {"t5"})

    def certainty_by_text(self, text: Mapping[str, int | None]) -> int:
        return 2 if text.keys() == {"t5"} else 0


CHROMA = _Chroma()

__all__ = ["CHROMA"]
