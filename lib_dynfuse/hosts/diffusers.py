"""Fused images from a diffusers pipeline, for programs without a WebUI.

    pipeline = load_pipeline("stable-diffusion-v1-5/")
    fused = FusedPipeline(pipeline, read_lora("dog.safetensors"), read_lora("watercolor.safetensors"), FuseSettings())
    result = fused("a dog in a park", seeds=[1])
    result.images[0].save("dog.png")

The pipeline keeps its own loop, scheduler and classifier-free guidance. Our forwards lie on its denoiser and its
text encoders only while these run.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from ..fusion import FusionError, FusionSession, Report, Rows, Step, Trace
from ..fusion.layer_sum import LayerSum, Summand
from ..guidance.encoders import Encoders, load_encoders
from ..guidance.guide import GuidanceRecord, wants_guidance
from ..guidance.references import Reference, reference_of_given, sides_needed
from ..guidance.score import Targets
from ..guidance.weights import EncoderError
from ..lora import LoraFile
from ..lora.matching import SiteBranch
from ..lora.naming import Site, flat
from ..settings import FuseSettings
from ..strength import one_each
from .diffusers_guidance import GuidanceSources, GuidedCall, NoDecoderError, guidance_decoders
from .diffusers_references import Job, influential, reference_key, reference_prompt
from .diffusers_schedulers import SchedulerError, SchedulerSteps
from .reference_maker import alone
from .wrapping import wrapped

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")


class PipelineError(RuntimeError):
    """A model that cannot be loaded or run. One sentence for the user."""


@dataclass(frozen=True)
class FusedImages:
    """images: PIL, in the order of the seeds. trace, report: as a session's. notes: sentences that the user should see.

    guidance: what the guidance saw and did, None where there was none. references: what it steered towards.
    """

    images: list[Image.Image]
    trace: Trace
    report: Report
    notes: list[str]
    guidance: GuidanceRecord | None = None
    references: list[Reference] = field(default_factory=list)


Progress = Callable[[int, int], None]
"""(steps done, steps in all)"""
ReferenceProgress = Callable[[str, int, int], None]
"""(side: "subject" or "style", steps done, steps in all)"""


class FusedPipeline:
    """A pipeline and a pair of LoRAs. Nothing is changed on the pipeline between calls."""

    def __init__(
        self,
        pipeline: Any,
        subject: LoraFile | Sequence[LoraFile],
        style: LoraFile | Sequence[LoraFile],
        settings: FuseSettings | None = None,
        guidance: GuidanceSources | None = None,
    ):
        """pipeline: a diffusers pipeline of PIPELINES. subject, style: one or several each. guidance: where a guided call takes its
        encoders from and keeps its references, None for the user's own folders. Raises FusionError when the LoRAs do not fit the
        pipeline or each other.
        """
        self.pipeline = pipeline
        self.subjects, self.styles = ((side,) if isinstance(side, LoraFile) else tuple(side) for side in (subject, style))
        self.settings = settings or FuseSettings()
        self.guidance = guidance or GuidanceSources()
        self._text = SummedTextParts(text_encoders(pipeline), self.subjects, self.styles, self.settings)
        self._new_session()  # tells now whether the pair fits, not after the prompt was encoded

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seeds: Sequence[int] = (0,),
        steps: int = 30,
        cfg_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        progress: Progress | None = None,
        reference_progress: ReferenceProgress | None = None,
        **more: Any,
    ) -> FusedImages:
        """One image per seed, as one batch; an image does not depend on the others of its batch.

        cfg_scale: the CFG scale (Flux: the distilled guidance), None for the pipeline's default. width, height: pixels, None for the
        model's own size. progress: called with (steps done, steps) after each. reference_progress: the same while a reference is made.
        more: passed on to the pipeline.
        Raises PipelineError for arguments that the pipeline refuses, and where the guidance cannot follow its scheduler; EncoderError
        and SettingsError where an encoder or a reference picture cannot be had.
        """
        session = self._new_session()
        notes = list(self._text.notes)
        job = Job(negative_prompt, seeds[0], steps, cfg_scale, width, height, more)
        # Under a caller's inference mode no gradient could be taken.
        with torch.inference_mode(False):
            call, references = self._guided(prompt, job, notes, reference_progress)
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "num_images_per_prompt": len(seeds),
            "num_inference_steps": steps,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "width": width,
            "height": height,
            **more,
        }
        if cfg_scale is not None:
            arguments["guidance_scale"] = cfg_scale
        if negative_prompt and _takes_negative_prompt(self.pipeline):
            arguments["negative_prompt"] = negative_prompt
        elif negative_prompt:
            notes.append("The negative prompt was not used: Flux has none.")
        if progress is not None:
            arguments["callback_on_step_end"] = _step_callback(progress)
        try:
            with (
                torch.inference_mode(False) if call else nullcontext(),
                self._text.during_encoding(self.pipeline),
                self._during_denoising(session, call),
            ):
                images = list(self.pipeline(**arguments).images)
        except ValueError as error:  # what the pipelines' own checks of arguments raise
            raise PipelineError(_first_line(error)) from error
        finally:
            session.release()
        record = call.record if call else None
        return FusedImages(
            images, session.trace, session.report, notes + session.notes() + (record.notes if record else []), record, references
        )

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """FusionSession.shapes of the denoiser."""
        return self._new_session().shapes

    def layer_weight(self, name: str) -> torch.Tensor:
        """The weight of one of the denoiser's layers, on the CPU. name: dotted."""
        return _weight_of(denoiser(self.pipeline).get_submodule(name)).detach().cpu()

    def _new_session(self) -> FusionSession:
        return FusionSession(denoiser(self.pipeline), self.subjects, self.styles, self.settings)

    @contextmanager
    def _during_denoising(self, session: FusionSession, call: GuidedCall | None) -> Iterator[None]:
        """Each call of the denoiser is a step, in the session's hands; the guidance, if any, takes over behind it."""
        calls = 0

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            name = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
            latent = kwargs[name] if name else args[0]
            rows = rows_of(self.pipeline, latent.shape[0])
            nonlocal calls
            session.begin(_step_of(self.pipeline.scheduler, calls))
            calls += 1

            def run(latent: torch.Tensor) -> Any:
                with session.attached(rows):
                    return forward(*args, **{**kwargs, name: latent}) if name else forward(latent, *args[1:], **kwargs)

            result = call.denoise(run, latent, kwargs, rows.count) if call else run(latent)
            session.end_step()
            return result

        with ExitStack() as stack:
            stack.enter_context(wrapped(denoiser(self.pipeline), "forward", around))
            if call:
                stack.enter_context(call.during_denoising())
            yield

    def _guided(
        self, prompt: str, job: Job, notes: list[str], progress: ReferenceProgress | None
    ) -> tuple[GuidedCall | None, list[Reference]]:
        """The guidance of a call and its references; none where the settings or missing encoders leave it out."""
        settings = self.settings
        if not wants_guidance(settings):
            return None, []
        sides = sides_needed(settings)
        try:
            SchedulerSteps(self.pipeline.scheduler)
            decoders = guidance_decoders(self.pipeline, settings.decoder, self.guidance.taesd)
        except (SchedulerError, NoDecoderError) as error:
            raise PipelineError(str(error)) from None
        sources = self.guidance.encoders
        try:
            encoders = sources if isinstance(sources, Encoders) else load_encoders(sources, self.guidance.progress)
        except EncoderError as error:
            if not self.guidance.go_on:
                raise
            notes.append(f"Made without guidance: {error}")
            return None, []
        seed = settings.reference_seed if settings.reference_seed >= 0 else job.seed
        found = {side: self._reference(side, prompt, replace(job, seed=seed), encoders, progress) for side in sides}
        # A side that does not count is never compared with: the other's embeddings only stand in its place.
        subject, style = (found.get(side, found[sides[0]]).embeddings for side in ("subject", "style"))
        targets = Targets.of(subject, style)
        return GuidedCall(self.pipeline, denoiser(self.pipeline), settings, targets, encoders, decoders), list(found.values())

    def _reference(self, side: str, prompt: str, job: Job, encoders: Encoders, progress: ReferenceProgress | None) -> Reference:
        """The side's reference: the user's picture, the cached one, or a new one."""
        settings, cache = self.settings, self.guidance.cache
        if given := getattr(settings, f"{side}_image"):
            return reference_of_given(side, given, cache, encoders)
        loras = self.subjects if side == "subject" else self.styles
        prompt = reference_prompt(side, settings, loras, prompt)
        key = reference_key(side, settings, loras, prompt, job, self.pipeline, encoders.identity)
        if (known := cache.get(key)) is not None:
            return known
        made = FusedPipeline(self.pipeline, self.subjects, self.styles, alone(settings, side))(
            prompt,
            negative_prompt=job.negative_prompt,
            seeds=[job.seed],
            steps=job.steps,
            cfg_scale=job.cfg_scale,
            width=job.width,
            height=job.height,
            progress=partial(progress, side) if progress else None,
            **influential(job.more),
        )
        picture = made.images[0]
        return cache.put(key, picture, encoders.embed_picture(picture), prompt)


class SummedTextParts:
    """The LoRAs' text-encoder parts, added up on the encoders while a prompt is encoded.

    dW = te_weight * sum over the LoRAs of weight * dW_b; the paper chooses only inside the denoiser. A weight that varies with the step
    counts in full. layers: what is put on the encoders. notes: sentences about parts that fit no encoder.
    """

    def __init__(self, encoders: dict[str, nn.Module], subjects: Sequence[LoraFile], styles: Sequence[LoraFile], settings: FuseSettings):
        """encoders: by their names in LoraFile.text. Raises FusionError for a part that was made for another encoder."""
        self.notes: list[str] = []
        schedules = (
            *one_each(settings.subject_schedules, len(subjects), "subject_weight"),
            *one_each(settings.style_schedules, len(styles), "style_weight"),
        )
        found: dict[tuple[str, str], list[tuple[SiteBranch, float]]] = {}
        for file, schedule in zip((*subjects, *styles), schedules, strict=True):
            strength = settings.te_weight * schedule.full
            unmatched: list[str] = []
            for encoder, branches in file.text.items() if strength else ():
                layers = _layers_by_flat_name(encoders[encoder]) if encoder in encoders else {}
                for name, branch in branches.items():
                    if name not in layers:
                        unmatched.append(f"{encoder} {name}")
                        continue
                    fitted = _fitted(SiteBranch(branch, name=name, file=file.path.name), encoders[encoder], layers[name])
                    found.setdefault((encoder, layers[name]), []).append((fitted, strength))
            if unmatched:
                self.notes.append(
                    f"{len(unmatched)} text-encoder layers of {file.name} fit no text encoder of this model (such as {unmatched[0]})."
                )
        summands = [Summand(name, encoders[encoder].get_submodule(name), parts) for (encoder, name), parts in found.items()]
        self._sum = LayerSum(summands, _weight_of)
        self.layers = self._sum.layers

    @contextmanager
    def during_encoding(self, pipeline: Any) -> Iterator[None]:
        """Attach around the pipeline's encode_prompt, for as long as the with-block lasts."""

        def around(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._sum.attached():
                return encode(*args, **kwargs)

        with wrapped(pipeline, "encode_prompt", around):
            yield


def _step_of(scheduler: Any, calls: int) -> Step:
    """The step that the next denoiser call is for. calls: how many were made before."""
    timesteps = scheduler.timesteps
    index = min(calls, len(timesteps) - 1)
    try:
        sigma = SchedulerSteps(scheduler).level(timesteps[index])
    except SchedulerError:
        sigma = math.nan
    return Step.of(index, len(timesteps), sigma)


def denoiser(pipeline: Any) -> nn.Module:
    """The pipeline's U-Net or transformer. Raises PipelineError."""
    found = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if not isinstance(found, nn.Module):
        raise PipelineError(f"{type(pipeline).__name__} has no U-Net or transformer to fuse on.")
    return found


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders under their names in LoraFile.text."""
    second = "t5" if getattr(pipeline, "transformer", None) is not None else "te2"
    encoders = {"te1": getattr(pipeline, "text_encoder", None), second: getattr(pipeline, "text_encoder_2", None)}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def rows_of(pipeline: Any, batch: int) -> Rows:
    """The rows of a denoiser call: diffusers puts the negative prompt's rows first, and has none without CFG."""
    if not getattr(pipeline, "do_classifier_free_guidance", False):
        return Rows.separate(batch)
    images = batch // 2
    return Rows((*range(images), *range(images)), (False,) * images + (True,) * images, images)


def load_pipeline(
    model: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None, config: str | Path | None = None
) -> Any:
    """A pipeline folder or a single-file checkpoint, ready to run.

    device: "cuda", "mps" or "cpu"; None for the best there is. dtype: None for float32 on a CPU, bfloat16 for Flux and float16 for
    the others elsewhere. config: a pipeline folder of the same base model, from which a single-file checkpoint takes its
    configuration and tokenizers (Flux: all but the transformer); without it diffusers looks for them in its cache and online.
    Raises PipelineError.
    """
    path = Path(model)
    if not path.exists():
        raise PipelineError(f"{path} cannot be loaded: there is no such file or folder.")
    if config is not None and not (Path(config) / "model_index.json").is_file():
        raise PipelineError(f"{config} is no pipeline folder: it holds no model_index.json.")
    kind = _class_of_folder(path) if path.is_dir() else _class_of_checkpoint(path)
    device = device or best_device()
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16 if kind == "FluxPipeline" else torch.float16
    try:
        if path.is_dir():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, variant=_variant(path), local_files_only=True)
        elif kind == "FluxPipeline":
            pipeline = _flux_from_single_file(path, dtype, config)
        else:
            found = {"config": str(config)} if config is not None else {}
            pipeline = getattr(diffusers, kind).from_single_file(str(path), torch_dtype=dtype, **found)
        pipeline = pipeline.to(device)
    except PipelineError:
        raise
    except Exception as error:  # diffusers raises whatever its libraries raise
        raise PipelineError(_why_not_loaded(path, config, error)) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_taesd(folder: Path) -> nn.Module:
    """A diffusers folder of an AutoencoderTiny, for FuseSettings.decoder "taesd". Raises PipelineError."""
    try:
        return diffusers.AutoencoderTiny.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers raises whatever its libraries raise
        raise PipelineError(f"{folder} cannot be loaded as a TAESD decoder: {_first_line(error)}.") from error


def best_device() -> str:
    """ "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _class_of_folder(path: Path) -> str:
    try:
        kind = json.loads((path / "model_index.json").read_text("utf-8"))["_class_name"]
    except FileNotFoundError:
        raise PipelineError(f"{path} is no pipeline folder: it holds no model_index.json.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise PipelineError(f"{path} cannot be loaded: its model_index.json cannot be read.") from None
    if kind not in PIPELINES:
        raise PipelineError(f"{path} cannot be used: it is a {kind}, and DynFuse runs {', '.join(PIPELINES)}.")
    return kind


def _class_of_checkpoint(path: Path) -> str:
    keys = {key.removeprefix("model.diffusion_model.") for key in _checkpoint_keys(path)}
    if "double_blocks.0.img_attn.qkv.weight" in keys:
        return "FluxPipeline"
    if "input_blocks.0.0.weight" in keys:
        if any(key.startswith("conditioner.embedders.1.") for key in keys):
            return "StableDiffusionXLPipeline"
        if any(key.startswith("cond_stage_model.") for key in keys):
            return "StableDiffusionPipeline"
    raise PipelineError(f"{path.name} cannot be used: its tensors are not those of a Stable Diffusion 1.x, 2.x, SDXL or Flux checkpoint.")


def _checkpoint_keys(path: Path) -> list[str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                return list(file.keys())
        content = torch.load(path, map_location="cpu", weights_only=True)
        return list(content.get("state_dict", content))
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise PipelineError(f"{path.name} cannot be read: it is damaged or no checkpoint ({_first_line(error)}).") from None


def _variant(folder: Path) -> str | None:
    """ "fp16" for a folder that holds the weights under that name only."""
    weights = [file.name for part in ("unet", "transformer") for file in (folder / part).glob("diffusion_pytorch_model*")]
    weights = [name for name in weights if not name.endswith(".json")]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def _flux_from_single_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> Any:
    if config is None:
        raise PipelineError(f"{path.name} holds only Flux's transformer: give a Flux pipeline folder for the rest with --config.")
    transformer = diffusers.FluxTransformer2DModel.from_single_file(
        str(path), config=str(config), subfolder="transformer", torch_dtype=dtype
    )
    return diffusers.FluxPipeline.from_pretrained(config, transformer=transformer, torch_dtype=dtype, local_files_only=True)


def _why_not_loaded(path: Path, config: str | Path | None, error: Exception) -> str:
    # Of what can go wrong with a checkpoint that could be opened, only looking for the rest touches files and the network.
    if path.is_file() and config is None and isinstance(error, OSError):
        return (
            f"{path.name} cannot be loaded: the configuration and tokenizers for it are not on this machine and could not be "
            "downloaded; give a pipeline folder of the same base model with --config."
        )
    return f"{path.name} cannot be loaded: {_first_line(error)}."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _takes_negative_prompt(pipeline: Any) -> bool:
    return getattr(pipeline, "transformer", None) is None and "negative_prompt" in inspect.signature(pipeline.__call__).parameters


def _step_callback(progress: Callable[[int, int], None]) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1, pipeline.num_timesteps)
        return tensors

    return on_step_end


def _layers_by_flat_name(encoder: nn.Module) -> dict[str, str]:
    """Flat name -> dotted name of an encoder's layers."""
    names = [name for name, module in encoder.named_modules() if getattr(module, "weight", None) is not None]
    found = {flat(name): name for name in names}
    # transformers 5 has no "text_model" between CLIPTextModel and its layers; files keep it in their names.
    return {**{f"text_model_{flat_name}": name for flat_name, name in found.items()}, **found}


def _fitted(branch: SiteBranch, encoder: nn.Module, layer: str) -> SiteBranch:
    try:
        return branch.fitted(Site(layer), tuple(encoder.get_submodule(layer).weight.shape))
    except ValueError as error:
        raise FusionError(str(error)) from None


def _weight_of(module: nn.Module) -> torch.Tensor:
    return module.weight


__all__ = [
    "PIPELINES",
    "FusedImages",
    "FusedPipeline",
    "GuidanceSources",
    "PipelineError",
    "SummedTextParts",
    "load_pipeline",
    "load_taesd",
]
