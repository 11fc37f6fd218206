"""Feature-level selection: from features to decisions (paper, section 4.1)."""

from .rows import Rows
from .session import FusionError, FusionSession, Report, fuse
from .trace import Trace

__all__ = ["FusionError", "FusionSession", "Report", "Rows", "Trace", "fuse"]
