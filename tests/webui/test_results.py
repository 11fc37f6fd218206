import base64
import dataclasses
import io
import types

import pytest
import torch
from PIL import Image

from lib_dynfuse.fusion.rules import Member
from lib_dynfuse.fusion.trace import Trace
from lib_dynfuse.guidance import curve
from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.guide import GuidanceRecord
from lib_dynfuse.guidance.references import Reference
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
    return types.SimpleNamespace(trace=seen, settings=settings, notes=list(notes), hires=hires, guidance=guidance, recipe=recipe)


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


ONE = '{"job_timestamp": "1", "all_seeds": [7]}'
"""What the browser has of job 1."""


def saved(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_jobs_map_and_notes_are_shown_in_its_tab():
    results.remember("txt2img", "1", [fusion_pass("a <b> note", "twice"), fusion_pass("twice", hires=True)])
    page = results.result_html("txt2img", ONE)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("Hires pass") == 1
    assert "a &lt;b&gt; note" in page
    assert page.count("twice") == 1
    assert results.result_html("img2img", ONE) == ""


def test_weights_that_are_the_same_everywhere_are_told_in_a_sentence():
    """In place of a field of one colour."""
    done = fusion_pass()
    same = torch.tensor([1.25, 0.8]).expand(3, 2, 1, 2).clone()
    done.trace = dataclasses.replace(trace(), weights=same)
    results.remember("txt2img", "1", [done])
    page = results.result_html("txt2img", ONE)
    assert "Every layer used &lt;dog&gt; at 1.25 and watercolor at 0.8, at every step." in page
    assert "<img" not in page
    for step, site in ((2, 0), (0, 1)):
        other = same.clone()
        other[step, site, 0, 1] = 0.7
        done.trace = dataclasses.replace(trace(), weights=other)
        results.remember("txt2img", "1", [done])
        page = results.result_html("txt2img", ONE)
        assert "Every layer" not in page
        assert page.count("<img") == 1


def test_a_layer_that_one_lora_leaves_alone_does_not_count_for_it():
    same = torch.tensor([1.25, 0.8]).expand(3, 2, 1, 2).clone()
    same[:, 1, :, 1] = 0
    present = torch.tensor([[True, True], [True, False]])
    assert dataclasses.replace(trace(), weights=same, present=present).uniform == pytest.approx([1.25, 0.8])
    assert dataclasses.replace(trace(), weights=same).uniform is None


def test_each_browser_sees_its_own_job():
    """Two clients of one server, in the same tab."""
    results.remember("txt2img", "1", [fusion_pass("first")])
    results.remember("txt2img", "2", [fusion_pass("second")])
    assert "first" in results.result_html("txt2img", ONE)
    assert "second" in results.result_html("txt2img", '{"job_timestamp": "2"}')
    results.remember("txt2img", "3", [])
    assert "first" in results.result_html("txt2img", ONE)
    assert results.result_html("txt2img", '{"job_timestamp": "3"}') == ""


@pytest.mark.parametrize("information", ["", None, "{}", "[]", "no JSON", '{"job_timestamp": "never"}'])
def test_a_browser_without_a_job_sees_none(information):
    results.remember("txt2img", "1", [fusion_pass("first", recipe="one")])
    assert results.result_html("txt2img", information) == ""
    assert results.recipe("txt2img", information) is None


def test_old_jobs_are_let_go():
    for number in range(40):
        results.remember("txt2img", str(number), [fusion_pass(f"note {number}")])
    assert results.result_html("txt2img", '{"job_timestamp": "0"}') == ""
    assert "note 39" in results.result_html("txt2img", '{"job_timestamp": "39"}')


def test_the_last_pass_that_ran_is_what_can_be_saved():
    results.remember(
        "txt2img", "1", [fusion_pass(recipe="first"), fusion_pass(hires=True, recipe="second"), fusion_pass("why", with_trace=False)]
    )
    assert results.recipe("txt2img", ONE) == "second"
    assert results.recipe("img2img", ONE) is None


def test_a_job_that_was_not_fused_shows_nothing():
    results.remember("txt2img", "1", [])
    assert results.result_html("txt2img", ONE) == ""


def test_a_pass_that_never_ran_shows_its_notes_only():
    results.remember("txt2img", "1", [fusion_pass("why", with_trace=False)])
    assert "why" in results.result_html("txt2img", ONE)
    assert "<img" not in results.result_html("txt2img", ONE)


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
    results.remember("txt2img", "1", [fusion_pass(guidance=guidance())])
    page = results.result_html("txt2img", ONE)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("data:image/jpeg;base64,") == 2
    assert "<b>Subject reference</b><span>generated: a &lt;b&gt;dog&lt;/b&gt;</span>" in page
    assert "<b>Style reference</b><span>your picture</span>" in page


def test_both_passes_have_a_curve_and_share_the_references():
    results.remember("txt2img", "1", [fusion_pass(guidance=guidance()), fusion_pass(hires=True, guidance=guidance())])
    page = results.result_html("txt2img", ONE)
    assert page.count("data:image/png;base64,") == 4
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count("Hires pass") == 1


@pytest.mark.parametrize("steps", [None, 0])
def test_a_pass_that_no_step_of_was_guided_has_no_curve(steps):
    results.remember("txt2img", "1", [fusion_pass(guidance=guidance(steps))])
    assert results.result_html("txt2img", ONE).count("data:image/png;base64,") == 1


def test_a_large_reference_is_shown_whole_and_smaller():
    results.remember("txt2img", "1", [fusion_pass(guidance=guidance())])
    address = results.result_html("txt2img", ONE).split("data:image/jpeg;base64,")[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(address))) as shown:
        assert shown.width == 2 * shown.height < 900


def test_the_curve_is_saved_under_the_map(saving):
    results.save_beside(str(saving / "map.png"), [fusion_pass()])
    results.save_beside(str(saving / "both.png"), [fusion_pass(guidance=guidance())])
    with Image.open(saving / "map-dynfuse.png") as one, Image.open(saving / "both-dynfuse.png") as both:
        drawn = curve.draw(record(), one.width)
        assert both.size == (one.width, one.height + drawn.height)
        assert both.crop((0, one.height, *both.size)).tobytes() == drawn.tobytes()
