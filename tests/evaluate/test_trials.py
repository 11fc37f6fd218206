"""What there is to ask about: in an evaluation's folder, and in a folder of pictures from elsewhere; and what voters get to see of it."""

import io

import numpy as np
import pytest
from PIL import Image

from lib_dynfuse.evaluate.atomic import write_whole
from lib_dynfuse.evaluate.folder import Evaluation, EvaluationError, Method, Pair, Picture
from lib_dynfuse.evaluate.shown import bare, fitted, png, webp_url
from lib_dynfuse.evaluate.trials import comparable, open_trials
from tests.evaluate.folders import METHODS, method_of, plain_folder


def test_a_plain_folders_pictures_of_one_name_are_one_trial(tmp_path):
    plain_folder(tmp_path, pairs=1, seeds=2)
    place = tmp_path / "pair 0"
    (place / "klora" / "1.png").rename(place / "klora" / "1-7.JPG")
    (place / "klora" / "notes.png").write_bytes(b"")
    (place / "prompt.txt").write_text("a dog\na cat\n")
    (place / "subject.png").rename(place / "subject-1.png")
    (place / "subject-2.webp").write_bytes(b"")
    (tmp_path / "votes").mkdir()
    trials, methods = open_trials(tmp_path)
    assert methods == tuple(sorted(METHODS))
    assert [(trial.prompt, trial.seed, trial.text, sorted(trial.pictures)) for trial in trials] == [
        (0, 0, "a dog", sorted(METHODS)),
        (0, 1, "a dog", sorted(set(METHODS) - {"klora"})),
        (1, 7, "a cat", ["klora"]),
    ]
    assert [path.name for path in trials[0].pair.subject_references] == ["subject-1.png", "subject-2.webp"]


def test_of_an_evaluation_the_methods_with_both_loras_or_one_file_of_both_are_compared(tmp_path):
    named = Method("sum", settings={"method": "direct"}), Method("subject only", "subject"), Method("balanced"), Method("zip", "merged")
    methods = (*named, Method("never made"))
    evaluation = Evaluation(tmp_path, "", (Pair("p", "a", "b", ("a dog",)),), methods, (1,))
    evaluation.save()
    for name in ("sum", "subject only", "balanced", "zip"):
        write_whole(evaluation.path(Picture("p", name, 0, 1)), b"a picture")
    trials, compared = open_trials(tmp_path)
    assert compared == ("sum", "balanced", "zip")
    assert sorted(trials[0].pictures) == ["balanced", "subject only", "sum", "zip"]


def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path):
    with pytest.raises(EvaluationError, match=r"no folder .*\.$"):
        open_trials(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"PAIR/METHOD/SEED\.png.*\.$"):
        open_trials(tmp_path)
    trials, methods = open_trials(plain_folder(tmp_path, pairs=1, seeds=1))
    with pytest.raises(EvaluationError, match="method nobody; there are of balanced, direct"):
        comparable(trials, ["direct", "nobody"], 2)
    (tmp_path / "pair 0" / "klora" / "0.png").unlink()
    with pytest.raises(EvaluationError, match="No pair, prompt and seed has pictures of 4"):
        comparable(open_trials(tmp_path)[0], [*methods[:2], methods[3]], 4)
    (tmp_path / "pair 0" / "style.png").unlink()
    with pytest.raises(EvaluationError, match="reference pictures of both"):
        comparable(open_trials(tmp_path)[0], methods[:2], 2)


def test_voters_get_the_pixels_and_nothing_that_names_the_method(tmp_path):
    path = plain_folder(tmp_path) / "pair 0" / "klora" / "0.png"
    assert b"klora" in path.read_bytes()
    content = png(path)
    assert b"klora" not in content
    assert Image.open(io.BytesIO(content)).info == {}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(path)))
    assert "klora" not in webp_url(path, 100)


def test_pictures_are_upright_and_on_white(tmp_path):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    pixels = np.asarray(bare(tmp_path / "a.png"))
    assert pixels[-1, -1].tolist() == [0, 0, 255]
    assert (pixels.reshape(-1, 3)[:-1] == 255).all()


def test_pictures_are_made_smaller_in_proportion_and_never_larger():
    assert fitted(Image.new("RGB", (400, 200)), 100).size == (100, 50)
    assert fitted(Image.new("RGB", (40, 20)), 100).size == (40, 20)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"a\.png is no"):
        bare(tmp_path / "a.png")


def test_the_colours_tell_the_methods_apart(tmp_path):
    folder = plain_folder(tmp_path, pairs=1, seeds=1) / "pair 0"
    assert {method: method_of(bare(folder / method / "0.png")) for method in METHODS} == {method: method for method in METHODS}
