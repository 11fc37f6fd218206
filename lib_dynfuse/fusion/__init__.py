"""Feature-level selection: from features to decisions (paper, section 4.1)."""

from .policy import Choice
from .rows import Rows
from .session import FusionError, FusionSession, Report, fuse
from .trace import Trace

__all__ = ["Choice", "FusionError", "FusionSession", "Report", "Rows", "Trace", "fuse"]
