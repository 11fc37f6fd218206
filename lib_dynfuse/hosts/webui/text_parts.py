"""The text-encoder parts of all LoRAs, which are summed: the paper chooses only inside the denoiser.

dW = te_weight * (subject_weight * dW_subject + style_weight * dW_style), with a term for every LoRA of a side. A host merges it with its
own machinery.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...lora import LoraFile, text_strengths
from ...lora.branch import Branch
from ...settings import FuseSettings
from .lora_files import FileVersion


@dataclass(frozen=True)
class TextPart:
    """One LoRA's branches of the text encoders at the strength at which they are merged.

    encoders: "te1" (CLIP-L, or the only CLIP), "te2" (CLIP-G), "t5" -> flat layer name -> branch.
    """

    name: str
    encoders: dict[str, dict[str, Branch]]
    strength: float

    def branches(self) -> Iterator[tuple[str, str, Branch]]:
        """(encoder, flat layer name, branch) of every layer."""
        for encoder, layers in self.encoders.items():
            for layer, branch in layers.items():
                yield encoder, layer, branch


@dataclass(frozen=True)
class TextParts:
    """What is merged into the text encoders in one pass.

    label: for people; unique to the contents, because the hosts compare LoRAs by name and strength only.
    """

    label: str
    parts: tuple[TextPart, ...]


def text_parts(
    settings: FuseSettings, subjects: Sequence[LoraFile], styles: Sequence[LoraFile], versions: Sequence[FileVersion]
) -> TextParts | None:
    """The parts of all LoRAs; None if there is nothing to merge. versions: of the subjects, then of the styles."""
    strengths = text_strengths(settings, subjects, styles)
    parts = tuple(itertools.chain.from_iterable(map(_parts, (*subjects, *styles), strengths)))
    if not parts:
        return None
    contents = repr(list(zip(versions, strengths)))
    digest = hashlib.sha256(contents.encode()).hexdigest()[:12]
    return TextParts(f"DynFuse text encoders of {' and '.join(dict.fromkeys(part.name for part in parts))} ({digest})", parts)


def _parts(file: LoraFile, strengths: Mapping[str, float]) -> Iterator[TextPart]:
    """One for the encoders that share a strength."""
    for strength in dict.fromkeys(strengths[encoder] for encoder, layers in file.text.items() if layers):
        if strength:
            yield TextPart(
                file.name, {encoder: layers for encoder, layers in file.text.items() if strengths[encoder] == strength}, strength
            )


__all__ = ["TextPart", "TextParts", "text_parts"]
