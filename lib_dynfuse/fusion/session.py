"""A fusion session: the LoRAs found on a model's layers, attached for a call, taken off after it.

    with fuse(unet, subject, style, FuseSettings()) as session:
        prediction = unet(latent, timestep, context)
    session.trace.weights

Hosts keep the session for a pass and attach it around each model call instead:

    session.begin(step)
    with session.attached(rows):
        prediction = unet(latent, timestep, context)
    session.end_step()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..lora import (
    Blocks,
    LoraFile,
    block_factors,
    branches_by_site,
    compatible,
    denoiser_aliases,
    is_attention,
    layer_label,
    misfit,
    norms_by_layer,
)
from ..lora.branch import Dense, LoraError, LowRank, NormShift
from ..lora.matching import SiteBranch
from ..lora.naming import Site
from ..settings import FuseSettings, SettingsError
from ..strength import BlockText, one_each
from .batches import ModelCall
from .calibration import Calibration, Correlations
from .call import FusionState
from .decisions import Decisions
from .folding import OwnWeight
from .layer import FusedLayer, FusedSite
from .norm import ShiftedNorm
from .patching import PatchedLayer, Uncompiled, argument, own_name, uncompiled
from .predictions import Call, Predictions
from .rewriting import Binding, Rewriting
from .rows import Rows
from .rules import RULES, Member, Places, Rule
from .rules.softened import softened
from .step import Step
from .trace import Trace, TraceRecorder


class FusionError(RuntimeError):
    """LoRAs and a model that cannot be fused. One sentence for the user."""


@dataclass
class Report:
    """What a session found. Layer labels, in the model's order.

    matched: changed by several LoRAs, between which the rule decides. one_sided: changed by one LoRA only. skipped: left to the base model
    by the settings. summed_norms: normalisation layers, which are summed. unmatched: per file name, the keys that no layer of this
    model takes.
    """

    matched: list[str] = field(default_factory=list)
    one_sided: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    summed_norms: list[str] = field(default_factory=list)
    unmatched: dict[str, list[str]] = field(default_factory=dict)


Files = LoraFile | Sequence[LoraFile]


def fuse(model: nn.Module, subject: Files, style: Files, settings: FuseSettings | None = None, *, steps: int = 0) -> FusionSession:
    """Fuse LoRAs on a denoiser for as long as the returned session is used as a context manager.

    model: a U-Net or transformer whose layers carry the names of a known family. subject, style: one or several each. steps: how many
    calls of the model there will be, for weights that vary with the step; 0: each is taken for the first. Raises FusionError when
    nothing matches or the files belong to different base models.
    """
    return FusionSession(model, subject, style, settings or FuseSettings(), steps=steps)


class FusionSession:
    """LoRAs on one model. See the module's text for the two ways to use it.

    shapes: dotted name of each of the model's layers -> shape of its weight, None where that is not told (quantised).
    """

    def __init__(
        self,
        model: nn.Module,
        subject: Files,
        style: Files,
        settings: FuseSettings,
        *,
        weight_of: Callable[[nn.Module], Tensor] | None = None,
        own_weight: OwnWeight | None = None,
        rule: Rule | None = None,
        steps: int = 0,
        watched: bool = False,
    ):
        """weight_of: gives a layer's dequantised weight; called only for kinds that depend on it. own_weight: gives the very tensor that a
        layer's forward computes with, or None where the host may write to it in there. rule: in place of the settings' method. watched:
        measure from the second step on what the paper's selection goes by, also where the method does not (see trace.selected); methods
        that rewrite the LoRAs, or predict with each alone, leave nothing to measure. Raises FusionError.
        """
        subjects, styles = ((files,) if isinstance(files, LoraFile) else tuple(files) for files in (subject, style))
        files = (*subjects, *styles)
        for number, file in enumerate(files):
            for other in files[:number]:
                reason = compatible(other, file)
                if reason:
                    raise FusionError(reason)
        self.shapes = layer_shapes(model)
        for file in files:
            if reason := misfit(file, self.shapes):
                raise FusionError(reason)
        self.settings = settings
        self.report = Report()
        self._model = model
        self._steps = steps
        rule = rule or RULES[settings.method]()
        if settings.loser and rule.selects:
            rule = softened(rule)
        schedules = (
            *one_each(settings.subject_schedules, len(subjects), "subject_weight"),
            *one_each(settings.style_schedules, len(styles), "style_weight"),
        )
        watched = watched and not (rule.measures or rule.rewrites or rule.composes)
        self._state = FusionState(settings, rule, schedules, watched)
        self._depth = 0
        self._compiled = Uncompiled(model)
        modules = _layers(model)
        weights = weight_of or weight_in_memory, own_weight or _own_weight
        self.layers = _find_layers(modules, files, len(subjects), self._state, weights, self.report)
        nothing_wanted = not rule.measures and all(schedule.full == 0 for schedule in schedules)
        if not self.report.matched and not self.report.one_sided and not nothing_wanted:
            raise FusionError(_nothing_matches(files, self.report))
        fused_layers = [layer for layer in self.layers if isinstance(layer, FusedLayer)]
        sites = [(layer, site) for layer in fused_layers for site in layer.sites]
        members = members_of(files, len(subjects))
        present = torch.zeros(len(sites), len(files), dtype=torch.bool)
        strengths = torch.zeros(len(sites), len(files))
        for row, (_, site) in enumerate(sites):
            present[row, list(site.members)] = True
            strengths[row, list(site.members)] = torch.tensor(site.strengths)
        places = tuple(site.site for _, site in sites)

        def change(site: int, member: int) -> LowRank | Dense:
            layer, fused = sites[site]
            return fused.bind(lambda: layer.weight_of(layer.module))[fused.members.index(member)]

        try:
            rule.prepare(Places(places, members, present, settings, change))
        except SettingsError as reason:
            raise FusionError(str(reason)) from None
        self._decisions = Decisions(self._state, fused_layers, TraceRecorder(places, members, present, strengths))
        self._predictions = Predictions(self._state, [member.subject for member in members], self._alone)
        owners = {site.number: layer for layer, site in sites}
        self._calibration = Calibration(
            self._state, members, lambda site: site.bind(lambda: owners[site.number].weight_of(owners[site.number].module)), self._alone
        )

    @property
    def rows(self) -> Rows | None:
        """The next call's rows; None: every row an image of its own."""
        return self._state.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self._state.rows = rows

    @property
    def undecided(self) -> bool:
        """Whether rows ran in this step before their image's choice was known: a negative prompt, alone and first. The step's calls, made
        once more, then find the choices that they lacked.
        """
        return self._state.undecided

    def begin(self, step: Step | None = None) -> None:
        """A denoiser step begins. step: None for the one after the last, of as many as the session was told."""
        self.end_step()
        step = step or Step.of(self._decisions.begun, self._steps)
        self._decisions.begin(step)
        self._predictions.begin(step)

    def repeat(self) -> None:
        """The step's calls are made once more, with the choices that the first ones brought."""
        self._decisions.repeat()
        self._predictions.repeat()

    def end_step(self) -> None:
        """The step's calls are over: what was measured in them decides for the steps to come. Does nothing where none is under way."""
        if self._calibration.side is None:
            self._decisions.end()

    def restart(self) -> None:
        """Begin another image on the same model with an empty record; the LoRAs on the device are kept."""
        if self._state.rule.calibrates:
            self._decisions.release()  # other matrices are to come
        self._decisions.restart()
        self._predictions.restart()

    @contextmanager
    def attached(self, rows: Rows | None = None) -> Iterator[FusionSession]:
        """Put the fused forwards on the model's layers for one call; they are off again whatever happens inside."""
        state = self._state
        before, state.rows = state.rows, rows if rows is not None else state.rows
        self._depth += 1
        try:
            if self._depth == 1:
                self._decisions.call_begins()
                self._attach()
                state.active = True
            yield self
            if self._depth == 1:
                self._decisions.call_ends()
                self._refuse_other_programs()
        finally:
            self._depth -= 1
            if self._depth == 0:
                state.active = False
                self._detach()
            state.rows = rows if rows is not None else before

    def predict(self, call: Call, rows: Rows | None = None, scale: float = 1.0) -> Any:
        """A model call's prediction under the fusion: with the settings' contrast, and of as many predictions as the rule is made of.

        call: (positions of rows, or None for all of them) -> the model's prediction for these, (n, ...); it is called with the LoRAs
        that it needs on the layers, and may be called several times. rows: all of the call's; None: every row an image of its own. scale:
        the CFG scale that the rows will be combined with. What is not a tensor is handed on as it is.
        """
        if not self._decisions.under_way:
            self.begin()
        if self._calibration.side is not None:
            return self._calibration.predicted(call, rows)
        if self.calibrates:
            name = self._state.rule.name
            raise FusionError(f"The method {name} must see each side alone before it fuses (FusionSession.show and learn).")
        if self._state.rule.composes:
            prediction = self._composed(call, rows)
        else:
            with self.attached(rows):
                prediction = call(None)
        return self._predictions.moved(prediction, scale, call)

    @property
    def compares(self) -> bool:
        """Whether the method goes by the similarity of two pictures, one of each side's LoRAs alone."""
        return self._state.rule.compares

    def tell_similarity(self, cosine: float) -> None:
        """What such a method goes by: of the pictures' DINO embeddings, -1 to 1."""
        self._state.rule.similarity = cosine

    @property
    def calibrates(self) -> bool:
        """Whether the method has yet to be told what the layers are given with each side alone."""
        return self._state.rule.calibrates and not self._state.rule.calibrated and self._calibration.side is None

    def show(self, side: str) -> None:
        """From here on this session does not fuse: predict runs one side's LoRAs alone, "subject" or "style", to see what layers are given.

        One step under the side's own prompt is enough. A session of its own for each side, or the same one for both, one after the other.
        """
        self._calibration.begin(side)

    @property
    def shown(self) -> Correlations:
        """What was seen since show."""
        return self._calibration.correlations

    def learn(self, subject: Correlations, style: Correlations) -> None:
        """Tell the method what was seen of each side; the session fuses from here on."""
        self._calibration.side = None
        self._state.rule.learn(subject, style)
        self._decisions.release()

    @property
    def contrasts(self) -> bool:
        """Whether predict moves predictions away from others."""
        return self._predictions.wanted

    @property
    def predicted_rows(self) -> tuple[int, int]:
        """Rows that the model was run on through predict: by the fusion itself, and beside it."""
        return self._predictions.own_rows, self._predictions.other_rows

    def _composed(self, call: Call, rows: Rows | None) -> Any:
        with self.attached(rows):
            heard = [member for member, schedule in enumerate(self._state.schedules) if schedule.full] or [0]
            predictions = []
            for member in heard:
                with self._alone((member,), self._state.rows):
                    predictions.append(call(None))
            self._state.hold_given(predictions[0].device)
            assert self._state.weights is not None
            weights = self._state.weights[0, 0, heard]
            stacked = torch.stack(predictions)
            parts = (weights / weights.sum()).view(-1, *[1] * predictions[0].dim())
            return (stacked.float() * parts.to(stacked.device)).sum(0).to(stacked.dtype)

    @contextmanager
    def _alone(self, members: tuple[int, ...], rows: Rows | None) -> Iterator[None]:
        """Only these LoRAs on the layers, each at its strength at this step, whatever the rule says; nothing is measured."""
        state = self._state
        before = state.only, state.rows, state.active
        self._depth += 1
        try:
            if self._depth == 1 and members:
                self._attach()
            state.only, state.rows, state.active = members, rows, bool(members)
            yield
        finally:
            state.only, state.rows, state.active = before
            self._depth -= 1
            if self._depth == 0:
                self._detach()

    def _refuse_other_programs(self) -> None:
        """No picture is plain in silence where something else computes in their place. Later calls may leave layers out, as caches do."""
        sites = [site for layer in self.layers if isinstance(layer, FusedLayer) for site in layer.sites]
        if self._decisions.begun == 1 and sites and all(site.operators is None for site in sites):
            raise FusionError(
                "None of the layers that the LoRAs change was run: another program computes in their place "
                "(as torch.compile around more than the model, or TensorRT)."
            )

    def _attach(self) -> None:
        self._compiled.attach()
        for layer in self.layers:
            layer.attach()

    def _detach(self) -> None:
        for layer in self.layers:
            layer.detach()
        self._compiled.detach()

    def __enter__(self) -> FusionSession:
        self._context = self._attached_for_many_calls()
        return self._context.__enter__()

    @contextmanager
    def _attached_for_many_calls(self) -> Iterator[FusionSession]:
        """Each call of the model is a step of its own."""
        marker = _StepMarker(self._model, self)
        with uncompiled(self._model):  # around the marker, which has to be met in every call
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
        trace, learned = self._decisions.trace(), self._state.rule.learned
        return replace(trace, learned=dict(learned)) if learned else trace

    def foreseen(self, steps: int) -> Trace:
        """What a picture of so many steps will bring. Only under a rule that does not measure."""
        return self._decisions.foreseen(steps)

    def notes(self) -> list[str]:
        """Sentences that the user should see after the job."""
        notes = []
        for name, keys in self.report.unmatched.items():
            if keys:
                notes.append(f"{len(keys)} keys of {name} fit no layer of this model (such as {keys[0]}).")
        trace = self.trace
        if trace.fallbacks:
            notes.append(f"{trace.fallbacks} choices were made on the negative prompt, because the WebUI ran it alone and first.")
        if self._state.unmeasured:
            steps = f"{self._state.unmeasured} step{'s' * (self._state.unmeasured > 1)}"
            notes.append(f"Memory was too short to measure the LoRAs in {steps}; the choices before stayed.")
        notes += self._predictions.notes
        if trace.non_finite:
            notes.append(f"{trace.non_finite} divergences were not finite numbers; the LoRA named first was used there.")
        return notes

    def unfold(self) -> None:
        """Let go of the copies of the layers' weights with the LoRAs in them, whose memory others need between two pictures. The LoRAs
        stay on the device.
        """
        self._decisions.unfold()

    def release(self) -> None:
        """Drop the LoRAs' copies on the device. The trace stays; a later call makes them anew."""
        self._decisions.release()
        for layer in self.layers:
            if isinstance(layer, ShiftedNorm):
                layer.release()


class _StepMarker(PatchedLayer):
    """The whole model, whose every call is a step with the session attached."""

    def __init__(self, model: nn.Module, session: FusionSession):
        super().__init__("", model)
        self.session = session

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        session.begin()
        call = ModelCall(self._base, args, kwargs, argument(args, kwargs).shape[0])
        result = call.of(session.predict(call, session.rows))
        session.end_step()
        return result


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Dotted name of each layer of a denoiser -> shape of its weight, None where that is not told (quantised)."""
    return {name: _shape_of(module) for name, module in _layers(model).items()}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Known by what they hold, not by their class: hosts make their own. An RMS norm's gain is called scale in BFL's Flux."""
    return {
        own_name(name): module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None or isinstance(getattr(module, "scale", None), Tensor)
    }


def _own_weight(module: nn.Module) -> Tensor | None:
    """Not of a layer with a forward of its own, which may compute with something else."""
    plain = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return module.weight if type(module).forward in plain else None


def weight_in_memory(module: nn.Module) -> Tensor:
    """A layer's weight, also where accelerate holds it somewhere else until the layer is run. Raises FusionError."""
    weight = module.weight
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not weight.is_meta:
        return weight
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map["weight"]
    raise FusionError("Some of these LoRAs depend on the model's weights, which are not in memory: load it without offloading.")


def _find_layers(
    modules: dict[str, nn.Module],
    files: Sequence[LoraFile],
    subjects: int,
    state: FusionState,
    weights: tuple[Callable[[nn.Module], Tensor], OwnWeight],
    report: Report,
) -> list[PatchedLayer]:
    settings = state.settings
    members = members_of(files, subjects)
    schedules = (
        *one_each(settings.given_schedules("subject"), subjects, "subject_weight"),
        *one_each(settings.given_schedules("style"), len(files) - subjects, "style_weight"),
    )
    given = [schedule.full for schedule in schedules]
    aliases = denoiser_aliases({name: _shape_of(module) for name, module in modules.items()})
    branches: list[dict[Site, SiteBranch]] = []
    norms: list[dict[str, NormShift]] = []
    for file in files:
        found, unmatched = branches_by_site(file, aliases)
        branches.append(found)
        norms.append(norms_by_layer(file, aliases))
        report.unmatched[file.name] = unmatched
    holders = Counter(site for found in branches for site in found)
    if not state.rule.measures:
        # A LoRA at strength 0 adds nothing and need not be computed: a reference of the guidance is one LoRA alone. Where divergences are
        # compared it counts: the others win every layer against it. So does one that only the tilt silences: the ends of that slider are
        # where its course leads, also for what a method makes of both.
        branches = [found if weight else {} for found, weight in zip(branches, given)]
        norms = [found if weight else {} for found, weight in zip(norms, given)]
    factors = factors_by_block(settings, files, subjects, modules)
    constants = [1.0 if schedule.constant is None else schedule.constant for schedule in state.schedules]
    order = {name: position for position, name in enumerate(modules)}
    by_layer: dict[str, list[FusedSite]] = {}
    touched = sorted({site for found in branches for site in found}, key=lambda s: (order[s.layer], s.part.start if s.part else 0))
    number = 0
    for site in touched:
        owners = [member for member, found in enumerate(branches) if site in found]
        if not state.rule.measures:
            owners = [member for member in owners if given[member] * factors[member](site)]
        one_sided = len(owners) == 1
        if (settings.scope == "attention" and not is_attention(site)) or (holders[site] == 1 and settings.one_sided == "skip"):
            report.skipped.append(layer_label(site))
            continue
        if not owners:
            continue
        module = modules[site.layer]
        bindings: Sequence[Binding] = [_fitted(site, branches[member][site], module) for member in owners]
        (report.one_sided if one_sided else report.matched).append(layer_label(site))
        strengths = tuple(constants[member] * factors[member](site) for member in owners)
        if state.rule.rewrites and not one_sided:
            bindings = Rewriting(state.rule, bindings, [members[member] for member in owners], strengths).bindings()
        by_layer.setdefault(site.layer, []).append(FusedSite(number, site, bindings, tuple(owners), strengths))
        number += 1
    layers: list[PatchedLayer] = [FusedLayer(name, modules[name], sites, state, *weights) for name, sites in by_layer.items()]
    for position, fused in enumerate(fused for layer in layers if isinstance(layer, FusedLayer) for fused in layer.sites):
        fused.number = position
    if settings.scope == "all":
        for name in sorted({name for found in norms for name in found}, key=lambda n: order[n]):
            shifts = [(member, found[name], factors[member](Site(name))) for member, found in enumerate(norms) if name in found]
            layers.append(ShiftedNorm(name, modules[name], shifts, state))
            report.summed_norms.append(name)
    return layers


def members_of(files: Sequence[LoraFile], subjects: int) -> tuple[Member, ...]:
    """The first `subjects` of the files are the subject's."""
    return tuple(Member(file.name, number < subjects) for number, file in enumerate(files))


def factors_by_block(
    settings: FuseSettings, files: Sequence[LoraFile], subjects: int, layers: Iterable[str]
) -> list[Callable[[Site], float]]:
    """For each LoRA, the factor that the settings' block weights put on it at a site. Raises FusionError for blocks that do not exist."""
    texts = (
        *one_each(settings.subject_block_texts, subjects, "subject_blocks"),
        *one_each(settings.style_block_texts, len(files) - subjects, "style_blocks"),
    )
    if texts == (BlockText(),) * len(files):
        return [lambda site: 1.0 for _ in files]
    blocks = Blocks.of_model(layers)

    def factor_of(text: BlockText) -> Callable[[Site], float]:
        factors = block_factors(text, blocks)
        return lambda site: factors[blocks.of(site)]

    try:
        return [factor_of(text) for text in texts]
    except SettingsError as reason:
        raise FusionError(str(reason)) from None


def _fitted(site: Site, binding: SiteBranch, module: nn.Module) -> SiteBranch:
    """The branch checked against the layer's shape, where that is known. Raises FusionError: the file is for another base model."""
    shape = _shape_of(module)
    if shape is None:
        return binding
    try:
        return binding.fitted(site, shape)
    except LoraError as reason:
        raise FusionError(str(reason)) from None


def _shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of a linear layer's or convolution's weight; None where a quantised one is stored in another."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() not in (2, 4) or hasattr(weight, "gguf_cls"):
        return None
    return tuple(weight.shape)


def _nothing_matches(files: Sequence[LoraFile], report: Report) -> str:
    names = [file.name for file in files]
    if report.skipped:
        return (
            f"{' and '.join(names)} have no layer left to fuse: the settings 'scope' and 'one_sided' exclude all "
            f"{len(report.skipped)} layers that they change."
        )
    families = " and ".join(sorted({_made_for(file) for file in files}))
    return f"No layer of this model is changed by {' or '.join(names)}: they were made for {families}."


def _made_for(file: LoraFile) -> str:
    if file.family is not None:
        return file.family
    layer = next(iter((*file.denoiser, *file.norms)), None)
    return "an unknown base model" if layer is None else f"a base model with layers such as {layer}"


__all__ = ["FusionError", "FusionSession", "Report", "factors_by_block", "fuse", "layer_shapes", "members_of", "weight_in_memory"]
