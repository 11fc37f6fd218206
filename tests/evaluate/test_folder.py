"""An evaluation's folder, read as it was written."""

import json

import pytest

from lib_dynfuse.evaluate.atomic import write_whole
from lib_dynfuse.evaluate.folder import Evaluation, EvaluationError, Method, Pair, Picture, is_name
from lib_dynfuse.evaluate.votes import Ballot, Vote, read_ballots, write_ballot


def evaluation(folder):
    pairs = (
        Pair("dog+ink", "dog", "ink", ("a dog in ink", "a dog, ink"), (folder / "references/subject/dog/01.png",), ()),
        Pair("cat+ink", "cat", "ink", ("a cat in ink",)),
    )
    methods = (Method("direct", settings={"method": "direct"}), Method("subject only", "subject"))
    return Evaluation(folder, "Dogs", pairs, methods, (3, 5), {"steps": 20})


def finish(found, *pictures):
    for picture in pictures:
        write_whole(found.path(picture), b"a picture")


def test_what_is_saved_is_opened_again_wherever_the_folder_has_gone(tmp_path):
    evaluation(tmp_path / "here").save()
    (tmp_path / "here").rename(tmp_path / "there")
    assert Evaluation.open(tmp_path / "there") == evaluation(tmp_path / "there")


def test_a_trial_has_the_finished_pictures_of_a_pair_a_prompt_and_a_seed(tmp_path):
    found = evaluation(tmp_path)
    one, other = Picture("dog+ink", "direct", 1, 5), Picture("dog+ink", "subject only", 1, 5)
    finish(found, one, other, Picture("cat+ink", "subject only", 0, 3))
    (tmp_path / "pictures/cat+ink/direct").mkdir()
    (tmp_path / "pictures/cat+ink/direct/.0-3.png.1-ab.part").write_bytes(b"half")
    trials = {(trial.pair.name, trial.prompt, trial.seed): trial for trial in found.trials()}
    assert set(trials) == {("dog+ink", 1, 5), ("cat+ink", 0, 3)}
    assert dict(trials["dog+ink", 1, 5].pictures) == {"direct": found.path(one), "subject only": found.path(other)}
    assert list(trials["dog+ink", 1, 5].pictures) == ["direct", "subject only"]
    assert trials["dog+ink", 1, 5].text == "a dog, ink"
    assert [trial.pair.name for trial in found.trials(["direct"])] == ["dog+ink"]


def test_every_pair_prompt_seed_and_method_is_one_picture(tmp_path):
    pictures = list(evaluation(tmp_path).pictures())
    assert len(pictures) == len({picture.file for picture in pictures}) == (2 + 1) * 2 * 2


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 1}', '{"format": 2, "pairs": []}'])
def test_a_folder_without_an_evaluation_is_refused_in_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"evaluation\.json.*\.$"):
        Evaluation.open(tmp_path)


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "a:b", "dot.", "space ", "x" * 81, "a\nb", 'a"b'])
def test_names_that_are_no_folder_everywhere_are_refused(name):
    assert not is_name(name)


@pytest.mark.parametrize("name", ["dog+ink", "selection bias=2", "Hund (groß)", "m=0.5", "dot"])
def test_names_in_plain_words_are_taken(name):
    assert is_name(name)


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_votes_are_read_as_they_were_written_with_whatever_else_they_hold(tmp_path):
    entry = {"pair": "dog+ink", "prompt": 0, "seed": 3, "shown": ["b", "a"], "chosen": "a", "seconds": 2.5}
    write_ballot(tmp_path, "anna", {"kind": "study", "voter": "Anna", "question": "Which?", "votes": [entry, {**entry, "chosen": None}]})
    votes = Vote("dog+ink", 0, 3, ("b", "a"), "a"), Vote("dog+ink", 0, 3, ("b", "a"), None)
    assert read_ballots(tmp_path) == [Ballot("anna", "study", "Anna", "Which?", votes)]


@pytest.mark.parametrize("votes", [None, [{"pair": "a"}], [{"pair": "a", "prompt": 0, "seed": 1, "shown": ["x"], "chosen": "y"}]])
def test_a_file_that_holds_no_votes_is_named(tmp_path, votes):
    (tmp_path / "votes").mkdir()
    (tmp_path / "votes" / "broken.json").write_text(json.dumps({"kind": "study", "voter": "", "question": "", "votes": votes}))
    with pytest.raises(EvaluationError, match=r"broken\.json"):
        read_ballots(tmp_path)
