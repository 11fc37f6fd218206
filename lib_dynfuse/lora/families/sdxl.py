"""SDXL (sd_xl_base.yaml)."""

from __future__ import annotations

import re

from .encoders import CLIP_G, CLIP_L
from .family import Evidence
from .unet import UNet

# The forms of sd-webui-lora-block-weight: for LoRA, and for LoCon and LyCORIS.
_FORMS = {
    12: ("base", "in4", "in5", "in7", "in8", "mid", *(f"out{n}" for n in range(6))),
    20: ("base", *(f"in{n}" for n in range(9)), "mid", *(f"out{n}" for n in range(9))),
}
# Its presets of these names are for SD 1.x; here the innermost level is deep, and the outer two are shallow.
_PRESETS = {
    "INS": ("base", "in0-in5"),
    "IND": ("base", "in6-in8"),
    "INALL": ("base", "in0-in8"),
    "MIDD": ("base", "in6-out2"),
    "OUTD": ("base", "out0-out2"),
    "OUTS": ("base", "out3-out8"),
    "OUTALL": ("base", "out0-out8"),
}

_ENCODERS = {"te1": CLIP_L, "te2": CLIP_G}
_KOHYA_TEXT = {"te1": "lora_te1_", "te2": "lora_te2_"}
_METADATA = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


class _SDXL(UNet):
    name = "SDXL"
    smallest = 640
    multipliers = (1, 2, 4)
    depth = (0, 2, 10)
    middle_depth = 10
    context = 2048
    linear = True
    vector = 2816
    encoders = _ENCODERS
    forms = _FORMS
    presets = _PRESETS
    kohya_layout = "LDM names"
    kohya_text = _KOHYA_TEXT
    metadata = _METADATA

    def hint(self, evidence: Evidence) -> int:
        """SDXL alone has a second encoder, a size embedding, and more than one transformer block per attention block."""
        names = evidence.shapes.keys()
        deep = any(re.search(r"_transformer_blocks_(?!0_)", name) for name in names)
        return 2 if deep or "te2" in evidence.text or any(name.startswith(("label_emb", "add_embedding")) for name in names) else 0


SDXL = _SDXL()

__all__ = ["SDXL"]
