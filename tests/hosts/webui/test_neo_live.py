"""Checks on a running Forge Neo: DYNFUSE_NEO_URL=http://127.0.0.1:7862 pytest tests/hosts/webui/test_neo_live.py

docs/development.md says how to set one up, live_forks.py what else can be said.
"""

from __future__ import annotations

import pytest

from . import live_forks
from .live import difference
from .live_checks import *  # noqa: F403
from .live_checks import ROUNDING, with_refiner
from .live_guidance_checks import *  # noqa: F403

if live_forks.address("NEO") is None:
    pytest.skip("DYNFUSE_NEO_URL names no running Forge Neo", allow_module_level=True)

# Its shared.latent_upscale_modes is empty: there is no hires upscaler "Latent".
HIRES = {"hr_upscaler": "None", "hr_additional_modules": ["Use same choices"]}
FLOW = {"flow": True, "job": {"cfg_scale": 1, "distilled_cfg_scale": 3.5, "scheduler": "Simple"}, "hires": {**HIRES, "hr_cfg": 1}}
MODELS = {
    "sd15": ("sd15tiny:sd15_a:sd15_b:sd15_c", {"foreign": "sdxlslim_b", "refiner": "sd15refiner"}),
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


@pytest.mark.parametrize("fast", [False, True], ids=["another model", "other weights in the same modules"])
class TestRefiner:
    """Neo switches at a noise level unless it is told to count steps, never before the first step, and restores the model after the fast
    switch only where its own refiner panel is shown: start it with "show_refiner": true in config.json.
    """

    @pytest.fixture
    def settings(self, case, fast):
        settings = with_refiner(case, case.refiner)
        case.webui.options(refiner_use_steps=True, refiner_fast_sd=fast)
        yield settings
        case.webui.options(refiner_fast_sd=False)
        self.loaded_anew(case)

    @staticmethod
    def loaded_anew(case):
        """After a fast switch Neo keeps a job's own <lora:...> for the next (sd_samplers_common.py:303), with or without DynFuse."""
        case.webui.options(sd_model_checkpoint=case.refiner)
        case.pixels("a cat", steps=1)
        case.load()

    def test_both_models_are_fused(self, case, settings):
        fused = case.image(f"a cat {case.tag}", **settings)
        assert "Refiner:" in fused.infotext
        assert "not fused" not in fused.infotext
        assert difference(fused.pixels, case.pixels(f"a cat {case.tag}", steps=6)) > ROUNDING
        assert difference(fused.pixels, case.pixels("a cat", **settings)) > ROUNDING

    def test_direct_equals_the_webuis_own_merge(self, case, settings):
        direct = case.pixels(f"a cat {case.tag_with('method=direct')}", **settings)
        assert difference(direct, case.pixels(f"a cat {case.two_tags}", **settings)) <= ROUNDING

    def test_the_model_is_as_before_when_it_returns(self, case, plain, settings):
        case.image(f"a cat {case.tag}", **settings)
        case.load()
        assert difference(case.pixels("a cat"), plain) == 0
