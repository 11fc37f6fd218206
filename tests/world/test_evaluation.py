"""`evaluate` from the plan to the report, in the miniature world: the same order of methods as docs/quality.md."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import csv
import io
import os
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="the world's model is a diffusers pipeline")

from dynfuse_world.benchmark.protocol import PICTURED
from dynfuse_world.evaluation import JUDGES, METHODS, write_plan
from lib_dynfuse import cli
from lib_dynfuse.evaluate.folder import Evaluation
from lib_dynfuse.evaluate.making import jobs_of
from lib_dynfuse.evaluate.plan import read_plan
from lib_dynfuse.evaluate.results import study_result
from tests.text.host_infotext import parse_infotext_line

TOLD_APART = ("selection", "direct", "default")
"""Worst first, as in docs/quality.md: 0.05, 0.24 and 0.32."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The plan, after it was run once."""
    folder = tmp_path_factory.mktemp("world")
    methods = {name: METHODS[name] for name in TOLD_APART}
    path = write_plan(folder, pairs=PICTURED, methods=methods, metrics=[*JUDGES, "style-sim"], seeds=range(2))
    assert cli.main(["evaluate", str(path)]) == 0
    return path


def means(path):
    rows = csv.DictReader((path.parent / "out" / "world-means.csv").open(encoding="utf-8"))
    return {row["method"]: float(row["mean"]) for row in rows if row["metric"].startswith("harmonic mean (judge")}


def test_the_methods_come_in_the_order_that_the_benchmark_found(world):
    found = means(world)
    assert sorted(found, key=found.get) == list(TOLD_APART)
    assert found["selection"] < 0.5 * found["direct"]


def test_each_picture_carries_the_settings_that_it_was_made_with(world):
    plan = read_plan(world)
    for job in jobs_of(plan)[::5]:
        with Image.open(plan.out / job.picture.file) as file:
            prompt, line = file.text["parameters"].split("\n")
        entries = parse_infotext_line(line)
        assert prompt == job.prompt
        assert (entries["Seed"], entries["Steps"]) == (str(job.picture.seed), "15")
        assert (entries["DynFuse method"], entries["DynFuse subject"]) == (job.settings.method, job.pair.subject.name)


def test_started_again_it_makes_what_is_missing_and_nothing_else(world, capsys):
    plan = read_plan(world)
    before = means(world)
    picture = plan.out / jobs_of(plan)[-1].picture.file
    content = picture.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in plan.out.rglob("*.png")}
    picture.unlink()
    assert cli.main(["evaluate", str(world), "--check"]) == 0
    assert "24 pictures, 1 of them to be made" in capsys.readouterr().out
    assert cli.main(["evaluate", str(world)]) == 0
    assert {path for path in plan.out.rglob("*.png") if path.stat().st_mtime_ns != times[path]} == {picture}
    with Image.open(picture) as again:
        difference = np.asarray(again, dtype=int) - np.asarray(opened(content), dtype=int)
    assert abs(difference).max() <= 2  # it was one of a batch before, and is alone now
    assert means(world) == before


def opened(content):
    return Image.open(io.BytesIO(content))


@contextmanager
def environment(**values):
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def test_a_method_that_is_added_later_is_made_and_scored_alone_as_a_launchers_second_process_does(world, capsys):
    more = world.with_name("more.toml")
    text = world.read_text("utf-8").replace("seeds = [0, 1]", "seeds = [0]")
    more.write_text(text + '\n[methods."subject only"]\nloras = "subject"\n', "utf-8")
    with environment(LOCAL_RANK="1"):  # shows no bars and no notes
        assert cli.main(["evaluate", str(more)]) == 0
    output = capsys.readouterr()
    assert "pictures/s" not in output.err
    names = Evaluation.open(world.parent / "out").method_names
    assert names == (*TOLD_APART, "subject only")
    assert len(list((world.parent / "out" / "pictures").rglob("*.png"))) == 24 + 4
    assert study_result(world.parent / "out") is None


def test_a_method_that_is_not_for_the_model_is_told_before_anything_is_made(world, capsys):
    wrong = world.with_name("wrong.toml")
    text = world.read_text("utf-8").replace('out = "out"', 'out = "wrong"')
    wrong.write_text(text + '\n[methods.b-lora]\nmethod = "blora"\n', "utf-8")
    assert cli.main(["evaluate", str(wrong)]) == 2
    assert "methods.b-lora: " in capsys.readouterr().err
    assert not (world.parent / "wrong" / "pictures").exists()


def test_a_lora_that_is_gone_is_told_before_anything_else(world, capsys):
    lora = world.parent / "loras" / "zib.safetensors"
    lora.rename(lora.with_suffix(".away"))
    try:
        assert cli.main(["evaluate", str(world)]) == 2
        assert "there is no LoRA file" in capsys.readouterr().err
    finally:
        lora.with_suffix(".away").rename(lora)
