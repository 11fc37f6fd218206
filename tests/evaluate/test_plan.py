"""Plans: what they mean, and all that is wrong with one told at once."""

import re
from pathlib import Path

import pytest

from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.plan import read_plan
from lib_dynfuse.evaluate.plans import copy_plan, shipped_plans
from lib_dynfuse.settings import FuseSettings
from tests.evaluate.plans import PLAN, plan_in, write_files, write_lora


def refused(folder, text):
    with pytest.raises(EvaluationError) as caught:
        plan_in(folder, text)
    return str(caught.value).splitlines()


def test_a_pair_has_its_prompts_loras_and_references(tmp_path):
    plan = plan_in(tmp_path)
    (pair,) = plan.pairs
    assert (pair.name, pair.prompts) == ("dog+ink", ("a sks dog in ink style",))
    assert pair.subject.loras == (tmp_path / "dog.safetensors",)
    assert [path.name for path in pair.subject.references] == ["0.png", "1.png"]
    assert (plan.count, plan.out, plan.make.seeds) == (4, tmp_path / "out", (1, 2))


def test_the_settings_of_a_picture_are_the_methods_with_the_pairs_weights_unless_it_has_its_own(tmp_path):
    text = PLAN.replace('lora = "dog.safetensors"', 'lora = "dog.safetensors"\nweight = 0.7\nalone = "one dog"')
    text += '[methods.louder]\npreset = "best"\nsubject_weight = 1.5\n'
    plan = plan_in(tmp_path, text)
    of = {method.name: method.settings_for(plan.pairs[0]) for method in plan.methods}
    told = {"subject": "dog", "style": "ink", "subject_prompt": "one dog"}
    assert of["direct"] == FuseSettings(method="direct", subject_weight=0.7, **told)
    assert of["louder"] == FuseSettings.from_mapping({"preset": "best", "subject_weight": 1.5, **told})


@pytest.mark.parametrize(("loras", "weights"), [("none", (0, 0)), ("subject", (0.7, 0)), ("style", (0, 1))])
def test_what_one_lora_makes_alone_is_the_plain_sum_with_the_other_at_nothing(tmp_path, loras, weights):
    text = PLAN.replace('lora = "dog.safetensors"', 'lora = "dog.safetensors"\nweight = 0.7') + f'[methods.alone]\nloras = "{loras}"\n'
    plan = plan_in(tmp_path, text)
    settings = plan.methods[-1].settings_for(plan.pairs[0])
    assert (settings.method, settings.subject_weight, settings.style_weight) == ("direct", *weights)


MERGED = '[methods.zip]\nmerged = "zip/{subject}-{style}.safetensors"\n'


def test_a_method_may_have_one_file_of_both_for_each_pair(tmp_path):
    (tmp_path / "zip").mkdir()
    write_lora(tmp_path / "zip" / "dog-ink.safetensors")
    plan = plan_in(tmp_path, PLAN.replace('lora = "dog.safetensors"', 'lora = "dog.safetensors"\nweight = 0.7') + MERGED)
    method = plan.methods[-1]
    assert method.of(plan.pairs[0]).subject.loras == (tmp_path / "zip" / "dog-ink.safetensors",)
    settings = method.settings_for(plan.pairs[0])
    assert (settings.subject, settings.subject_weight, settings.style_weight, settings.method) == ("dog-ink", 1.0, 0.0, "direct")
    own = plan.methods[0]
    assert own.of(plan.pairs[0]) is plan.pairs[0]


def test_a_merged_file_that_is_missing_or_not_one_for_each_pair_is_told(tmp_path):
    assert any("methods.zip, dog+ink" in line and "no LoRA file" in line for line in refused(tmp_path, PLAN + MERGED))
    told = refused(tmp_path, PLAN + MERGED.replace("{subject}-{style}", "one"))
    assert any("{subject}" in line for line in told)


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    text = PLAN.replace("steps = 4", 'steps = 0\nsamplr = "DDIM"\nsize = "100x100"').replace("seeds = [1, 2]", "seeds = [1, 1]")
    text = text.replace('"dog.safetensors"', '"missing.safetensors"').replace("references/ink.png", "references/none.png")
    text = text.replace("metrics = []", 'metrics = ["clip-scor", "nowhere:Metric"]').replace('pairs = "all"', 'pairs = [["dog", "oil"]]')
    text += '[methods.wrong]\nmethod = "dynamite"\n[methods.odd]\nm = -1\nsubject = "dog"\n[encoders]\ncl1p = "x"\n'
    told = "\n".join(refused(tmp_path, text))
    for piece in (
        *("steps must be", "'samplr'; did you mean sampler?", "size must be", "seeds must be", "no LoRA file", "no reference picture"),
        *("did you mean clip-score?", "nowhere:Metric cannot be imported", "'oil' is no style; there are ink", "'dynamite'"),
        *("m must be at least 0", "subject comes from the pairs", "'cl1p'; did you mean clip?"),
    ):
        assert piece in told, piece
    assert all(line.endswith((".", "?")) for line in told.splitlines())


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("a = ", "cannot be read as a plan"),
        ("", "steps must be"),
        (PLAN.replace('model = "model"', ""), "either model"),
        (PLAN.replace('model = "model"', 'model = "model"\nwebuis = ["http://127.0.0.1:1"]'), "either model"),
        (PLAN.replace('model = "model"', 'webuis = ["127.0.0.1"]'), "list of addresses"),
        (PLAN.replace('model = "model"', 'webuis = ["http://127.0.0.1:1"]\ndtype = "float16"'), "dtype is for a model"),
        (PLAN.replace('model = "model"', 'model = "elsewhere"'), "there is no"),
        (PLAN + "[methods.DIRECT]\n", "one folder on some systems"),
        (PLAN + '[methods."a/b"]\n', "cannot be a folder's everywhere"),
        (PLAN.replace("references/ink.png", "dog.safetensors"), "is no picture"),
        (PLAN.replace('lora = "ink.safetensors"', 'lora = "broken.safetensors"'), "is damaged or no LoRA file"),
        (
            PLAN.replace("metrics = []", 'metrics = ["style-sim"]').replace('references = ["references/ink.png"]', ""),
            "metric style-sim needs",
        ),
        (PLAN.replace('pairs = "all"', "pairs = { draw = 2 }"), "2 pairs cannot be drawn of 1"),
        (PLAN.replace('words = "sks dog"', 'weight = "loud"'), "weight"),
        (PLAN + '[methods.pair]\nsubject_weight = "1+1"\n', "subject_weight"),
        ('base = "gone.toml"\n' + PLAN, "There is no plan"),
        ('base = "test.toml"\n' + PLAN, "stands on itself"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_in_sentences(tmp_path, text, piece):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert piece in "\n".join(refused(tmp_path, text))


def test_a_webuis_loras_are_names_and_need_no_files(tmp_path):
    text = PLAN.replace('model = "model"', 'webuis = ["http://127.0.0.1:7860/"]').replace("dog.safetensors", "dog.v2")
    plan = plan_in(tmp_path, text)
    assert plan.make.webuis == ("http://127.0.0.1:7860",)
    assert plan.pairs[0].subject.lora_names == ("dog.v2",)
    assert plan.pairs[0].style.lora_names == ("ink",)


def test_pairs_drawn_by_lot_are_the_same_each_time_and_others_with_another_seed(tmp_path):
    more = "".join(f'[subjects.s{n}]\nlora = "dog.safetensors"\n' for n in range(9))

    def drawn(seed):
        return [pair.name for pair in plan_in(tmp_path, PLAN.replace('"all"', f"{{ draw = 4, seed = {seed} }}") + more).pairs]

    assert drawn(0) == drawn(0)
    assert len(set(drawn(0))) == 4
    assert any(drawn(seed) != drawn(0) for seed in range(1, 4))


def test_a_plan_stands_on_another_and_paths_are_relative_to_the_file_that_names_them(tmp_path):
    plan_in(tmp_path / "below")
    above = tmp_path / "above.toml"
    above.write_text('base = "below/test.toml"\nout = "here"\n[make]\nsteps = 9\n[methods.best]\npreset = "best"\n')
    plan = read_plan(above)
    assert plan.pairs[0].subject.loras == (tmp_path / "below" / "dog.safetensors",)
    assert (plan.make.steps, plan.make.seeds, plan.out) == (9, (1, 2), tmp_path / "here")
    assert [method.name for method in plan.methods] == ["direct", "default", "best"]


@pytest.mark.parametrize("name", shipped_plans())
def test_a_shipped_plan_can_be_run_once_its_files_are_there(tmp_path, name):
    paths = copy_plan(name, tmp_path)
    pairs = (tmp_path / "pairs.toml").read_text()
    (tmp_path / "sd_xl_base_1.0.safetensors").write_bytes(b"")
    write_files(tmp_path / "x")
    for lora in re.findall(r'lora = "([^"]+)"', pairs):
        (tmp_path / lora).parent.mkdir(exist_ok=True)
        write_lora(tmp_path / lora)
        folder = tmp_path / "references" / Path(lora).stem
        folder.mkdir(parents=True)
        (tmp_path / "x/references/ink.png").rename(folder / "1.png") if not (folder / "1.png").exists() else None
        (tmp_path / "x/references/ink.png").write_bytes((folder / "1.png").read_bytes())
    plan = read_plan(paths[0])
    assert len(plan.pairs) == 30
    assert plan.make.steps == 50
    assert len(plan.make.seeds) * len(plan.pairs[0].prompts) == 10
    assert "direct" in [method.name for method in plan.methods]


def test_plans_of_one_folder_mean_the_same_by_the_same_name():
    tables = {}
    for name in shipped_plans():
        text = (Path(copy_plan.__code__.co_filename).parent / f"{name}.toml").read_text()
        for method, settings in re.findall(r"\[methods\.([^\]]+)\]\n((?:[^\[\n].*\n?)*)", text):
            assert tables.setdefault(method, settings.strip()) == settings.strip(), method


def test_a_plan_that_is_there_is_not_overwritten_and_its_pairs_are_kept(tmp_path):
    (tmp_path / "pairs.toml").write_text("mine")
    assert [path.name for path in copy_plan("table4", tmp_path)] == ["table4.toml"]
    assert (tmp_path / "pairs.toml").read_text() == "mine"
    with pytest.raises(EvaluationError, match="not overwritten"):
        copy_plan("table4", tmp_path)
