"""Checks on a running Forge: DYNFUSE_FORGE_URL=http://127.0.0.1:7861 pytest tests/hosts/webui/test_forge_live.py

docs/development.md says how to set one up. The names of checkpoints and LoRAs can be given as DYNFUSE_FORGE_SD15, _SDXL, _FLUX,
_FLUX_SPLIT and _FLUX_GGUF, "checkpoint:subject:style[:other LoRA]"; the text encoders and the VAE of the last as
DYNFUSE_FORGE_FLUX_MODULES, "file:file:file". DYNFUSE_FORGE_PRISTINE_URL names a second Forge with the same files and without the
extension.
"""

from __future__ import annotations

import os

import pytest

from .live import Case, WebUI, difference
from .live_checks import *  # noqa: F403
from .live_checks import ROUNDING
from .live_guidance_checks import *  # noqa: F403
from .live_guidance_checks import GRADIENTS, tag, told

URL = os.environ.get("DYNFUSE_FORGE_URL")
PRISTINE = os.environ.get("DYNFUSE_FORGE_PRISTINE_URL")

if URL is None:
    pytest.skip("DYNFUSE_FORGE_URL names no running Forge", allow_module_level=True)

FLUX_MODULES = os.environ.get("DYNFUSE_FORGE_FLUX_MODULES", "fluxtiny_ae.safetensors:fluxtiny_clip_l.safetensors:fluxtiny_t5.safetensors")


def cases():
    webui = WebUI(URL)
    flow = {"cfg_scale": 1, "distilled_cfg_scale": 3.5}
    made = []
    for name, variable, names, job, settings in (
        ("sd15", "SD15", "sd15tiny:sd15_a:sd15_b", {}, {"foreign": "sdxl_b", "refiner": "sd15refiner"}),
        ("flux", "FLUX", "fluxtiny:flux_a:flux_b:flux_a_diffusers", flow, {"foreign": "sd15_b", "flow": True}),
        ("flux split", "FLUX_SPLIT", "fluxtiny:flux_a_diffusers:flux_b_diffusers:flux_a", flow, {"flow": True}),
        ("flux mixed", "FLUX_MIXED", "fluxtiny:flux_a:flux_b_diffusers", flow, {"flow": True}),
        ("flux gguf", "FLUX_GGUF", "fluxtiny_Q8_0:flux_a:flux_b", flow, {"flow": True, "requantises": True}),
        ("sdxl", "SDXL", "sdxltiny:sdxl_a:sdxl_b", {}, {"foreign": "sd15_b"}),
    ):
        checkpoint, subject, style, *other = os.environ.get(f"DYNFUSE_FORGE_{variable}", names).split(":")
        modules = FLUX_MODULES.split(":") if variable == "FLUX_GGUF" else []
        made.append(
            Case(
                name,
                webui,
                subject,
                style,
                {"sd_model_checkpoint": checkpoint, "forge_additional_modules": modules},
                # "Automatic" gives NaN latents with Flux, and a black image without a word.
                {"width": 64, "height": 64, "scheduler": "Simple", **job},
                other=other[0] if other else None,
                neighbours=made,
                pristine=WebUI(PRISTINE) if PRISTINE else None,
                hires={"hr_additional_modules": ["Use same choices"], "hr_cfg": job.get("cfg_scale", 5)},
                **settings,
            )
        )
    return made


@pytest.fixture(scope="module", params=cases(), ids=lambda case: case.name)
def case(request):
    request.param.load()
    return request.param


class TestQuantisedBase:
    """A merge into a quantised base is rounded again; our branches are not."""

    def test_the_fusion_is_that_of_the_exact_base_up_to_the_bases_own_rounding(self, case):
        if case.name != "flux gguf":
            pytest.skip("not quantised")
        exact = next(other for other in case.neighbours if other.name == "flux")
        direct = case.pixels(f"a cat {case.tag_with('method=direct')}")
        rounded = case.pixels("a cat")
        exact.load()
        off = abs(direct - exact.pixels(f"a cat {exact.tag_with('method=direct')}")).mean()
        base = abs(rounded - exact.pixels("a cat")).mean()
        case.load()
        assert off <= 3 * base + 1


class TestForgesStore:
    def test_a_plain_job_with_an_unknown_lora_is_what_it_is_without_us(self, case, plain):
        """There Forge's own load_networks fails halfway; it must not leave our text-encoder parts behind."""
        case.image(f"a cat {case.tag}")
        assert difference(case.pixels("a cat <lora:no such thing:1>"), plain) == 0

    def test_the_pair_is_fused_beside_an_unknown_lora(self, case, fused):
        assert difference(case.pixels(f"a cat {case.tag}<lora:no such thing:1>"), fused) <= ROUNDING


# Those that come with Forge and have a hand in the model's calls: their arguments, and whether they let gradients through.
EXTENSIONS = {
    "MultiDiffusion": ("MultiDiffusion Integrated", [True, "MultiDiffusion", 64, 64, 32, 2], False),
    "Mixture of Diffusers": ("MultiDiffusion Integrated", [True, "Mixture of Diffusers", 64, 64, 32, 2], False),
    "perturbed attention": ("PerturbedAttentionGuidance Integrated", [True, 3.0, 0.0, 0.0, 1.0], True),
    "Kohya HRFix": ("Kohya HRFix Integrated", [True, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"], True),
}


@pytest.mark.parametrize("extension", EXTENSIONS)
class TestForgesOwnExtensions:
    @pytest.fixture
    def settings(self, case, extension):
        if case.name != "sd15":
            pytest.skip("once is enough")
        title, arguments, _ = EXTENSIONS[extension]
        return {"width": 128, "height": 128, "alwayson_scripts": {title: {"args": arguments}}}

    def test_direct_equals_forges_own_merge_beside_it(self, case, settings):
        merged = case.pixels(f"a cat {case.two_tags}", **settings)
        assert difference(case.pixels(f"a cat {case.two_tags}", width=128, height=128), merged) > 5
        assert difference(case.pixels(f"a cat {case.tag_with('method=direct')}", **settings), merged) <= ROUNDING

    def test_a_batch_of_two_is_two_single_pictures_beside_it(self, case, settings):
        batch = case.pixels(f"a cat {case.tag}", batch_size=2, seed=20, **settings)
        singles = [case.pixels(f"a cat {case.tag}", seed=20 + i, **settings)[0] for i in range(2)]
        assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_pictures_are_guided_beside_it(self, guided, extension, settings, gradient):
        plain = guided.pixels("a cat", **settings)
        fused = guided.pixels(f"a cat {guided.tag}", **settings)
        moved = guided.pixels(f"a cat {tag(guided, gradient=gradient)}", **settings)
        assert difference(moved, fused) >= 2
        given_up = any("given up" in note for note in told(guided)["passes"][0]["notes"])
        assert given_up == (gradient == "exact" and not EXTENSIONS[extension][2])
        assert difference(guided.pixels("a cat", **settings), plain) == 0
