"""When a device's or the machine's memory runs out."""

from __future__ import annotations

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


__all__ = ["is_out_of_memory"]
