"""The part of the panel that shows a job: which one, which of its pictures, and what is beside the map."""

import json

import gradio as gr
import pytest

from lib_dynfuse.hosts.webui.passes import Recipe
from lib_dynfuse.webui import panel, result, results, saving

from .test_panel import behind, wired
from .test_results import batch, guidance


def recipe_of(done):
    done.recipe = Recipe(done.settings, (), (), done.trace, {})
    return done


@pytest.fixture(autouse=True)
def _one_job():
    results._seen_jobs.clear()
    done = batch(True, False)
    done.guidance = guidance()
    done.notes = ["a note"]
    done.settings = type(done.settings)(subject="dog", style="watercolor", method="klora")
    recipe_of(done)
    results.remember("txt2img", "1", [results.batch_of([done], (7, 8))])


@pytest.fixture
def page(webui, host):
    """(the controls, what the host's end of a job does, what the box with the job does, choosing a picture, choosing a view, saving)"""
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
        box = gr.Textbox(elem_id="dynfuse_txt2img_box")
        result.wire(box, made.result, "txt2img", host, made.references, [made.fields["subject"], made.fields["style"]])
    # The box with the job has other listeners, too.
    shown = next(function for function, _, outputs in wired(demo) if "dynfuse_txt2img_result_part" in outputs)
    finished, *rest = behind(demo, "box", "picture", "view", "saving_button")
    return made.result, finished, shown, *rest, demo


INFORMATION = json.dumps({"job_timestamp": "1", "all_seeds": [7, 8]})


def test_a_finished_job_shows_its_first_picture_and_what_goes_with_it(page, host):
    _, finished, shown, *_ = page
    job, references = finished(INFORMATION)
    assert "No picture is kept yet" in references
    part, picture, view, map_, beside, save, name, message = shown(job)
    assert part["visible"] is view["visible"] is save["visible"] is picture["visible"] is True
    assert picture["choices"] == ["Picture 1 of 2, seed 7", "Picture 2 of 2, seed 8"]
    assert picture["value"] == "Picture 1 of 2, seed 7"
    assert "Picture 1 of 2, seed 7: what was used" in map_
    assert "a note" in beside
    assert beside.count("<img") == 3
    assert (name, message) == ("dog-watercolor", "")


def test_a_page_that_is_loaded_again_shows_the_same_for_its_job(page):
    """It has nothing but the box's text, which the browser kept."""
    _, finished, shown, *_ = page
    job, _ = finished(INFORMATION)
    assert json.loads(json.dumps(job)) == job
    assert shown(job) == shown(job)


@pytest.mark.parametrize("information", ["", '{"job_timestamp": "2"}', "{"])
def test_another_job_shows_nothing(page, information):
    _, finished, shown, chosen, viewed, save, _ = page
    job, _ = finished(information)
    part, picture, view, map_, beside, saved, name, message = shown(job)
    assert part["visible"] is picture["visible"] is view["visible"] is saved["visible"] is False
    assert (map_, beside, name, message) == ("", "", "", "")
    assert chosen(job, "Picture 2 of 2, seed 8", results.USED)[:2] == ["", ""]
    assert viewed(job, None, results.SELECTED) == ""
    assert "Make a picture with DynFuse first" in save(job, None, "new", 0)


def test_another_picture_can_be_chosen_and_what_the_map_shows_of_it(page):
    _, _, _, chosen, viewed, _, _ = page
    second = "Picture 2 of 2, seed 8"
    map_, beside, save, *_ = chosen("1", second, results.SELECTED)
    assert f"{second}: what the selection would choose" in map_
    assert "a note" in beside
    assert save["visible"] is True
    assert f"{second}: what was used" in viewed("1", second, results.USED)


def test_what_is_saved_is_the_chosen_picture(page, monkeypatch):
    *_, save, demo = page
    asked = []
    monkeypatch.setattr(saving, "save", lambda recipe, *rest: asked.append((recipe.trace.weights[0, 0, :, 0].tolist(), *rest[:2])))
    for title in ("Picture 1 of 2, seed 7", "Picture 2 of 2, seed 8"):
        save("1", title, "new", 4)
    assert asked == [([1.0], "new", 4), ([0.0], "new", 4)]


def test_a_new_lora_can_be_picked(page, host):
    *_, demo = page
    choices = next(function for function, _, outputs in wired(demo) if outputs == ["dynfuse_txt2img_subject", "dynfuse_txt2img_style"])
    host.loras["dog-ink"] = "cc33"
    for update in choices():
        assert "dog-ink" in update["choices"]
        assert "value" not in update, "what is picked stays"


def test_without_a_folder_for_loras_there_is_nothing_to_save_to(page, host):
    _, _, shown, *_ = page
    host.lora_folder = None
    assert shown("1")[5]["visible"] is False


def test_the_controls_are_no_settings(page, built_arguments):
    made = page[0]
    ours = [made.picture, made.view, made.name, made.rank, made.button]
    assert not {control.elem_id for control in ours} & built_arguments
    assert all(len(control.webui_tooltip) > 20 for control in ours)
    assert all(control.do_not_save_to_config for control in (made.job, made.picture, made.view, made.name, made.rank))
    assert made.part.visible is made.saving.visible is False


@pytest.fixture
def built_arguments(webui, host):
    with gr.Blocks():
        return {control.elem_id for control in panel.build("txt2img", host).arguments}


def test_the_browser_keeps_the_job_in_its_own_window():
    """The box that the script on the page writes to is there, and not seen."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    script, style = ((root / name).read_text() for name in ("javascript/dynfuse.js", "style.css"))
    assert "#dynfuse_${tab}_job" in script
    assert "sessionStorage" in script
    assert "localStorage" not in script
    assert ".dynfuse-unseen {\n    display: none" in style
