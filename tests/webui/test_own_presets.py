"""The user's own presets: kept, read back, chosen in the panel, named in a tag."""

from __future__ import annotations

import json

import gradio as gr
import pytest

from lib_dynfuse import FuseSettings, SettingsError
from lib_dynfuse.settings import PRESETS, field_types, preset_names, use_own_presets
from lib_dynfuse.text import tag
from lib_dynfuse.user_presets import FIELDS, UserPresets
from lib_dynfuse.webui import own_presets, panel

INK = FuseSettings(
    subject="dog", style="ink", method="ties", density=0.4, contrast=0.5, style_weight="0@0,1@1", subject_prompt="a", reference_seed=4
)


@pytest.fixture
def presets(tmp_path):
    return UserPresets(tmp_path / "models" / "dynfuse" / "presets.json")


@pytest.fixture
def _forgotten():
    yield
    use_own_presets(dict)


def test_a_preset_holds_everything_but_what_belongs_to_a_picture(presets):
    assert set(field_types()) - set(FIELDS) == {
        *("subject", "style", "subject_prompt", "style_prompt", "subject_image", "style_image", "reference_seed")
    }
    assert presets.all() == {}
    assert presets.save(" my ink ", INK) == "my ink"
    kept = UserPresets(presets.path).all()["my ink"]
    assert kept == {name: getattr(INK, name) for name in FIELDS}
    assert [path.name for path in presets.path.parent.iterdir()] == ["presets.json"]


def test_saving_again_replaces_and_deleting_forgets(presets):
    presets.save("a", INK)
    presets.save("b", FuseSettings())
    presets.save("a", FuseSettings(method="direct"))
    assert presets.all()["a"]["method"] == "direct"
    assert presets.delete("a")
    assert not presets.delete("a")
    assert list(presets.all()) == ["b"]


@pytest.mark.parametrize("name", ["", "  ", "paper", "Default", "a:b", "a>b", "x" * 41, "-a", "a=b", "a\nb", None])
def test_a_name_that_a_tag_could_not_hold_is_refused(presets, name):
    with pytest.raises(SettingsError, match="preset"):
        presets.save(name, INK)
    assert not presets.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"a": 3}',
        '{"a": {"method": "gone"}}',
        '{"a": {"contrast": "much"}}',
        '{"a:b": {}}',
        '{"a": {"m": []}}',
    ],
)
def test_a_damaged_file_is_no_presets(presets, content):
    presets.path.parent.mkdir(parents=True)
    presets.path.write_text(content)
    assert presets.all() == {}
    presets.save("b", INK)
    assert list(presets.all()) == ["b"]


def test_what_another_version_wrote_is_read_as_far_as_it_means_something(presets):
    presets.save("a", INK)
    kept = json.loads(presets.path.read_text("utf-8"))
    kept["a"] |= {"of tomorrow": 1, "subject": "cat"}
    del kept["a"]["density"]
    presets.path.write_text(json.dumps(kept))
    assert presets.all()["a"] == {name: getattr(INK, name) for name in FIELDS} | {"density": FuseSettings().density}


@pytest.mark.usefixtures("_forgotten")
def test_a_tag_names_it(presets):
    use_own_presets(presets.all)
    presets.save("my ink", INK)
    assert preset_names() == (*PRESETS, "my ink")
    read = tag.parse_tag(["dog", "ink", "preset=my ink", "contrast=2"])
    assert (read.method, read.density, read.contrast, read.style_weight) == ("ties", 0.4, 2.0, "0@0,1@1")
    with pytest.raises(SettingsError, match="preset must be one of default, best, paper, my ink, not"):
        tag.parse_tag(["dog", "ink", "preset=ink"])


def test_the_webui_tells_the_settings_where_they_are(script_module, host):
    script_module._before_ui()
    host.presets.save("mine", INK)
    assert preset_names()[-1] == "mine"


class Row:
    """The panel's row, by its buttons; values of the panel's controls by name."""

    def __init__(self, host):
        with gr.Blocks() as demo:
            self.panel = panel.build("txt2img", host)
        self.names = {control._id: name for name, control in self.panel.controls.items()}
        blocks = {block.elem_id: block for block in demo.blocks.values() if getattr(block, "elem_id", None)}
        self.name = blocks["dynfuse_txt2img_own_preset"]
        self.events = {}
        functions = list(demo.fns.values()) if isinstance(demo.fns, dict) else demo.fns
        for event, function in zip(demo.get_config_file()["dependencies"], functions):
            for target in event["targets"]:
                for what in own_presets.TOOLTIPS:
                    pressed = target[0] if isinstance(target, (list, tuple)) else target
                    if pressed == blocks[f"dynfuse_txt2img_own_preset_{what}"]._id:
                        self.events[what] = event, function.fn

    def press(self, what, name, **values):
        event, function = self.events[what]
        inputs = [values.get(self.names[each], None) for each in event["inputs"][1:]]
        outputs = function(name, *inputs)
        told = {self.names.get(each, each): output for each, output in zip(event["outputs"], outputs, strict=True)}
        return told, outputs[-1]


def test_the_row_saves_applies_and_deletes(webui, host):
    row = Row(host)
    values = {name: getattr(INK, name) for name in FIELDS} | {
        "style_weight": 1.0,
        "style_weight_text": "0@0,1@1",
        "subject_weight_text": "",
    }
    told, message = row.press("save", "my ink", **values)
    assert "preset=my ink" in message
    assert told[row.name._id]["choices"] == ["my ink"]
    assert host.presets.all()["my ink"] == {name: getattr(INK, name) for name in FIELDS}

    told, message = row.press("apply", "my ink")
    assert "my ink" in message
    assert told["method"]["value"] == "ties"
    assert told["contrast"]["value"] == 0.5
    assert "value" not in told["style_weight"], "a slider holds no points"
    assert (told["style_weight_text"]["value"], told["subject_weight_text"]["value"]) == ("0@0,1@1", "")
    assert not {"subject", "style", "subject_prompt", "reference_seed", "subject_image"} & set(told)

    told, message = row.press("delete", "my ink")
    assert told[row.name._id]["choices"] == []
    assert "deleted" in message


def test_mistakes_are_told_beside_the_buttons(webui, host, monkeypatch):
    row = Row(host)
    assert "Pick one" in row.press("apply", None)[1]
    assert "Pick one" in row.press("delete", "gone")[1]
    assert "Not saved: a preset&#x27;s name" in row.press("save", "a:b")[1]
    assert "Not saved: method must be one of" in row.press("save", "a", method="sum")[1]
    monkeypatch.setattr(UserPresets, "_write", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in row.press("save", "a")[1]


def test_the_row_is_no_setting(webui, host):
    row = Row(host)
    assert row.name not in row.panel.arguments
    assert row.name.do_not_save_to_config
