"""Feature-level fusion: from features to the weight of each LoRA in each layer (paper, section 4.1)."""

from .rows import Rows
from .rules import RULES, Rule
from .session import FusionError, FusionSession, Report, fuse
from .step import Step
from .trace import Trace

__all__ = ["RULES", "FusionError", "FusionSession", "Report", "Rows", "Rule", "Step", "Trace", "fuse"]
