"""What is tried, and how small."""

from __future__ import annotations

import pytest

from lib_dynfuse.lora import smallest_side
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.tuning.plan import STEPS, Frame, applied, candidates, described, small_frame


@pytest.mark.parametrize(
    "settings",
    [
        FuseSettings(),
        FuseSettings(contrast=0.5, tilt=-0.3),
        FuseSettings(method="dynfuse"),
        FuseSettings(tilt=1.0),
        FuseSettings(tilt=-0.95),
    ],
)
def test_the_present_settings_come_first_and_nothing_twice(settings):
    plan = [applied(settings, changes) for changes in candidates(settings)]
    assert plan[0] == settings
    labels = [described(tried) for tried in plan]
    assert len(labels) == len(set(labels))
    assert 4 <= len(plan) <= 12


def test_tilts_go_either_way_from_the_present_one_at_several_contrasts():
    plan = candidates(FuseSettings(tilt=0.1, contrast=0.0))
    assert {changes["tilt"] for changes in plan} == {0.1, -0.05, 0.25}
    assert {changes["contrast"] for changes in plan} == {0.0, 1.0, 2.0, 3.0}
    assert len(plan) == 12


def test_a_method_without_a_contrast_of_its_own_is_tried_without_one():
    assert described(applied(FuseSettings(method="dynfuse"), candidates(FuseSettings(method="dynfuse"))[0])) == "tilt 0, contrast 0"
    assert described(FuseSettings()) == "tilt 0, contrast 1.5"


def test_small_pictures_are_neither_guided_nor_tuned():
    settings = FuseSettings(guidance=True, tune="auto", m=3.0)
    assert applied(settings, {"tilt": 0.2, "contrast": 2.0}) == FuseSettings(m=3.0, tilt=0.2, contrast=2.0)


@pytest.mark.parametrize(
    ("size", "family", "small"),
    [
        ((512, 512), "SD 1.x", (384, 384)),
        ((512, 768), "SD 1.x", (320, 448)),
        ((1024, 1024), "SDXL", (640, 640)),
        ((832, 1216), "SDXL", (512, 768)),
        ((1024, 1024), "Flux", (512, 512)),
        ((1024, 1024), None, (512, 512)),
        ((256, 384), "SD 1.x", (256, 384)),
        ((64, 64), "SD 1.x", (64, 64)),
        ((4096, 64), "SD 1.x", (3072, 64)),
    ],
)
def test_they_are_small_and_of_the_same_aspect(size, family, small):
    assert small_frame(*size, 30, smallest_side(family)) == Frame(*small, STEPS)


def test_a_job_of_few_steps_keeps_them():
    assert small_frame(512, 512, 4, 384).steps == 4
