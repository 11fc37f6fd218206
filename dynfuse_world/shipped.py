"""The shipped weight files and their checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .model import WEIGHTS

CHECKSUMS = "checksums.json"


class WeightsError(RuntimeError):
    """A weight file is missing or is not the one that was shipped. One sentence for the user."""


def verify(weights: Path = WEIGHTS) -> None:
    """Compare every file with its checksum: a tenth of a second. Raises WeightsError."""
    try:
        wanted: dict[str, str] = json.loads((weights / CHECKSUMS).read_text("utf-8"))
    except (OSError, ValueError):
        raise WeightsError(f"The folder {weights} has no readable {CHECKSUMS}: the miniature world's weights are not there.") from None
    for name, checksum in wanted.items():
        path = weights / name
        if not path.is_file():
            raise WeightsError(f"The weight file {path} is missing: get the project's files again, or make it with toy train.")
        if checksum_of(path) != checksum:
            raise WeightsError(f"The weight file {path} is damaged: its checksum is not the one in {CHECKSUMS}.")


def write_checksums(weights: Path) -> None:
    """Of all weight files below the folder, in alphabetical order."""
    files = sorted(path for path in weights.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != CHECKSUMS)
    sums = {path.relative_to(weights).as_posix(): checksum_of(path) for path in files}
    (weights / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", "utf-8")


def checksum_of(path: Path) -> str:
    """SHA-256, hexadecimal. Line ends of text files do not count: git may change them."""
    content = path.read_bytes()
    return hashlib.sha256(content.replace(b"\r\n", b"\n") if path.suffix == ".json" else content).hexdigest()


__all__ = ["CHECKSUMS", "WeightsError", "checksum_of", "verify", "write_checksums"]
