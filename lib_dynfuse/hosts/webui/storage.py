"""What the guidance keeps on disk, and where its encoders come from. The options are registered by webui/options.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...guidance.encoders import Encoders, load_encoders
from ...guidance.references import ReferenceCache
from ...guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderSources
from ...user_presets import FILE, UserPresets
from .capabilities import Value
from .references import Interrupted

NEEDS = (*(Value("modules.shared", name) for name in ("opts", "state")), Value("modules.paths_internal", "models_path"))

MEBIBYTE = 1 << 20


class Storage:
    """models/dynfuse of the WebUI, or what its user chose in its place."""

    @property
    def folder(self) -> Path:
        """Where encoders and references are kept."""
        from modules import paths_internal

        return Path(paths_internal.models_path, "dynfuse")

    @property
    def reference_cache(self) -> ReferenceCache:
        """The references of earlier jobs, and the pictures that the user gave."""
        return ReferenceCache(self.folder / "references", int(_option("dynfuse_reference_cache_mb", 256)) * MEBIBYTE)

    @property
    def presets(self) -> UserPresets:
        """The user's own."""
        return UserPresets(self.folder / FILE)

    def encoder_sources(self) -> EncoderSources:
        """Which encoders the user wants, and where they lie."""
        return EncoderSources(
            Path(_option("dynfuse_encoders_folder", "") or self.folder),
            str(_option("dynfuse_clip_model", "") or CLIP_DEFAULT).strip(),
            str(_option("dynfuse_dino_model", "") or DINO_DEFAULT).strip(),
            bool(_option("dynfuse_download_encoders", True)),
        )

    def encoders(self) -> Encoders:
        """Both encoders, downloaded if need be. Raises EncoderError, or Interrupted when the user stops the job."""
        return load_encoders(self.encoder_sources(), _loading_progress)

    @property
    def watches_selection(self) -> bool:
        """Whether it is measured what the paper's selection would choose, under methods that do not go by that."""
        return bool(_option("dynfuse_watch_selection", False))

    @property
    def goes_on_without_encoders(self) -> bool:
        """Whether a picture is made unguided where an encoder cannot be had."""
        return bool(_option("dynfuse_without_encoders", "stop") == "go on")


def _option(name: str, default: Any) -> Any:
    from modules.shared import opts

    return getattr(opts, name, default)


def _loading_progress(what: str, done: int, total: int) -> None:
    """Shows a download in the WebUI's progress bar; the console's is tqdm's. Raises Interrupted when the user stops the job."""
    from modules.shared import state

    if state.interrupted or state.skipped:
        raise Interrupted
    state.textinfo = f"DynFuse: {what} ({done // MEBIBYTE} of {total // MEBIBYTE} MB)" if done < total else None


__all__ = ["NEEDS", "Storage"]
