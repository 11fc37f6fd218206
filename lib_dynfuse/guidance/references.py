"""The reference pictures (paper, Eq. 14-15), and what else is found with encoders, kept from job to job.

One entry is one PNG, which people can look at; its text chunk holds the prompt, the embeddings and a checksum over all of it. It is
written under another name and renamed, so that a killed process leaves no half entry, and any number of processes may share a folder.
An entry that does not check out is made anew.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..settings import FuseSettings, SettingsError
from .encoders import Embeddings, Encoders

T = TypeVar("T")

_CHUNK = "dynfuse reference"
_GIVEN = "given"
_PICTURE_ID = re.compile(r"[0-9a-f]{16}")
_DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+;base64,")
# More than any reference needs: a picture is shown to the encoders at 224 pixels.
_LARGEST_GIVEN = 2048
_MOST_TEXT = 64 << 20
_ABANDONED_SECONDS = 3600.0

# What Pillow and the decoding below raise for bytes that are no picture, or no longer the one that was written.
# AttributeError: a picture of another kind under the name of a PNG has no text chunks.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that changes a reference picture or its embeddings.

    side: "subject" or "style". checkpoint, vae, lora: what identifies their contents (hashes); several LoRAs' with + between.
    strength: of the LoRA, or of each of several; te_strength: what it is multiplied by on the text encoders. others: the other LoRAs
    of the job, which are part of the base. encoders: Encoders.identity. more: (name, value) of what else a host lets people set.
    """

    side: str
    checkpoint: str
    vae: str
    lora: str
    strength: float | str
    te_strength: float
    others: str
    prompt: str
    negative_prompt: str
    seed: int
    sampler: str
    scheduler: str
    steps: int
    cfg_scale: float
    width: int
    height: int
    clip_skip: int
    encoders: str
    more: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """40 hex digits: the entry's file name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Reference:
    """One of a job's two references. embeddings: one row each, on the CPU. given: by the user, not generated."""

    side: str
    picture: Image.Image
    embeddings: Embeddings
    prompt: str
    given: bool = False


@dataclass(frozen=True)
class Entry:
    """A cached picture, to show. time: of its last use, in seconds."""

    path: Path
    side: str
    prompt: str
    bytes: int
    time: float


class ReferenceCache:
    """References and given pictures in a folder of bounded size; the least recently used go first."""

    def __init__(self, folder: Path, limit_bytes: int = 256 << 20):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes

    def get(self, key: ReferenceKey) -> Reference | None:
        """The entry of a key; None if there is none or it is damaged."""

        def read(picture: Image.Image, about: dict[str, Any]) -> Reference:
            embeddings = Embeddings(clip=_row(about["clip"]), dino=_row(about["dino"]))
            return Reference(key.side, picture, embeddings, str(about["prompt"]))

        return self.entry(key.digest, read)

    def put(self, key: ReferenceKey, picture: Image.Image, embeddings: Embeddings, prompt: str) -> Reference:
        """Keep a reference. A folder that cannot be written to only costs the next job its time."""
        picture = picture.convert("RGB")
        about = {
            "side": key.side,
            "prompt": prompt,
            "clip": _text(embeddings.clip),
            "dino": _text(embeddings.dino),
            "key": asdict(key),
        }
        self.keep_entry(key.digest, picture, about)
        return Reference(key.side, picture, Embeddings(embeddings.clip.cpu(), embeddings.dino.cpu()), prompt)

    def entry(self, digest: str, read: Callable[[Image.Image, dict[str, Any]], T]) -> T | None:
        """What read makes of the picture of that name and of what is kept with it; None if there is none, or it is damaged."""
        path = self.folder / f"{digest}.png"
        try:
            found = read(*_read(path))
        except FileNotFoundError:
            return None
        except _DAMAGED:
            self._remove(path)
            return None
        self._touch(path)
        return found

    def keep_entry(self, digest: str, picture: Image.Image, about: dict[str, Any]) -> None:
        """Keep a picture under a name. about: for JSON; "side" and "prompt" are shown. As with put, a folder that refuses is no error."""
        path = self.folder / f"{digest}.png"
        with contextlib.suppress(OSError):
            self._write(path, picture, about)
            self._make_room(path)

    def keep_picture(self, image: Image.Image) -> str:
        """Keep a picture that the user gave. Returns 16 hex digits that stand for its contents. Raises OSError."""
        picture = as_kept(image)
        name = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]
        path = self._given(name)
        if path.exists():
            self._touch(path)
        else:
            self._write(path, picture, {"side": _GIVEN, "prompt": ""})
            self._make_room(path)
        return name

    def picture(self, text: str) -> Image.Image:
        """The picture that a setting's text stands for: keep_picture's digits, or a picture in base64, also as a data address.

        Never a path or an address: the text may come from another machine. Raises SettingsError.
        """
        if not _PICTURE_ID.fullmatch(text):
            return _decoded(text)
        path = self._given(text)
        try:
            picture, _ = _read(path)
        except FileNotFoundError:
            raise SettingsError(
                f"the reference picture {text} is not (or no longer) kept on this machine; give the picture itself again, or leave it empty"
            ) from None
        except _DAMAGED:
            self._remove(path)
            raise SettingsError(f"the reference picture {text} is damaged; give the picture itself again, or leave it empty") from None
        self._touch(path)
        return picture

    def entries(self) -> list[Entry]:
        """What is kept, the most recently used first."""
        found = []
        for path, size, used in self._files():
            try:
                with Image.open(path) as image:
                    about = json.loads(image.info[_CHUNK])  # image.text would decode the picture: seconds for a full folder
                found.append(Entry(path, str(about["side"]), str(about["prompt"]), size, used))
            except _DAMAGED:
                continue
        return sorted(found, key=lambda entry: entry.time, reverse=True)

    def state(self) -> tuple[object, ...]:
        """Changes when anything in the folder does, or is used. No file is opened."""
        return self.limit_bytes, *sorted((path.name, size, used) for path, size, used in self._files())

    def size(self) -> int:
        """Bytes in the folder."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> int:
        """Remove everything. Returns the number of pictures that were there."""
        removed = 0
        for path, _, _ in self._files():
            removed += self._remove(path)
        for path in self._abandoned(0.0):
            self._remove(path)
        return removed

    def _given(self, name: str) -> Path:
        return self.folder / f"{_GIVEN}-{name}.png"

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of every entry."""
        for path in self.folder.glob("*.png"):
            try:
                status = path.stat()
            except OSError:  # another process removed it
                continue
            yield path, status.st_size, status.st_mtime

    def _abandoned(self, seconds: float) -> Iterator[Path]:
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= seconds:
                    yield path

    def _write(self, path: Path, picture: Image.Image, about: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {**about, "sum": _checksum(picture, about)}
        information = PngInfo()
        information.add_text(_CHUNK, json.dumps(about))
        content = io.BytesIO()
        picture.save(content, "PNG", pnginfo=information)
        for last in (False, False, True):
            part = self.folder / f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part"
            try:
                with open(part, "xb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
                return
            except FileNotFoundError:  # another process has cleared the folder in between
                if last:
                    raise
            finally:
                self._remove(part)

    def _make_room(self, newest: Path) -> None:
        for path in self._abandoned(_ABANDONED_SECONDS):
            self._remove(path)
        files = sorted(self._files(), key=lambda file: file[2])
        size = sum(size for _, size, _ in files)
        for path, bytes_, _ in files:
            if size <= self.limit_bytes:
                return
            if path != newest:
                self._remove(path)
                size -= bytes_

    @staticmethod
    def _touch(path: Path) -> None:
        with contextlib.suppress(OSError):
            os.utime(path)

    @staticmethod
    def _remove(path: Path) -> bool:
        try:
            path.unlink()
        except OSError:
            return False
        return True


def as_kept(image: Image.Image) -> Image.Image:
    """What is kept of a picture that the user gave: RGB, at most 2048 pixels on its longer side. Of such a picture, the same pixels."""
    # A photo on a transparent ground would else show whatever colour hides there.
    picture = image.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(ground, picture).convert("RGB")
    picture.thumbnail((_LARGEST_GIVEN, _LARGEST_GIVEN), Image.Resampling.LANCZOS)
    return picture


def sides_needed(settings: FuseSettings) -> tuple[str, ...]:
    """The references that count: "subject", "style"."""
    content, *of_style = settings.guidance_weights
    subject = ("subject",) if content else ()
    style = ("style",) if any(of_style) else ()
    return (*subject, *style)


def reference_of_given(side: str, text: str, cache: ReferenceCache, encoders: Encoders) -> Reference:
    """The reference that a picture of the user's makes. text: see ReferenceCache.picture. Raises SettingsError, naming the setting."""
    try:
        picture = cache.picture(text)
    except SettingsError as error:
        raise SettingsError(f"{side}_image: {error}") from None
    return Reference(side, picture, encoders.embed_picture(picture), "", given=True)


def _decoded(text: str) -> Image.Image:
    if len(text) > _MOST_TEXT:
        raise SettingsError(f"the picture is too large ({len(text) >> 20} MiB of text; at most {_MOST_TEXT >> 20})")
    try:
        content = base64.b64decode(_DATA_ADDRESS.sub("", text, count=1), validate=True)
        image = Image.open(io.BytesIO(content))
        image.load()
    except (binascii.Error, *_DAMAGED):
        raise SettingsError("this is no picture in base64; a file's path or an address is not accepted") from None
    return image


def _read(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """An entry that checks out. Raises FileNotFoundError or one of _DAMAGED."""
    with Image.open(path) as image:
        image.load()
        about = json.loads(image.text[_CHUNK])
        picture = image.convert("RGB")
    if about.pop("sum") != _checksum(picture, about):
        raise ValueError("the entry was changed")
    return picture, about


def _checksum(picture: Image.Image, about: dict[str, Any]) -> str:
    text = json.dumps([picture.size, about], sort_keys=True)
    return hashlib.sha256(text.encode() + picture.tobytes()).hexdigest()


def _text(row: Tensor) -> str:
    return base64.b64encode(row.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def _row(text: str) -> Tensor:
    content = bytearray(base64.b64decode(text, validate=True))
    # A job under inference mode would keep a tensor that no gradient can be taken with.
    with torch.inference_mode(False):
        return torch.frombuffer(content, dtype=torch.float32).clone()[None]


KEY_FIELDS = tuple(f.name for f in fields(ReferenceKey))

__all__ = ["KEY_FIELDS", "Entry", "Reference", "ReferenceCache", "ReferenceKey", "reference_of_given", "sides_needed"]
