"""Checks on a running A1111: DYNFUSE_A1111_URL=http://127.0.0.1:7860 pytest tests/hosts/webui/test_a1111_live.py

docs/development.md says how to set one up. The names of checkpoints and LoRAs can be given as DYNFUSE_A1111_SD15, _SD15_TEXT and _SDXL,
"checkpoint:subject:style[:other LoRA]". DYNFUSE_A1111_PRISTINE_URL names a second A1111 with the same files and without the extension
(--disable-extra-extensions).
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

from .live import Case, WebUI, difference
from .live_checks import *  # noqa: F403
from .live_checks import ROUNDING
from .live_guidance_checks import *  # noqa: F403

URL = os.environ.get("DYNFUSE_A1111_URL")
PRISTINE = os.environ.get("DYNFUSE_A1111_PRISTINE_URL")

if URL is None:
    pytest.skip("DYNFUSE_A1111_URL names no running A1111", allow_module_level=True)


def cases():
    webui = WebUI(URL)
    made = []
    for name, names, settings in (
        ("sd15", os.environ.get("DYNFUSE_A1111_SD15", "tiny15:subj:sty:subjte"), {"foreign": "xlsty", "refiner": "tiny15refiner"}),
        ("sd15 with text encoder", os.environ.get("DYNFUSE_A1111_SD15_TEXT", "tiny15:subjte:sty:subj"), {}),
        ("sdxl", os.environ.get("DYNFUSE_A1111_SDXL", "tinyxl:xlsubj:xlsty"), {"foreign": "sty"}),
    ):
        checkpoint, subject, style, *other = names.split(":")
        made.append(
            Case(
                name,
                webui,
                subject,
                style,
                {"sd_model_checkpoint": checkpoint},
                {"width": 64, "height": 64},
                other=other[0] if other else None,
                neighbours=made,
                pristine=WebUI(PRISTINE) if PRISTINE else None,
                **settings,
            )
        )
    return made


@pytest.fixture(scope="module", params=cases(), ids=lambda case: case.name)
def case(request):
    request.param.load()
    return request.param


@pytest.fixture
def option(case):
    """Set an option for one test: option(name, value)."""
    before = case.webui.call("/sdapi/v1/options")
    changed = []

    def set_option(name, value):
        changed.append(name)
        case.webui.options(**{name: value})

    yield set_option
    case.webui.options(**{name: before[name] for name in changed})


@pytest.fixture
def rows_apart(option):
    """A context in which A1111 makes a call for each prompt of each image, and for each negative prompt."""

    @contextmanager
    def apart():
        option("batch_cond_uncond", False)
        yield {}

    return apart()


class TestRowsOfA1111:
    def test_calls_of_one_image_each_give_the_image_of_one_call(self, case, option):
        together = case.pixels(f"a cat AND a dog {case.tag}", batch_size=2)
        option("batch_cond_uncond", False)
        assert difference(case.pixels(f"a cat AND a dog {case.tag}", batch_size=2), together) <= ROUNDING

    def test_a_skipped_negative_prompt(self, case, option):
        option("skip_early_cond", 0.5)
        batch = case.pixels(f"a cat {case.tag}", batch_size=2, steps=4)
        singles = [case.pixels(f"a cat {case.tag}", seed=1 + i, steps=4)[0] for i in range(2)]
        assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING

    def test_padded_prompts(self, case, option):
        option("pad_cond_uncond", True)
        prompt = " ".join(["a cat on a mat"] * 20)
        batch = case.pixels(f"{prompt} {case.tag}", batch_size=2)
        singles = [case.pixels(f"{prompt} {case.tag}", seed=1 + i)[0] for i in range(2)]
        assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING


class TestLoraExtension:
    def test_direct_equals_the_merge_under_the_functional_option(self, case, option):
        option("lora_functional", True)
        two = case.pixels(f"a cat {case.two_tags}")
        assert difference(case.pixels(f"a cat {case.tag_with('method=direct')}"), two) <= ROUNDING

    def test_unmatched_keys_are_named(self, case):
        if case.name != "sd15":
            pytest.skip("the file with an impossible key is for SD 1.5")
        fused = case.image(f"a cat <dynfuse:badkeys:{case.style}>")
        assert "badkeys" in fused.info["extra_generation_params"]["DynFuse note"]
