"""A fusion session: both branches found on a model's layers, attached for a call, taken off after it.

    with fuse(unet, subject, style, FuseSettings()) as session:
        prediction = unet(latent, timestep, context)
    session.trace.winners

Hosts keep the session for a pass and attach it around each model call instead:

    session.new_step()
    with session.attached(rows):
        prediction = unet(latent, timestep, context)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor, nn

from ..lora import LoraFile, branches_by_site, compatible, denoiser_aliases, is_attention, layer_label, norms_by_layer
from ..lora.branch import LoraError, NormShift
from ..lora.matching import SiteBranch
from ..lora.naming import Site
from ..settings import FuseSettings
from .layer import FusedLayer, FusedSite, PatchedLayer, ShiftedNorm, StepState
from .policy import Choice, gamma
from .rows import Rows
from .trace import Trace, TraceRecorder


class FusionError(RuntimeError):
    """Two LoRAs and a model that cannot be fused. One sentence for the user."""


@dataclass
class Report:
    """What a session found. Layer labels, in the model's order.

    matched: decided between both LoRAs (or summed, method direct). one_sided: touched by one LoRA only. skipped: left to the base model
    by the settings. summed_norms: normalisation layers, which are summed. unmatched: per file name, the keys that no layer of this
    model takes.
    """

    matched: list[str] = field(default_factory=list)
    one_sided: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    summed_norms: list[str] = field(default_factory=list)
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def fuse(model: nn.Module, subject: LoraFile, style: LoraFile, settings: FuseSettings | None = None) -> FusionSession:
    """Fuse two LoRAs on a denoiser for as long as the returned session is used as a context manager.

    model: a U-Net or transformer whose layers carry the names of a known family. Raises FusionError when nothing matches or the files
    belong to different base models.
    """
    return FusionSession(model, subject, style, settings or FuseSettings())


class FusionSession:
    """Both branches on one model. See the module's text for the two ways to use it."""

    def __init__(
        self,
        model: nn.Module,
        subject: LoraFile,
        style: LoraFile,
        settings: FuseSettings,
        *,
        weight_of: Callable[[nn.Module], Tensor] | None = None,
        choice: Choice | None = None,
    ):
        """weight_of: gives a layer's dequantised weight; called only for kinds that depend on it. choice: chooses at two-sided layers in
        place of the measurement (method dynfuse); the trace then stays empty, as nothing was measured. Raises FusionError.
        """
        reason = compatible(subject, style)
        if reason:
            raise FusionError(reason)
        self.settings = settings
        self.report = Report()
        self._model = model
        self._state = StepState(settings, choice)
        self._depth = 0
        self._steps_without_gamma = settings.balance == "gamma"
        # Layers are known by what they hold, not by their class: hosts make their own. An RMS norm's gain is called scale in BFL's Flux.
        modules = {
            name: module
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None or isinstance(getattr(module, "scale", None), Tensor)
        }
        self.layers = _find_layers(modules, subject, style, settings, self._state, weight_of or _own_weight, self.report)
        nothing_wanted = settings.method == "direct" and not settings.subject_weight and not settings.style_weight
        if not self.report.matched and not self.report.one_sided and not nothing_wanted:
            raise FusionError(_nothing_matches(subject, style, self.report))
        self._sites = [site for layer in self.layers if isinstance(layer, FusedLayer) for site in layer.sites]
        self._recorder = TraceRecorder(
            tuple(s.site for s in self._sites),
            tuple(s.bindings[1] is None for s in self._sites),
            tuple(s.bindings[0] is None for s in self._sites),
        )

    @property
    def rows(self) -> Rows | None:
        """The next call's rows; None: every row an image of its own."""
        return self._state.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self._state.rows = rows

    def new_step(self) -> None:
        """A new denoiser step begins: record the last one's decisions and forget them."""
        measured = self._recorder.add([s.divergence for s in self._sites], [s.decision for s in self._sites])
        if measured is not None and self._steps_without_gamma:
            self._state.gamma = gamma(measured)
            self._steps_without_gamma = False
        for site in self._sites:
            site.forget()

    def restart(self) -> None:
        """Begin another image on the same model with an empty record; the branches on the device are kept."""
        for site in self._sites:
            site.forget()
        self._recorder.steps.clear()
        self._state.fallbacks = 0
        self._state.gamma = None
        self._steps_without_gamma = self.settings.balance == "gamma"

    @contextmanager
    def attached(self, rows: Rows | None = None) -> Iterator[FusionSession]:
        """Put the fused forwards on the model's layers for one call; they are off again whatever happens inside."""
        if rows is not None:
            self._state.rows = rows
        self._depth += 1
        try:
            if self._depth == 1:
                for layer in self.layers:
                    layer.attach()
                self._state.active = True
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._state.active = False
                for layer in self.layers:
                    layer.detach()

    def __enter__(self) -> FusionSession:
        self._context = self._attached_for_many_calls()
        return self._context.__enter__()

    @contextmanager
    def _attached_for_many_calls(self) -> Iterator[FusionSession]:
        """Stay attached, and take each call of the model for a step of its own."""
        marker = _StepMarker(self._model, self)
        with self.attached():
            marker.attach()
            try:
                yield self
            finally:
                marker.detach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._context.__exit__(kind, error, trace)

    @property
    def trace(self) -> Trace:
        """What was decided so far, the step under way included."""
        self.new_step()
        return self._recorder.trace(self._state.fallbacks)

    def notes(self) -> list[str]:
        """Sentences that the user should see after the job."""
        notes = []
        for name, keys in self.report.unmatched.items():
            if keys:
                notes.append(f"{len(keys)} keys of {name} fit no layer of this model (such as {keys[0]}).")
        trace = self.trace
        if trace.fallbacks:
            notes.append(f"{trace.fallbacks} choices were made on the negative prompt, because the WebUI ran it alone and first.")
        if trace.non_finite:
            notes.append(f"{trace.non_finite} divergences were not finite numbers; the subject was used there.")
        return notes

    def release(self) -> None:
        """Drop the branches' copies on the device. The trace stays; a later call makes them anew."""
        for site in self._sites:
            site.operators = None


class _StepMarker(PatchedLayer):
    """The whole model with a new step before each call."""

    def __init__(self, model: nn.Module, session: FusionSession):
        super().__init__("", model, session._state)
        self.session = session

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        self.session.new_step()
        return self._base(*args, **kwargs)


def _own_weight(module: nn.Module) -> Tensor:
    return module.weight


def _find_layers(
    modules: dict[str, nn.Module],
    subject: LoraFile,
    style: LoraFile,
    settings: FuseSettings,
    state: StepState,
    weight_of: Callable[[nn.Module], Tensor],
    report: Report,
) -> list[PatchedLayer]:
    aliases = denoiser_aliases(modules)
    branches: list[dict[Site, SiteBranch]] = []
    norms: list[dict[str, NormShift]] = []
    for file in (subject, style):
        found, unmatched = branches_by_site(file, aliases)
        branches.append(found)
        norms.append(norms_by_layer(file, aliases))
        report.unmatched[file.name] = unmatched
    strengths = (settings.subject_weight, settings.style_weight)
    if settings.method == "direct":
        # A LoRA at strength 0 adds nothing and need not be computed: a reference of the guidance is one LoRA alone. With a choice to be
        # made it counts: the other LoRA wins every layer against it.
        branches = [found if strength else {} for found, strength in zip(branches, strengths)]
        norms = [found if strength else {} for found, strength in zip(norms, strengths)]
    order = {name: position for position, name in enumerate(modules)}
    by_layer: dict[str, list[FusedSite]] = {}
    touched = sorted(branches[0].keys() | branches[1].keys(), key=lambda s: (order[s.layer], s.part.start if s.part else 0))
    for site in touched:
        pair = (branches[0].get(site), branches[1].get(site))
        two_sided = None not in pair
        if (settings.scope == "attention" and not is_attention(site)) or (not two_sided and settings.one_sided == "skip"):
            report.skipped.append(layer_label(site))
            continue
        module = modules[site.layer]
        pair = (_fitted(site, pair[0], module), _fitted(site, pair[1], module))
        (report.matched if two_sided else report.one_sided).append(layer_label(site))
        by_layer.setdefault(site.layer, []).append(FusedSite(site, pair, strengths))
    layers: list[PatchedLayer] = [FusedLayer(name, modules[name], sites, state, weight_of) for name, sites in by_layer.items()]
    if settings.scope == "all":
        for name in sorted(norms[0].keys() | norms[1].keys(), key=lambda n: order[n]):
            shifts = [side.get(name) for side in norms]
            gain = _sum([None if s is None or s.weight is None else s.weight.float() * w for s, w in zip(shifts, strengths)])
            offset = _sum([None if s is None or s.bias is None else s.bias.float() * w for s, w in zip(shifts, strengths)])
            layers.append(ShiftedNorm(name, modules[name], gain, offset, state))
            report.summed_norms.append(name)
    return layers


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    return sum(present[1:], present[0]) if present else None


def _fitted(site: Site, binding: SiteBranch | None, module: nn.Module) -> SiteBranch | None:
    """The branch checked against the layer's shape, where that is known. Raises FusionError: the file is for another base model."""
    weight = getattr(module, "weight", None)
    if binding is None or not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() not in (2, 4):
        return binding
    if hasattr(weight, "gguf_cls"):
        return binding  # quantised: the stored shape is not the layer's
    try:
        return binding.fitted(site, tuple(weight.shape))
    except LoraError as reason:
        raise FusionError(str(reason)) from None


def _nothing_matches(subject: LoraFile, style: LoraFile, report: Report) -> str:
    if report.skipped:
        return (
            f"{subject.name} and {style.name} have no layer left to fuse: the settings 'scope' and 'one_sided' exclude all "
            f"{len(report.skipped)} layers that they change."
        )
    families = " and ".join(sorted({file.family or "an unknown base model" for file in (subject, style)}))
    return f"No layer of this model is changed by {subject.name} or {style.name}: they were made for {families}."


__all__ = ["FusionError", "FusionSession", "Report", "fuse"]
