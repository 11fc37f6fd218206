"""Torch's own files (.pt, .ckpt, .bin) as tensors, without running anything that they hold.

torch.load believes what a file says of sizes: a damaged one makes it inflate gigabytes or read beyond its memory. Here a zip archive's
directory is compared with the file's size before anything is inflated, and the pickle in it is followed step by step by a machine that
knows dictionaries, lists, numbers and tensors; every tensor must lie within what the file holds.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# What a compressed archive may hold beyond the file's own size; torch compresses nothing.
_SLACK = 32 << 20
# Sizes that no file of tensors comes near: of a zip archive's directory in bytes, of a pickle in operations.
_DIRECTORY = 4 << 20
_OPERATIONS = 700_000
# Where a zip archive's directory is announced, with the longest comment after it.
_END = 65_536 + 22 + 76
_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class PickledError(Exception):
    """Why a file is not read, in words that complete a sentence about it."""


class CodeError(PickledError):
    """The file holds other things than tensors, which might be code."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file. key: its name there. count: how many numbers the pickle says it has."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Place:
    """A tensor's place in a storage, all in numbers."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def of(self, data: bytearray) -> Tensor:
        """The tensor. data: its storage's numbers. Raises PickledError if there are fewer than the pickle says."""
        if self.storage.count * self.storage.dtype.itemsize > len(data):
            raise PickledError("it is damaged: it announces more numbers than it holds")
        if not self.bytes:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(data, dtype=self.storage.dtype, count=self.storage.count)
        found = flat.as_strided(self.size, self.stride, self.offset)
        return (
            found if found.numel() == self.storage.count and found.is_contiguous() else found.clone(memory_format=torch.contiguous_format)
        )


@dataclass(frozen=True)
class TorchFile:
    """names: of its tensors, in order. load: some names -> their tensors. Both raise PickledError."""

    names: list[str]
    load: Callable[[Iterable[str]], dict[str, Tensor]]


def opened(path: Path) -> TorchFile:
    """A torch file, its tensors not yet read. Raises PickledError; other errors for a file that is damaged in some other way."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    return _opened_archive(path) if zipped else _opened_stream(path)


def _opened_archive(path: Path) -> TorchFile:
    with _archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
        if not pickles:
            raise PickledError("it is a zip archive, but none that torch has written")
        places = _places(_Machine().run(io.BytesIO(archive.read(pickles[0]))))
    folder = pickles[0].removesuffix("data.pkl") + "data/"

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        with _archive(path) as archive:

            def data(storage: Storage) -> bytearray:
                entry = archive.getinfo(folder + storage.key)
                with archive.open(entry) as record:
                    return _whole(record, entry.file_size)

            return _read(names, places, data, path.stat().st_size + _SLACK)

    return TorchFile(list(places), load)


def _archive(path: Path) -> zipfile.ZipFile:
    """A zip archive that holds no more than a file of its size should. Raises PickledError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _END))
        end = file.read()
    found = end.rfind(b"PK\5\6")
    directory = int.from_bytes(end[found + 12 : found + 16], "little")
    if directory == 0xFFFFFFFF and found >= 76:  # the archive is of the kind for large files
        directory = int.from_bytes(end[found - 36 : found - 28], "little")
    if found < 0 or directory > _DIRECTORY:
        raise PickledError("it is cut off or damaged")
    archive = zipfile.ZipFile(path)
    held = sum(entry.file_size for entry in archive.infolist())
    if held > size + _SLACK:
        archive.close()
        raise PickledError(f"it is a compressed archive that would take {held >> 20} MiB, and no LoRA")
    return archive


def _opened_stream(path: Path) -> TorchFile:
    """The form from before torch 1.6: five pickles, one after another, and then the storages."""
    machine = _Machine()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        magic = machine.run(whole)
        if magic != _MAGIC:
            return TorchFile(list(_places(magic)), lambda names: {})  # a plain pickle holds no storages
        _version, system, content, keys = (machine.run(whole) for _ in range(4))
        start = whole.tell()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise PickledError("it was written on a computer with another order of bytes")
    places = _places(content)

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        size = path.stat().st_size
        with open(path, "rb") as file:
            at: dict[str, tuple[int, int]] = {}
            position = start
            for key in keys:
                file.seek(position)
                count = int.from_bytes(file.read(8), "little") * machine.storages[key].dtype.itemsize
                at[key] = position + 8, count
                position += 8 + count
                if position > size:
                    raise PickledError("it is cut off or damaged")

            def data(storage: Storage) -> bytearray:
                file.seek(at[storage.key][0])
                return _whole(file, at[storage.key][1])

            return _read(names, places, data, size + _SLACK)

    return TorchFile(list(places), load)


def _places(content: Any) -> dict[str, Place]:
    """The named tensors of a file's content. Raises PickledError if it is no dictionary."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, list) and any(isinstance(item, Place) for item in content):
        raise PickledError("it holds no named tensors, but a list, as cloneofsimo's first LoRAs do; their .safetensors can be read")
    if not isinstance(content, dict):
        raise PickledError("it holds no named tensors")
    return {name: value for name, value in content.items() if isinstance(value, Place)}


def _read(names: Iterable[str], places: Mapping[str, Place], data: Callable[[Storage], bytearray], limit: int) -> dict[str, Tensor]:
    """Tensors by name; each storage is read once. limit: bytes that they may take together."""
    wanted = {name: places[name] for name in names}
    if sum(place.bytes for place in wanted.values()) > limit:
        raise PickledError("it is damaged: it announces more numbers than it holds")
    by_storage: dict[str, list[str]] = {}
    for name, place in wanted.items():
        by_storage.setdefault(place.storage.key, []).append(name)
    found: dict[str, Tensor] = {}
    for sharing in by_storage.values():
        numbers = data(wanted[sharing[0]].storage)
        found |= {name: wanted[name].of(numbers) for name in sharing}
    return {name: found[name] for name in wanted}


def _whole(file: IO[bytes], size: int) -> bytearray:
    """The next `size` bytes, which are known to be there."""
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        part = file.read(min(size - at, 1 << 20))
        if not part:
            raise PickledError("it is cut off or damaged")
        view[at : at + len(part)] = part
        at += len(part)
    return data


_Function = Callable[..., Any]


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Place:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise PickledError("it is damaged: a tensor in it has no shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if math.prod(size) and (last >= storage.count or math.prod(size) > storage.count):
        raise PickledError("it is damaged: a tensor in it is larger than its numbers")
    return Place(storage, offset, size, stride)


def _nothing(*_: Any) -> None:
    return None


_FUNCTIONS: Mapping[str, _Function] = {
    "collections OrderedDict": lambda pairs=(): {key: value for key, value in pairs if isinstance(key, str)},
    "_codecs encode": _nothing,  # how protocol 2 writes bytes
    "torch Size": tuple,
    "torch device": _nothing,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: data,
}
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS: Mapping[str, _Function] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"}
)
_IGNORED = frozenset({"PROTO", "FRAME"})


class _Machine:
    """Follows a pickle as far as dictionaries, lists, numbers and tensors go. storages: all that it met, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def run(self, stream: IO[bytes] | mmap.mmap) -> Any:
        """The content of the next pickle. Raises CodeError for an operation that has no place in a file of tensors."""
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > _OPERATIONS:
                raise PickledError("it is no LoRA: it holds too many things")
            if operation.name == "STOP":
                return self._stack.pop()
            self._step(operation.name, argument)
        raise PickledError("it is cut off or damaged")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name == "TUPLE":
            self._stack = self._outer.pop()
            self._stack.append(tuple(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name in ("APPEND", "SETITEM"):
            length = 1 if name == "APPEND" else 2
            items = stack[-length:]
            del stack[-length:]
            self._fill(stack[-1], items)
        elif name in ("APPENDS", "SETITEMS"):
            self._stack = self._outer.pop()
            self._fill(self._stack[-1], stack)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            text = argument if name == "GLOBAL" else " ".join(reversed([stack.pop(), stack.pop()]))
            stack.append(_named(text))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if function not in _FUNCTIONS.values():
                raise CodeError
            stack.append(function(*arguments))
        elif name == "BUILD":
            stack.pop()  # what an OrderedDict carries beside its items
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name not in _IGNORED:
            raise CodeError

    def _fill(self, container: Any, items: list[Any]) -> None:
        if isinstance(container, dict):
            # Nothing but text names a tensor, and hashing a tuple of tuples may take forever.
            container.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))
        elif isinstance(container, list):
            container.extend(items)
        else:
            raise PickledError("it is damaged")

    def _storage(self, kind: str, dtype: torch.dtype, key: str, _location: str, count: int, view: Any = None) -> Storage:
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or type(count) is not int
            or view is not None
        ):
            raise PickledError("it is damaged, or of a form that torch no longer writes")
        self.storages[key] = Storage(key, dtype, count)
        return self.storages[key]


def _named(text: str) -> Any:
    """What a name in a pickle stands for. Raises CodeError for one that has no place in a file of tensors."""
    module, _, name = text.partition(" ")
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return None
    if text not in _FUNCTIONS:
        raise CodeError
    return _FUNCTIONS[text]


__all__ = ["CodeError", "PickledError", "TorchFile", "opened"]
