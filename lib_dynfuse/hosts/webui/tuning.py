"""The search for a pair's settings in a WebUI: small pictures as jobs inside the job, before its first picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...settings import FuseSettings
from ...tuning.kept import digest_of, keep, known
from ...tuning.plan import candidates
from ...tuning.search import Tuned, search
from ..sides import SIDES
from .references import ReferenceMaker, announced

# (the job, what it asked for, what it uses instead, what was found: None where there are no encoders)
Tell = Callable[[Any, FuseSettings, FuseSettings, Tuned | None], None]


def with_both_sides(settings: FuseSettings) -> FuseSettings:
    """The settings under which both references count."""
    weights = dict.fromkeys(("content_weight", "style_clip_weight", "style_dino_weight"), 1.0)
    return replace(settings, tilt=0.0, **weights)  # type: ignore[arg-type]


def tuned(maker: ReferenceMaker, asked: FuseSettings) -> Tuned:
    """What an earlier job found, or what is found now and kept. maker: of the small frame, for settings under which both references count.

    Raises SettingsError (a given picture), ReferenceFailed, or Interrupted: nothing is kept then but finished references.
    """
    assert maker.jobs.frame is not None
    digest = digest_of([maker.key(side) for side in SIDES], asked, maker.jobs.prompt)
    if (found := known(maker.cache, digest)) is not None:
        return found
    references = maker.references()
    with announced(len(candidates(asked))):
        found = search(asked, maker.jobs.frame, references, maker.encoders, maker.picture)
    keep(maker.cache, digest, found, maker.jobs.prompt)
    return found


__all__ = ["Tell", "tuned", "with_both_sides"]
