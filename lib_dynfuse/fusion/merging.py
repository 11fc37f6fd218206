"""A fusion as one LoRA: each LoRA's weights, which a rule may change from step to step, as one constant factor at each site.

Under a rule that does not measure, the weights of every step are known beforehand (FusionSession.foreseen), and the file is exact where
they are the same at every step. What a rule measures is only known of a picture: then the factors are the means of its trace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..lora import LoraError, LoraFile, MergeReport, Share, denoiser_aliases, norms_by_layer, text_strengths, write_merged
from ..lora.branch import Dense, LowRank
from ..lora.export import Progress, Rewrite
from ..lora.families import Shape, reference_layers, text_encoder
from ..lora.matching import naming_family
from ..lora.naming import Site
from ..settings import FuseSettings
from .predictions import contrasts
from .rules import RULES, Places
from .session import FusionSession, factors_by_block, members_of
from .trace import Trace

Key = TypeVar("Key")

GUIDANCE_FIELDS = (
    *("guidance", "m", "content_weight", "style_clip_weight", "style_dino_weight", "start", "end", "every", "gradient", "decoder", "limit"),
    *("subject_prompt", "style_prompt", "subject_image", "style_image", "reference_seed"),
)
"""The settings of the guidance, which no LoRA file can hold."""


@dataclass(frozen=True)
class Means:
    """How much of each LoRA goes into the file.

    sites: S. weights: (S, B) float64, what each LoRA's change is multiplied by, 0 where it was not used. strengths: (B,) float64, the same
    for normalisation layers, before factors on blocks. present: (S, B) bool, whether the LoRA changes the site. constant: whether the
    weights were these at every step of every image. steps, images: how many they are the means of.
    """

    sites: tuple[Site, ...]
    weights: Tensor
    strengths: Tensor
    present: Tensor
    constant: bool
    steps: int
    images: int

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Means:
        """Over all steps and images of the records, which are of one model and the same LoRAs. A step that did not run a site counts
        for nothing there.
        """
        first = traces[0]
        total, count = torch.zeros(first.present.shape, dtype=torch.float64), torch.zeros(len(first.sites), 1, dtype=torch.float64)
        lowest, highest = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
        for trace in traces:
            weights, unused = trace.weights.double(), ~trace.reached[:, :, None, None]
            total += weights.masked_fill(unused, 0.0).sum((0, 2))
            count += trace.reached.sum(0).unsqueeze(-1) * weights.shape[2]
            lowest = torch.minimum(lowest, weights.masked_fill(unused, torch.inf).amin((0, 2)))
            highest = torch.maximum(highest, weights.masked_fill(unused, -torch.inf).amax((0, 2)))
        used = count.expand_as(total) > 0
        steady = (lowest == highest) | ~used
        weights = torch.where(steady & used, lowest, total / count.clamp_min(1))
        strengths = torch.cat([trace.strengths for trace in traces]).double()
        return cls(
            first.sites,
            weights,
            strengths.mean(0),
            first.present,
            bool(steady.all()) and bool((strengths == strengths[:1]).all()),
            len(first.weights),
            sum(trace.weights.shape[2] for trace in traces),
        )

    @property
    def averages(self) -> list[float]:
        """Each LoRA's weight on average over the sites that it changes; 0 for one without."""
        return (self.weights.sum(0) / self.present.sum(0).clamp_min(1)).tolist()


@dataclass(frozen=True)
class Merged:
    """A file that was written. beyond: what the settings ask for and no LoRA can hold."""

    path: Path
    files: tuple[LoraFile, ...]
    means: Means
    report: MergeReport
    dtype: torch.dtype
    rank: int | None
    beyond: tuple[str, ...]


def shares(
    means: Means, subjects: Sequence[LoraFile], styles: Sequence[LoraFile], settings: FuseSettings, layers: Mapping[str, Shape | None]
) -> list[Share]:
    """What of each LoRA goes into the file. layers: the model's, which the means are of. Raises FusionError for blocks that it lacks."""
    files = (*subjects, *styles)
    aliases = denoiser_aliases(layers)
    blocks = factors_by_block(settings, files, len(subjects), layers)
    texts = text_strengths(settings, subjects, styles)
    made = []
    for number, file in enumerate(files):
        factors = {}
        if settings.scope == "all":  # as in a session: normalisation layers are summed whatever the rule says
            norms = map(Site, norms_by_layer(file, aliases))
            factors = {site: means.strengths[number].item() * blocks[number](site) for site in norms}
        factors.update(zip(means.sites, means.weights[:, number].tolist()))
        made.append(Share(file, _looked_up(factors), _looked_up(texts[number])))
    return made


def merge_files(
    path: str | os.PathLike[str],
    subjects: Sequence[LoraFile],
    styles: Sequence[LoraFile],
    settings: FuseSettings,
    *,
    steps: int = 30,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> Merged:
    """Write the LoRAs as one, without a model or a picture. steps: over which weights that vary with the step are averaged.

    Raises LoraError or FusionError: one sentence, also where the rule goes by what is seen of pictures.
    """
    rule = RULES[settings.method]
    if rule.measures or rule.compares or rule.calibrates:
        raise LoraError(
            f"The method {settings.method} goes by what it sees of pictures: make one with generate --save-lora FILE, "
            "or press the button under a picture in the panel; --method direct needs none."
        )
    model = _published_model([*subjects, *styles])
    session = FusionSession(model, subjects, styles, settings, weight_of=_no_weight)
    return merge_pictures(
        path, subjects, styles, settings, [session.foreseen(steps)], session.shapes, rank=rank, dtype=dtype, progress=progress
    )


def merge_pictures(
    path: str | os.PathLike[str],
    subjects: Sequence[LoraFile],
    styles: Sequence[LoraFile],
    settings: FuseSettings,
    traces: Sequence[Trace],
    layers: Mapping[str, Shape | None],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    weight_of: Callable[[str], Tensor] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write the LoRAs as one that does on average what was done in pictures.

    traces: of one model with these LoRAs and settings. layers: that model's (FusionSession.shapes). weight_of: dotted layer name -> its
    weight on the CPU, dequantised; without it LoRAs of kinds that depend on it are refused. Raises LoraError or FusionError: one sentence.
    """
    files = (*subjects, *styles)
    means = Means.of(traces)
    report = write_merged(
        path,
        shares(means, subjects, styles, settings, layers),
        layers=layers,
        rank=rank,
        dtype=dtype,
        metadata=_metadata(settings, means),
        weight_of=weight_of,
        rewrite=_rewrite(files, len(subjects), settings, means, traces),
        progress=progress,
    )
    return Merged(Path(path), files, means, report, dtype, rank, _beyond(settings))


def _rewrite(files: Sequence[LoraFile], subjects: int, settings: FuseSettings, means: Means, traces: Sequence[Trace]) -> Rewrite | None:
    rule = RULES[settings.method]()
    if not rule.rewrites:
        return None
    members = members_of(files, subjects)

    def unknown(site: int, member: int) -> LowRank | Dense:
        raise AssertionError("a rule that rewrites is handed the changes")

    rule.prepare(Places(means.sites, members, means.present, settings, unknown))
    rule.learned = _mean_learned(traces)
    return lambda site, changes, numbers, factors: rule.rewritten(site, changes, [members[number] for number in numbers], factors)


def _mean_learned(traces: Sequence[Trace]) -> Mapping[Site, Tensor]:
    """Over the records, of what a rule learned of the sites in each."""
    first = traces[0].learned
    return {site: torch.stack([trace.learned[site] for trace in traces]).mean(0) for site in first}


def describe_merged(merged: Merged) -> list[str]:
    """What a merged file holds, in lines for a person: its name, then (after two spaces) one property each."""
    rows = properties(merged)
    width = max(len(label) for label, _ in rows)
    return [merged.path.name, *(f"  {label:<{width}}  {text}" for label, text in rows)]


def properties(merged: Merged) -> list[tuple[str, str]]:
    """(label, what a merged file holds)."""
    report, means = merged.report, merged.means
    names = [file.name for file in merged.files]
    rows = [
        ("Base model", report.family or "unknown"),
        ("Weights", f"{', '.join(f'{name} {average:.3g}' for name, average in zip(names, means.averages))}; {_origin(means)}"),
        ("Layers", ", ".join(_layers(report)) or "none"),
        ("Text encoders", ", ".join(_encoders(report)) or "none"),
        ("Error", _error(merged)),
    ]
    for file in merged.files:
        rows += [("Left out", text) for text in _left_out(file, report)]
    return [*rows, *(("Left out", f"{what}, which no LoRA can hold") for what in merged.beyond)]


def _beyond(settings: FuseSettings) -> tuple[str, ...]:
    found = {
        "the guidance": settings.guidance,
        "the contrast": any(contrasts(settings, RULES[settings.method])),
        "the weight in the negative prompt": settings.negative_weight != 1,
    }
    return tuple(what for what, asked in found.items() if asked)


def _looked_up(factors: Mapping[Key, float]) -> Callable[[Key], float]:
    return lambda key: factors.get(key, 0.0)


def _published_model(files: Sequence[LoraFile]) -> nn.Module:
    """The layers of the published model of the files' family, without weights. Raises LoraError where the files do not tell the family."""
    family = naming_family(files)
    if family is None:
        raise LoraError(
            f"{files[0].path.name} cannot be merged without a model, for its layers do not tell the base model: make a picture with "
            "generate --save-lora FILE."
        )
    model = nn.Module()
    for layer, shape in reference_layers(family.name).items():
        owner, *path = model, *layer.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer("weight", torch.empty(shape, device="meta"), persistent=False)
    return model


def _no_weight(module: nn.Module) -> Tensor:
    raise LoraError(
        "These LoRAs cannot be merged without a model: some of their layers depend on the base model's own weights; make a picture with "
        "generate --save-lora FILE."
    )


def _metadata(settings: FuseSettings, means: Means) -> dict[str, str]:
    chosen = {name: value for name, value in settings.non_default().items() if name not in GUIDANCE_FIELDS}
    return {"settings": json.dumps(chosen, ensure_ascii=False), "weights": _origin(means)}


def _origin(means: Means) -> str:
    if means.constant:
        return "the same at every step"
    images = f" and {means.images} images" if means.images > 1 else ""
    return f"means over {_count(means.steps, 'step')}{images}"


def _layers(report: MergeReport) -> list[str]:
    counts = [f"{_count(count, 'layer')} of rank {rank}" for rank, count in report.ranks.items()]
    if len(counts) > 3:
        counts = [f"{sum(report.ranks.values())} layers of rank {min(report.ranks)} to {max(report.ranks)}"]
    if report.whole:
        counts.append(f"{len(report.whole)} whole (A1111 and Forge read these, diffusers does not; a rank makes them low rank)")
    if report.norms:
        counts.append(_count(report.norms, "normalisation layer"))
    return counts


def _encoders(report: MergeReport) -> list[str]:
    return [f"{text_encoder(name, report.family).name} ({_count(count, 'layer')})" for name, count in report.text.items()]


def _error(merged: Merged) -> str:
    report, rounding = merged.report, f"rounding to {str(merged.dtype).removeprefix('torch.')}"
    if not report.errors:
        return f"none but {rounding}"
    worst = max(report.errors, key=lambda key: report.errors[key])
    return (
        f"{report.error:.2%} of the change is lost to the reduction to rank {merged.rank}, at most {report.errors[worst]:.2%} of a layer's "
        f"({worst}), beside {rounding}"
    )


def _left_out(file: LoraFile, report: MergeReport) -> list[str]:
    layers = {key for keys in file.keys.values() for key in keys}
    unread = [key for key in file.unmatched if key not in layers]
    misfits = report.unmatched.get(file.name, [])
    texts = [
        f"{_count(len(keys), 'key')} of {file.name} {why} (such as {keys[0]})"
        for keys, why in ((misfits, "that fit no layer of the model"), (unread, "of no known kind"))
        if keys
    ]
    return [*texts, *([f"the embeddings inside {file.name} ({', '.join(file.embeddings)})"] if file.embeddings else [])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


__all__ = ["GUIDANCE_FIELDS", "Means", "Merged", "describe_merged", "merge_files", "merge_pictures", "properties", "shares"]
