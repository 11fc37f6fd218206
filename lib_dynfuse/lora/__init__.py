"""LoRA files: read in every dialect and kind, and matched to a model's layers."""

from .branch import Branch, LoraError, LowRank, NormShift, bound, merged
from .families import block_label, denoiser_aliases, is_attention, layer_label
from .matching import SiteBranch, branches_by_site, compatible, norms_by_layer
from .naming import Alias, Part, Site
from .reader import LoraFile, read_lora

__all__ = [
    "Alias",
    "Branch",
    "LoraError",
    "LoraFile",
    "LowRank",
    "NormShift",
    "Part",
    "Site",
    "SiteBranch",
    "block_label",
    "bound",
    "branches_by_site",
    "compatible",
    "denoiser_aliases",
    "is_attention",
    "layer_label",
    "merged",
    "norms_by_layer",
    "read_lora",
]
