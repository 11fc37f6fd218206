"""The tensors of a TorchScript archive, without running what it holds.

OpenAI publishes CLIP as such archives. torch.jit.load would compile and may run their code, and torch.load hands them to it even with
weights_only (torch/serialization.py). The tensors alone need neither: they lie in the archive as raw bytes, and a pickle of plain
structures tells which is which.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive, damaged ones aside."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, as the module's state_dict would have them.

    Raises zipfile.BadZipFile, pickle.UnpicklingError, KeyError or other errors of damaged archives.
    """
    with zipfile.ZipFile(path) as archive:
        top = next(name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1).removesuffix("data.pkl")
        with archive.open(f"{top}data.pkl") as structure:
            module = _Unpickler(structure, archive, top).load()
    state: dict[str, Tensor] = {}
    _collect(module, "", state)
    return state


class _Module:
    """Stands for any object of the archive's own classes."""

    attributes: object = None

    def __setstate__(self, state: object) -> None:
        self.attributes = state


def _collect(value: object, name: str, state: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        state[name] = value
    elif isinstance(value, _Module) and isinstance(value.attributes, dict):
        for key, attribute in value.attributes.items():
            _collect(attribute, f"{name}.{key}" if name else str(key), state)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Tensor:
    return storage.as_strided(size, stride, offset)  # refuses what would lie outside of the storage


class _Unpickler(pickle.Unpickler):
    """Knows the few names that torch writes for modules and tensors, and makes nothing else (torch/csrc/jit/serialization/pickler.cpp)."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(file)
        self._archive, self._top = archive, top
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, kind: value
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
            return lambda values: values
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, identifier: Any) -> Tensor:
        kind, dtype, key, _, count = identifier
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds other things than tensors")
        if key not in self._storages:
            content = self._archive.read(f"{self._top}data/{key}")
            # A copy, because torch wants memory that may be written to.
            self._storages[key] = torch.frombuffer(bytearray(content), dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return self._storages[key]
