"""Text-encoder parts in ComfyUI's patcher, which Forge Neo, reForge and Forge Classic use.

Patches lie by parameter name, (strength, patch, strength of the model, ...), without the file that they are from (Neo:
backend/patcher/base.py:413; reForge: ldm_patched/modules/model_patcher.py:502; Classic: the same file, :191). So ours are known by
what they are: see ours.
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...lora.branch import Branch, LowRank, bound
from .forge import ForgeTextEncoders, current_model, text_patches
from .text_parts import TextParts


class OurPatch(tuple[Any, ...]):
    """(kind, tensors), as the patchers take it."""

    of_dynfuse = True


def ours(patch: Any) -> bool:
    """Whether DynFuse has made it."""
    return bool(getattr(patch, "of_dynfuse", False))


class PatcherTextEncoders(ForgeTextEncoders):
    """The parts are patches among the host's own."""

    def add(self, text: TextParts) -> list[str]:
        model = current_model()
        if model is None:
            return []
        clip = model.forge_objects_after_applying_lora.clip.clone()
        names = dict(clip.cond_stage_model.named_parameters())
        unmatched: list[str] = []
        for part in text.parts:
            patches, missing = text_patches(part, names, lambda key: self.unmerged(clip, names[key], key), self._patch)
            unmatched += [f"{layer} of {part.name}" for layer in missing]
            if patches:
                self.add_patches(clip, patches, part.strength)
        # A clone with other patches is what the hosts merge anew, before the next prompt is encoded.
        self.give(model, clip)
        return unmatched

    def remove(self) -> None:
        for objects in self.objects_with_parts(current_model()):
            if any(ours(entry[1]) for entries in objects.clip.patcher.patches.values() for entry in entries):
                objects.clip = objects.clip.clone()
                patcher = objects.clip.patcher
                kept = {key: [entry for entry in entries if not ours(entry[1])] for key, entries in patcher.patches.items()}
                patcher.patches = {key: entries for key, entries in kept.items() if entries}
                if hasattr(patcher, "patches_uuid"):
                    patcher.patches_uuid = uuid.uuid4()
        self._given = []

    @abstractmethod
    def low_rank(self, up: Tensor, down: Tensor, alpha: float) -> Any:
        """The patch alpha / rank * up @ down, marked as ours."""

    def add_patches(self, clip: Any, patches: dict[str, Any], strength: float) -> None:
        """Put them into a clone of the host's CLIP."""
        clip.add_patches(patches, strength)

    def unmerged(self, clip: Any, parameter: Tensor, key: str) -> Tensor:
        """The weight before any LoRA: a merge of the last job may still be in the parameter."""
        backup = clip.patcher.backup.get(key)
        return parameter if backup is None else backup.weight

    def _patch(self, branch: Branch, weight: Callable[[], Tensor]) -> Any:
        """Thin matrices stay thin: CLIP-G's full ones would take 2.5 GB."""
        applied = bound(branch, weight)
        if isinstance(applied, LowRank):
            return self.low_rank(applied.up, applied.down, applied.scale * applied.rank)
        return OurPatch(("diff", (applied.delta_weight(),)))


__all__ = ["OurPatch", "PatcherTextEncoders", "ours"]
