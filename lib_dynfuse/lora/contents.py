"""What a file on disk holds: keys, metadata, and tensors when they are asked for. Contents go before endings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]
from torch import Tensor

from ..printable import printable
from ..reasons import first_line
from . import pickled
from .branch import LoraError

ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin", ".pth")
# More than any model has, and so few that their names take little memory.
_TENSORS = 50_000


@dataclass(frozen=True)
class Contents:
    """keys: names of the tensors. load: some keys -> their tensors; raises LoraError. metadata: texts beside them."""

    keys: list[str]
    load: Callable[[Iterable[str]], dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)


def opened(path: Path) -> Contents:
    """The contents of a file, its tensors not yet read. Raises LoraError."""
    try:
        if path.exists() and not path.is_file():
            raise LoraError(f"{path.name} cannot be read: it is {'a folder' if path.is_dir() else 'no file'}.")
        with open(path, "rb") as file:
            beginning = file.read(9)
        size = path.stat().st_size
    except FileNotFoundError:
        raise LoraError(f"{path.name} cannot be read: there is no such file.") from None
    except OSError as error:
        raise LoraError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    if size == 0:
        raise LoraError(f"{path.name} cannot be read: the file is empty.")
    # The header first, as its length may begin with the bytes that mark a pickle or a zip archive.
    torchs_own = beginning.startswith((b"PK", b"\x80")) or path.suffix.lower() in ENDINGS[1:]
    if torchs_own and beginning[8:] != b"{":
        return _opened_pickle(path)
    return _opened_safetensors(path, beginning[:8], size)


def _opened_safetensors(path: Path, beginning: bytes, size: int) -> Contents:
    header = int.from_bytes(beginning, "little")
    # safetensors reports a cut-off file and one that never was a safetensors file by the same error.
    if len(beginning) < 8 or header > size - 8:
        reason = "it is cut off" if len(beginning) == 8 and header < 100_000_000 else "it is no safetensors file"
        raise LoraError(f"{path.name} cannot be read: {reason}.")

    def load(keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                # Clones, because a tensor that safetensors maps from the file would change, or kill the process, with the file.
                return {key: file.get_tensor(key).clone() for key in keys}
        except Exception as error:  # whatever torch makes of a header that safetensors lets pass
            raise LoraError(f"{path.name} cannot be read: {printable(first_line(error))}.") from None

    try:
        with open(path, "rb") as whole:
            whole.seek(8)
            count = whole.read(header).count(b'"dtype"')
        if count > _TENSORS:
            raise LoraError(f"{path.name} is no LoRA: it holds {count:,} tensors.")
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            return Contents(list(file.keys()), load, dict(file.metadata() or {}))
    except (SafetensorError, OSError, MemoryError) as error:
        reason = "it is cut off or damaged" if re.search("incomplete|invalid", str(error), re.IGNORECASE) else printable(first_line(error))
        raise LoraError(f"{path.name} cannot be read: {reason}.") from None


def _opened_pickle(path: Path) -> Contents:
    try:
        file = pickled.opened(path)
    except Exception as error:
        raise _unread(path, error) from None

    def load(keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            return file.load(keys)
        except Exception as error:
            raise _unread(path, error) from None

    return Contents(file.names, load)


def _unread(path: Path, error: Exception) -> LoraError:
    """The sentence for what went wrong; a damaged file makes its reader fail in any way, struct.error and KeyError among them."""
    if isinstance(error, pickled.CodeError):
        return LoraError(f"{path.name} was not opened: it is damaged or holds other things than tensors, which might be code.")
    reason = str(error) if isinstance(error, pickled.PickledError) else f"it is damaged ({printable(first_line(error))})"
    return LoraError(f"{path.name} cannot be read: {reason}.")


__all__ = ["ENDINGS", "Contents", "opened"]
