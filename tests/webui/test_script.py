import types

import gradio as gr
import pytest
from PIL import Image

from lib_dynfuse.guidance.weights import CLIP_DEFAULT, DINO_DEFAULT
from lib_dynfuse.settings import METHODS, FuseSettings, SettingsError, field_types
from lib_dynfuse.text import tag
from tests.webui.conftest import Job, extra_network_data

PAIR = {"subject": "dog", "style": "watercolor"}
ON = (True, PAIR)
OFF = (False, PAIR)


@pytest.fixture
def script(script_module):
    made = script_module.DynFuseScript()
    made.is_img2img = False
    return made


def request(data):
    """What the host part reads of the tags in a prompt's extra network data."""
    return tag.parse_tags([parameters.items for parameters in (data or {}).get("dynfuse", [])])


def test_the_panels_settings_become_the_batchs_tag(script):
    job = Job("a dog <lora:ink:1>", "a cat")
    assert request(job.run_batch(script, *ON)) == FuseSettings(**PAIR)
    assert job.all_prompts == ["a dog <lora:ink:1>", "a cat"]


def test_a_switched_off_panel_changes_nothing(script):
    job = Job("a dog", hr_prompts=["a dog"])
    assert job.run_batch(script, *OFF) == {}
    assert job.extra_generation_params == {}
    assert job.hr_extra_network_data == {}


def test_a_tag_works_with_the_panel_switched_off(script):
    assert request(Job("<dynfuse:dog:ink:0.5>").run_batch(script, *OFF)) == FuseSettings(subject="dog", style="ink", subject_weight=0.5)


def test_a_tag_goes_before_the_panel(script):
    job = Job("a dog <dynfuse:fox:ink>")
    assert request(job.run_batch(script, *ON)) == FuseSettings(subject="fox", style="ink")
    assert "DynFuse" not in job.extra_generation_params


def test_an_unclosed_tag_before_ours_does_not_swallow_it(script):
    assert request(Job("a dog <lora:ink").run_batch(script, *ON)) == FuseSettings(**PAIR)


def test_the_hires_pass_gets_the_panels_settings_too(script):
    job = Job("a dog", hr_prompts=["a dog, sharp"])
    job.run_batch(script, *ON)
    assert request(job.hr_extra_network_data) == FuseSettings(**PAIR)


def test_a_hires_prompts_own_tag_goes_before_the_panel(script):
    job = Job("a dog", hr_prompts=["a dog <dynfuse:fox:ink>"])
    first = job.run_batch(script, *ON)
    assert request(first) == FuseSettings(**PAIR)
    assert request(job.hr_extra_network_data) == FuseSettings(subject="fox", style="ink")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((True, {**PAIR, "colour": 1}), "unknown setting 'colour'"),
        ((True, {**PAIR, "style_weight": "much"}), "style_weight must be a number"),
        ((True, "dog", "dog"), "same LoRA"),
        ((True, "dog", None), "no style LoRA"),
        ((PAIR,), "true or false"),
    ],
)
def test_a_mistake_reaches_the_host_part_as_a_sentence(script, arguments, words):
    job = Job("a dog", hr_prompts=["a dog"])
    with pytest.raises(SettingsError, match=words):
        request(job.run_batch(script, *arguments))
    with pytest.raises(SettingsError, match=words):
        request(job.hr_extra_network_data)
    with_tag = Job("a dog <dynfuse:fox:ink>").run_batch(script, *arguments)
    assert request(with_tag) == FuseSettings(subject="fox", style="ink"), "a tag goes before the panel"


@pytest.mark.parametrize("arguments", [(True, [], []), (True, None, ""), (True, {}), (True, {"subject": "", "method": "direct"})])
def test_an_open_and_empty_panel_makes_the_plain_picture_with_a_note(script, arguments):
    job = Job("a dog", hr_prompts=["a dog"])
    assert "dynfuse" not in job.run_batch(script, *arguments)
    assert "dynfuse" not in job.hr_extra_network_data
    assert job.comments == ["DynFuse: no LoRA is chosen in the panel, so nothing was fused"]
    with_tag = Job("a dog <dynfuse:fox:ink>")
    assert request(with_tag.run_batch(script, *arguments)) == FuseSettings(subject="fox", style="ink")
    assert with_tag.comments == []


@pytest.mark.parametrize("text", ["<DynFuse:fox:ink>", "< dynfuse:fox:ink>", "<DYNFUSE :fox:ink>", "< dynfuse : fox:ink >"])
def test_a_tag_in_any_case_and_with_spaces_is_one(script, text):
    job = Job(f"a dog {text}", hr_prompts=[f"a dog {text}"])
    assert request(job.run_batch(script, *OFF)) == FuseSettings(subject="fox", style="ink")
    assert request(job.hr_extra_network_data) == FuseSettings(subject="fox", style="ink")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a dog <dynfuse:>", "names no LoRA"),
        ("a dog < dynfuse : >", "names no LoRA"),
        ("a dog <dynfuze:fox:ink>", "is no tag that is known"),
        ("a dog <dyn fuse:fox:ink>", "is no tag that is known"),
        ("a dog <dynfuse;fox:ink>", "is no tag that is known"),
        ("a dog <dynfuse:fox:ink", "<dynfuse:fox:ink is no whole tag"),
        ("a dog dynfuse:fox:ink> on grass", "dynfuse:fox:ink> is no whole tag"),
        ("a dog (DynFuse:fox:ink)", "is no whole tag"),
        ("a dog <dynfuse fox ink>", "is no whole tag"),
        ("a dog <dynfuse>", "is no whole tag"),
        ("a dog <DynFuse=fox:ink>", "is no whole tag"),
    ],
)
def test_a_tag_that_is_none_stops_the_picture(script, prompt, words):
    with pytest.raises(SettingsError, match=words):
        request(Job(prompt).run_batch(script, *OFF))


@pytest.mark.parametrize(
    "prompt", ["a <lora:dynamic:1> dog", "a <dynamic:1> dog", "a <lora:dynfuse:1> dog", "1 < 2: a dog >", "<fuse:a:b>"]
)
def test_other_peoples_tags_are_left_alone(script, prompt):
    job = Job(prompt)
    assert "dynfuse" not in job.run_batch(script, *OFF)
    assert job.all_prompts == [prompt]


@pytest.mark.parametrize("which", ["all_negative_prompts", "all_hr_negative_prompts"])
def test_a_tag_in_the_negative_prompt_is_named(script, which):
    job = Job("a dog", **{which: ["bad <dynfuse:fox:ink>"]})
    with pytest.raises(SettingsError, match="stands in the negative prompt"):
        request(job.run_batch(script, *OFF))


@pytest.mark.parametrize(
    "prompts", [("a <dynfuse:fox:ink>", "b"), ("a", "b <dynfuse:fox:ink>"), ("a <dynfuse:fox:ink>", "b <dynfuse:dog:ink>")]
)
def test_a_batch_of_different_tags_stops_with_a_sentence(script, prompts):
    with pytest.raises(SettingsError, match="the pictures of one batch ask for different fusions"):
        request(Job(*prompts).run_batch(script, *OFF))


def test_each_picture_has_the_hashes_of_its_own_loras(script):
    job = Job("a <dynfuse:dog:nothing>", "b", "c <dynfuse:nothing:watercolor>")
    script.process(job, *OFF)
    entry = job.extra_generation_params["DynFuse LoRA hashes"]
    told = [entry(index=number, all_prompts=job.all_prompts, p=job) for number in range(3)]
    assert told == ["dog: aa11", None, "watercolor: bb22"]


def test_prompts_that_another_script_writes_after_ours_are_read_as_well(script):
    """Dynamic Prompts makes prompts of a template in its own `process`."""
    job = Job("a {<dynfuse:dog:hund>|<dynfuse:watercolor:x>}")
    script.process(job, *OFF)
    job.all_prompts, job.all_seeds = ["a dog < DynFuse : dog:x >", "a cat <dynfuse:watercolor:x>"], [7, 8]
    prompts = job.all_prompts[:1]
    script.before_process_batch(job, *OFF, prompts=prompts, seeds=[7], subseeds=[1], batch_number=0)
    assert prompts == ["a dog <dynfuse:dog:x>"]
    script.process_batch(job, *OFF, prompts=prompts, seeds=[7], subseeds=[1], batch_number=0)
    hashes = job.extra_generation_params["DynFuse LoRA hashes"]
    assert [hashes(index=number) for number in range(2)] == ["dog: aa11", "watercolor: bb22"]
    wrong = ["a dog <dynfus:dog:x>"]
    script.before_process_batch(job, *OFF, prompts=wrong, seeds=[7], subseeds=[1], batch_number=0)
    with pytest.raises(SettingsError, match="is no tag that is known"):
        request(extra_network_data(wrong[0]))


def test_an_inner_job_leaves_the_result_alone(script, host, script_module, monkeypatch):
    kept = []
    monkeypatch.setattr(script_module.results, "remember", lambda tab, job, batches: kept.append(len(batches)))
    monkeypatch.setattr(script_module.results, "batch_of", lambda passes, seeds: types.SimpleNamespace(passes=passes))
    host.passes = lambda p: ["a pass"]
    outer, inner = Job("a", "b"), Job("a face")
    script.process(outer, *OFF)
    for number in range(2):
        script.postprocess_batch(outer, *OFF, images=None, batch_number=number)
        host.inner = True
        script.process(inner, *OFF)
        script.postprocess_batch(inner, *OFF, images=None, batch_number=0)
        script.postprocess(inner, None)
        host.inner = False
    script.postprocess(outer, None)
    assert kept == [2]


def test_every_batch_of_a_job_is_kept_with_its_seeds(script, host, script_module, monkeypatch):
    kept = []
    monkeypatch.setattr(script_module.results, "batch_of", lambda passes, seeds: types.SimpleNamespace(passes=passes, seeds=list(seeds)))
    monkeypatch.setattr(script_module.results, "remember", lambda tab, job, batches: kept.append((job, [one.seeds for one in batches])))
    host.passes = lambda p: ["a pass"]
    for _ in range(2):  # the second job has its own only
        job = Job("a", "b", "c", batch_size=2)
        script.process(job, *OFF)
        for number in range(2):
            script.postprocess_batch(job, *OFF, images=None, batch_number=number)
        script.postprocess(job, types.SimpleNamespace(job_timestamp="1"))
    assert kept == [("1", [[7, 8], [9]])] * 2


def test_an_argument_nobody_thought_of_still_stops_the_image(script, webui, script_module, monkeypatch):
    monkeypatch.setattr(script_module, "read_arguments", lambda arguments, cache: 1 / 0)
    prompts = ["a dog"]
    script.before_process_batch(Job(), *ON, prompts=prompts)
    with pytest.raises(SettingsError, match="division by zero"):
        request(extra_network_data(prompts[0]))
    assert webui.errors


def test_the_infotext_gets_settings_and_hashes(script):
    job = Job()
    job.run_batch(script, True, {**PAIR, "te_weight": 0.5})
    assert job.extra_generation_params == {
        "DynFuse": "True",
        "DynFuse subject": "dog",
        "DynFuse style": "watercolor",
        "DynFuse method": "balanced",
        "DynFuse te weight": "0.5",
        "DynFuse LoRA hashes": "dog: aa11, watercolor: bb22",
    }


@pytest.mark.parametrize(
    ("prompts", "settings", "written"),
    [
        (["a dog"] * 3, {"guidance": True}, "7"),  # the second image alone would else get references of its own seed
        (["a dog"], {"guidance": True}, None),
        (["a dog"] * 3, {"guidance": True, "reference_seed": 12}, "12"),
        (["a dog"] * 3, {"guidance": True, "m": 0}, None),
        (["a dog"] * 3, {}, None),
    ],
)
def test_the_infotext_makes_each_image_of_a_job_repeatable_alone(script, prompts, settings, written):
    job = Job(*prompts)
    job.run_batch(script, True, {**PAIR, **settings})
    assert job.extra_generation_params.get("DynFuse reference seed") == written


def test_the_infotext_gets_the_hashes_of_a_tags_loras(script):
    job = Job("a dog", hr_prompts=["a dog <dynfuse:dog:nothing>"])
    job.run_batch(script, *OFF)
    assert job.extra_generation_params == {"DynFuse LoRA hashes": "dog: aa11"}


def test_the_infotext_gets_the_hash_of_each_of_several_loras(script, host):
    host.loras["a+b"] = "cc33"
    for arguments, prompt in (
        ((True, {"subject": ["dog", "a+b"], "style": "watercolor"}), "a dog"),
        (OFF, "<dynfuse:dog+a%2Bb:watercolor>"),
    ):
        job = Job(prompt)
        assert request(job.run_batch(script, *arguments)).subjects == ("dog", "a+b")
        assert job.extra_generation_params["DynFuse LoRA hashes"] == "dog: aa11, a%2Bb: cc33, watercolor: bb22"


def test_a_method_that_is_registered_later_reaches_the_host_part(script, monkeypatch):
    monkeypatch.setitem(METHODS, "halves", "each LoRA at half its weight")
    assert request(Job().run_batch(script, True, {**PAIR, "method": "halves"})).method == "halves"
    assert request(Job("<dynfuse:dog:ink:method=halves>").run_batch(script, *OFF)).method == "halves"


def test_a_processing_object_used_again_keeps_no_old_entries(script):
    job = Job()
    job.run_batch(script, True, {**PAIR, "te_weight": 0.5})
    job.extra_generation_params["Dynamic thing"] = 1
    job.run_batch(script, *OFF)
    assert job.extra_generation_params == {"Dynamic thing": 1}


def test_the_user_is_told_when_the_host_ignores_all_tags(script):
    for arguments, prompt in ((ON, "a dog"), (OFF, "<dynfuse:dog:watercolor>")):
        job = Job(prompt, disable_extra_networks=True)
        script.process(job, *arguments)
        assert "not fused" in job.comments[0]
        assert "not fused" in job.extra_generation_params["DynFuse note"]


def test_ui_may_be_called_twice_and_every_control_has_a_value(script):
    with gr.Blocks():
        assert script.ui(False)
        controls = script.ui(False)
    assert all(control.value is not None or isinstance(control, gr.Image) for control in controls)
    assert [field[0] for field in script.infotext_fields] == controls


def test_the_other_tab_is_found_by_the_same_paste_functions(script, script_module):
    other = script_module.DynFuseScript()
    with gr.Blocks():
        script.ui(False)
        other.ui(True)
    assert script.paste_field_names == other.paste_field_names == [field[1] for field in other.infotext_fields]


def test_the_result_is_refreshed_when_the_tabs_generation_info_changes(script):
    with gr.Blocks() as demo:
        script.ui(False)
        handlers = [len(demo.fns)]
        for element in ("generation_info_img2img", "generation_info_txt2img"):
            script.after_component(gr.Textbox(visible=False, elem_id=element), elem_id=element)
            handlers.append(len(demo.fns))
    assert handlers[0] == handlers[1] < handlers[2]


def test_the_host_part_and_the_tags_network_come_and_go_with_the_ui(script_module, webui, host):
    script_module.register()
    webui.callbacks["before_ui"]()
    assert host.installed is tag.parse_tags
    network = webui.networks["dynfuse"]
    network.activate(Job(), [])
    network.deactivate(Job())
    webui.callbacks["script_unloaded"]()
    assert host.installed is None


def test_pasted_prompts_get_the_names_of_this_webui(script_module, webui):
    script_module.register()
    entries = {"Prompt": "<dynfuse:hund:watercolor>", "Hires prompt": "<dynfuse:hund:watercolor>", "DynFuse LoRA hashes": "hund: aa11"}
    webui.callbacks["infotext_pasted"]("", entries)
    assert entries["Prompt"] == entries["Hires prompt"] == "<dynfuse:dog:watercolor>"


def test_the_script_file_shows_the_host_exactly_one_script(script_module, webui):
    import pathlib
    import runpy

    path = pathlib.Path(__file__).parents[2] / "scripts" / "dynfuse.py"
    names = runpy.run_path(str(path))
    base = __import__("modules.scripts", fromlist=["Script"]).Script
    found = [value for value in names.values() if isinstance(value, type) and issubclass(value, base)]
    assert found == [script_module.DynFuseScript]
    assert set(webui.callbacks) == {"before_ui", "script_unloaded", "infotext_pasted", "image_saved"}


def test_a_picture_of_the_panel_travels_as_digits_and_is_kept(script, host):
    picture = Image.new("RGB", (20, 10), "red")
    named = {**PAIR, "style_image": picture}
    job = Job("a dog", hr_prompts=["a dog"])
    settings = request(job.run_batch(script, True, *(named.get(name) for name in field_types())))
    assert host.reference_cache.picture(settings.style_image).tobytes() == picture.tobytes()
    assert request(job.hr_extra_network_data) == settings
    assert job.extra_generation_params["DynFuse style image"] == settings.style_image


def test_a_picture_that_cannot_be_read_stops_the_image(script):
    with pytest.raises(SettingsError, match="style_image: .*base64"):
        request(Job().run_batch(script, True, {**PAIR, "style_image": "/etc/hostname"}))


def test_the_options_are_the_hosts_parts_own_with_its_defaults(webui, script_module):
    script_module.register()
    defaults = {name: option.default for name, option in webui.options.items()}
    assert defaults == {
        "dynfuse_save_map": False,
        "dynfuse_clip_model": CLIP_DEFAULT,
        "dynfuse_dino_model": DINO_DEFAULT,
        "dynfuse_encoders_folder": "",
        "dynfuse_download_encoders": True,
        "dynfuse_without_encoders": "stop",
        "dynfuse_watch_selection": False,
        "dynfuse_reference_cache_mb": 256,
    }
    # The host's own options know them at once: it may have copied the list before (modules/options.py, reorder).
    assert vars(webui.opts) == defaults
    for option in webui.options.values():
        assert (option.section, option.category_id) == (("dynfuse", "DynFuse"), "sd")  # else its page stands under "Uncategorized"
        with gr.Blocks():
            (option.component or gr.Textbox)(value=option.default, **(option.component_args or {}))
