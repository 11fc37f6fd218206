"""The judges, and the flawed pictures that they learn from."""

import random

import pytest
import torch

from dynfuse_world.judges import NONE, OTHER, STYLE_NAMES, SUBJECT_NAMES, Judges, load_judges
from dynfuse_world.model import WEIGHTS
from dynfuse_world.painter import CLASSES, HELD_OUT_STYLES, JUNK, STYLES, SUBJECTS, Scene
from dynfuse_world.training import judges as training
from dynfuse_world.training.flawed import KINDS, batch, example
from dynfuse_world.training.pictures import as_floats, as_tensor

SEED = 424_242  # of no training


def pictures_of(scenes):
    return as_floats(as_tensor(scenes, random.Random(SEED)))


def examples_of(kind, count):
    rng = random.Random(f"{SEED} {kind}")
    return batch([example(kind, rng) for _ in range(count)], SUBJECT_NAMES, STYLE_NAMES)


@pytest.fixture(scope="module")
def judges():
    return load_judges(WEIGHTS / "judges.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_picture_shows_adds_up_to_one(kind):
    pictures, subjects, styles = examples_of(kind, 12)
    assert pictures.shape == (12, 3, 64, 64)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    torch.testing.assert_close(subjects.sum(1), torch.ones(12))
    torch.testing.assert_close(styles.sum(1), torch.ones(12))


def test_a_subject_with_exchanged_parts_is_none_where_that_shows():
    for kind in ("two parts", "three parts"):
        _, subjects, _ = examples_of(kind, 60)
        shares = subjects[:, [SUBJECT_NAMES.index(name) for name in SUBJECTS]].sum(1)
        assert shares.mean() < 0.05
        assert shares.max() <= 0.6


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="64"):
        Judges().eval().scores(torch.zeros(1, 3, 32, 32))


def test_a_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_POOL", 96)
    monkeypatch.setattr(training, "_CALIBRATED", 96)
    work, weights = tmp_path / "work", tmp_path / "weights"
    training.train_judges(work, weights, steps=1)
    first = load_judges(weights / "judges.safetensors")
    record = training.train_judges(work, weights, steps=3)
    second = load_judges(weights / "judges.safetensors")
    assert record["steps"] == 3
    assert torch.load(work / "judges.pt", weights_only=True)["step"] == 3
    assert not torch.equal(first.of_style.answer.weight, second.of_style.answer.weight)


def test_the_shipped_judges_name_what_they_have_never_seen(judges):
    things, styles = [*CLASSES, *SUBJECTS], [*STYLES, *HELD_OUT_STYLES]
    scenes = [Scene(what, style) for what in things for style in styles]
    scores = judges.scores(pictures_of(scenes))
    subjects = [SUBJECT_NAMES[number] for number in scores.subject_probabilities.argmax(1)]
    named = [STYLE_NAMES[number] for number in scores.style_probabilities.argmax(1)]
    assert sum(name == scene.what for name, scene in zip(subjects, scenes)) >= 0.93 * len(scenes)
    assert sum(name == scene.style for name, scene in zip(named, scenes)) >= 0.93 * len(scenes)


def test_the_shipped_judges_do_not_take_a_near_miss_for_a_subject(judges):
    for kind, most in (("one part", 0.35), ("two parts", 0.1), ("three parts", 0.05)):
        pictures, shares, _ = examples_of(kind, 80)
        subjects = [SUBJECT_NAMES.index(name) for name in SUBJECTS]
        shows = shares[:, subjects].sum(1) == 0
        taken = judges.scores(pictures[shows]).subject_probabilities[:, subjects].amax(1) > 0.5
        assert taken.float().mean() <= most, kind


def test_shapes_without_an_object_are_none_and_a_style_without_a_name_is_other(judges):
    junk = judges.scores(pictures_of([Scene(JUNK, style) for style in STYLES for _ in range(6)]))
    assert (junk.subject(NONE) > 0.5).float().mean() >= 0.85
    nameless = judges.scores(pictures_of([Scene(what, None) for what in CLASSES for _ in range(4)]))
    assert (nameless.style(OTHER) > 0.5).float().mean() >= 0.75
