"""Checks on a running reForge: DYNFUSE_REFORGE_URL=http://127.0.0.1:7863 pytest tests/hosts/webui/test_reforge_live.py

docs/development.md says how to set one up, live_forks.py what else can be said.
"""

from __future__ import annotations

import pytest

from . import live_forks
from .live import difference
from .live_checks import *  # noqa: F403
from .live_checks import with_refiner
from .live_guidance_checks import *  # noqa: F403

if live_forks.address("REFORGE") is None:
    pytest.skip("DYNFUSE_REFORGE_URL names no running reForge", allow_module_level=True)

MODELS = {
    "sd15": ("sd15tiny:sd15_a:sd15_b:sd15_c", {"foreign": "sdxlslim_b", "refiner": "sd15refiner"}),
    "sdxl": ("sdxlslim:sdxlslim_a:sdxlslim_b", {"foreign": "sd15_b"}),
}


@pytest.fixture(scope="module", params=live_forks.cases("REFORGE", MODELS, hires={"hr_cfg": 5}), ids=lambda case: case.name)
def case(request):
    request.param.load()
    return request.param


def test_a_model_that_stays_loaded_beside_the_refiner_is_as_before(case, plain):
    settings = with_refiner(case, case.refiner)
    case.webui.options(sd_checkpoints_limit=2)
    try:
        case.image(f"a cat {case.tag}", **settings)
        assert difference(case.pixels("a cat"), plain) == 0
    finally:
        case.webui.options(sd_checkpoints_limit=1)
