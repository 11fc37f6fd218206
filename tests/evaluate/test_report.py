"""The report: a page that can be read, and tables that other programs read."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from lib_dynfuse.evaluate.metrics import metric_class
from lib_dynfuse.evaluate.plan import EncoderNames, Making, Plan
from lib_dynfuse.evaluate.report import Report, about_pictures, page, write_report
from lib_dynfuse.evaluate.results import judge_results, study_result
from lib_dynfuse.evaluate.summary import summarised
from lib_dynfuse.evaluate.votes import write_ballot
from tests.evaluate.plans import evaluation_in
from tests.evaluate.test_summary import scores_of

METRICS = [metric_class(name) for name in ("style-sim", "clip-score", "dinov2-content")]
VOID = ("meta", "img", "br", "link")


class Page(HTMLParser):
    """The page's text, its pictures and links; fails where elements are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.text = [], [], [], set(), ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        self.links += [given["href"]] if "href" in given else []
        self.ids.update([given["id"]] if "id" in given else [])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"line {self.getpos()[0]}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data} "


def report_of(folder, **changes):
    evaluation = evaluation_in(folder, methods=("direct", "default", "guided"))
    evaluation = replace(evaluation, title="<Dogs> & ink", **changes)
    plan = Plan("dogs", evaluation.title, folder, Making(4, (0, 1)), (), (), (), EncoderNames(), 'title = "<Dogs> & ink"')
    scores = scores_of(evaluation, METRICS)
    found = summarised(evaluation, METRICS, scores)
    return Report(plan, evaluation, METRICS, scores, found, study_result(folder), judge_results(folder), about_pictures(evaluation))


def test_the_page_shows_every_picture_beside_it_and_escapes_what_people_wrote(tmp_path):
    report = report_of(tmp_path)
    found = Page(page(report))
    assert "<Dogs> & ink" in found.text
    assert "12 of 0 pictures" in found.text
    shown = {unquote(image["src"]) for image in found.images}
    assert {picture.file for picture in report.evaluation.pictures()} <= shown
    assert all((tmp_path / file).is_file() for file in shown)
    assert all(image["alt"] for image in found.images)
    assert {link[1:] for link in found.links if link.startswith("#")} <= found.ids
    assert "prefers-color-scheme: dark" in page(report)


def test_the_page_tells_means_and_warns_beside_what_a_method_optimises(tmp_path):
    report = report_of(tmp_path)
    text = page(report)
    mean = next(row for row in report.summary.rows if row.method.name == "default").means["style-sim"]
    assert f"<td>{mean.mean:.3f}<span" in text
    heads = re.findall(r'<th scope="col">([^<]+?)( <abbr.*?</abbr>)?</th>', text)
    assert {name: bool(warning) for name, warning in heads if name in ("style-sim", "dinov2-content")} == {
        "style-sim": True,
        "dinov2-content": False,
    }
    assert "guidance raises CLIP similarity" in text
    assert all(metric.protocol in Page(text).text for metric in METRICS)


def test_votes_are_told_with_their_intervals_and_who_follows_the_position(tmp_path):
    assert "None yet" in page(report_of(tmp_path))
    question = {"pair": "s0+t0", "prompt": 0, "shown": ["direct", "default"]}
    votes = [{**question, "seed": n, "chosen": "default" if n % 4 else "direct"} for n in range(8)]
    write_ballot(tmp_path, "anna", {"kind": "study", "voter": "Anna", "question": "Which is better?", "votes": votes})
    text = Page(page(report_of(tmp_path))).text
    assert "Which is better?" in text
    assert "6 of 8" in text
    assert "75.0 %" in text
    assert all(note in text for note in study_result(tmp_path)["notes"])


def test_the_tables_have_every_picture_and_every_mean(tmp_path):
    report = report_of(tmp_path)
    files = {path.name: list(csv.DictReader(path.open(encoding="utf-8"))) for path in write_report(report) if path.suffix == ".csv"}
    pictures = {row["picture"]: row for row in files["dogs.csv"]}
    for picture in report.evaluation.pictures():
        assert float(pictures[picture.file]["dinov2-content"]) == report.scores["dinov2-content"][picture]
    rows = {(row["method"], row["metric"]): row for row in files["dogs-means.csv"]}
    assert float(rows["guided", "style-sim"]["difference"]) == pytest.approx(
        float(rows["guided", "style-sim"]["mean"]) - float(rows["direct", "style-sim"]["mean"])
    )
    assert rows["guided", "style-sim"]["warning"]
    assert not rows["guided", "dinov2-content"]["warning"]


def test_a_report_of_an_unfinished_evaluation_says_what_is_missing(tmp_path):
    report = report_of(tmp_path)
    gone = next(report.evaluation.pictures())
    report.evaluation.path(gone).unlink()
    scores = {name: {p: score for p, score in found.items() if p != gone} for name, found in report.scores.items()}
    summary = summarised(report.evaluation, METRICS, scores)
    text = Page(page(replace(report, scores=scores, summary=summary, about=about_pictures(report.evaluation)))).text
    assert "Of 2 pairs 1 have all their pictures" in text
    assert "not yet" in text


def test_the_page_has_what_is_needed_to_repeat_it(tmp_path):
    side = {"loras": ["dog"], "weight": 0.7, "alone": "", "files": [{"name": "dog.safetensors", "hash": "abc123"}]}
    make = {"by": "diffusers", "model": "sdxl", "steps": 50, "sides": {"subject dog": side}, "model file": {"hash": "deadbeef"}}
    text = Page(page(report_of(tmp_path, make=make))).text
    for piece in ("sdxl", "50", "deadbeef", "abc123", "0.7", "method=direct, guidance=true", "torch", json.dumps("<Dogs> & ink")):
        assert piece in text, piece
