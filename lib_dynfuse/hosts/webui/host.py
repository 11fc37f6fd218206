"""DynFuse's side of a running WebUI: its list of LoRAs, what is kept on disk, and the seams through which jobs are seen.

First of all: do no harm. Whatever is needed of the WebUI is looked up before anything is wrapped; if a piece is missing or different,
nothing is (see off).
"""

from __future__ import annotations

import logging
from typing import Any

from ...fusion.session import layer_shapes
from ...guidance.references import ReferenceCache
from ...lora import LoraFile
from ...lora.families import Shape
from ...user_presets import UserPresets
from . import catalogue, job, picture_options, requests, storage
from .capabilities import off_because, why_off
from .catalogue import Catalogue
from .job import JobSeams
from .passes import FusionPass
from .record import FusionJob
from .requests import ParseTags, Requests
from .roles import Roles
from .seams import Seams
from .storage import Storage
from .tuning import Tell

log = logging.getLogger(__name__)

NOT_INSTALLED = off_because("the WebUI has not told it to begin")


class WebUIHost:
    """There is one of it per process: see detect.

    off: one sentence on why DynFuse does nothing here, None while it is installed. catalogue: the WebUI's LoRAs. storage: what the
    guidance keeps.
    """

    def __init__(self, roles: Roles):
        self.roles = roles
        self.off: str | None = NOT_INSTALLED
        self.catalogue = Catalogue()
        self.storage = Storage()
        self.requests = Requests(roles, self.catalogue, self.storage)
        self.jobs = JobSeams(roles, self.catalogue, self.requests)
        self.needs = (*job.NEEDS, *requests.NEEDS, *catalogue.NEEDS, *storage.NEEDS, *picture_options.NEEDS, *roles.needs)
        self._seams = Seams()

    @property
    def name(self) -> str:
        """Of the WebUI."""
        return self.roles.name

    @property
    def reference_cache(self) -> ReferenceCache:
        """The references of earlier jobs, and the pictures that the user gave."""
        return self.storage.reference_cache

    def install(self, parse_tags: ParseTags, tell_tuned: Tell | None = None) -> None:
        """Wrap the WebUI's functions, or none of them: see off. May be called again at any time, with another parser.

        tell_tuned: called when a job uses other settings than it asked for, because they were found for its pair.
        """
        self.requests.parse_tags = parse_tags
        if tell_tuned is not None:
            self.requests.tell_tuned = tell_tuned
        try:
            off = why_off(self.needs, self.roles.barred)
            if off is None:
                self._seams.install(self.jobs.wrappings())
        except Exception as reason:
            log.exception("DynFuse could not be installed")
            off = off_because(f"it could not be installed ({type(reason).__name__}: {reason})")
        if off is not None:
            self._seams.undo()
            if off != self.off:
                print(off)
        self.off = off

    def uninstall(self) -> None:
        """Take everything back."""
        self.off = NOT_INSTALLED
        try:
            self.jobs.forget()
        except Exception:
            log.exception("DynFuse could not take its text-encoder parts back")
        self._seams.undo()

    @property
    def presets(self) -> UserPresets:
        """The user's own."""
        return self.storage.presets

    def read_lora(self, path: str) -> LoraFile:
        """From memory where it was read last. Raises LoraError or OSError."""
        return self.requests.read_file(path)[1]

    def loaded_layers(self) -> dict[str, Shape | None] | None:
        """Layers of the loaded checkpoint's denoiser and the shapes of their weights, None where quantised; None where none is loaded or
        nobody knows."""
        try:
            model = self.roles.denoisers.loaded()
        except Exception:
            log.debug("DynFuse does not know the loaded checkpoint", exc_info=True)
            return None
        return None if model is None else layer_shapes(model)

    def before_sampling(self, p: Any) -> None:
        """A sampling is about to begin. The scripts' hook of this name is the only place from which memory can be asked for."""
        self.jobs.before_sampling(p)

    def is_inner(self, p: Any) -> bool:
        """Whether a job was begun inside another one, as ADetailer's are: it has that one's fusion, and its results are no one's."""
        return self.jobs.is_inner(p)

    def last_pass(self, p: Any) -> FusionPass | None:
        """The last pass of a job, running or over; None if nothing was fused. See FusionPass.trace, settings, notes."""
        passes = self.passes(p)
        return passes[-1] if passes else None

    def passes(self, p: Any) -> list[FusionPass]:
        """The passes of a job's last batch: the first pass and, with hires fix, the second."""
        found = FusionJob.of(p)
        return found.passes if found is not None else []


__all__ = ["WebUIHost"]
