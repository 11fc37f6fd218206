"""SDXL (sd_xl_base.yaml)."""

from __future__ import annotations

import re

from .encoders import CLIP_G, CLIP_L
from .family import Evidence
from .unet import UNet


class _SDXL(UNet):
    def hint(self, evidence: Evidence) -> int:
        """SDXL alone has a second encoder, a size embedding, and more than one transformer block per attention block."""
        names = evidence.shapes.keys()
        deep = any(re.search(r"_transformer_blocks_(?!0_)", name) for name in names)
        return 2 if deep or "te2" in evidence.text or any(name.startswith(("label_emb", "add_embedding")) for name in names) else 0


SDXL = _SDXL(
    "SDXL",
    multipliers=(1, 2, 4),
    depth=(0, 2, 10),
    middle_depth=10,
    context=2048,
    linear=True,
    encoders={"te1": CLIP_L, "te2": CLIP_G},
    vector=2816,
)

__all__ = ["SDXL"]
