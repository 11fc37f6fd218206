"""The encoders' weight files: where they lie, and how they get there.

Every model has a folder of its own inside EncoderSources.folder, where its files keep the names that they have on the hub: a file that
a person puts there on an offline machine is found like one that was downloaded.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import os
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any

CLIP_DEFAULT = "ViT-B-32/openai"
DINO_DEFAULT = "facebook/dino-vits16"

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all); an exception that it raises ends the download and is handed on."""

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
DINO_CONFIG = "config.json"
DINO_PREPROCESSING = "preprocessor_config.json"
DINO_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Where the hub has OpenAI's weights as safetensors. Up to 2.30 open_clip's own table names only OpenAI's pickled archives.
_OPENAI_ON_THE_HUB = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B-32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B-16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L-14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L-14-336": "timm/vit_large_patch14_clip_336.openai",
}


class EncoderError(RuntimeError):
    """An encoder cannot be had; one sentence for the user."""


@dataclass(frozen=True)
class EncoderSources:
    """Which encoders, and where they come from.

    folder: where weights are looked for and downloaded to. clip: ARCHITECTURE/TAG of open_clip, or a local folder with
    open_clip_config.json and weights, or ARCHITECTURE=FILE (OpenAI's weights: its own archive, or ARCHITECTURE-quickgelu). dino: a
    ViT's name on the hub, or a local folder with config.json and weights. An empty name is the default's. download: whether a missing
    file may be fetched.
    """

    folder: Path
    clip: str = CLIP_DEFAULT
    dino: str = DINO_DEFAULT
    download: bool = True


@dataclass(frozen=True)
class ModelFiles:
    """One encoder's files.

    name: as the user named it. config: None where the architecture tells. tag: open_clip's name of the training. local: named by a path,
    so that only the files' contents tell which model it is.
    """

    name: str
    weights: Path
    config: Path | None
    preprocessing: Path | None = None
    architecture: str | None = None
    tag: str | None = None
    local: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.config, self.preprocessing, self.weights) if path is not None)

    @property
    def version(self) -> tuple[tuple[str, int, int], ...]:
        """Changes with the files: (path, bytes, time of change) of each."""
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths)


def clip_files(sources: EncoderSources, progress: Progress | None = None) -> ModelFiles:
    """The files of sources.clip, downloaded where that is needed and allowed. Raises EncoderError."""
    name = sources.clip.strip() or CLIP_DEFAULT
    if given := re.fullmatch(r"([\w.-]+)=(.+)", name):
        weights = Path(given[2]).expanduser()
        if not weights.is_file():
            raise EncoderError(f"The CLIP model {name} cannot be loaded: there is no file {weights}.")
        return ModelFiles(name, weights, None, architecture=given[1], local=True)
    if (folder := Path(name).expanduser()).is_dir():
        return ModelFiles(name, _given("CLIP", folder, CLIP_WEIGHTS), _given("CLIP", folder, (CLIP_CONFIG,)), local=True)
    architecture, tag = _name("CLIP", name, "a folder, ARCHITECTURE=FILE, nor open_clip's ARCHITECTURE/TAG")
    model = _Model("CLIP", name, sources.folder / f"{architecture}--{tag}")
    remotes = _clip_remotes(architecture, tag)
    names = dict.fromkeys((*CLIP_WEIGHTS, *(remote.file for remote in remotes)))
    weights = model.found(names) or model.fetched(remotes, sources.download, progress)
    return ModelFiles(name, weights, model.found((CLIP_CONFIG,)), architecture=architecture, tag=tag)


def dino_files(sources: EncoderSources, progress: Progress | None = None) -> ModelFiles:
    """The files of sources.dino, downloaded where that is needed and allowed. Raises EncoderError."""
    name = sources.dino.strip() or DINO_DEFAULT
    if (folder := Path(name).expanduser()).is_dir():
        given = _given("DINO", folder, DINO_WEIGHTS), _given("DINO", folder, (DINO_CONFIG,))
        return ModelFiles(name, *given, preprocessing=_Model("DINO", name, folder).found((DINO_PREPROCESSING,)), local=True)
    owner, repository = _name("DINO", name, "a folder nor a model's name on the hub, OWNER/MODEL")
    model = _Model("DINO", name, sources.folder / f"{owner}--{repository}")
    config, weights = model.found((DINO_CONFIG,)), model.found(DINO_WEIGHTS)
    if config is None or weights is None:
        # The weights last: they take minutes, and a model that the hub does not have is noticed at once.
        in_need = [_on_the_hub(name, DINO_WEIGHTS[0])] if weights is None else []
        config = config or model.fetched([_on_the_hub(name, DINO_CONFIG)], sources.download, None, with_it=in_need)
        if weights is None:
            model.fetched_if_there(_on_the_hub(name, DINO_PREPROCESSING), sources.download)
            weights = model.fetched([_on_the_hub(name, file) for file in DINO_WEIGHTS], sources.download, progress)
    return ModelFiles(name, weights, config, model.found((DINO_PREPROCESSING,)))


def imported(package: str, module: str) -> Any:
    """A module of a package that WebUIs bring along and other machines may lack. Raises EncoderError."""
    try:
        with warnings.catch_warnings():
            # The versions that the WebUIs pin warn about each other's future (open_clip 2.20.0 about timm).
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise EncoderError(f"The guidance needs the Python package {package}, which cannot be imported ({error}).") from None


def _given(kind: str, folder: Path, names: Sequence[str]) -> Path:
    path = _Model(kind, str(folder), folder).found(names)
    if path is None:
        raise EncoderError(f"The {kind} model {folder} cannot be loaded: the folder has no {' and no '.join(names)}.")
    return path


def _name(kind: str, name: str, otherwise: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w[\w.-]*)/(\w[\w.-]*)", name)
    if match is None:
        raise EncoderError(f"The {kind} model {name!r} cannot be loaded: it is neither {otherwise}.")
    return match[1], match[2]


@dataclass(frozen=True)
class _Remote:
    """A file elsewhere. source: where people find it. sha256: its first digits where they are publicly known; else the hub is asked."""

    file: str
    url: str
    source: str
    sha256: str | None = None


def _on_the_hub(repository: str, file: str) -> _Remote:
    constants = imported("huggingface_hub", "huggingface_hub.constants")  # knows the hub's address
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    return _Remote(file, f"{endpoint}/{repository}/resolve/main/{file}", f"{repository} on the Hugging Face hub")


def _clip_remotes(architecture: str, tag: str) -> list[_Remote]:
    """Where open_clip's weights are to be had, best first: the hub's safetensors, its pickle, the file of open_clip's own table."""
    open_clip = imported("open_clip_torch", "open_clip")
    known = open_clip.get_pretrained_cfg(architecture, tag)
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    if not repository and tag == "openai":
        repository = _OPENAI_ON_THE_HUB.get(architecture.removesuffix("-quickgelu"), "")
    remotes = [_on_the_hub(repository, name) for name in ((file,) if file else CLIP_WEIGHTS)] if repository else []
    if url := known.get("url", ""):
        # OpenAI's addresses carry the file's SHA-256, open_clip's releases its first digits in the file's name.
        digits = re.search(r"/([0-9a-f]{64})/", url) or re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
        if digits:
            remotes.append(_Remote(url.rpartition("/")[2], url, urllib.parse.urlsplit(url).hostname or url, digits[1]))
    return remotes


@dataclass(frozen=True)
class _Model:
    """One model's place in the folder of weights. kind, name: for messages."""

    kind: str
    name: str
    folder: Path

    def found(self, names: Iterable[str]) -> Path | None:
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def fetched(self, remotes: Sequence[_Remote], download: bool, progress: Progress | None, with_it: Sequence[_Remote] = ()) -> Path:
        """The first of `remotes` that can be had. with_it: what the error asks for besides. Raises EncoderError."""
        hint = [*remotes[:1], *with_it]
        if not remotes:
            raise EncoderError(
                f"The {self.kind} model {self.name} is not in {self.folder}, and open_clip knows no file of that name to fetch."
            )
        if forbidden := _forbidden(download):
            raise self._missing(forbidden, hint)
        reasons: list[str] = []
        unreachable: set[str] = set()
        for remote in remotes:
            host = urllib.parse.urlsplit(remote.url).netloc
            if host in unreachable:
                continue  # finding that out again takes its time
            try:
                return _download(remote, self.folder / remote.file, f"{self.kind} {self.name}", progress)
            except _NotThere as error:
                reasons.append(f"{host} has no {remote.file} of it: {error}")
            except _Unreachable as error:
                unreachable.add(host)
                reasons.append(f"{host} did not deliver it: {error}")
            except _WrongChecksum as error:
                raise self._missing(f"what was downloaded from {host} was thrown away, because {error}", hint) from None
            except OSError as error:
                raise EncoderError(
                    f"The {self.kind} model {self.name} cannot be written to {self.folder}: {error.strerror or error}."
                ) from None
        raise self._missing(f"could not be downloaded ({'; '.join(reasons)})", hint)

    def fetched_if_there(self, remote: _Remote, download: bool) -> None:
        if not _forbidden(download):
            try:
                _download(remote, self.folder / remote.file, "", None)
            except _NotThere:
                return
            except (_Unreachable, _WrongChecksum, OSError) as error:
                raise self._missing(f"could not be downloaded ({error})", [remote]) from None

    def _missing(self, why: str, remotes: Sequence[_Remote]) -> EncoderError:
        files = " and ".join(remote.file for remote in remotes)
        return EncoderError(
            f"The {self.kind} model {self.name} is not in {self.folder} and {why}: "
            f"put {files} of {remotes[0].source} into that folder, or name a local model in the settings."
        )


def _forbidden(download: bool) -> str:
    if not download:
        return "downloading encoders is switched off"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} forbids downloading it"
    return ""


class _NotThere(Exception):
    """The host answers that it has no such file, or none for everybody."""


class _Unreachable(Exception):
    """The host does not answer, or breaks off again and again."""


class _WrongChecksum(Exception):
    """The file is not the one that it should be."""


_TIMEOUT = 20.0  # seconds without a byte
_PAUSE = 1.0  # seconds before going on with a download that broke off
_ATTEMPTS = 4  # in a row that bring nothing
_STALE = 24 * 3600.0  # seconds after which an unfinished file is of a process that was killed
_BLOCK = 1 << 20


def _download(remote: _Remote, target: Path, what: str, progress: Progress | None) -> Path:
    """Fetch a file, check it, and only then give it its name: no process ever sees half of it, and two at once each bring a whole one.

    Raises _NotThere, _Unreachable, _WrongChecksum; OSError where it cannot be written; whatever `progress` raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(unfinished, "wb") as file:
            checksum = _fetch(remote.url, file, lambda done, total: progress(what, done, total) if progress else None)
            file.flush()
            os.fsync(file.fileno())
        _check(unfinished, remote.sha256 or checksum)
        try:
            os.replace(unfinished, target)
        except PermissionError:  # Windows, while another process reads the same file, which it has just brought itself
            if not target.is_file() or target.stat().st_size != unfinished.stat().st_size:
                raise
        return target
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".*.part"):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError:  # another process was faster
            continue


def _check(path: Path, checksum: str) -> None:
    """checksum: hexadecimal; SHA-256 or its beginning, or the 40 digits by which git names a file. Raises _WrongChecksum."""
    if not checksum:
        raise _WrongChecksum("the host gives no checksum to compare with")
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if len(checksum) == 40 else hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(checksum):
        raise _WrongChecksum(f"its checksum begins with {digest.hexdigest()[:12]} and should with {checksum[:12]}")


def _fetch(url: str, file: IO[bytes], report: Callable[[int, int], None]) -> str:
    """Write what lies at `url` to `file`, going on where the connection breaks off.

    Returns the host's checksum, empty where it gives none. Raises _NotThere, _Unreachable.
    """
    checksum, reached, failures = "", False, 0
    while True:
        start = file.tell()
        try:
            answer = _Answer(url, start)
            reached = True
            if answer.start != start or answer.checksum != checksum:
                if answer.start:  # another file than the one that was begun
                    answer.close()
                    answer = _Answer(url, 0)
                file.seek(0)
                file.truncate()
                checksum = answer.checksum
            for block in answer.blocks():
                file.write(block)
                report(file.tell(), answer.total)
            return checksum
        except _BrokenOff as error:
            reached = reached or error.answered
            failures = failures + 1 if file.tell() <= start else 1
            if not reached or failures == _ATTEMPTS:
                raise _Unreachable(str(error)) from None
            time.sleep(_PAUSE * failures)


class _BrokenOff(Exception):
    """No answer, or not the whole of it. answered: something came from the host."""

    def __init__(self, reason: object, answered: bool) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.answered = answered


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps what the hub says of a large file, on the way to the host that stores it."""

    def __init__(self) -> None:
        self.checksum = ""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.checksum = self.checksum or _digits(headers.get("X-Linked-Etag"))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _digits(etag: str | None) -> str:
    """The checksum that is a hub's ETag: SHA-256 of a large file, git's name of a small one; empty for any other."""
    match = re.fullmatch(r'(?:W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?', etag or "")
    return match[1] if match else ""


class _Answer:
    """One attempt's answer. start: its first byte's place in the file. total: the file's bytes, 0 where the host does not say."""

    def __init__(self, url: str, start: int) -> None:
        """Ask for the bytes from `start` on. Raises _NotThere, _BrokenOff."""
        headers = {"User-Agent": "DynFuse", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)
        try:
            self._response = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403, 404, 410):  # the hub answers 401 for a repository that it does not have
                raise _NotThere(f"{error.code} {error.reason}") from None
            raise _BrokenOff(f"{error.code} {error.reason}", True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenOff(getattr(error, "reason", error), False) from None
        answer = self._response.headers
        self.start = start if self._response.status == 206 else 0
        length = int(answer.get("Content-Length") or 0)
        self.total = self.start + length if length else 0
        self.checksum = redirects.checksum or _digits(answer.get("X-Linked-Etag")) or _digits(answer.get("ETag"))

    def blocks(self) -> Iterator[bytes]:
        """The file from `start` on. Raises _BrokenOff."""
        done = self.start
        with self._response:
            while True:
                try:
                    block = self._response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _BrokenOff(error, True) from None
                if not block:
                    break
                done += len(block)
                yield block
        if done < self.total:
            raise _BrokenOff(f"the connection ended after {done} of {self.total} bytes", True)

    def close(self) -> None:
        self._response.close()
