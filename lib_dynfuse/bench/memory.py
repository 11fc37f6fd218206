"""Peak memory of a piece of work: of the GPU as PyTorch counts it, of the process on Linux, else unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_above_before(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `work` needed at its worst moment beyond what was in use before; None where it cannot be told.

    GPU: torch.cuda.max_memory_allocated. CPU: the process's largest resident size (VmHWM), which Linux lets a process set back.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    _give_back_free_memory()
    try:
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        work()
        return max(0, _resident("VmHWM") - before)
    except (OSError, ValueError):
        return None


def _give_back_free_memory() -> None:
    """What malloc keeps for later would hide a need for memory."""
    with contextlib.suppress(OSError, AttributeError):  # another system's, or another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    """Bytes. Raises ValueError where the system does not say."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


__all__ = ["peak_above_before"]
