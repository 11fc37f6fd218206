"""What DynFuse did in one job: its passes, for as long as the processing object lives."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from ...guidance.encoders import Encoders
from ...guidance.references import Reference, sides_needed
from ...settings import FuseSettings
from ...tuning.search import Tuned
from .guided import Decoders
from .passes import FusionPass

log = logging.getLogger(__name__)


class FusionJob:
    """What DynFuse did in one job. Lives on the job's processing object as `p.dynfuse`.

    Scripts copy processing objects with everything on them; a record on a copy belongs to the original and is not the copy's.
    """

    def __init__(self, p: Any):
        self._owner = weakref.ref(p)
        self.passes: list[FusionPass] = []
        self.over = False
        self.decoders = Decoders()
        self.encoders: Encoders | None = None
        self.tuned: dict[FuseSettings, Tuned | None] = {}
        """By what was asked for: what was found for the pair, None where there were no encoders."""

    @classmethod
    def of(cls, p: Any) -> FusionJob | None:
        """The record of this very object; None if it has none."""
        job = getattr(p, "dynfuse", None)
        return job if isinstance(job, cls) and job._owner() is p else None

    @property
    def current(self) -> FusionPass | None:
        """The pass that the next denoiser call belongs to; None: it is a plain one."""
        return self._current if not self.over else None

    _current: FusionPass | None = None

    def begin(self, new: FusionPass | None) -> None:
        """A prompt's tags were activated: whatever was asked for before no longer holds."""
        self.finish_current()
        earlier, self._current = self._current, new
        if earlier is not None and new is not None:
            new.succeed(earlier)
        elif earlier is not None:
            earlier.release()
        if new is None:
            return
        # A prompt may be activated several times before it is used (A1111 with --lowvram, Forge with hires): only passes that ran count,
        # and only this batch's, so that a hundred batches do not pile up their records.
        self.passes = [*(p for p in self.passes if p.trace is not None and p.batch == new.batch), new]

    def finish_current(self) -> None:
        """Keep the running pass's record, whatever state it was left in."""
        if self._current is None:
            return
        try:
            self._current.finish()
        except Exception:
            log.exception("DynFuse could not read the record of a pass")

    def end(self) -> None:
        """The job is over, well or badly. The record may be kept for long; the LoRAs are not, with it."""
        self.finish_current()
        if self._current is not None:
            self._current.release()
        self.decoders.release()
        if self.encoders is not None:
            self.encoders.to("cpu")
        self.over = True
        for done in self.passes:
            done.request = None

    def references_for(self, new: FusionPass) -> list[Reference] | None:
        """Those of an earlier pass of the same batch that asks for the same ones: a hires pass has its first pass's."""
        assert new.settings is not None
        for done in reversed(self.passes):
            if done.guidance is not None and done.batch == new.batch and _same_references(done.guidance.settings, new.settings):
                return done.guidance.references
        return None

    def notes(self) -> list[str]:
        """The sentences of all passes of this batch, each once."""
        return list(dict.fromkeys(note for p in self.passes for note in p.notes))


_REFERENCE_FIELDS = (
    *("subject", "style", "subject_weight", "style_weight", "te_weight"),
    *("subject_prompt", "style_prompt", "subject_image", "style_image", "reference_seed"),
)


def _same_references(one: FuseSettings, other: FuseSettings) -> bool:
    same = all(getattr(one, name) == getattr(other, name) for name in _REFERENCE_FIELDS)
    return same and sides_needed(one) == sides_needed(other)


def current_pass(p: Any) -> FusionPass | None:
    """The pass that p's next denoiser call belongs to; None: a plain one."""
    job = FusionJob.of(p)
    return job.current if job is not None else None


__all__ = ["FusionJob", "current_pass"]
