"""Which WebUI this process is: the nearest of those that we know, by its modules.

Whether it is what it looks like is for WebUIHost.install to find out.
"""

from __future__ import annotations

from .a1111 import A1111
from .forge import FORGE
from .host import WebUIHost
from .roles import Roles

_host: WebUIHost | None = None


def detect() -> WebUIHost:
    """The host part of this process: there is one. Raises RuntimeError outside of a WebUI."""
    global _host
    if _host is None:
        _host = WebUIHost(nearest())
    return _host


def nearest() -> Roles:
    """The WebUI. Raises RuntimeError outside of one."""
    try:
        import modules.sd_models  # noqa: F401
    except ImportError:
        raise RuntimeError("DynFuse's WebUI part runs inside A1111 or Forge only.") from None
    try:
        from backend.patcher.clip import CLIP  # noqa: F401
    except ImportError:
        return A1111
    return FORGE


__all__ = ["detect", "nearest"]
