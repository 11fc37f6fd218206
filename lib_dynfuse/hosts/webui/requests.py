"""From the tags of a prompt to a pass: the LoRAs found and read, the references at hand, or the sentence that stops the picture."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...fusion import FusionError
from ...fusion.calibration import Correlations
from ...fusion.rules import RULES
from ...guidance.encoders import Encoders
from ...guidance.guide import wants_guidance
from ...guidance.weights import EncoderError
from ...lora import LoraFile, compatible, smallest_side
from ...lora.branch import LoraError
from ...settings import FuseSettings, SettingsError
from ...tuning.plan import small_frame, untuned, wants_tuning
from ..references import SAME_PROMPT, alone, compared, similarity
from ..sides import SIDES, names_of
from .capabilities import Call, Value
from .catalogue import Catalogue, UnknownLora
from .guided import GuidedPass
from .lora_files import FileVersion, LoraFiles
from .passes import FusionPass, Request
from .record import FusionJob
from .references import (
    JOB_ARGUMENTS,
    Interrupted,
    Jobs,
    ReferenceFailed,
    ReferenceMaker,
    file_identity,
    other_tags,
    own_random_state,
)
from .roles import Roles
from .storage import Storage
from .text_parts import text_parts
from .tuning import Tell, tuned, with_both_sides

log = logging.getLogger(__name__)

TAG = "dynfuse"

NEEDS = (
    Call("modules.extra_networks", "parse_prompt", 1),
    Value("modules.shared", "sd_model"),
    Value("modules.sd_vae", "loaded_vae_file"),
    *(
        Value("modules.processing", f"StableDiffusionProcessing.{name}")
        for name in (
            *("all_prompts", "all_negative_prompts", "all_seeds", "batch_size"),
            *("sampler_name", "steps", "cfg_scale", "width", "height"),
        )
    ),
    Call("modules.processing", "StableDiffusionProcessingTxt2Img", keywords=JOB_ARGUMENTS),
)

# The items of every <dynfuse:...> tag of a prompt -> the settings they ask for, None without a tag. Raises SettingsError.
ParseTags = Callable[[Sequence[Sequence[str]]], FuseSettings | None]


class Requests:
    """Reads requests, with the WebUI's list of LoRAs and what is kept on disk."""

    def __init__(self, roles: Roles, catalogue: Catalogue, storage: Storage):
        self.parse_tags: ParseTags = lambda tags: None
        self.tell_tuned: Tell = lambda p, asked, used, found: None
        self._roles = roles
        self._catalogue = catalogue
        self._storage = storage
        self._files = LoraFiles()

    def asks(self, p: Any, data: Mapping[str, Sequence[Any]]) -> bool:
        """Whether a pass is to be fused. data: the parsed tags of its prompt."""
        return TAG in data or is_reference(p)

    def requested(
        self, p: Any, data: Mapping[str, Sequence[Any]], job: FusionJob, inherited: FuseSettings | None = None
    ) -> FusionPass | None:
        """The pass that the tags ask for: None without a tag, one with an error sentence if it cannot be done.

        inherited: what holds for a job inside another one that has no tag of its own.
        """
        new = FusionPass(self._roles, hires=bool(getattr(p, "is_hr_pass", False)), batch=getattr(p, "iteration", 0))
        try:
            # A reference's job says itself what it is.
            own = getattr(p, "dynfuse_settings", None)
            new.settings = own or self.parse_tags([list(params.items) for params in data.get(TAG, [])]) or inherited
            if new.settings is None:
                return None
            if own is None and inherited is not None:
                new.settings = replace(untuned(new.settings), guidance=False)
            if wants_tuning(new.settings):
                new.settings = self._tuned(p, data, new, new.settings, job)
            new.shows = getattr(p, "dynfuse_shows", None)
            new.request = self._read(new.settings.for_hires() if new.hires else new.settings)
            if new.shows is not None:  # the other side's words are not heard either
                new.request = replace(new.request, text=self._read(alone(new.settings, new.shows)).text)
            if wants_guidance(new.settings):
                new.guidance = self._guidance(p, data, new, job)
            if RULES[new.settings.method].compares:
                new.similarity = self._similarity(p, data, new, job)
            if RULES[new.settings.method].calibrates and new.shows is None:
                new.seen = self._seen(p, data, new, job)
        except (SettingsError, LoraError, UnknownLora, FusionError, EncoderError, ReferenceFailed) as reason:
            new.error = f"DynFuse: {reason}"
        except Exception as reason:
            log.exception("DynFuse could not prepare the fusion")
            new.error = f"DynFuse could not prepare the fusion: {type(reason).__name__}: {reason}"
        else:
            for note in itertools.chain.from_iterable(map(_unused, new.request.files)):
                new.note(note)
        return new

    def _read(self, settings: FuseSettings) -> Request:
        paths = {side: [self._catalogue.known_path(name) for name in names_of(settings, side)] for side in SIDES}
        named: dict[str, str] = {}
        for name, path in ((name, path) for side in SIDES for name, path in zip(names_of(settings, side), paths[side])):
            real = os.path.realpath(path)
            if real in named:
                raise UnknownLora(f"{named[real]!r} and {name!r} are the same LoRA, {os.path.basename(path)}; name two.")
            named[real] = name
        read = {side: [self.read_file(path) for path in paths[side]] for side in SIDES}
        subjects, styles = (tuple(file for _, file in read[side]) for side in SIDES)
        files = (*subjects, *styles)
        for one, other in itertools.combinations(files, 2):
            reason = compatible(one, other)
            if reason is not None:
                raise FusionError(reason)
        versions = tuple(version for side in SIDES for version, _ in read[side])
        text = text_parts(settings, subjects, styles, versions)
        return Request(settings, subjects, styles, frozenset(named), versions, text, self._storage.watches_selection)

    def read_file(self, path: str) -> tuple[FileVersion, LoraFile]:
        """Raises LoraError: one sentence."""
        try:
            return self._files.read(path)
        except OSError as error:
            raise LoraError(f"{os.path.basename(path)} cannot be read: {error.strerror or error}.") from None

    def _guidance(self, p: Any, data: Mapping[str, Sequence[Any]], new: FusionPass, job: FusionJob) -> GuidedPass | None:
        """The guidance of a pass, with its references at hand. Raises EncoderError, SettingsError or ReferenceFailed."""
        assert new.settings is not None
        assert new.request is not None
        try:
            with own_random_state():  # a new encoder is filled with random numbers before its weights are
                job.encoders = encoders = self._storage.encoders()
            references = job.references_for(new) or self._reference_maker(p, data, new.settings, new.request, encoders).references()
        except EncoderError as reason:
            if not self._storage.goes_on_without_encoders:
                raise
            new.note(f"The picture was not guided. {reason}")
            return None
        except Interrupted:
            return None  # the job itself stops at its first step
        return GuidedPass(self._roles.samplers, new.settings, encoders, references, job.decoders)

    def _tuned(self, p: Any, data: Mapping[str, Sequence[Any]], new: FusionPass, asked: FuseSettings, job: FusionJob) -> FuseSettings:
        """The settings found for the pair; as they were asked for where there are no encoders. One search serves a job's batches and its
        hires pass. Raises LoraError, UnknownLora, FusionError, SettingsError or ReferenceFailed.
        """
        if asked not in job.tuned:
            try:
                request = self._read(asked)
                with own_random_state():
                    job.encoders = encoders = self._storage.encoders()
                frame = small_frame(int(p.width), int(p.height), int(p.steps), smallest_side(request.files[0].family))
                maker = self._reference_maker(p, data, with_both_sides(asked), request, encoders)
                job.tuned[asked] = tuned(replace(maker, jobs=replace(maker.jobs, frame=frame)), asked)
            except EncoderError as reason:
                job.tuned[asked] = None
                new.note(f"The pair was not tuned: {reason}")
            except Interrupted:
                return untuned(asked)  # the job itself stops at its first step
        new.tuned = job.tuned[asked]
        used = untuned(asked) if new.tuned is None else new.tuned.settings(asked)
        self.tell_tuned(p, asked, used, new.tuned)
        return used

    def _similarity(self, p: Any, data: Mapping[str, Sequence[Any]], new: FusionPass, job: FusionJob) -> float:
        """Of the two pictures that the pass's method compares, made with one side alone. Raises EncoderError or ReferenceFailed."""
        assert new.settings is not None
        assert new.request is not None
        known = next((done.similarity for done in reversed(job.passes) if done.batch == new.batch and done.similarity is not None), None)
        if known is not None:  # a hires pass has its first pass's
            return known
        try:
            with own_random_state():
                job.encoders = encoders = self._storage.encoders()
            maker = self._reference_maker(p, data, compared(new.settings), new.request, encoders, of_the_picture=True)
            return similarity(maker.references())
        except Interrupted:
            return 0.0  # the job itself stops at its first step

    def _seen(self, p: Any, data: Mapping[str, Sequence[Any]], new: FusionPass, job: FusionJob) -> tuple[Correlations, Correlations] | None:
        """What the layers are given with each side alone. Raises ReferenceFailed."""
        assert new.settings is not None
        assert new.request is not None
        jobs = self._jobs(p, data, new.settings, new.request)
        if all(jobs.own_prompt(side) is None for side in SIDES):
            new.note(SAME_PROMPT.format(method=new.settings.method))
        known = next((done.seen for done in reversed(job.passes) if done.batch == new.batch and done.seen is not None), None)
        if known is not None:  # a hires pass has its first pass's
            return known
        try:
            return jobs.seen("subject"), jobs.seen("style")
        except Interrupted:
            return {}, {}  # the job itself stops at its first step

    def _reference_maker(
        self,
        p: Any,
        data: Mapping[str, Sequence[Any]],
        settings: FuseSettings,
        request: Request,
        encoders: Encoders,
        of_the_picture: bool = False,
    ) -> ReferenceMaker:
        """settings: of the first pass, whose references a hires pass shares whatever its own weights are. of_the_picture: under its
        prompt, whatever words the LoRAs have of their own.
        """
        tags = self._other_tags(data, request)
        return ReferenceMaker(
            self._jobs(p, data, settings, request, of_the_picture),
            encoders,
            self._storage.reference_cache,
            self._roles.checkpoints.identity(p),
            hashes={side: "+".join(map(self._hash, names_of(settings, side))) for side in SIDES},
            tags_identity="; ".join(
                f"{kind}:{':'.join(items)} ({file_identity(self._catalogue.path(items[0])) if items else ''})" for kind, items in tags
            ),
        )

    def _jobs(
        self, p: Any, data: Mapping[str, Sequence[Any]], settings: FuseSettings, request: Request, of_the_picture: bool = False
    ) -> Jobs:
        return Jobs(
            p,
            settings,
            activation_texts={
                side: None if of_the_picture else self._catalogue.activation_text(*names_of(settings, side)) for side in SIDES
            },
            tags=" ".join(f"<{kind}:{':'.join(items)}>" for kind, items in self._other_tags(data, request)),
            more=self._roles.checkpoints.arguments(p),
            prepare=self._roles.checkpoints.prepare,
        )

    def _other_tags(self, data: Mapping[str, Sequence[Any]], request: Request) -> list[tuple[str, list[str]]]:
        return other_tags(data, TAG, lambda name: self._catalogue.is_among(name, request.paths))

    def _hash(self, name: str) -> str:
        return self._catalogue.hash(name) or file_identity(self._catalogue.path(name))


def is_reference(p: Any) -> bool:
    """Whether a job is one of ours that makes a reference."""
    return getattr(p, "dynfuse_settings", None) is not None


def _unused(file: LoraFile) -> list[str]:
    """Sentences on what is in a file and takes no part. Layers that this model lacks are for the session to tell."""
    notes = []
    layers = {key for keys in file.keys.values() for key in keys}
    unread = [key for key in file.unmatched if key not in layers]
    if unread:
        notes.append(f"{len(unread)} keys of {file.name} are of no known kind and were not used (such as {unread[0]}).")
    if file.embeddings:
        notes.append(f"The embeddings inside {file.name} ({', '.join(file.embeddings)}) are not used.")
    return notes


__all__ = ["NEEDS", "TAG", "ParseTags", "Requests", "is_reference"]
