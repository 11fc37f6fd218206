import base64
import dataclasses
import io
import json
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

from lib_dynfuse.fusion.rules import Member
from lib_dynfuse.fusion.selection_map import STYLE, SUBJECT
from lib_dynfuse.fusion.trace import Trace
from lib_dynfuse.guidance import curve
from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.guide import GuidanceRecord
from lib_dynfuse.guidance.references import Reference
from lib_dynfuse.hosts.webui.passes import Recipe
from lib_dynfuse.lora.naming import Site
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.webui import results


def trace(steps=3):
    sites = tuple(Site(f"input_blocks.{block}.1.proj_in") for block in (1, 2))
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, :, None].expand(steps, 2, 1, 2)
    reached = torch.ones(steps, 2, dtype=torch.bool)
    members = (Member("dog", True), Member("watercolor", False))
    return Trace(sites, members, weights, torch.ones(steps, 2, 1, 2), reached, reached, torch.ones(2, 2, dtype=torch.bool))


def fusion_pass(*notes, hires=False, with_trace=True, guidance=None, recipe=None):
    """What hosts.webui.passes.FusionPass shows of a finished pass."""
    settings = FuseSettings(subject="<dog>", style="watercolor")
    seen = trace() if with_trace else None
    return types.SimpleNamespace(
        trace=seen, settings=settings, notes=list(notes), hires=hires, guidance=guidance, recipe=recipe, tuned=None
    )


def record(steps=3):
    return GuidanceRecord(list(range(steps)), torch.linspace(0.2, 0.5, 3 * steps).view(steps, 3, 1), (True, True, True), steps)


def guidance(steps=3, prompt="a <b>dog</b>"):
    """What hosts.webui.guided.GuidedPass shows of a finished pass; steps None: it ended before the first."""
    embeddings = Embeddings(torch.ones(1, 1), torch.ones(1, 1))
    references = [
        Reference("subject", Image.new("RGB", (900, 450), "red"), embeddings, prompt),
        Reference("style", Image.new("RGB", (20, 10), "blue"), embeddings, "", given=True),
    ]
    return types.SimpleNamespace(record=None if steps is None else record(steps), references=references)


@pytest.fixture
def saving(webui, tmp_path):
    webui.opts.dynfuse_save_map = True
    return tmp_path


def saved(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _nothing_seen():
    results._seen_jobs.clear()


def job(name, *passes, tab="txt2img", seeds=(7,)):
    """A finished job of one batch."""
    results.remember(tab, name, [results.batch_of(passes, seeds)])


def page(name="1", view=results.USED, number=0):
    """What the panel shows of one of its pictures."""
    found = results.pictures_of("txt2img", name)
    return results.map_part(found[number], view) + results.beside_part(found[number]) if found else ""


def cells(text):
    """The pictures in it, top row first: (rows, columns, 4) each."""
    addresses = re.findall(r'src="data:image/png;base64,(.*?)" style', text)
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(address))).convert("RGBA"))) for address in addresses]


def test_a_finished_jobs_map_and_notes_are_shown_in_its_tab():
    job("1", fusion_pass("a <b> note", "twice"), fusion_pass("twice", hires=True))
    shown = page()
    assert len(cells(shown)) == 2
    assert shown.count("hires pass") == 1
    assert "a &lt;b&gt; note" in shown
    assert shown.count("twice") == 1
    assert results.pictures_of("img2img", "1") == []


def test_weights_that_are_the_same_everywhere_are_told_in_a_sentence():
    """In place of a field of one colour."""
    done = fusion_pass()
    same = torch.tensor([1.25, 0.8]).expand(3, 2, 1, 2).clone()
    done.trace = dataclasses.replace(trace(), weights=same)
    job("1", done)
    assert "Every layer used &lt;dog&gt; at 1.25 and watercolor at 0.8, at every step." in page()
    assert "<img" not in page()
    for number, (step, site) in enumerate(((2, 0), (0, 1))):
        other = same.clone()
        other[step, site, 0, 1] = 0.7
        done.trace = dataclasses.replace(trace(), weights=other)
        job(f"other {number}", done)
        assert "Every layer" not in page(f"other {number}")
        assert page(f"other {number}").count("<img") == 1


def test_a_layer_that_one_lora_leaves_alone_does_not_count_for_it():
    same = torch.tensor([1.25, 0.8]).expand(3, 2, 1, 2).clone()
    same[:, 1, :, 1] = 0
    present = torch.tensor([[True, True], [True, False]])
    assert dataclasses.replace(trace(), weights=same, present=present).uniform == pytest.approx([1.25, 0.8])
    assert dataclasses.replace(trace(), weights=same).uniform is None


def batch(*firsts, steps=3):
    """A pass of as many pictures, in each of which the subject has the first layer, or the style has it; the other has the second."""
    done = fusion_pass()
    rows = [[[1.0, 0.0], [0.0, 1.0]] if first else [[0.0, 1.0], [1.0, 0.0]] for first in firsts]
    weights = torch.tensor(rows).transpose(0, 1)[None].expand(steps, -1, -1, -1)
    done.trace = dataclasses.replace(trace(steps), weights=weights, divergences=weights + 0.1)
    return done


def test_every_picture_of_a_job_has_its_own_map():
    """Of two batches of two, in the order in which they were made."""
    results.remember(
        "txt2img", "1", [results.batch_of([batch(True, False)], (7, 8)), results.batch_of([batch(False, True, steps=4)], (9, 10))]
    )
    found = results.pictures_of("txt2img", "1")
    assert [one.title for one in found] == [f"Picture {number} of 4, seed {number + 6}" for number in (1, 2, 3, 4)]
    for one, first, steps in zip(found, (True, False, False, True), (3, 3, 4, 4)):
        shown = results.map_part(one)
        assert f"<figcaption>{one.title}: what was used</figcaption>" in shown
        (picture,) = cells(shown)
        corners = [tuple(picture[0, 0].tolist()), tuple(picture[-1, -1].tolist())]
        colours = [(*SUBJECT, 255), (*STYLE, 255)]
        assert corners == (colours if first else colours[::-1])
        assert re.findall(r'<span style="top: .*?">(\d+)</span>', shown)[-1] == str(steps)


def test_what_is_saved_is_what_the_chosen_picture_did():
    done = batch(True, False)
    done.recipe = Recipe(done.settings, (), (), done.trace, {})
    job("1", done, seeds=(7, 8))
    first, second = (results.recipe(one).trace for one in results.pictures_of("txt2img", "1"))
    assert torch.equal(first.weights, done.trace.weights[:, :, :1])
    assert torch.equal(second.weights, done.trace.weights[:, :, 1:])


def test_the_map_lies_on_the_page():
    """Nothing behind the cells, paler ones let the page through, and all that is to be read is text of it."""
    done = batch(True)
    weights = done.trace.weights.clone()
    weights[0] = 0.5 * weights[1]
    reached = done.trace.reached.clone()
    reached[2, 1] = False
    done.trace = dataclasses.replace(done.trace, weights=weights, reached=reached)
    job("1", done)
    shown = page()
    (picture,) = cells(shown)
    rows, columns, _ = picture.shape
    opacity = picture[rows // 6, :, 3].unique().tolist()
    assert opacity == [0, 128]
    assert set(picture[rows // 2, :, 3].unique().tolist()) == {0, 255}
    assert picture[-2, columns - 2, 3] < 60
    assert ">not measured</span>" in shown.replace("</i>", ">")
    for text in ("Subject: &lt;dog&gt; <b>", "Style: watercolor <b>", "<b>60 %</b>", ">1</span>", ">2</span>", ">in</span>"):
        assert text in shown


def test_the_selection_that_would_have_been_is_a_map_of_its_own():
    done = batch(True)
    done.settings = dataclasses.replace(done.settings, method="klora")
    done.trace = dataclasses.replace(done.trace, divergences=done.trace.divergences.flip(-1))
    job("1", done)
    job("2", fusion_pass())
    (one,) = results.pictures_of("txt2img", "1")
    assert results.has_selection(one)
    (used,), (selected,) = cells(page()), cells(page(view=results.SELECTED))
    assert tuple(used[0, 0].tolist()) == tuple(selected[-1, -1].tolist()) == (*SUBJECT, 255)
    assert "not measured" not in page()
    done.settings = dataclasses.replace(done.settings, method="dynfuse")
    job("3", done)
    assert not results.has_selection(*results.pictures_of("txt2img", "3"))


def test_each_browser_sees_its_own_job():
    """Two clients of one server, in the same tab."""
    job("1", fusion_pass("first"))
    job("2", fusion_pass("second"))
    assert "first" in page("1")
    assert "second" in page("2")
    results.remember("txt2img", "3", [])
    assert "first" in page("1")
    assert page("3") == ""


@pytest.mark.parametrize("information", ["", None, "{}", "[]", "no JSON", '{"job_timestamp": "never"}'])
def test_a_browser_without_a_job_sees_none(information):
    job("1", fusion_pass("first", recipe="one"))
    assert results.pictures_of("txt2img", results.job_in(information)) == []


def test_a_browser_knows_its_job_by_what_came_with_the_pictures():
    processed = types.SimpleNamespace(job_timestamp="20261129130000")
    assert results.job_in(json.dumps({"job_timestamp": processed.job_timestamp, "all_seeds": [7]})) == results.job_of(processed)


def test_old_jobs_are_let_go():
    for number in range(40):
        job(str(number), fusion_pass(f"note {number}"))
    assert page("0") == ""
    assert "note 39" in page("39")


def test_many_pictures_are_not_kept_for_ever():
    for number in range(5):
        results.remember("txt2img", str(number), [results.batch_of([fusion_pass()], range(8)) for _ in range(20)])
        kept = [len(results.pictures_of("txt2img", str(job))) for job in range(5)]
        assert kept[number] == 64
        assert sum(kept) == 64


def test_the_last_pass_that_ran_is_what_can_be_saved():
    first, second = (Recipe(FuseSettings(), (), (), trace(), {}) for _ in range(2))
    job("1", fusion_pass(recipe=first), fusion_pass(hires=True, recipe=second), fusion_pass("why", with_trace=False))
    (one,) = results.pictures_of("txt2img", "1")
    assert results.recipe(one).shapes is second.shapes


def test_a_pass_that_never_ran_shows_its_notes_only():
    job("1", fusion_pass("why", with_trace=False))
    assert "why" in page()
    assert "<img" not in page()


def test_the_map_is_saved_beside_the_image(saving):
    results.save_beside(str(saving / "00001-7.jpg"), [fusion_pass()])
    assert saved(saving) == ["00001-7-dynfuse.png"]


def test_the_maps_of_both_passes_stand_one_above_the_other(saving):
    results.save_beside(str(saving / "one.png"), [fusion_pass()])
    results.save_beside(str(saving / "two.png"), [fusion_pass(), fusion_pass(hires=True)])
    with Image.open(saving / "one-dynfuse.png") as one, Image.open(saving / "two-dynfuse.png") as two:
        assert two.size == (one.width, 2 * one.height)


@pytest.mark.parametrize("name", ["grid-0001.png", "00001-7-mask.png", "00001-7-mask-composite.png", "00001-7-before-highres-fix.png"])
def test_grids_masks_and_earlier_stages_get_no_map(saving, name):
    results.save_beside(str(saving / name), [fusion_pass()])
    assert saved(saving) == []


def test_nothing_is_saved_for_a_plain_image_or_unless_the_user_wants_it(webui, tmp_path):
    results.save_beside(str(tmp_path / "1.png"), [fusion_pass()])
    webui.opts.dynfuse_save_map = True
    results.save_beside(str(tmp_path / "2.png"), [])
    results.save_beside(str(tmp_path / "3.png"), [fusion_pass(with_trace=False)])
    assert saved(tmp_path) == []


def test_a_guided_job_shows_its_curve_and_both_references():
    job("1", fusion_pass(guidance=guidance()))
    shown = results.beside_part(*results.pictures_of("txt2img", "1"))
    assert shown.count("data:image/png;base64,") == 1
    assert shown.count("data:image/jpeg;base64,") == 2
    assert "<b>Subject reference</b><span>generated: a &lt;b&gt;dog&lt;/b&gt;</span>" in shown
    assert "<b>Style reference</b><span>your picture</span>" in shown


def test_both_passes_have_a_curve_and_share_the_references():
    job("1", fusion_pass(guidance=guidance()), fusion_pass(hires=True, guidance=guidance()))
    assert page().count("data:image/png;base64,") == 4
    assert page().count("data:image/jpeg;base64,") == 2
    assert page().count("hires pass") == 2


@pytest.mark.parametrize("steps", [None, 0])
def test_a_pass_that_no_step_of_was_guided_has_no_curve(steps):
    job("1", fusion_pass(guidance=guidance(steps)))
    assert page().count("data:image/png;base64,") == 1


def test_a_large_reference_is_shown_whole_and_smaller():
    job("1", fusion_pass(guidance=guidance()))
    address = page().split("data:image/jpeg;base64,")[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(address))) as shown:
        assert shown.width == 2 * shown.height < 900


def test_the_curve_is_saved_under_the_map(saving):
    results.save_beside(str(saving / "map.png"), [fusion_pass()])
    results.save_beside(str(saving / "both.png"), [fusion_pass(guidance=guidance())])
    with Image.open(saving / "map-dynfuse.png") as one, Image.open(saving / "both-dynfuse.png") as both:
        drawn = curve.draw(record(), one.width)
        assert both.size == (one.width, one.height + drawn.height)
        assert both.crop((0, one.height, *both.size)).tobytes() == drawn.tobytes()
