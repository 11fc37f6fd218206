"""Stable Diffusion 1.x (v1-inference.yaml) and 2.x (v2-inference-v.yaml)."""

from __future__ import annotations

from .encoders import CLIP_H, CLIP_L
from .family import Evidence
from .unet import UNet

# The forms of sd-webui-lora-block-weight: the blocks with attention, which a LoRA changes, and all blocks, for LoCon and LyCORIS.
_FORMS = {
    17: ("base", "in1", "in2", "in4", "in5", "in7", "in8", "mid", *(f"out{n}" for n in range(3, 12))),
    26: ("base", *(f"in{n}" for n in range(12)), "mid", *(f"out{n}" for n in range(12))),
}
# What its presets of these names leave on, with the blocks between that its 17 numbers leave out.
_PRESETS = {
    "INS": ("base", "in0-in4"),
    "IND": ("base", "in5-in11"),
    "INALL": ("base", "in0-in11"),
    "MIDD": ("base", "in5-out6"),
    "OUTD": ("base", "out0-out6"),
    "OUTS": ("base", "out7-out11"),
    "OUTALL": ("base", "out0-out11"),
}

_ENCODERS_1, _ENCODERS_2 = {"te1": CLIP_L}, {"te1": CLIP_H}
_KOHYA_TEXT = {"te1": "lora_te_"}
_METADATA_1 = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.architecture": "stable-diffusion-v1/lora"}
_METADATA_2 = {"ss_base_model_version": "sd_v2", "ss_v2": "True", "modelspec.architecture": "stable-diffusion-v2-768-v/lora"}


class _SD1(UNet):
    name = "SD 1.x"
    smallest = 384
    multipliers = (1, 2, 4, 4)
    depth = (1, 1, 1, 0)
    middle_depth = 1
    context = 768
    linear = False
    encoders = _ENCODERS_1
    forms = _FORMS
    presets = _PRESETS
    kohya_layout = "diffusers names"
    kohya_text = _KOHYA_TEXT
    metadata = _METADATA_1


class _SD2(_SD1):
    name = "SD 2.x"
    smallest = 512
    context = 1024
    linear = True
    encoders = _ENCODERS_2
    metadata = _METADATA_2

    def hint(self, evidence: Evidence) -> int:
        return 1 if evidence.text.get("te1") == 1024 else 0


SD1, SD2 = _SD1(), _SD2()

__all__ = ["SD1", "SD2"]
