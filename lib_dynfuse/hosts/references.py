"""What the references of all hosts have in common: one LoRA of the pair alone, under a prompt of its own (paper, Eq. 14-15)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..guidance.references import Reference
from ..settings import FuseSettings
from ..strength import number_text
from .sides import SIDES


def alone(settings: FuseSettings, side: str) -> FuseSettings:
    """The fusion that uses one side's LoRAs in full, and nothing of the other's (Eq. 14-15)."""
    other = "style" if side == "subject" else "subject"
    changes: dict[str, Any] = {
        f"{other}_weight": 0.0,
        f"{side}_weight": full_weight(settings, side),
        f"{side}_blocks": getattr(settings, f"{side}_blocks"),
    }
    plain = FuseSettings(subject=settings.subject, style=settings.style, method="direct", te_weight=settings.te_weight)
    return replace(plain, **changes)


def compared(settings: FuseSettings) -> FuseSettings:
    """For the two pictures that a method compares: of the job's own prompt, whatever references a guidance has."""
    weights: dict[str, Any] = dict.fromkeys(("content_weight", "style_clip_weight", "style_dino_weight"), 1.0)
    return replace(settings, subject_prompt="", style_prompt="", subject_image="", style_image="", tilt=0.0, **weights)


def shown(settings: FuseSettings) -> FuseSettings:
    """For sessions that only see what layers are given with one side alone: each LoRA in full, whatever its course over the steps."""
    weights: dict[str, Any] = {f"{side}_weight": full_weight(settings, side) for side in SIDES}
    return replace(settings, **weights, tilt=0.0, guidance=False, contrast=0.0, style_contrast=0.0, subject_contrast=0.0)


SAME_PROMPT = (
    "The method {method} saw both sides under the picture's own prompt, where it can hardly tell them apart: give subject_prompt and "
    "style_prompt, or the LoRAs an activation text."
)
"""What the user should know where neither side has a prompt of its own."""


def similarity(references: Sequence[Reference]) -> float:
    """Cosine of the DINO embeddings of two references."""
    one, other = (reference.embeddings.dino for reference in references)
    return float((one.double() * other.double()).sum())


def full_weight(settings: FuseSettings, side: str) -> float | str:
    """A side's weight without its course over the steps: that of each of its LoRAs where it is farthest from 0."""
    weights = [schedule.full for schedule in settings.given_schedules(side)]
    return weights[0] if len(set(weights)) == 1 else "+".join(map(number_text, weights))


def activation_text(lora_path: str) -> str | None:
    """What the WebUI keeps as a LoRA's activation text: in the .json beside the file (ui_edit_user_metadata.py:63 of A1111's Lora)."""
    try:
        with open(f"{os.path.splitext(lora_path)[0]}.json", encoding="utf8") as file:
            text = json.load(file).get("activation text")
    except (OSError, ValueError, AttributeError):
        return None
    return text.strip() if isinstance(text, str) and text.strip() else None


def activation_texts(lora_paths: Sequence[str]) -> str | None:
    """The activation texts of a side's LoRAs in one line, None where there is none."""
    texts = [text for path in lora_paths if (text := activation_text(path)) is not None]
    if len(texts) < 2:
        return texts[0] if texts else None
    return ", ".join(text.strip(" ,") for text in texts)


__all__ = ["SAME_PROMPT", "activation_text", "activation_texts", "alone", "compared", "full_weight", "shown", "similarity"]
