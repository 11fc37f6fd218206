"""Which WebUI this process is: the nearest of those that we know, by its modules.

Whether it is what it looks like is for WebUIHost.install to find out.
"""

from __future__ import annotations

from .a1111 import A1111
from .forge import Forge
from .host import WebUIHost

_host: WebUIHost | None = None


def detect() -> WebUIHost:
    """The host part of this process: there is one. Raises RuntimeError outside of a WebUI."""
    global _host
    if _host is None:
        _host = nearest()
    return _host


def nearest() -> WebUIHost:
    """A new host part. Raises RuntimeError outside of a WebUI."""
    try:
        import modules.sd_models  # noqa: F401
    except ImportError:
        raise RuntimeError("DynFuse's WebUI part runs inside A1111 or Forge only.") from None
    try:
        from backend.patcher.clip import CLIP  # noqa: F401
    except ImportError:
        return A1111()
    return Forge()


__all__ = ["detect", "nearest"]
