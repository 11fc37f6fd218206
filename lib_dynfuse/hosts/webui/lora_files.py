"""LoRA files read once, and read again when they change on disk."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

import torch

from ...lora import LoraFile, read_lora
from ...lora.adapter_config import SIDECAR


@dataclass(frozen=True)
class FileVersion:
    """Identifies a file's contents without reading them. time: of modification, in nanoseconds. size: in bytes. sidecar: both of PEFT's
    configuration beside it, which its strength may stand in; None without one.
    """

    path: str
    time: int
    size: int
    sidecar: tuple[int, int] | None = None

    @classmethod
    def of(cls, path: str) -> FileVersion:
        """Raises OSError if the file cannot be looked at."""
        status = os.stat(path)
        sidecar = None
        with suppress(OSError):
            beside = os.stat(os.path.join(os.path.dirname(path), SIDECAR))
            sidecar = beside.st_mtime_ns, beside.st_size
        return cls(os.path.realpath(path), status.st_mtime_ns, status.st_size, sidecar)


class LoraFiles:
    """The last few LoRA files that were asked for, in main memory."""

    def __init__(self, limit: int = 4):
        self._limit = limit
        self._files: OrderedDict[str, tuple[FileVersion, LoraFile]] = OrderedDict()

    def read(self, path: str) -> tuple[FileVersion, LoraFile]:
        """A file's branches, from memory if the file is the same as last time. Raises LoraError or OSError."""
        version = FileVersion.of(path)
        known = self._files.pop(version.path, None)
        if known is None or known[0] != version:
            # Forge calls us under inference mode, and inference tensors would stay unfit for anything else.
            with torch.inference_mode(False):
                known = (version, read_lora(path))
        self._files[version.path] = known
        while len(self._files) > self._limit:
            self._files.popitem(last=False)
        return known


__all__ = ["FileVersion", "LoraFiles"]
