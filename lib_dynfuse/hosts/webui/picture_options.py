"""The WebUI's options that a picture may depend on.

Not a list of those that do: forks and extensions have more of them with every version, and a reference that was made with another value
would be used without a word. So all count but those that by their page in the settings cannot matter.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .capabilities import Value

NEEDS = (Value("modules.shared", "opts.data_labels"),)

# Pages of the settings that are about what happens beside or after the sampling of a picture from text.
_CATEGORIES = frozenset({"saving", "ui", "system", "postprocessing", "training"})
_SECTIONS = frozenset({"img2img", "interrogate", "dynfuse"})
# What they choose counts by its contents (BaseIdentity), and A1111 completes the first one by a hash once it knows it.
_FILES = frozenset({"sd_model_checkpoint", "sd_vae"})


def picture_options(opts: Any) -> dict[str, Any]:
    """The values of those options, by name."""
    return {
        name: _plain(getattr(opts, name, None))
        for name, info in opts.data_labels.items()
        if name not in _FILES and not getattr(info, "do_not_save", False) and _may_matter(info)
    }


def digest_of_options(opts: Any) -> str:
    """Stands for those options. Not the values themselves: extensions keep passwords there, and what is kept is shown and shared."""
    return hashlib.sha256(json.dumps(picture_options(opts), sort_keys=True, default=repr).encode()).hexdigest()


def _may_matter(info: Any) -> bool:
    """Options that no page shows have None for it: what Forge keeps there counts by what it has loaded."""
    section = getattr(info, "section", None) or ("",)
    return section[0] is not None and section[0] not in _SECTIONS and getattr(info, "category_id", None) not in _CATEGORIES


def _plain(value: Any) -> Any:
    """The same for 1 and 1.0: a slider gives either."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


__all__ = ["NEEDS", "digest_of_options", "picture_options"]
