"""The command line, and what the documents say of plans and metrics."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from lib_dynfuse import cli
from lib_dynfuse.evaluate.makers.with_diffusers import device_of, own_device
from lib_dynfuse.evaluate.makers.with_webui import WebUIMaker
from lib_dynfuse.evaluate.metrics import EncoderNames, Metric, Shelf, known_metrics
from lib_dynfuse.evaluate.plan import Making, read_plan
from tests.evaluate.plans import PLAN, evaluation_in, noise, write_files, write_lora
from tests.evaluate.test_webui_maker import WebUI, serving

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    """The indented pieces of a page."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", (DOCS / page).read_text("utf-8"), re.M)
    return [textwrap.dedent(block).strip() + "\n" for block in found if block.strip()]


def test_a_plan_is_copied_by_its_name_and_not_over_another(tmp_path, capsys):
    assert cli.main(["evaluate", "--new", "table3", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "mine" / name) for name in ("table3.toml", "pairs.toml")]
    assert cli.main(["evaluate", "--new", "table3", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.endswith("is not overwritten.\n")


def test_what_is_missing_for_a_plan_is_told_at_once_and_nothing_is_made(tmp_path, capsys):
    cli.main(["evaluate", "--new", "table3", str(tmp_path)])
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "table3.toml")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert sum("there is no LoRA file" in line for line in told) == 14
    assert sum("there is no reference picture" in line for line in told) == 14
    assert not (tmp_path / "out").exists()


def test_the_documented_plan_can_be_read(tmp_path):
    (text,) = (block for block in blocks("evaluation.md") if block.startswith("title ="))
    write_files(tmp_path)
    for name in ("sd_xl_base_1.0.safetensors", "sdxl-folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos/dog").mkdir(parents=True)
    for name in ("photos/dog/1.jpg", "ink.jpg"):
        noise(1).save(tmp_path / name)
    (tmp_path / "zip").mkdir()
    for name in ("cat", "zip/cat-ink", "zip/dog-ink"):
        write_lora(tmp_path / f"{name}.safetensors")
    (tmp_path / "pairs.toml").write_text('[subjects.cat]\nlora = "cat.safetensors"\nreferences = ["ink.jpg"]\n')
    (tmp_path / "plan.toml").write_text(text, "utf-8")
    plan = read_plan(tmp_path / "plan.toml")
    assert [pair.name for pair in plan.pairs] == ["cat+ink", "dog+ink"]
    assert [method.name for method in plan.methods] == ["direct", "gentle", "subject only", "ziplora"]
    assert set(plan.metrics) <= set(known_metrics())


def test_every_metric_stands_in_the_documents_table():
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "evaluation.md").read_text("utf-8"), re.M)
    assert re.findall(r"`([\w-]+)`", " ".join(rows)) == list(known_metrics())


def test_the_documented_metric_is_one(tmp_path):
    (text,) = (block for block in blocks("development.md") if "class Brightness" in block)
    names = {}
    exec(text, names)
    evaluation = evaluation_in(tmp_path, pairs=1, seeds=1)
    metric = names["Brightness"](Shelf(EncoderNames()))
    assert isinstance(metric, Metric)
    (score,) = metric.scores(evaluation.pairs[0], [evaluation.path(next(evaluation.pictures()))])
    assert 100 < score < 155


@pytest.mark.parametrize(
    ("rank", "count", "device"), [("", 2, None), ("0", 2, "cuda:0"), ("1", 2, "cuda:1"), ("3", 2, "cuda:1"), ("1", 0, None)]
)
def test_each_process_of_a_launcher_has_its_gpu(monkeypatch, rank, count, device):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert own_device() == device
    assert device_of(Making(1, (0,), device="cuda")) == (device or "cuda")
    assert device_of(Making(1, (0,), device="cpu")) == "cpu"


def test_an_evaluation_through_a_webui_from_the_plan_to_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WebUIMaker.__init__.__kwdefaults__, "pause", 0.01)
    write_files(tmp_path)
    with WebUI() as server:
        serving(server)
        text = PLAN.replace('model = "model"', f'webuis = ["{server.address}", "http://127.0.0.1:9"]')
        text = text.replace("metrics = []", f'metrics = ["{__name__}:Size"]')
        (tmp_path / "web.toml").write_text(text)
        assert cli.main(["evaluate", str(tmp_path / "web.toml"), "--check"]) == 0
        assert "4 pictures, 4 of them to be made" in capsys.readouterr().out
        assert cli.main(["evaluate", str(tmp_path / "web.toml")]) == 0
        server.shutdown()
    output = capsys.readouterr()
    assert "http://127.0.0.1:9 does not answer" in output.err
    assert [Path(line).name for line in output.out.splitlines()] == ["web.html", "web.csv", "web-means.csv"]
    assert "size,8.0,8.0,8.0,0.0" in (tmp_path / "out" / "web-means.csv").read_text()
    assert cli.main(["evaluate", str(tmp_path / "web.toml"), "--report"]) == 0  # needs no WebUI


class Size(Metric):
    name, side, family, protocol = "size", "style", "own", "Pixels."

    def scores(self, pair, pictures):
        from lib_dynfuse.evaluate.metrics.encoders import opened

        return [float(opened(path).width) for path in pictures]
