"""Checks on a running Forge Classic: DYNFUSE_CLASSIC_URL=http://127.0.0.1:7864 pytest tests/hosts/webui/test_classic_live.py

docs/development.md says how to set one up, live_forks.py what else can be said.
"""

from __future__ import annotations

import pytest

from . import live_forks
from .live_checks import *  # noqa: F403
from .live_guidance_checks import *  # noqa: F403

if live_forks.address("CLASSIC") is None:
    pytest.skip("DYNFUSE_CLASSIC_URL names no running Forge Classic", allow_module_level=True)

MODELS = {
    "sd15": ("sd15tiny:sd15_a:sd15_b:sd15_c", {"foreign": "sdxlslim_b", "refiner": "sd15refiner"}),
    "sdxl": ("sdxlslim:sdxlslim_a:sdxlslim_b", {"foreign": "sd15_b"}),
}


@pytest.fixture(scope="module", params=live_forks.cases("CLASSIC", MODELS, hires={"hr_cfg": 5}), ids=lambda case: case.name)
def case(request):
    request.param.load()
    return request.param
