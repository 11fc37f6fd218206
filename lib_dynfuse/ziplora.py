"""`python -m lib_dynfuse ziplora`: a subject LoRA and a style LoRA as one file, merged by coefficients trained on the base model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .bars import Bars
from .fusion.merging import Means, Merged, describe_merged, shares
from .fusion.session import FusionSession
from .given_files import read_sides
from .lora import LoraFile, check_target, write_merged
from .settings import LORA_FIELDS, FuseSettings, SettingsError

if TYPE_CHECKING:  # imports diffusers, which is not everywhere
    from .fusion.ziplora import Mergers
    from .hosts.diffusers.ziplora import Loss, Recipe


@dataclass(frozen=True)
class Request:
    """What to merge and how. base, config: as load_pipeline takes them. prompts: by side, "" for the LoRA's activation text.

    settings: of the plain sum, with constant weights. options: fields of hosts.diffusers.ziplora.Recipe. file_dtype: of the file's numbers.
    """

    base: Path
    subject: Path
    style: Path
    out: Path
    settings: FuseSettings
    prompts: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    file_dtype: torch.dtype = torch.float16


def run(request: Request) -> int:
    """Train and write, with progress on standard error and what is in the file on standard output. Returns the exit code.

    Raises LoraError, FusionError, PipelineError or SettingsError with a sentence for the user. Nothing is written before the end.
    """
    check_target(request.out)
    (subject,), (style,), settings = read_sides([request.subject], [request.style], request.settings)
    prompts = prompts_of(request.prompts, {"subject": subject, "style": style})

    from .hosts.diffusers import FusedPipeline, best_device, denoiser, load_pipeline
    from .hosts.diffusers.ziplora import Recipe, lessons, train

    recipe = Recipe(**request.options)
    device = request.device or best_device()
    # In float16 most of the gradients would be 0.
    dtype = request.dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    pipeline = load_pipeline(request.base, device=device, dtype=dtype, config=request.config)
    fused = FusedPipeline(pipeline, subject, style, settings)
    with Bars() as bars:
        made = lessons(
            fused, prompts, recipe, lambda side, done, total: bars.show(f"Pictures of the {side}'s LoRA alone", done, total, "step")
        )
    losses: list[Loss] = []
    with tqdm(total=recipe.steps, desc="Mergers", unit="step") as bar:

        def done(loss: Loss) -> None:
            losses.append(loss)
            bar.set_postfix_str(
                f"loss {loss.total(recipe.weight):.4g}: subject {loss.subject:.3g}, style {loss.style:.3g}, |cos| {loss.similarity:.4g}",
                refresh=False,
            )
            bar.update()

        mergers = train(fused, made, recipe, done)
    session = FusionSession(denoiser(pipeline), subject, style, settings)
    with Bars(delay=1.0) as bars:
        merged = write(
            *(request.out, session, (subject, style), mergers, {**asdict(recipe), "prompts": prompts, "base": request.base.name}),
            weight_of=fused.layer_weight,
            dtype=request.file_dtype,
            progress=lambda count, total: bars.show(f"Saving {request.out.name}", count, total, "layer"),
        )
    print(*describe_merged(merged), *_learned(losses, mergers, recipe), sep="\n")
    return 0


def prompts_of(given: dict[str, str], files: dict[str, LoraFile]) -> dict[str, str]:
    """By side: as given, else the LoRA's activation text. Raises SettingsError where there is neither."""
    from .hosts.references import activation_text

    found = {side: given[side].strip() or activation_text(str(files[side].path)) or "" for side in LORA_FIELDS}
    for side, prompt in found.items():
        if not prompt:
            raise SettingsError(f"Give --{side}-prompt: what {files[side].name} was taught, in the words that it was taught with.")
    return found


def write(
    path: Path,
    session: FusionSession,
    files: tuple[LoraFile, LoraFile],
    mergers: Mergers,
    about: dict[str, Any],
    *,
    weight_of: Any = None,
    dtype: torch.dtype = torch.float16,
    progress: Any = None,
) -> Merged:
    """Write both LoRAs under the mergers as one file. Raises LoraError.

    session: of the plain sum on the model that the mergers were trained on. about: how they were, for the metadata.
    """
    settings = session.settings
    means = Means.of([session.foreseen(1)])
    report = write_merged(
        path,
        shares(means, files[:1], files[1:], settings, session.shapes),
        layers=session.shapes,
        dtype=dtype,
        metadata={
            "settings": json.dumps(settings.non_default(), ensure_ascii=False),
            "ziplora": json.dumps(about, ensure_ascii=False),
        },
        weight_of=weight_of,
        rewrite=mergers.rewritten,
        progress=progress,
    )
    return Merged(path, files, means, report, dtype, None, ())


def _learned(losses: Sequence[Loss], mergers: Mergers, recipe: Recipe) -> list[str]:
    """What became of the loss and of the coefficients."""
    count = max(1, len(losses) // 10)
    parts = []
    for name in ("subject", "style", "similarity"):
        first, last = (mean(getattr(loss, name) for loss in some) for some in (losses[:count], losses[-count:]))
        parts.append(f"{'sum of |cos|' if name == 'similarity' else name} {first:.4g} to {last:.4g}")
    columns = [own.detach().float() for own in mergers.columns.values()]
    means = [torch.cat([own[number] for own in columns]).mean().item() for number in range(2)]
    return [
        f"  Mergers: {len(columns)} layers; coefficients of the subject {means[0]:.3g} on average, of the style {means[1]:.3g}",
        f"  Loss, first and last {count} of {recipe.steps} steps: {'; '.join(parts)}",
    ]


__all__ = ["Request", "prompts_of", "run", "write"]
