"""One pass of denoising (the first pass, or the hires pass) of one batch, and what became of it.

A pass begins when the WebUI activates the tags of a prompt and ends with the next activation or with the job. Its session is
made at the first denoiser call, because only then is the model that will be used certain to be loaded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ...fusion import FusionError, FusionSession, Report, Rows, Trace
from ...guidance.encoders import Encoders
from ...guidance.references import Reference, sides_needed
from ...lora import LoraFile
from ...settings import FuseSettings
from .guided import Decoders, GuidedPass
from .lora_files import FileVersion
from .text_parts import TextParts

log = logging.getLogger(__name__)

# (the model call's first argument, its keyword arguments) -> the call's rows; kept for the calls of one denoiser step.
RowLayout = Callable[[Tensor, Mapping[str, Any]], Rows]


class Denoisers(Protocol):
    """What a pass asks its host about the denoiser."""

    def denoiser(self, cfg_denoiser: Any) -> nn.Module:
        """The diffusion model that the next model calls go to. Raises FusionError where its layers would not be run."""

    def denoiser_identity(self, cfg_denoiser: Any) -> object:
        """Changes when the denoiser or the checkpoint in it changes."""

    def merged_loras(self, cfg_denoiser: Any) -> object:
        """Changes when other LoRAs are merged into the denoiser: kinds that depend on its weights are then made anew."""

    def weight_of(self, layer: nn.Module) -> Tensor:
        """A layer's weight as the model computes with it, dequantised: other LoRAs merged, ours not."""

    def row_layout(self, cfg_denoiser: Any, cond: Any) -> RowLayout:
        """How the rows of the model calls of one step are ordered. cond: the step's positive conditioning."""


@dataclass(frozen=True)
class Request:
    """A pair of LoRAs that was found and read, and how to fuse it. paths: of subject and style, real paths."""

    settings: FuseSettings
    subject: LoraFile
    style: LoraFile
    paths: frozenset[str]
    versions: tuple[FileVersion, ...]
    text: TextParts | None


@dataclass
class FusionPass:
    """One pass.

    settings: what was asked for; None if it could not be understood. request: the same with the LoRAs, until the job is over.
    error: the sentence that stops the image, instead of a request. guidance: None where none is wanted, or could be had. batch: number
    of the batch in the job, from 0.
    """

    denoisers: Denoisers
    settings: FuseSettings | None = None
    request: Request | None = None
    error: str | None = None
    guidance: GuidedPass | None = None
    hires: bool = False
    batch: int = 0
    denoising: bool = field(default=False, init=False)
    _session: FusionSession | None = field(default=None, init=False)
    _key: object = field(default=None, init=False)
    _spare: tuple[object, FusionSession] | None = field(default=None, init=False)
    _identity: object = field(default=None, init=False)
    _trace: Trace | None = field(default=None, init=False)
    _report: Report | None = field(default=None, init=False)
    _notes: list[str] = field(default_factory=list, init=False)
    _hook: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def trace(self) -> Trace | None:
        """What was decided so far; None before the first denoiser call. Of the base model, where a refiner took over."""
        if self._trace is None and self._session is not None:
            return self._session.trace
        return self._trace

    @property
    def report(self) -> Report | None:
        """Which layers and keys matched; None before the first denoiser call."""
        return self._report

    @property
    def notes(self) -> list[str]:
        """Sentences that the user should see. Asks the device: call it when the pass is over."""
        session = self._session.notes() if self._session is not None else []
        guidance = self.guidance.notes if self.guidance is not None else []
        return list(dict.fromkeys([*self._notes, *session, *guidance]))

    def note(self, sentence: str) -> None:
        """Add a sentence that the user should see."""
        self._notes.append(sentence)

    def denoise(self, cfg_denoiser: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one CFGDenoiser.forward, call(*args, **kwargs), fused and guided.

        Raises RuntimeError with one sentence where the pass cannot be fused.
        """
        if self.error is not None:
            raise RuntimeError(self.error)
        cond = kwargs["cond"] if "cond" in kwargs else args[3]  # forward(self, x, sigma, uncond, cond, ...)

        def attach_again() -> None:
            self._hook.close()
            self._attach(cfg_denoiser, cond)

        self.denoising = True
        try:
            with self._hook:
                self._attach(cfg_denoiser, cond)
                if self.guidance is None:
                    return call(*args, **kwargs)
                return self.guidance.denoise(cfg_denoiser, call, args, kwargs, attach_again)
        finally:
            self.denoising = False

    def switch_model(self, cfg_denoiser: Any, switch: Callable[[], bool]) -> bool:
        """Let the host's refiner take over (or not) inside a denoiser call, and follow it to its model."""
        switched = switch()
        if switched and self.guidance is not None:
            self.guidance.stop("The refiner's steps were not guided.")
        if switched and self.denoising:
            self._hook.close()
            # The refiner brought its own conditionings; the argument of the running call is the old model's.
            self._attach(cfg_denoiser, cfg_denoiser.sampler.sampler_extra_args["cond"])
        return switched

    def finish(self) -> None:
        """The pass is over: keep the record. The session stays for a pass to come, until succeed or release."""
        if self.guidance is not None:
            self.guidance.finish()
        self._finish_session()

    def _finish_session(self) -> None:
        session, self._session, self._identity = self._session, None, None
        if session is None:
            return
        self._spare = (self._key, session)
        if self._trace is None:
            self._trace = session.trace
        self._notes = list(dict.fromkeys([*self._notes, *session.notes()]))

    def succeed(self, earlier: FusionPass) -> None:
        """Follow a pass that is over, with what it had on the device: a job's next batch mostly wants the same."""
        self._spare, earlier._spare = earlier._spare, None

    def release(self) -> None:
        """Let go of the model and of the device's memory."""
        if self._spare is not None:
            self._spare[1].release()
            self._spare = None

    def _attach(self, cfg_denoiser: Any, cond: Any) -> None:
        session = self._session_for(cfg_denoiser)
        if session is None:
            return
        session.new_step()
        rows_of = self.denoisers.row_layout(cfg_denoiser, cond)
        self._hook.enter_context(fused_calls(self.denoisers.denoiser(cfg_denoiser), session, rows_of))

    def _session_for(self, cfg_denoiser: Any) -> FusionSession | None:
        """The session on the model that is loaded now; None where a refiner is left unfused."""
        identity = self.denoisers.denoiser_identity(cfg_denoiser)
        if identity == self._identity:
            return self._session
        refiner = self._identity is not None
        self._finish_session()
        if refiner:
            self.release()
        try:
            self._session = self._made_or_spare(cfg_denoiser, identity)
        except FusionError as reason:
            if not refiner:
                raise
            self.note(f"The refiner's steps were not fused: {reason}")
        self._identity = identity
        if self._report is None and self._session is not None:
            self._report = self._session.report
        return self._session

    def _made_or_spare(self, cfg_denoiser: Any, identity: object) -> FusionSession:
        request = self.request
        assert request is not None
        model = self.denoisers.denoiser(cfg_denoiser)
        self._key = (request.settings, request.versions, identity, self.denoisers.merged_loras(cfg_denoiser))
        if self._spare is not None and self._spare[0] == self._key:
            session = self._spare[1]
            session.restart()
            return session
        self.release()
        return FusionSession(model, request.subject, request.style, request.settings, weight_of=self.denoisers.weight_of)


@contextmanager
def fused_calls(model: nn.Module, session: FusionSession, rows_of: RowLayout) -> Iterator[None]:
    """Every call of the model inside is made with the session attached. The model's own forward is back afterwards."""
    own = model.__dict__.get("forward")  # another extension's
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        with session.attached(rows_of(x, kwargs)):
            return original(*args, **kwargs)

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


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


__all__ = ["Denoisers", "FusionJob", "FusionPass", "Request", "RowLayout", "fused_calls"]
