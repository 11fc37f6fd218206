"""The encoders' weight files: where they lie, and how they get there.

Every model has a folder of its own inside EncoderSources.folder, where its files keep the names that they have on the hub; so a file
that a person puts there on an offline machine is found like one that was downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CLIP_DEFAULT = "ViT-B-32/openai"
DINO_DEFAULT = "facebook/dino-vits16"

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all); an exception that it raises ends the download and is handed on."""

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
DINO_CONFIG = "config.json"
DINO_PREPROCESSING = "preprocessor_config.json"
DINO_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class EncoderError(RuntimeError):
    """An encoder cannot be had; one sentence for the user."""


@dataclass(frozen=True)
class EncoderSources:
    """Which encoders, and where they come from.

    folder: where weights are looked for and downloaded to. clip: ARCHITECTURE/TAG of open_clip, or a local folder with
    open_clip_config.json and weights, or ARCHITECTURE=FILE. dino: a ViT's name on the hub, or a local folder with config.json and
    weights. download: whether a missing file may be fetched.
    """

    folder: Path
    clip: str = CLIP_DEFAULT
    dino: str = DINO_DEFAULT
    download: bool = True


@dataclass(frozen=True)
class ModelFiles:
    """One encoder's files. name: as the user named it. config: None where the architecture tells. local: named by a path, not by name."""

    name: str
    weights: Path
    config: Path | None
    preprocessing: Path | None = None
    architecture: str | None = None
    tag: str | None = None
    local: bool = False

    @property
    def version(self) -> tuple[tuple[str, int, int], ...]:
        """Changes with the files: (path, bytes, time of change) of each."""
        files = [path for path in (self.weights, self.config, self.preprocessing) if path is not None]
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def clip_files(sources: EncoderSources, progress: Progress | None = None) -> ModelFiles:
    """The files of sources.clip, downloaded where that is needed and allowed. Raises EncoderError."""
    architecture, equals, path = sources.clip.partition("=")
    if equals and not Path(sources.clip).exists():
        weights = Path(path).expanduser()
        if not weights.is_file():
            raise EncoderError(f"The CLIP model {sources.clip} cannot be loaded: there is no file {weights}.")
        return ModelFiles(sources.clip, weights, None, architecture=architecture, local=True)
    folder = Path(sources.clip).expanduser()
    if folder.is_dir():
        return ModelFiles(sources.clip, _first("CLIP", folder, CLIP_WEIGHTS), _first("CLIP", folder, (CLIP_CONFIG,)), local=True)
    architecture, _, tag = sources.clip.partition("/")
    folder = sources.folder / f"{architecture}--{tag}"
    weights = _first("CLIP", folder, CLIP_WEIGHTS)
    config = folder / CLIP_CONFIG
    return ModelFiles(sources.clip, weights, config if config.is_file() else None, architecture=architecture, tag=tag)


def dino_files(sources: EncoderSources, progress: Progress | None = None) -> ModelFiles:
    """The files of sources.dino, downloaded where that is needed and allowed. Raises EncoderError."""
    folder = Path(sources.dino).expanduser()
    local = folder.is_dir()
    if not local:
        folder = sources.folder / sources.dino.replace("/", "--")
    preprocessing = folder / DINO_PREPROCESSING
    return ModelFiles(
        sources.dino,
        _first("DINO", folder, DINO_WEIGHTS),
        _first("DINO", folder, (DINO_CONFIG,)),
        preprocessing if preprocessing.is_file() else None,
        local=local,
    )


def _first(kind: str, folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EncoderError(f"The {kind} model cannot be loaded: there is no {' or '.join(names)} in {folder}.")
