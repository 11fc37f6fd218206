"""Contrast: the prompt's prediction, moved away from what the model predicts without the LoRAs, or with one side's alone.

With u and c the predictions of the negative prompt and of the prompt under the fusion and s the CFG scale, the picture follows

    u + s (c - u) + contrast (c - c_none) + style_contrast (c - c_style) + subject_contrast (c - c_subject)

c_none: the same prompt with none of the LoRAs; c_style, c_subject: with one side's, each LoRA at its strength of this step. So the last
three terms divided by s are added to the prompt's rows; each part of an AND prompt gets its own, under its own weight. Their sum is a
direction, which may be kept for some steps. It is a constant to gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..memory import is_out_of_memory
from ..settings import FuseSettings
from .call import FusionState
from .rows import Rows
from .rules.rule import Rule
from .step import Step

Call = Callable[["tuple[int, ...] | None"], Any]
"""(positions of a call's rows, None for all) -> the model's prediction for them."""

Alone = Callable[[tuple[int, ...], "Rows | None"], AbstractContextManager[None]]
"""(LoRAs, rows) -> inside, these are on the model alone."""

# Fractions of the steps come from sliders: 0.30000000000000004 is 0.3.
_FRACTION_NOISE = 1e-6


def contrasts(settings: FuseSettings, rule: Rule | type[Rule]) -> tuple[float, float, float]:
    """Strengths of the contrast to the picture with no LoRA, with the styles' alone, with the subjects' alone."""
    own = settings.contrast if settings.contrast >= 0 else rule.contrast
    return own, settings.style_contrast, settings.subject_contrast


class Predictions:
    """Of one session. own_rows, other_rows: rows that the model was run on, by the fusion itself and for the contrast."""

    def __init__(self, state: FusionState, subjects: Sequence[bool], alone: Alone):
        """subjects: of each LoRA, whether it is a subject's. alone: puts LoRAs on the model."""
        styles, own = (tuple(n for n, is_subject in enumerate(subjects) if is_subject == side) for side in (False, True))
        wanted = zip(((), styles, own), contrasts(state.settings, state.rule))
        self._away = [(members, strength) for members, strength in wanted if strength]
        self._state = state
        self._alone = alone
        self._inside = self._renewed = False
        self._given_up: str | None = None
        # (image, number among its conditional rows of the step) -> direction, float32.
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[int, int] = {}
        self.own_rows = self.other_rows = 0

    @property
    def wanted(self) -> bool:
        return bool(self._away)

    @property
    def notes(self) -> list[str]:
        """Sentences that the user should see."""
        return [self._given_up] if self._given_up else []

    def begin(self, step: Step) -> None:
        """A step begins."""
        settings = self._state.settings
        first = math.ceil(settings.contrast_start * step.count - _FRACTION_NOISE)
        before_end = settings.contrast_end >= 1 or step.index < settings.contrast_end * step.count - _FRACTION_NOISE
        self._inside = bool(self._away) and self._given_up is None and step.index >= first and before_end
        self._renewed = self._inside and (step.index - first) % settings.contrast_every == 0
        self._seen.clear()
        if not self._inside:
            self._kept.clear()

    def repeat(self) -> None:
        """The step's calls are made once more."""
        self._seen.clear()

    def restart(self) -> None:
        """Another picture begins."""
        self._kept.clear()
        self._seen.clear()
        self._inside, self._given_up = False, None
        self.own_rows = self.other_rows = 0

    def moved(self, prediction: Any, scale: float, call: Call) -> Any:
        """The prediction of the call that has just been made, with this step's direction. Otherwise as FusionSession.predict."""
        if not isinstance(prediction, Tensor):
            return prediction
        self.own_rows += prediction.shape[0]
        if not self._inside or scale <= 0:
            return prediction
        rows = self._state.rows
        if rows is None or len(rows.images) != prediction.shape[0]:
            rows = Rows.separate(prediction.shape[0])
        positions = rows.voting
        if not positions:
            return prediction
        keys = [self._key(rows.images[position]) for position in positions]
        lacking = [(position, key) for position, key in zip(positions, keys) if self._renewed or not self._fits(key, prediction)]
        if lacking:
            try:
                made = self._made(prediction, rows, tuple(position for position, _ in lacking), call)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                made = None
            if made is None:  # not in the except clause: the exception's frames hold on to the memory that ran out
                self._give_up(prediction.device)
                return prediction
            self._kept.update(zip((key for _, key in lacking), made.unbind(0)))
        direction = torch.stack([self._kept[key] for key in keys])
        places = self._state.indices(prediction.device).numbers(positions)
        return prediction.index_add(0, places, direction.to(prediction.dtype), alpha=1.0 / scale)

    def _key(self, image: int) -> tuple[int, int]:
        """Of an image's next conditional row, whichever call of the step it comes in: the next part of an AND prompt, the next tile."""
        number = self._seen.get(image, 0)
        self._seen[image] = number + 1
        return image, number

    def _fits(self, key: tuple[int, int], prediction: Tensor) -> bool:
        known = self._kept.get(key)
        return known is not None and known.shape == prediction.shape[1:] and known.device == prediction.device

    @torch.no_grad()
    def _made(self, prediction: Tensor, rows: Rows, positions: tuple[int, ...], call: Call) -> Tensor:
        """(n, ...) float32: the direction of these rows."""
        whole = len(positions) == len(rows.images)
        some = Rows(tuple(rows.images[at] for at in positions), (True,) * len(positions), rows.count)
        own = prediction if whole else prediction.index_select(0, self._state.indices(prediction.device).numbers(positions))
        direction = own.float() * sum(strength for _, strength in self._away)
        for members, strength in self._away:
            with self._alone(members, some):
                other = call(None if whole else positions)
            self.other_rows += len(positions)
            direction = direction.sub_(other.float(), alpha=strength)
        return direction

    def _give_up(self, device: torch.device) -> None:
        step = self._state.step
        self._inside = False
        self._kept.clear()
        at = f" from step {step.index + 1} on" if step is not None else ""
        self._given_up = f"The contrast was left out{at}: memory ran out."
        if device.type == "cuda":
            torch.cuda.empty_cache()


__all__ = ["Alone", "Call", "Predictions", "contrasts"]
