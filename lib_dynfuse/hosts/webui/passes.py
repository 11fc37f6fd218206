"""One pass of denoising (the first pass, or the hires pass) of one batch, and what became of it.

A pass begins when the WebUI activates the tags of a prompt and ends with the next activation or with the job. Its session is
made at the first denoiser call, because only then is the model that will be used certain to be loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...fusion import FusionError, FusionSession, Report, Step, Trace
from ...fusion.batches import Adjust, ModelCall
from ...fusion.calibration import Correlations, SeenEnough
from ...fusion.patching import hooked_by_others
from ...lora import LoraFile
from ...settings import FuseSettings
from ...tuning.search import Tuned
from .facts import Sampling
from .guided import GuidedPass
from .lora_files import FileVersion
from .roles import Roles, RowLayout
from .seams import argument
from .text_parts import TextParts


@dataclass(frozen=True)
class Request:
    """LoRAs that were found and read, at least one for each side, and how to fuse them.

    paths: of all of them, real paths. versions: of the subjects, then of the styles. watched: see FusionSession.
    """

    settings: FuseSettings
    subjects: tuple[LoraFile, ...]
    styles: tuple[LoraFile, ...]
    paths: frozenset[str]
    versions: tuple[FileVersion, ...]
    text: TextParts | None
    watched: bool = False

    @property
    def files(self) -> tuple[LoraFile, ...]:
        """The subjects, then the styles."""
        return (*self.subjects, *self.styles)


@dataclass(frozen=True)
class Recipe:
    """What is kept of a pass for writing its LoRAs as one file: no tensor of theirs.

    settings: of this pass. subjects, styles: the files as they were. shapes: FusionSession.shapes of the model, which the trace is of.
    """

    settings: FuseSettings
    subjects: tuple[FileVersion, ...]
    styles: tuple[FileVersion, ...]
    trace: Trace
    shapes: Mapping[str, tuple[int, ...] | None]


@dataclass
class FusionPass:
    """One pass.

    settings: what was asked for; None if it could not be understood. request: the same with the LoRAs, until the job is over.
    error: the sentence that stops the image, instead of a request. guidance: None where none is wanted, or could be had. similarity:
    of the pictures that the method compares, if it does. shows: this pass only shows what layers are given with that side alone, and ends
    with SeenEnough after its first step; seen: what two such passes showed, the subject's and the style's, if the method goes by it.
    tuned: where the settings are what was found for the pair. batch: number of the batch in the job, from 0.
    """

    roles: Roles
    settings: FuseSettings | None = None
    request: Request | None = None
    error: str | None = None
    guidance: GuidedPass | None = None
    similarity: float | None = None
    tuned: Tuned | None = None
    shows: str | None = None
    seen: tuple[Correlations, Correlations] | None = None
    hires: bool = False
    batch: int = 0
    denoising: bool = field(default=False, init=False)
    sampling: Sampling = field(init=False)
    _session: FusionSession | None = field(default=None, init=False)
    _step: Step | None = field(default=None, init=False)
    _scale: float = field(default=1.0, init=False)
    _key: object = field(default=None, init=False)
    _spare: tuple[object, FusionSession] | None = field(default=None, init=False)
    _identity: object = field(default=None, init=False)
    _trace: Trace | None = field(default=None, init=False)
    _recipe: Recipe | None = field(default=None, init=False)
    _report: Report | None = field(default=None, init=False)
    _notes: list[str] = field(default_factory=list, init=False)
    _hook: ExitStack = field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        self.sampling = Sampling(self.roles.samplers)

    @property
    def trace(self) -> Trace | None:
        """What was decided so far; None before the first denoiser call. Of the base model, where a refiner took over."""
        if self._trace is None and self._session is not None:
            return self._session.trace
        return self._trace

    @property
    def recipe(self) -> Recipe | None:
        """For one file that does what this pass did so far; None before the first denoiser call. Of the same model as the trace."""
        if self._recipe is None and self._session is not None and self._trace is None:
            return self._made_recipe(self._session.trace, self._session)
        return self._recipe

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
        cond = argument(args, kwargs, 3, "cond")  # forward(self, x, sigma, uncond, cond, ...)
        facts = self.sampling.facts(cfg_denoiser, args, kwargs)
        self._step, self._scale = facts.step, facts.scale

        def attach_again() -> None:
            self._hook.close()
            self._attach(cfg_denoiser, cond, FusionSession.repeat)

        self.denoising = True
        try:
            with self._hook, _in_a_sentence():
                self._attach(cfg_denoiser, cond, self._begin)
                if self.guidance is None:
                    result = call(*args, **kwargs)
                else:
                    result = self.guidance.denoise(facts, cfg_denoiser, call, args, kwargs, attach_again)
            if self._session is not None:
                self._session.end_step()
                if self.shows is not None:
                    raise SeenEnough(self._session.shown)
            return result
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
            self._attach(cfg_denoiser, cfg_denoiser.sampler.sampler_extra_args["cond"], self._begin)
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
        session.unfold()
        self._spare = (self._key, session)
        if self._trace is None:
            self._trace = session.trace
            self._recipe = self._made_recipe(self._trace, session)
        self._notes = list(dict.fromkeys([*self._notes, *session.notes()]))

    def _made_recipe(self, trace: Trace, session: FusionSession) -> Recipe | None:
        request = self.request
        if request is None or not len(trace.weights):
            return None
        count = len(request.subjects)
        return Recipe(request.settings, request.versions[:count], request.versions[count:], trace, session.shapes)

    def succeed(self, earlier: FusionPass) -> None:
        """Follow a pass that is over, with what it had on the device: a job's next batch mostly wants the same."""
        self._spare, earlier._spare = earlier._spare, None

    def release(self) -> None:
        """Let go of the model and of the device's memory."""
        if self._spare is not None:
            self._spare[1].release()
            self._spare = None

    def _begin(self, session: FusionSession) -> None:
        assert self._step is not None
        if self.similarity is not None:
            session.tell_similarity(self.similarity)
        if self.seen is not None and session.calibrates:
            session.learn(*self.seen)
        session.begin(self._step)

    def _attach(self, cfg_denoiser: Any, cond: Any, tell: Callable[[FusionSession], None]) -> None:
        """Put the session on the model for the rest of this denoiser call. tell: says to it which step this is."""
        session = self._session_for(cfg_denoiser)
        if session is None:
            return
        tell(session)
        denoisers = self.roles.denoisers
        rows_of = denoisers.row_layout(cfg_denoiser, cond)
        self._hook.enter_context(denoisers.model_calls(functools.partial(self._calls, session)))
        model = denoisers.denoiser(cfg_denoiser)
        self._hook.enter_context(fused_calls(model, session, rows_of, lambda: self._scale, denoisers.adjusted_rows))

    def _calls(self, session: FusionSession, calls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All model calls of a step."""
        scale = self.roles.denoisers.scale_of_calls(args, kwargs)
        if scale is not None:
            self._scale = float(scale)
        return _decided(session, calls, *args, **kwargs)

    def _session_for(self, cfg_denoiser: Any) -> FusionSession | None:
        """The session on the model that is loaded now; None where a refiner is left unfused."""
        identity = self.roles.denoisers.identity(cfg_denoiser)
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
        denoisers = self.roles.denoisers
        model = denoisers.denoiser(cfg_denoiser)
        self._key = (request.settings, request.versions, identity, denoisers.merged_loras(cfg_denoiser), request.watched)
        if self._spare is not None and self._spare[0] == self._key:
            session = self._spare[1]
            session.restart()
            return session
        self.release()
        session = FusionSession(
            model,
            request.subjects,
            request.styles,
            request.settings,
            weight_of=denoisers.weight_of,
            own_weight=denoisers.own_weight,
            watched=request.watched,
        )
        if self.shows is not None:
            session.show(self.shows)
        return session


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What cannot be fused reaches the user as every other refusal does."""
    try:
        yield
    except FusionError as reason:
        raise RuntimeError(f"DynFuse: {reason}") from None


def _decided(session: FusionSession, calls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """All model calls of a step, made once more where a negative prompt that ran alone and first could not know its image's choice."""
    result = calls(*args, **kwargs)
    if not session.undecided:
        return result
    del result  # and the graph with it
    session.repeat()
    return calls(*args, **kwargs)


def _never(arguments: dict[str, Any], positions: tuple[int, ...], batch: int) -> None:
    """See fusion.batches.Adjust."""


@contextmanager
def fused_calls(
    model: nn.Module, session: FusionSession, rows_of: RowLayout, scale: Callable[[], float], adjust: Adjust | None = None
) -> Iterator[None]:
    """Every call of the model inside is the session's. The model's own forward is back afterwards.

    A call is made again for some of its rows, unless another extension has hooks on the model: these see the rows of the host's calls only.
    scale: the CFG scale of the call that is being made. adjust: see fusion.batches.
    """
    own = model.__dict__.get("forward")  # another extension's
    original = model.forward
    hooked = session.contrasts and hooked_by_others(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        call = ModelCall(original, args, kwargs, x.shape[0], _never if hooked else adjust)
        return call.of(session.predict(call, rows_of(x, kwargs), scale()))

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


__all__ = ["FusionPass", "Recipe", "Request", "fused_calls"]
