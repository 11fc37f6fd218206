"""Which WebUI this process is: the nearest of those that we know, by its modules.

Whether it is what it looks like is for WebUIHost.install to find out.
"""

from __future__ import annotations

import importlib

from .a1111 import A1111
from .forge import FORGE
from .host import WebUIHost
from .ldm_forge import CLASSIC, REFORGE
from .neo import NEO
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
        raise RuntimeError("DynFuse's WebUI part runs inside A1111, Forge and their like only.") from None
    if _has("backend.patcher.clip", "CLIP"):
        # The store of patches by file; Forge Neo has Forge's names around ComfyUI's.
        return FORGE if _has("backend.patcher.lora", "LoraLoader") else NEO
    if _has("modules_forge.forge_loader", "ForgeSD"):
        # ComfyUI's adapters are younger than Forge Classic.
        return REFORGE if _has("ldm_patched.modules.weight_adapter", "LoRAAdapter") else CLASSIC
    return A1111


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


__all__ = ["detect", "nearest"]
