"""Fused images from diffusers pipelines, for programs without a WebUI: see pipeline.py."""

from .guidance import GuidanceSources
from .loading import PIPELINES, PipelineError, best_device, load_pipeline, load_taesd
from .pipeline import FusedImages, FusedPipeline, denoiser, rows_of
from .text import SummedTextParts, text_encoders

__all__ = [
    "PIPELINES",
    "FusedImages",
    "FusedPipeline",
    "GuidanceSources",
    "PipelineError",
    "SummedTextParts",
    "best_device",
    "denoiser",
    "load_pipeline",
    "load_taesd",
    "rows_of",
    "text_encoders",
]
