"""What the live tests of Forge Neo, reForge and Forge Classic share: their cases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .live import Case, WebUI


def address(host: str) -> str | None:
    """Where that host runs: DYNFUSE_<HOST>_URL."""
    return os.environ.get(f"DYNFUSE_{host}_URL")


def cases(host: str, models: Mapping[str, tuple[str, Mapping[str, Any]]], **of_all: Any) -> list[Case]:
    """models: name -> ("checkpoint:subject:style[:other LoRA]", what else is said of the case). The names of the files can be given as
    DYNFUSE_<HOST>_<NAME>, a second host with the same files and without the extension as DYNFUSE_<HOST>_PRISTINE_URL, the names of the
    models to be checked as DYNFUSE_<HOST>_CASES.
    """
    url, pristine = address(host), os.environ.get(f"DYNFUSE_{host}_PRISTINE_URL")
    assert url is not None
    wanted = os.environ.get(f"DYNFUSE_{host}_CASES", ",".join(models)).split(",")
    webui = WebUI(url)
    made: list[Case] = []
    for name, (files, settings) in models.items():
        if name not in wanted:
            continue
        checkpoint, subject, style, *other = os.environ.get(f"DYNFUSE_{host}_{name.upper().replace(' ', '_')}", files).split(":")
        case = {**of_all, **settings}
        made.append(
            Case(
                name,
                webui,
                subject,
                style,
                {"sd_model_checkpoint": checkpoint},
                {"width": 64, "height": 64, **case.pop("job", {})},
                other=other[0] if other else None,
                neighbours=made,
                pristine=WebUI(pristine) if pristine else None,
                **case,
            )
        )
    return made
