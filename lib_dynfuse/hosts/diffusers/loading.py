"""diffusers pipelines from folders and single-file checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import nn

from ...reasons import first_line

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")


class PipelineError(RuntimeError):
    """A model that cannot be loaded or run. One sentence for the user."""


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
        raise PipelineError(f"{folder} cannot be loaded as a TAESD decoder: {first_line(error)}.") from error


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
        raise PipelineError(f"{path.name} cannot be read: it is damaged or no checkpoint ({first_line(error)}).") from None


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
    return f"{path.name} cannot be loaded: {first_line(error)}."


__all__ = ["PIPELINES", "PipelineError", "best_device", "load_pipeline", "load_taesd"]
