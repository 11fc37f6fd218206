"""Pictures of rows, from the world's networks with random weights."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

import copy
import json
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")

from dynfuse_world import benchmark, model
from dynfuse_world.benchmark.making import RandomChoice, Studio, louder, random_choice, shipped_judges
from dynfuse_world.benchmark.methods import ROWS, SWEEP, row_of
from dynfuse_world.benchmark.protocol import PICTURED, TUNING
from dynfuse_world.benchmark.run import made
from dynfuse_world.benchmark.work import SCORES, Setup, Task, tasks
from dynfuse_world.judges import Judges, SecondJudges
from dynfuse_world.oracles import read_oracle, write_oracles
from lib_dynfuse.fusion import Rows
from lib_dynfuse.fusion.session import FusionSession
from lib_dynfuse.hosts.diffusers import FusedPipeline
from lib_dynfuse.lora import read_lora
from lib_dynfuse.lora.naming import Site
from lib_dynfuse.settings import FuseSettings

from ..fakes.encoders import write_clip, write_dino

PAIR = TUNING[0]
ROW = {row.name: row for row in ROWS}
SEEDS = (3, 4)
STEPS = 3


def attention_lora(unet, rank, seed):
    """kohya's tensors, strong enough that a choice shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if re.search(r"\.to_(q|k|v|out\.0)$", name):
            key = f"lora_unet_{name.replace('.', '_')}"
            out, width = module.weight.shape
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as the shipped one, for the first tuning pair."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = model.new_unet()
        model.save_network(unet, folder / "unet.safetensors")
        model.save_network(model.new_vae(), folder / "vae.safetensors", {"scaling_factor": "0.35"})
        model.save_text_encoder(model.new_text_encoder(), folder / "text_encoder.safetensors")
        model.save_network(Judges(), folder / "judges.safetensors")
        model.save_network(SecondJudges(), folder / "judges2.safetensors")
    (folder / "loras").mkdir()
    for seed, name in enumerate((PAIR.subject, PAIR.style)):
        save_file(attention_lora(unet, 8, seed), folder / "loras" / f"{name}.safetensors")
    write_oracles({pair.name: attention_lora(unet, 4, seed) for seed, pair in enumerate(TUNING[:2], 9)}, folder)
    write_clip(folder / "clip", size=64)
    write_dino(folder / "dino", size=64)
    return folder


@pytest.fixture
def setup(weights, tmp_path):
    return Setup(weights, tmp_path / "references", shipped_judges, SEEDS, STEPS)


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory):
    return Studio(Setup(weights, tmp_path_factory.mktemp("references"), shipped_judges, SEEDS, STEPS))


def made_of(studio, row):
    return studio.make(Task(PAIR, row, shown=len(SEEDS)))


def test_every_row_is_made_and_judged(studio):
    outcomes = {name: made_of(studio, row) for name, row in ROW.items()}
    for outcome in outcomes.values():
        assert outcome.pictures.shape == (len(SEEDS), 64, 64, 3)
        assert outcome.seconds > 0
        for scores in (getattr(outcome, name) for name in SCORES):
            assert scores.shape == (len(SEEDS),)
            assert ((scores >= 0) & (scores <= 1)).all()
    assert {name for name, outcome in outcomes.items() if outcome.diagnosis} == {"selection", "both"}
    outcomes.pop("tuned")  # what it finds may be another row's settings
    different = {outcome.pictures.tobytes() for outcome in outcomes.values()}
    assert len(different) == len(outcomes)


def test_the_tuned_row_is_the_pair_with_what_was_found_for_it(studio, weights, tmp_path):
    loras = [read_lora(weights / "loras" / f"{name}.safetensors") for name in (PAIR.subject, PAIR.style)]
    fused = FusedPipeline(model.load_pipeline(weights), *loras, ROW["tuned"].settings_for(PAIR), studio.guidance)
    found = fused.tuned(PAIR.prompt, seed=SEEDS[0], steps=STEPS, cfg_scale=5.0)
    plain = FusedPipeline(model.load_pipeline(weights), *loras, found.settings(FuseSettings()))
    images = plain(PAIR.prompt, seeds=SEEDS, steps=STEPS, cfg_scale=5.0).images
    np.testing.assert_array_equal(made_of(studio, ROW["tuned"]).pictures, np.stack([np.asarray(image) for image in images]))


def test_the_base_row_is_the_pipeline_alone(studio, weights):
    pipeline = model.load_pipeline(weights)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(
        PAIR.prompt, num_images_per_prompt=len(SEEDS), num_inference_steps=STEPS, guidance_scale=5.0, generator=generators
    ).images
    np.testing.assert_array_equal(made_of(studio, ROW["base model"]).pictures, np.stack([np.asarray(image) for image in images]))


def test_another_prompt_is_the_pipelines_own(setup, weights):
    asked = replace(setup, prompt="{style} style {word}")
    outcomes = [Studio(each).make(Task(PAIR, ROW["direct"], shown=1)).pictures for each in (setup, asked)]
    loras = [read_lora(weights / "loras" / f"{name}.safetensors") for name in (PAIR.subject, PAIR.style)]
    image = FusedPipeline(model.load_pipeline(weights), *loras, FuseSettings(method="direct"))(
        "blueprint style zib", seeds=SEEDS, steps=STEPS, cfg_scale=5.0
    ).images[0]
    np.testing.assert_array_equal(outcomes[1][0], np.asarray(image))
    assert not np.array_equal(*outcomes)


def test_an_oracle_is_read_out_of_the_common_file(weights):
    for seed, pair in enumerate(TUNING[:2], 9):
        tensors = attention_lora(model.new_unet(), 4, seed)
        oracle = read_oracle(weights, pair.name)
        assert len(oracle.denoiser) == sum(key.endswith("up.weight") for key in tensors)
        for layer, branch in oracle.denoiser.items():
            up, down = (tensors[f"lora_unet_{layer}.lora_{way}.weight"].half().float() for way in ("up", "down"))
            torch.testing.assert_close(branch.delta_weight(), up @ down)
    with pytest.raises(KeyError, match=TUNING[3].name):
        read_oracle(weights, TUNING[3].name)


def test_a_random_choice_uses_one_lora_in_each_layer_of_each_picture(weights):
    """Against the same network with that LoRA merged into each layer's weight."""
    unet = model.load_network(model.new_unet(), weights / "unet.safetensors")
    files = [weights / "loras" / f"{name}.safetensors" for name in (PAIR.subject, PAIR.style)]
    tensors, loras = [load_file(file) for file in files], [read_lora(file) for file in files]
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, model.TEXT_WIDTH, generator=generator)
    session = FusionSession(unet, *loras, FuseSettings(), rule=RandomChoice(PAIR, SEEDS))
    with torch.no_grad(), session.attached(Rows((0, 1), (True, True), 2)):
        fused = unet(latent, 500, text).sample
    tables = []
    for image in range(len(SEEDS)):
        merged = copy.deepcopy(unet)
        table = {site.layer: bool(random_choice(PAIR, SEEDS, site)[image]) for site in (layer.sites[0].site for layer in session.layers)}
        for name, of_subject in table.items():
            key, side = f"lora_unet_{name.replace('.', '_')}", tensors[0 if of_subject else 1]
            merged.get_submodule(name).weight.data += side[f"{key}.lora_up.weight"] @ side[f"{key}.lora_down.weight"]
        with torch.no_grad():
            expected = merged(latent[image : image + 1], 500, text[image : image + 1]).sample
        torch.testing.assert_close(fused[image : image + 1], expected, rtol=1e-3, atol=1e-4)
        tables.append(table)
    assert tables[0] != tables[1]
    assert all(0.3 < np.mean(list(table.values())) < 0.7 for table in tables)


def test_a_coin_between_a_lora_and_nothing_leaves_the_base_model_where_the_lora_lost(weights, studio):
    outcome = made_of(studio, row_of("random style_weight=0", "tried"))
    pipeline = model.load_pipeline(weights)
    tensors = load_file(weights / "loras" / f"{PAIR.subject}.safetensors")
    for name, module in pipeline.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.lora_up.weight" in tensors and bool(random_choice(PAIR, SEEDS, Site(name))[0]):
            module.weight.data += tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    generator = torch.Generator().manual_seed(SEEDS[0])
    image = pipeline(PAIR.prompt, num_inference_steps=STEPS, guidance_scale=5.0, generator=generator).images[0]
    difference = np.abs(outcome.pictures[0].astype(int) - np.asarray(image))
    assert difference.max() <= 1


def test_a_random_choice_is_the_same_every_time_and_another_for_another_pair():
    site, seeds = Site("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), tuple(range(64))
    assert torch.equal(random_choice(PAIR, seeds, site), random_choice(PAIR, seeds, site))
    assert not torch.equal(random_choice(PAIR, seeds, site), random_choice(TUNING[1], seeds, site))


def test_rows_that_choose_on_their_own_are_the_products_and_both_are_in_the_trace(studio, weights):
    outcome = made_of(studio, row_of("selection granularity=row", "tried"))
    loras = [read_lora(weights / "loras" / f"{name}.safetensors") for name in (PAIR.subject, PAIR.style)]
    product = FusedPipeline(model.load_pipeline(weights), *loras, FuseSettings(method="dynfuse", granularity="row"))
    images = product(PAIR.prompt, seeds=SEEDS, steps=STEPS, cfg_scale=5.0)
    np.testing.assert_array_equal(outcome.pictures, np.stack([np.asarray(image) for image in images.images]))
    assert outcome.diagnosis.share == pytest.approx(images.trace.subject_share())
    assert 0 < outcome.diagnosis.agreement < 1


def test_the_time_of_a_row_is_without_its_references(weights, tmp_path, monkeypatch):
    """On a clock that a denoising step moves on by one second; at first the references are made, then they are there."""
    steps: list[None] = []
    monkeypatch.setattr(time, "process_time", lambda: float(len(steps)))
    fresh = Studio(Setup(weights, tmp_path / "references", shipped_judges, SEEDS, STEPS), lambda: steps.append(None))
    first, second = (fresh.make(Task(PAIR, ROW["guidance"], 1)) for _ in range(2))
    assert len(steps) == 4 * STEPS
    assert len(list((tmp_path / "references").glob("*.png"))) == 2
    assert first.seconds == second.seconds == STEPS / len(SEEDS)
    np.testing.assert_array_equal(first.pictures, second.pictures)


def test_the_numbers_are_the_same_on_any_number_of_processes(setup):
    work = tasks([PAIR], [ROW["direct"], ROW["selection"], ROW["guidance"]])
    for alone, together in zip(made(work, setup, 1), made(work, setup, 2), strict=True):
        assert (alone.pair, alone.row) == (together.pair, together.row)
        for name in (*SCORES, "pictures"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))
        assert alone.diagnosis == together.diagnosis


def test_a_picture_is_scored_by_both_judges_and_its_colours_are_its_own(studio):
    outcome = made_of(studio, ROW["direct"])
    floats = torch.from_numpy(outcome.pictures / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    for prefix, judges in zip(("", "second_"), studio.judges, strict=True):
        scores = judges.scores(floats)
        for name, wanted in (("subject", scores.subject(PAIR.subject)), ("style", scores.style(PAIR.style))):
            np.testing.assert_allclose(getattr(outcome, prefix + name), wanted.double(), atol=1e-6)
    assert not np.allclose(outcome.subject, outcome.second_subject)
    assert outcome.saturation == pytest.approx(np.ptp(outcome.pictures.astype(float), axis=3).mean((1, 2)) / 255)


@pytest.fixture(scope="module")
def others(weights, tmp_path_factory):
    """Weights with other LoRAs as their set overfit; and a copy in which these are the plain ones."""
    folder = shutil.copytree(weights, tmp_path_factory.mktemp("sets") / "both")
    (folder / "loras" / "overfit").mkdir()
    alone = shutil.copytree(weights, tmp_path_factory.mktemp("sets") / "alone")
    for seed, name in enumerate((PAIR.subject, PAIR.style), 50):
        for path in (folder / "loras" / "overfit", alone / "loras"):
            save_file(attention_lora(model.new_unet(), 8, seed), path / f"{name}.safetensors")
    return folder, alone


def test_each_set_of_loras_is_made_as_if_it_were_alone(weights, others, setup, tmp_path):
    """Guided, so that references are made, kept in a folder that all sets share, and found by another process."""
    both, of_overfit = others
    third = 3**0.5
    alone = {"plain": (weights, (1.0, 1.0)), "overfit": (of_overfit, (1.0, 1.0)), "loud-styles": (weights, (1 / third, third))}
    rows = [ROW["guidance"], row_of("random criterion=js", "tried")]
    together = made(tasks([replace(PAIR, files=files) for files in alone], rows), replace(setup, weights=both), 1)
    assert [outcome.pair.name for outcome in together] == [PAIR.name, f"{PAIR.name}@overfit", f"{PAIR.name}@loud-styles"] * 2
    for outcome in together:
        folder, loudness = alone[outcome.pair.files]
        single = Studio(Setup(folder, tmp_path / outcome.pair.files, shipped_judges, SEEDS, STEPS, loudness=loudness))
        task = next(task for task in tasks([PAIR], rows) if task.row.name == outcome.row)
        for name in SCORES:
            np.testing.assert_array_equal(getattr(outcome, name), getattr(single.make(task), name))
    assert len({outcome.subject.tobytes() for outcome in together}) == len(together)
    # Of the two louder files one each; the other sets' files are others.
    assert len(list(setup.references.glob("*.png"))) == 2 * len(alone)


def test_the_sweep_and_the_shown_pictures_are_of_every_set():
    pairs = [replace(pair, files=files) for files in ("a", "b") for pair in (*TUNING, *PICTURED)]
    work = tasks(pairs, [ROW["direct"], SWEEP[0]])
    assert [task.pair.files for task in work if task.row == SWEEP[0]] == ["a"] * 4 + ["b"] * 4
    assert sum(task.shown > 0 for task in work) == 2 * len(PICTURED)


def test_a_louder_file_is_the_same_lora_at_another_weight(weights, tmp_path):
    path = weights / "loras" / f"{PAIR.subject}.safetensors"
    plain, loud = read_lora(path), louder(path, 1.5, tmp_path)
    assert loud.name == plain.name
    for name, branch in plain.denoiser.items():
        torch.testing.assert_close(loud.denoiser[name].delta_weight(), 1.5 * branch.delta_weight())


def test_an_exception_between_steps_ends_the_work(setup):
    class Enough(Exception):
        pass

    def on_step():
        raise Enough

    studio = Studio(setup, on_step)
    for row in (ROW["base model"], ROW["direct"], ROW["guidance"]):
        with pytest.raises(Enough):
            studio.make(Task(PAIR, row))


def test_a_missing_file_is_told_by_the_process_that_missed_it(tmp_path):
    work = tasks([PAIR], [ROW["direct"], ROW["selection"]])
    with pytest.raises(OSError, match="vae"):
        made(work, Setup(tmp_path, tmp_path, shipped_judges, SEEDS, STEPS), 2)


@pytest.fixture
def short(weights):
    """The command's beginning: few pictures, fewer steps."""
    return ["--weights", str(weights), "--workers", "1", "--pairs", PAIR.name, "--seeds", "2", "--steps", str(STEPS)]


def test_the_command_prints_the_table_and_writes_pictures(short, tmp_path, capsys):
    rows = ["--only", "direct", "--only", "selection", "--try", "selection bias=2"]
    assert benchmark.main([*short, *rows, "--pictures", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "| selection bias=2 " in printed
    assert "Tuning pairs: 1 × 2 pictures a row" in printed
    assert "Reported" not in printed
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tuning-bars.svg", "tuning-plane.svg"}


def test_the_command_prints_json(short, capsys):
    assert (
        benchmark.main(
            [
                *short,
                "--json",
                "--only",
                "direct",
                "--first-seed",
                "7",
                "--cfg",
                "3",
                "--loudness",
                "1.5",
                "0.5",
                "--prompt",
                "{style} {word}",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in result["tuning"]] == ["direct"]
    assert result["reported"] == []
    assert all(len(result["pictures"][0][name]) == 2 for name in SCORES)
    assert result["agreement"]["style"]["pictures"] == 2
    protocol = result["protocol"]
    assert protocol["prompts"][PAIR.name][0] == f"{PAIR.style} {PAIR.subject}"
    assert (protocol["steps"], protocol["cfg_scale"], protocol["loudness"], protocol["seeds"]) == (STEPS, 3.0, [1.5, 0.5], [7, 8])
    assert result["run"]["torch"] == torch.__version__


def test_the_command_pools_several_sets_and_tells_each(short, others, capsys):
    both, of_overfit = map(str, others)
    rest = short[2:]
    sets = ["--weights", both, "--set", "overfit", "--set", "plain"]
    rows = ["--only", "direct", "--only", "selection"]
    assert benchmark.main([*rest, *sets, *rows, "--json"]) == 0
    pooled = json.loads(capsys.readouterr().out)
    assert pooled["protocol"]["sets"] == ["plain", "overfit"]
    assert pooled["protocol"]["tuning"] == [PAIR.name, f"{PAIR.name}@overfit"]
    assert {picture["pair"] for picture in pooled["pictures"]} == set(pooled["protocol"]["tuning"])
    means = {files: {row["row"]: row["means"]["subject"][0] for row in found["tuning"]} for files, found in pooled["sets"].items()}
    for row in pooled["tuning"]:
        assert row["means"]["subject"][0] == pytest.approx(np.mean([means[files][row["row"]] for files in ("plain", "overfit")]))
    for files, folder in (("plain", both), ("overfit", of_overfit)):
        assert benchmark.main([*rest, "--weights", folder, *rows, "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone["sets"] == {}
        assert {row["row"]: row["means"]["subject"][0] for row in alone["tuning"]} == pytest.approx(means[files])
    assert benchmark.main([*rest, *sets, *rows]) == 0
    printed = capsys.readouterr().out
    assert "Tuning pairs: 2 × 2 pictures a row" in printed
    assert printed.count("\n| direct ") == 1 + 2 + 2  # pooled, of each set, by the second judges, its colours


def test_a_set_that_was_not_made_is_told_before_any_work(short, capsys):
    assert benchmark.main([*short, "--set", "all"]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "toy train loras --set dropout" in said


@pytest.mark.parametrize(
    "wrong",
    [
        ["--only", "fusion"],
        ["--try", "fusion"],
        ["--pairs", "zib-flat"],
        ["--prompt", "a {subject}"],
        ["--prompt", "a dog, {subject}, {style}"],
        ["--prompt", "{}"],
        ["--pairs", "reported", "--only", "sweep"],
    ],
)
def test_what_the_command_cannot_do_it_says_in_a_sentence(wrong, capsys):
    assert benchmark.main(wrong) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
