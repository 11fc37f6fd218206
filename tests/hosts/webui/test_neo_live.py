"""Checks on a running Forge Neo: DYNFUSE_NEO_URL=http://127.0.0.1:7862 pytest tests/hosts/webui/test_neo_live.py

docs/development.md says how to set one up, live_forks.py what else can be said.
"""

from __future__ import annotations

import pytest

from . import live_forks
from .live_checks import *  # noqa: F403
from .live_guidance_checks import *  # noqa: F403

if live_forks.address("NEO") is None:
    pytest.skip("DYNFUSE_NEO_URL names no running Forge Neo", allow_module_level=True)

# Its shared.latent_upscale_modes is empty: there is no hires upscaler "Latent".
HIRES = {"hr_upscaler": "None", "hr_additional_modules": ["Use same choices"]}
FLOW = {"flow": True, "job": {"cfg_scale": 1, "distilled_cfg_scale": 3.5, "scheduler": "Simple"}, "hires": {**HIRES, "hr_cfg": 1}}
MODELS = {
    "sd15": ("sd15tiny:sd15_a:sd15_b", {"foreign": "sdxlslim_b"}),
    "sdxl": ("sdxlslim:sdxlslim_a:sdxlslim_b", {"foreign": "sd15_b"}),
    "flux": ("fluxtiny:flux_a:flux_b:flux_a_diffusers", {"foreign": "sd15_b", **FLOW}),
    "chroma": ("chromatiny:chroma_a:chroma_b", FLOW),
    "zimage": ("zimagetiny:zimage_a:zimage_b", FLOW),
    "qwen": ("qwentiny:qwen_a:qwen_b", FLOW),
}


@pytest.fixture(scope="module", params=live_forks.cases("NEO", MODELS, hires={**HIRES, "hr_cfg": 5}), ids=lambda case: case.name)
def case(request):
    request.param.load()
    return request.param
