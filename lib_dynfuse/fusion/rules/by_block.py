"""Methods that give each side its own blocks of SDXL: B-LoRA (arXiv 2403.14572) and CRAFT-LoRA's routing (arXiv 2602.18936)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import SettingsError
from ...lora.blocks import Blocks
from ..step import Step
from .rule import Places, Rule, Votes


class BLora(Rule):
    """The subjects' LoRAs in the attention of output_blocks.0, the styles' in that of output_blocks.1, nothing elsewhere.

    SDXL only: its output_blocks.0 is the deepest that has attention. Everywhere else SettingsError.
    """

    name = "blora"
    summary = "SDXL: the subject's LoRA in one block, the style's in the next, nothing elsewhere (B-LoRA)"
    constant = True

    subject_blocks: tuple[str, ...] = ("out0",)
    style_blocks: tuple[str, ...] = ("out1",)

    def prepare(self, places: Places) -> None:
        super().prepare(places)
        layers = [site.layer for site in places.sites]
        blocks = Blocks.of_model(layers)
        found = [blocks.of(site) if _in_attention(site.layer) else "" for site in places.sites]
        if "out0" not in found:
            raise SettingsError(f"The method {self.name} is made for SDXL: this base model has no attention in output_blocks.0.")
        table = torch.zeros(len(found), 1, len(places.members))
        for row, block in enumerate(found):
            for number, member in enumerate(places.members):
                table[row, 0, number] = float(block in (self.subject_blocks if member.subject else self.style_blocks))
        self._table = table

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        if self._table.device != self.device:
            with torch.inference_mode(False):
                self._table = self._table.to(self.device)
        return self._table


class Craft(BLora):
    """The subjects' in input_blocks.4 and 5, middle_block, output_blocks.0; the styles' in output_blocks.1 and 3 to 5. Its training of the
    base model, and its guidance without LoRAs in the negative prompt (the setting negative_weight), are no part of this.
    """

    name = "craft"
    summary = "SDXL: the subject's LoRA in the inner blocks, the style's in the outer ones (CRAFT-LoRA's routing)"
    subject_blocks = ("in4", "in5", "mid", "out0")
    style_blocks = ("out1", "out3", "out4", "out5")


def _in_attention(layer: str) -> bool:
    """Whether a layer lies in a U-Net's transformer: of LDM's names input_blocks.4.1, middle_block.1, output_blocks.0.1."""
    parts = layer.split(".")
    if "attentions" in parts:
        return True
    return (parts[0] in ("input_blocks", "output_blocks") and parts[2:3] == ["1"]) or parts[:2] == ["middle_block", "1"]


__all__ = ["BLora", "Craft"]
