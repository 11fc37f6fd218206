"""How much of a device's or the machine's memory is left, and when it has run out."""

from __future__ import annotations

import sys

import torch

# The last four are what cuBLAS and cuDNN say when there is no room for their workspace.
_OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "alloc_failed",
    "cublas_status_not_initialized",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device's or the machine's memory did not suffice."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> int:
    """Bytes; 0 where that cannot be told."""
    if device.type == "meta":
        return sys.maxsize
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type in ("cpu", "mps"):
        try:
            import psutil
        except ImportError:
            return 0
        return int(psutil.virtual_memory().available)
    return 0


__all__ = ["free_memory", "is_out_of_memory"]
