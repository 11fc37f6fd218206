"""The score against float64 by hand, the choice, and what is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.references import Reference, ReferenceCache, ReferenceKey
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.tuning import sheet
from lib_dynfuse.tuning.kept import digest_of, keep, known
from lib_dynfuse.tuning.plan import Frame, candidates
from lib_dynfuse.tuning.score import Score, scored
from lib_dynfuse.tuning.search import best_of, search

ASKED = FuseSettings(subject="dog", style="ink", tune="auto")
FRAME = Frame(8, 6, 5)


def unit(rng, size):
    vector = rng.standard_normal(size)
    return vector / np.linalg.norm(vector)


def embeddings(clip, dino):
    return Embeddings(*(torch.tensor(x, dtype=torch.float32)[None] for x in (clip, dino)))


@pytest.mark.parametrize("seed", range(20))
def test_the_score_is_the_harmonic_mean_of_both_positions(seed):
    rng = np.random.default_rng(seed)
    subject, style = ((unit(rng, 6), unit(rng, 5)) for _ in range(2))
    mixed = [a * subject[i] + (1 - a) * style[i] + 0.1 * unit(rng, len(subject[i])) for i, a in enumerate(rng.random(2))]
    picture = [x / np.linalg.norm(x) for x in mixed]
    found = scored(embeddings(*picture), embeddings(*subject), embeddings(*style))
    clip_far, dino_far = subject[0] @ style[0], subject[1] @ style[1]
    of_subject = (picture[0] @ subject[0] - clip_far) / (1 - clip_far)
    far = (clip_far + dino_far) / 2
    of_style = ((picture[0] @ style[0] + picture[1] @ style[1]) / 2 - far) / (1 - far)
    of_subject, of_style = (min(1, max(0, x)) for x in (of_subject, of_style))
    assert (found.subject, found.style) == pytest.approx((of_subject, of_style), abs=1e-6)
    expected = 0 if of_subject + of_style == 0 else 2 * of_subject * of_style / (of_subject + of_style)
    assert found.total == pytest.approx(expected, abs=1e-6)


def test_each_reference_is_all_of_its_side_and_nothing_of_the_other():
    rng = np.random.default_rng(0)
    subject, style = (embeddings(unit(rng, 6), unit(rng, 5)) for _ in range(2))
    assert scored(subject, subject, style) == Score(pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert scored(style, subject, style) == Score(pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))


def test_two_references_that_are_one_picture_tell_nothing():
    one = embeddings(unit(np.random.default_rng(0), 6), unit(np.random.default_rng(1), 5))
    assert scored(one, one, one).total == 0


def test_one_side_alone_is_worth_nothing():
    assert Score(1.0, 0.0).total == Score(0.0, 0.0).total == 0
    assert Score(0.4, 0.4).total == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("totals", "best"),
    [((0.5, 0.51, 0.515), 0), ((0.5, 0.53, 0.56), 2), ((0.5, 0.56, 0.56), 1), ((0.6, 0.1, 0.2), 0), ((0.0, 0.0, 0.0), 0)],
)
def test_the_present_settings_stay_unless_another_is_clearly_better(totals, best):
    assert best_of([Score(total, total) for total in totals]) == best


class ByColour:
    """Encoders for which a picture's colour is its direction: red the subject's, green the style's."""

    def embed_picture(self, picture):
        colour = np.asarray(picture, dtype=np.float64).reshape(-1, 3).mean(0)
        direction = torch.tensor(colour / np.linalg.norm(colour), dtype=torch.float32)[None]
        return Embeddings(direction, direction)


@pytest.fixture
def found():
    """A search in which more style and a contrast of 2 makes the even mixture of red and green."""
    seen = []

    def picture(settings, number, total):
        seen.append((number, total))
        assert settings.tune == "off"
        green = 120 if settings.tilt > 0 and settings.contrast == 2 else 30 + 2 * number
        return Image.new("RGB", (8, 6), (120, green, 0))

    encoders = ByColour()
    references = [
        Reference(side, image, encoders.embed_picture(image), "p")
        for side, image in (("subject", Image.new("RGB", (8, 6), "red")), ("style", Image.new("RGB", (8, 6), (0, 255, 0))))
    ]
    result = search(ASKED, FRAME, references, encoders, picture)
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]
    return result


def test_the_search_takes_the_best(found):
    assert len(found.tried) == len(candidates(ASKED))
    assert found.settings(ASKED) == FuseSettings(subject="dog", style="ink", tilt=0.15, contrast=2.0)
    assert found.tried[found.best].score.total == pytest.approx(2**-0.5, abs=1e-6)


def test_it_says_what_it_found(found):
    assert "tilt 0.15, contrast 2, score 0.71" in found.sentence
    assert "as asked (tilt 0, contrast 1.5)" in found.sentence
    assert "8x6 and 5 steps" in found.sentence
    lines = found.table()
    assert len(lines) == len(found.tried) + 1
    assert [line.startswith("*") for line in lines].index(True) == found.best + 1


class TestKept:
    KEY = ReferenceKey(
        *("subject", "base", "vae", "lora", 1.0, 1.0, "", "a dog", "", 1, "Euler", "", 12, 7.0, 64, 64, 1, "encoders"),
    )

    def test_what_was_found_is_found_again(self, found, tmp_path):
        cache = ReferenceCache(tmp_path)
        assert known(cache, "a" * 40) is None
        keep(cache, "a" * 40, found, "a dog")
        again = known(cache, "a" * 40)
        assert again.settings(ASKED) == found.settings(ASKED)
        assert (again.best, again.frame, again.sentence) == (found.best, found.frame, found.sentence)
        for one, other in zip(again.tried, found.tried, strict=True):
            assert (dict(one.changes), one.label, one.score) == (dict(other.changes), other.label, other.score)
            assert one.picture.tobytes() == other.picture.tobytes()
        assert [(entry.side, entry.prompt) for entry in cache.entries()] == [("tuned", "a dog")]

    def test_one_that_was_tampered_with_is_none(self, found, tmp_path):
        cache = ReferenceCache(tmp_path)
        keep(cache, "a" * 40, found, "a dog")
        path = tmp_path / f"{'a' * 40}.png"
        path.write_bytes(path.read_bytes()[:-40])
        assert known(cache, "a" * 40) is None
        assert not path.exists()

    @pytest.mark.parametrize("about", [{"tried": [], "best": 0, "frame": {}}, {"tried": [{"changes": {}}], "best": 0, "frame": {}}, {}])
    def test_one_of_another_version_is_none(self, tmp_path, about):
        cache = ReferenceCache(tmp_path)
        cache.keep_entry("a" * 40, Image.new("RGB", (4, 4)), json.loads(json.dumps({"side": "tuned", "prompt": "", **about})))
        assert known(cache, "a" * 40) is None

    def test_its_name_follows_from_all_that_the_small_pictures_are_made_with(self):
        def name(settings=ASKED, prompt="a dog", **key):
            return digest_of([ReferenceKey(**{**vars(self.KEY), **key})] * 2, settings, prompt)

        same = [
            name(),
            name(FuseSettings(**{**ASKED.non_default(), "guidance": True, "m": 3.0, "hr": "0.5", "reference_seed": 1})),
            name(FuseSettings(**{**ASKED.non_default(), "subject": "hound"})),  # its contents are in the reference's key
        ]
        others = [
            name(prompt="a cat"),
            *(
                name(**{field: value})
                for field, value in (("lora", "x"), ("checkpoint", "x"), ("seed", 2), ("steps", 8), ("encoders", "x"))
            ),
            *(
                name(FuseSettings(**{**ASKED.non_default(), field: value}))
                for field, value in (("contrast", 0.5), ("tilt", 0.1), ("method", "direct"), ("bias", 2.0), ("subject_image", "0" * 16))
            ),
        ]
        assert len(set(same)) == 1
        assert len({same[0], *others}) == 1 + len(others)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_a_sheet_is_taken_apart_again(count):
    pictures = [Image.new("RGB", (7, 5), (20 * n, 0, 0)) for n in range(count)]
    again = sheet.ungrid(sheet.grid(pictures), count)
    assert [picture.tobytes() for picture in again] == [picture.tobytes() for picture in pictures]


def test_the_contact_sheet_holds_every_picture_and_frames_the_best(found):
    drawn = sheet.draw(found)
    pixels = np.asarray(drawn)
    for one in found.tried:
        colour = np.asarray(one.picture)[0, 0]
        assert (pixels == colour).all(-1).sum() >= 8 * 6
    framed = (pixels == np.array([0x2A, 0x9D, 0x5C])).all(-1)
    columns = sheet.columns_of(len(found.tried))
    cell = (drawn.width // columns, drawn.height // -(-len(found.tried) // columns))
    rows, places = np.nonzero(framed)
    assert {int(row) // cell[1] * columns + int(place) // cell[0] for row, place in zip(rows, places)} == {found.best}
