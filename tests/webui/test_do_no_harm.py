"""The script in a WebUI that DynFuse does not fit, and when something of its own fails."""

import contextlib
import inspect

import gradio as gr
import pytest

from lib_dynfuse.webui import panel
from tests.webui.conftest import Job, extra_network_data

PAIR = {"subject": "dog", "style": "watercolor"}
SENTENCE = "DynFuse is off in this WebUI, which works as if it were not installed: networks.load_networks is missing."
HOOKS = ("process", "before_process_batch", "process_batch", "process_before_every_sampling", "postprocess_batch", "postprocess")


@pytest.fixture
def script(script_module):
    made = script_module.DynFuseScript()
    made.is_img2img = False
    return made


@pytest.fixture
def off(host):
    host.off = SENTENCE
    return host


class TestAWebUIThatDoesNotFit:
    def test_the_panel_is_the_sentence_and_one_switch_in_both_tabs_and_every_time(self, script, off):
        for is_img2img in (False, True, False):
            with gr.Blocks() as demo:
                controls = script.ui(is_img2img)
            assert [(control.label, control.value) for control in controls] == [("DynFuse", False)]
            shown = [block.value for block in demo.blocks.values() if isinstance(block, gr.HTML)]
            assert shown == [f"<p>{SENTENCE}</p>"]

    def test_the_tags_network_is_not_registered(self, script_module, webui, off):
        script_module.register()
        webui.callbacks["before_ui"]()
        assert webui.networks == {}

    @pytest.mark.parametrize("arguments", [(), (False,), (True,), (True, PAIR), (False, PAIR)])
    def test_prompts_and_hires_tags_stay_as_they_are(self, script, off, arguments):
        job = Job("a dog", "a cat <dynfuse:dog:watercolor>", hr_prompts=["a dog", "a cat"])
        assert job.run_batch(script, *arguments) == {}
        assert job.hr_extra_network_data == {}

    def test_a_plain_job_is_told_nothing(self, script, off):
        job = Job("a dog")
        job.extra_generation_params["DynFuse of somebody else"] = 1
        job.run_batch(script, False)
        assert job.extra_generation_params == {"DynFuse of somebody else": 1}
        assert job.comments == []

    @pytest.mark.parametrize(("prompt", "arguments"), [("a dog", (True, PAIR)), ("a dog", (True,)), ("<dynfuse:dog:watercolor>", ())])
    def test_whoever_asks_for_a_fusion_gets_the_sentence(self, script, off, prompt, arguments):
        job = Job(prompt)
        job.run_batch(script, *arguments)
        assert job.comments == [SENTENCE]
        assert job.extra_generation_params == {"DynFuse note": SENTENCE}

    def test_a_pasted_infotext_is_left_alone(self, script_module, webui, off):
        script_module.register()
        entries = {"Prompt": "<dynfuse:hund:watercolor>", "DynFuse LoRA hashes": "hund: aa11", "DynFuse": "True", "DynFuse m": "many"}
        before = dict(entries)
        webui.callbacks["infotext_pasted"]("", entries)
        assert entries == before


class Broken:
    """A host part of which nothing works."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)


class TestOurOwnErrors:
    @pytest.fixture
    def _broken(self, script_module, monkeypatch):
        monkeypatch.setattr(script_module, "detect", Broken)

    @pytest.mark.usefixtures("_broken")
    def test_a_plain_job_is_as_if_the_script_were_not_there(self, script, caplog):
        for _ in range(3):
            job = Job("a dog", "a cat", hr_prompts=["a dog"])
            before = dict(vars(job), hr_extra_network_data={})
            assert job.run_batch(script, False, PAIR) == {}
            script.process_before_every_sampling(job, False, PAIR)
            script.postprocess(job, object(), False, PAIR)
            assert vars(job) == before
        told = [record.message for record in caplog.records]
        assert len(told) == len(set(told)) >= 1

    @pytest.mark.usefixtures("_broken")
    def test_no_hook_and_no_callback_raises(self, script_module, webui, script):
        script_module.register()
        calls = {
            "before_ui": (),
            "script_unloaded": (),
            "infotext_pasted": ("", {}),
            "image_saved": (Job(),),
        }
        for name, arguments in calls.items():
            webui.callbacks[name](*arguments)
        script.after_component(object(), elem_id="generation_info_txt2img")
        with gr.Blocks():
            assert script.ui(False) == []
            assert script.ui(True) == []

    def test_a_panel_that_cannot_be_built_leaves_no_arguments(self, script, monkeypatch):
        monkeypatch.setattr(panel, "_control", lambda *arguments: 1 / 0)
        with gr.Blocks():
            assert script.ui(False) == []
        script.after_component(gr.Textbox(visible=False), elem_id="generation_info_txt2img")
        assert Job("a dog").run_batch(script) == {}

    def test_a_host_without_paste_fields_leaves_no_arguments(self, script, webui, monkeypatch):
        monkeypatch.delattr("modules.infotext_utils.PasteField")
        with gr.Blocks():
            assert script.ui(False) == []

    def test_a_host_without_one_of_the_callbacks_gets_none_of_ours(self, script_module, webui, monkeypatch):
        monkeypatch.delattr("modules.script_callbacks.on_image_saved")
        with contextlib.suppress(AttributeError):  # the WebUI prints it, with the name
            script_module.register()
        assert webui.callbacks == {}

    def test_options_that_cannot_be_registered_are_gone_without(self, script_module, webui, monkeypatch):
        monkeypatch.delattr("modules.shared.OptionInfo")
        script_module.register()
        assert "before_ui" in webui.callbacks

    @pytest.mark.parametrize("enabled", [False, None, ""])
    def test_a_switched_off_panel_is_not_read_at_all(self, script, script_module, monkeypatch, enabled):
        monkeypatch.setattr(script_module, "read_arguments", lambda arguments, cache: 1 / 0)
        prompts = ["a dog"]
        script.before_process_batch(Job(), enabled, PAIR, prompts=prompts)
        assert extra_network_data(prompts[0]) == {}

    def test_the_hooks_still_look_like_the_hosts(self, script):
        assert list(inspect.signature(script.before_process_batch).parameters) == ["p", "arguments", "prompts", "kwargs"]
        assert all(getattr(script, hook).__name__ == hook for hook in HOOKS)
