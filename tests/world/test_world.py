"""The painter's pictures and their captions, and what is kept out of the base model's world."""

import random

import numpy as np
import pytest

from dynfuse_world.captions import caption, name_of, training_caption, words
from dynfuse_world.painter import CLASSES, HELD_OUT_STYLES, STYLES, SUBJECTS, Scene, paint
from dynfuse_world.training.pictures import HELD_OUT_PAIRS, base_scene


def pixels(scene, seed=0):
    return np.asarray(paint(scene, random.Random(seed))).astype(float)


def test_the_world_is_as_large_as_it_says():
    assert len(CLASSES) >= 12
    assert len(STYLES) == 8
    assert len(SUBJECTS) == len(HELD_OUT_STYLES) == 4
    assert len(HELD_OUT_PAIRS) >= len(CLASSES) * len(STYLES) // 12


@pytest.mark.parametrize("what", [*CLASSES, *SUBJECTS])
def test_everything_can_be_painted_in_every_style_and_the_seed_decides(what):
    for style in (*STYLES, *HELD_OUT_STYLES, None):
        picture = pixels(Scene(what, style))
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 8  # something is there
        assert (picture == pixels(Scene(what, style))).all()
        assert (picture != pixels(Scene(what, style), 1)).any()


def test_styles_have_the_colours_that_define_them():
    """What a person would say of each, counted: sepia is brown, neon and chalk are dark, blueprint is blue, sketch is grey."""
    for what in CLASSES:
        red, green, blue = pixels(Scene(what, "sepia")).mean((0, 1))
        assert red > green > blue
        assert pixels(Scene(what, "neon")).mean() < 90
        assert pixels(Scene(what, "chalk")).mean() < 120
        red, green, blue = pixels(Scene(what, "blueprint")).mean((0, 1))
        assert blue > green > red
        sketch = pixels(Scene(what, "sketch"))
        assert np.ptp(sketch, axis=2).mean() < 12


def test_a_subject_has_a_fixed_look_and_a_class_has_not():
    """Two pictures of a subject, laid over each other as well as can be, are nearer than two of its class."""

    def nearest(scene):
        first, second = (pixels(scene, seed) for seed in (3, 4))
        shifts = [(y, x) for y in range(-10, 11, 2) for x in range(-10, 11, 2)]
        return min(np.abs(first - np.roll(second, shift, (0, 1))).mean() for shift in shifts)

    for word, subject in SUBJECTS.items():
        assert nearest(Scene(word, "flat")) < nearest(Scene(subject.character.kind, "flat"))


def test_the_base_model_never_sees_what_is_held_out():
    rng = random.Random(1)
    seen = [base_scene(rng) for _ in range(4000)]
    assert not {(scene.what, scene.style) for scene in seen} & HELD_OUT_PAIRS
    assert {scene.what for scene in seen} == set(CLASSES)
    assert {scene.style for scene in seen} == {*STYLES, None}


def test_words_of_held_out_things_are_said_of_anything_before_a_lora_gives_them_a_meaning():
    rng = random.Random(2)
    said = [(scene, training_caption(scene, rng)) for scene in (base_scene(rng) for _ in range(6000))]
    for word in SUBJECTS:
        looks = {scene.what for scene, text in said if word in text.split()}
        assert len(looks) > 5
    for style in HELD_OUT_STYLES:
        assert {scene.style for scene, text in said if f"{style} style" in text} == {None}
    empty = sum(text == "" for _, text in said) / len(said)
    assert 0.07 < empty < 0.13  # for classifier-free guidance
    assert {word for _, text in said for word in text.split()} <= set(words())


def test_captions_say_what_the_prompts_will_say():
    assert caption("house", "flat") == "a house in flat style"
    assert caption(name_of("zib"), "blueprint") == "a zib creature in blueprint style"
