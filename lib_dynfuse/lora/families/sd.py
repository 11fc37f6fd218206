"""Stable Diffusion 1.x (v1-inference.yaml) and 2.x (v2-inference-v.yaml)."""

from __future__ import annotations

from .encoders import CLIP_H, CLIP_L
from .family import Evidence
from .unet import UNet


class _SD2(UNet):
    def hint(self, evidence: Evidence) -> int:
        return 1 if evidence.text.get("te1") == 1024 else 0


SD1 = UNet("SD 1.x", (1, 2, 4, 4), depth=(1, 1, 1, 0), middle_depth=1, context=768, linear=False, encoders={"te1": CLIP_L})
SD2 = _SD2("SD 2.x", (1, 2, 4, 4), depth=(1, 1, 1, 0), middle_depth=1, context=1024, linear=True, encoders={"te1": CLIP_H})

__all__ = ["SD1", "SD2"]
