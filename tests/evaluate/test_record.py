"""Plans that share a folder, and a folder that is never made to mean something else."""

from __future__ import annotations

import pytest

from lib_dynfuse.evaluate.claims import Claims
from lib_dynfuse.evaluate.folder import Evaluation, EvaluationError
from lib_dynfuse.evaluate.record import recorded
from tests.evaluate.plans import PLAN, plan_in, write_lora


def record(folder, text=PLAN, name="test"):
    with Claims() as claims:
        return recorded(plan_in(folder, text, name), claims)


def test_the_folder_has_the_plan_and_copies_of_its_references(tmp_path):
    found = record(tmp_path)
    assert Evaluation.open(tmp_path / "out") == found
    (pair,) = found.pairs
    assert [path.read_bytes() for path in pair.subject_references] == [
        (tmp_path / f"references/dog/{number}.png").read_bytes() for number in range(2)
    ]
    assert (tmp_path / "out/test.toml").read_text() == PLAN
    assert {method.name: dict(method.settings) for method in found.methods} == {"direct": {"method": "direct"}, "default": {}}
    assert record(tmp_path) == found


def test_a_second_plan_adds_to_it_and_sees_its_own_part(tmp_path):
    record(tmp_path)
    more = PLAN.replace("[1, 2]", "[2, 3]").replace("[methods.default]", '[methods.best]\npreset = "best"')
    own = record(tmp_path, more, "more")
    assert (own.method_names, own.seeds) == (("direct", "best"), (2, 3))
    every = Evaluation.open(tmp_path / "out")
    assert (every.method_names, every.seeds) == (("direct", "default", "best"), (1, 2, 3))


@pytest.mark.parametrize(
    ("old", "new", "piece"),
    [
        ("steps = 4", "steps = 5", "steps is 5 here and 4 there"),
        ("[methods.default]", "[methods.default]\ncontrast = 2", "method default has other settings"),
        ('words = "sks dog"', 'words = "dog"', "pair dog\\+ink has other prompts"),
        ('words = "sks dog"', 'words = "sks dog"\nweight = 0.5', "subject dog has other LoRAs, another weight"),
        ('["references/dog"]', '["references/ink.png"]', "subject dog has another reference picture"),
        ('["references/dog"]', '["references/dog/0.png"]', "pair dog\\+ink has other prompts or reference pictures"),
    ],
)
def test_what_contradicts_the_folder_is_refused(tmp_path, old, new, piece):
    before = record(tmp_path)
    with pytest.raises(EvaluationError, match=piece):
        record(tmp_path, PLAN.replace(old, new))
    assert Evaluation.open(tmp_path / "out") == before


def test_a_merged_file_that_has_changed_under_its_name_is_refused(tmp_path):
    zipped = tmp_path / "dog-ink.safetensors"
    write_lora(zipped)
    text = PLAN + '[methods.zip]\nmerged = "{subject}-{style}.safetensors"\n'
    record(tmp_path, text)
    record(tmp_path, text)
    write_lora(zipped, 2.0)
    with pytest.raises(EvaluationError, match=r"dog-ink\.safetensors is not the one"):
        record(tmp_path, text)


def test_a_lora_file_that_has_changed_under_its_name_is_refused_and_one_that_was_copied_is_not(tmp_path):
    record(tmp_path)
    content = (tmp_path / "dog.safetensors").read_bytes()
    (tmp_path / "dog.safetensors").unlink()
    (tmp_path / "dog.safetensors").write_bytes(content)
    record(tmp_path)
    write_lora(tmp_path / "dog.safetensors", 2.0)
    with pytest.raises(EvaluationError, match=r"dog\.safetensors is not the one"):
        record(tmp_path)
