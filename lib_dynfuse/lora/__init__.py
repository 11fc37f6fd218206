"""LoRA files: read in every dialect and kind, and matched to a model's layers."""

from .blocks import Blocks, block_factors, text_factors, text_strengths
from .branch import Branch, LoraError, LowRank, NormShift, bound, merged
from .export import MergeReport, Share, check_target, merged_tensors, write_merged
from .families import block_label, denoiser_aliases, is_attention, layer_label, smallest_side
from .matching import SiteBranch, branches_by_site, compatible, misfit, norms_by_layer
from .naming import Alias, Part, Site
from .reader import LoraFile, read_lora

__all__ = [
    "Alias",
    "Blocks",
    "Branch",
    "LoraError",
    "LoraFile",
    "LowRank",
    "MergeReport",
    "NormShift",
    "Part",
    "Share",
    "Site",
    "SiteBranch",
    "block_factors",
    "block_label",
    "bound",
    "branches_by_site",
    "check_target",
    "compatible",
    "denoiser_aliases",
    "is_attention",
    "layer_label",
    "merged",
    "merged_tensors",
    "misfit",
    "norms_by_layer",
    "read_lora",
    "smallest_side",
    "text_factors",
    "text_strengths",
    "write_merged",
]
