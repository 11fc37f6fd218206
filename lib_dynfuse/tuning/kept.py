"""What was found, kept beside the references: one picture of all small pictures, with their settings and scores inside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from ..guidance.references import ReferenceCache, ReferenceKey
from ..settings import LORA_FIELDS, FuseSettings
from .plan import FIELDS, Frame, candidates
from .score import Score
from .search import MARGIN, Tried, Tuned
from .sheet import grid, ungrid

SIDE = "tuned"

_UNSEEN = frozenset(
    (
        *(*LORA_FIELDS, "reference_seed", "hr", "guidance", "m", "content_weight", "style_clip_weight", "style_dino_weight"),
        *("start", "end", "every", "gradient", "decoder", "limit"),
    )
)
"""Settings that no small picture is made with, or that are in the references' keys."""


def digest_of(keys: Sequence[ReferenceKey], settings: FuseSettings, prompt: str) -> str:
    """The name of what is found. keys: of both small references: the files, the checkpoint, the sampler and all else that is not in the
    settings. prompt: the picture's.
    """
    own = {name: value for name, value in settings.non_default().items() if name not in _UNSEEN}
    everything = {"references": [asdict(key) for key in keys], "settings": own, "prompt": prompt}
    tried = {"candidates": candidates(settings), "margin": MARGIN}
    return hashlib.sha256(json.dumps([everything, tried], sort_keys=True).encode()).hexdigest()[:40]


def keep(cache: ReferenceCache, digest: str, found: Tuned, prompt: str) -> None:
    """A folder that cannot be written to only costs the next job its time."""
    about = {
        "side": SIDE,
        "prompt": prompt,
        "frame": asdict(found.frame),
        "best": found.best,
        "tried": [{"changes": dict(one.changes), "label": one.label, "score": asdict(one.score)} for one in found.tried],
    }
    cache.keep_entry(digest, grid([one.picture for one in found.tried]), about)


def known(cache: ReferenceCache, digest: str) -> Tuned | None:
    """What was kept; None if there is nothing, or it is damaged."""
    return cache.entry(digest, _read)


def _read(picture: Image.Image, about: dict[str, Any]) -> Tuned:
    pictures = ungrid(picture, len(about["tried"]))
    tried = tuple(
        Tried({name: one["changes"][name] for name in FIELDS}, str(one["label"]), Score(**one["score"]), small)
        for one, small in zip(about["tried"], pictures, strict=True)
    )
    return Tuned(tried, range(len(tried))[about["best"]], Frame(**about["frame"]))


__all__ = ["SIDE", "digest_of", "keep", "known"]
