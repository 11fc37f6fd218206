"""Tuning in the panel: the button, the contact sheet, a click on it, and what the infotext tells."""

from __future__ import annotations

import html
import json
import re
import types

import gradio as gr
import pytest
from PIL import Image

from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.text import infotext, tag
from lib_dynfuse.tuning.plan import Frame, candidates
from lib_dynfuse.tuning.score import Score
from lib_dynfuse.tuning.search import Tried, Tuned
from lib_dynfuse.webui import panel, results, tuning
from tests.webui.conftest import Job
from tests.webui.test_panel import behind, flat, wired

ASKED = FuseSettings(subject="dog", style="watercolor", style_weight="0@0,1@0.3", tune="auto")


@pytest.fixture
def found():
    """A search that took its last candidate."""
    plan = candidates(ASKED)
    tried = [Tried(changes, f"number {n}", Score(0.1 * n, 0.5), Image.new("RGB", (6, 4))) for n, changes in enumerate(plan)]
    return Tuned(tuple(tried), len(plan) - 1, Frame(384, 256, 12))


def cells(page):
    """The settings behind every picture of a contact sheet."""
    return [json.loads(html.unescape(text)) for text in re.findall(r'data-settings="([^"]*)"', page)]


class TestSheet:
    def test_every_candidate_is_a_button_with_its_settings_and_score(self, found):
        page = tuning.sheet_html("txt2img", tuning.Sheet(found, found.settings(ASKED)))
        assert cells(page) == [dict(one.changes) for one in found.tried]
        assert page.count("<img") == len(found.tried)
        assert page.count("dynfuse-best") == 1
        assert page.index("dynfuse-best") > page.index("number 0")
        assert f"score {found.tried[-1].score.total:.2f}" in page
        assert html.escape(tag.format_tag(found.settings(ASKED))) in page

    def test_a_job_without_a_search_has_none(self):
        assert tuning.sheet_html("txt2img", None) == ""

    def test_a_label_is_text_and_no_markup(self, found):
        tried = Tried(found.tried[0].changes, "<b>1</b>", Score(0, 0), Image.new("RGB", (6, 4)))
        page = tuning.sheet_html("txt2img", tuning.Sheet(Tuned((tried,), 0, found.frame), found.settings(ASKED)))
        assert "<b>1" not in page


@pytest.fixture
def built(webui, host):
    """(the panel's controls by name, what the button does, what a click does and what each sets)"""
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
    return demo, made


def outputs(demo, made, name):
    """What the event of a control sets, by the names of the panel's controls."""
    names = {control._id: name for name, control in made.controls.items()} | {made.tuning.message._id: "message"}
    source = next(block._id for block in demo.blocks.values() if block.elem_id == f"dynfuse_txt2img_{name}")
    event = next(event for event in demo.get_config_file()["dependencies"] if source in flat(event["targets"]))
    return [names[output] for output in event["outputs"]]


class TestPanel:
    def test_the_button_switches_everything_on_and_presses_generate(self, built):
        demo, made = built
        (begin,) = behind(demo, "tune_button")
        done = dict(zip(outputs(demo, made, "tune_button"), begin(["dog"], ["watercolor"]), strict=True))
        assert (done["enabled"], done["tune"]) == (True, "auto")
        assert tuning.GENERATE in done["message"]
        scripts = [event.get("js") for event in demo.get_config_file()["dependencies"]]
        pressing = [script for script in scripts if isinstance(script, str) and "dynfusePressGenerate" in script]
        assert len(pressing) == 1
        assert f"'{tuning.GENERATE}'" in pressing[0]

    @pytest.mark.parametrize("pair", [(None, ["ink"]), (["dog"], []), (None, None)])
    def test_without_a_pair_it_says_so_and_presses_nothing(self, built, pair):
        (begin,) = behind(built[0], "tune_button")
        *_, message = begin(*pair)
        assert "Pick a subject LoRA and a style LoRA" in message
        assert tuning.GENERATE not in message

    def test_a_click_on_a_picture_sets_the_panel_to_its_settings(self, built, found):
        demo, made = built
        (choose,) = behind(demo, "tuned_choice")
        clicked = {"settings": dict(found.tried[-1].changes), "click": 3}
        done = dict(zip(outputs(demo, made, "tuned_choice"), choose(json.dumps(clicked)), strict=True))
        assert done["tune"] == "off"
        assert done["contrast"] == found.tried[-1].changes["contrast"]
        assert done["tilt"] == found.tried[-1].changes["tilt"]
        assert "Set as in the picture" in done["message"]

    @pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"settings": {"contrast": "red"}}', '{"settings": 3}'])
    def test_what_no_picture_sent_changes_nothing(self, built, text):
        (choose,) = behind(built[0], "tuned_choice")
        *updates, message = choose(text)
        assert message == ""
        assert all("value" not in update for update in updates)

    def test_the_sheet_follows_the_job_that_the_browser_shows(self, built):
        functions = [function for function, targets, outputs in wired(built[0]) if outputs == ["dynfuse_txt2img_tuned"]]
        assert [function("no job") for function in functions] == [""]

    def test_its_controls_are_no_settings(self, built):
        _, made = built
        assert not {made.tuning.button, made.tuning.choice} & set(made.arguments)
        assert len(made.tuning.button.webui_tooltip) > 20
        assert made.tuning.choice.do_not_save_to_config


class TestTold:
    """What is written into a job once its settings are found."""

    def entries(self, p):
        return {key: value(index=0) if callable(value) else value for key, value in p.extra_generation_params.items()}

    def test_the_panels_infotext_has_the_found_values(self, script_module, found, host):
        p = Job("a dog", "a dog")
        script = script_module.DynFuseScript()
        values = {name: getattr(ASKED, name) for name in ("subject", "style", "style_weight", "tune")}
        script.process(p, True, values)
        assert self.entries(p)["DynFuse tune"] == "auto"
        used = found.settings(ASKED)
        for number in range(2):
            if not number:  # the next batch has them already
                tuning.tell(p, ASKED, used, found)
            script.process_batch(p, True, values, prompts=["a dog"], batch_number=number)
        read = infotext.read_settings({key: value for key, value in self.entries(p).items() if value is not None})
        assert read == used
        assert read.tune == "off"
        assert self.entries(p)["DynFuse tuned"] == found.sentence
        assert p.all_prompts == ["a dog", "a dog"]

    def test_a_value_that_is_the_default_again_is_left_out(self, script_module, host):
        asked = FuseSettings(subject="dog", style="watercolor", contrast=3.0, tune="auto")
        p = Job("a dog")
        script_module.DynFuseScript().process(p, True, {"subject": "dog", "style": "watercolor", "contrast": 3.0, "tune": "auto"})
        tuning.tell(p, asked, FuseSettings(subject="dog", style="watercolor"), None)
        read = infotext.read_settings({key: value for key, value in self.entries(p).items() if value is not None})
        assert read == FuseSettings(subject="dog", style="watercolor")
        assert "DynFuse tuned" not in p.extra_generation_params

    def test_a_tag_becomes_one_with_the_found_values_and_others_stay(self, script_module, found, host):
        asked = tag.format_tag(ASKED)
        other = "a cat <dynfuse:dog:ink:tune=auto>"
        p = Job(f"a dog {asked}", other, hr_prompts=[f"large {asked}", other], main_prompt=f"a dog {asked}")
        script_module.DynFuseScript().process(p, False)
        used = found.settings(ASKED)
        tuning.tell(p, ASKED, used, found)
        assert [tag.parse_tags(tag.find_tags(prompt)) for prompt in (*p.all_prompts, *p.all_hr_prompts, p.main_prompt)] == [
            *(used, tag.parse_tags(tag.find_tags(other))) * 2,
            used,
        ]
        assert p.all_prompts[0].startswith("a dog <dynfuse:dog:watercolor:")
        assert "DynFuse tune" not in p.extra_generation_params

    def test_beside_pictures_with_tags_of_their_own_only_the_panels_have_the_found_values(self, script_module, found, host):
        p = Job("a dog", "a cat <dynfuse:dog:ink>")
        script_module.DynFuseScript().process(
            p, True, {name: getattr(ASKED, name) for name in ("subject", "style", "style_weight", "tune")}
        )
        tuning.tell(p, ASKED, found.settings(ASKED), found)
        contrasts = [p.extra_generation_params["DynFuse contrast"](index=index) for index in range(2)]
        assert contrasts == [tag.format_field("contrast", found.tried[-1].changes["contrast"]), None]

    def test_the_next_job_of_the_same_object_starts_anew(self, script_module, found, host):
        p = Job("a dog")
        script = script_module.DynFuseScript()
        values = {name: getattr(ASKED, name) for name in ("subject", "style", "style_weight", "tune")}
        script.process(p, True, values)
        tuning.tell(p, ASKED, found.settings(ASKED), found)
        script.process(p, True, {**values, "tune": "off"})
        assert "DynFuse tuned" not in p.extra_generation_params
        assert not any(name in p.extra_generation_params for name in ("DynFuse contrast", "DynFuse tune"))

    def test_the_host_is_told_to_call_it(self, script_module, host, webui):
        script_module.register()
        webui.callbacks["on_before_ui" if "on_before_ui" in webui.callbacks else "before_ui"]()
        assert host.told is tuning.tell


def test_the_sheet_is_of_the_job_that_the_browser_shows(found):
    settings = found.settings(ASKED)
    fields = {"trace": None, "notes": [], "hires": False, "guidance": None, "recipe": None}
    tuned, plain = (types.SimpleNamespace(settings=settings, tuned=search, **fields) for search in (found, None))
    results.remember("txt2img", "tuned job", [results.batch_of([plain], [1]), results.batch_of([tuned], [2])])
    results.remember("txt2img", "plain job", [results.batch_of([plain], [3])])
    assert results.tuned("txt2img", "tuned job") == tuning.Sheet(found, settings)
    assert results.tuned("txt2img", "plain job") is results.tuned("img2img", "tuned job") is results.tuned("txt2img", None) is None
