"""The panel is built with the installed gradio: 3.41 in A1111's environment, 4.40 in Forge's."""

import json

import gradio as gr
import pytest
from PIL import Image

from lib_dynfuse.settings import LORA_FIELDS, METHODS, FuseSettings, field_metadata, field_types
from lib_dynfuse.text import infotext
from lib_dynfuse.webui import panel
from lib_dynfuse.webui.arguments import read_arguments
from lib_dynfuse.webui.pictures import picture_address
from tests.webui.conftest import FakeHost

WEIGHT_TEXTS = ["Subject weight over the steps", "Style weight over the steps"]


@pytest.fixture
def built(webui, host):
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
        other = panel.build("img2img", host)
    return demo, made, other


def components(demo):
    return demo.get_config_file()["components"]


def test_the_panel_has_a_control_for_every_field_in_the_public_order(built):
    _, made, _ = built
    assert list(made.fields) == list(field_types())
    labels = [control.label for control in made.arguments]
    assert labels == ["DynFuse", *(field_metadata(name)["label"] for name in field_types()), *WEIGHT_TEXTS]


def test_untouched_controls_mean_the_default_settings(built, host):
    _, made, _ = built
    values = [control.value for control in made.arguments]
    assert values[0] is False
    assert read_arguments([True, "dog", "watercolor", *values[3:]], host.reference_cache) == FuseSettings(subject="dog", style="watercolor")


def test_every_control_has_a_value_of_its_fields_type(built):
    _, made, _ = built
    for name, kind in field_types().items():
        if not field_metadata(name)["picture"]:
            assert isinstance(made.fields[name].value, list if name in LORA_FIELDS else kind), name
    assert [control.value for control in made.texts.values()] == ["", ""]


def test_controls_offer_what_the_settings_permit(built):
    _, made, _ = built
    for name, control in made.fields.items():
        metadata = field_metadata(name)
        if metadata["picture"]:
            assert (control.type, control.interactive) == ("pil", True)
        elif metadata["choices"]:
            assert [choice[0] if isinstance(choice, tuple) else choice for choice in control.choices] == list(metadata["choices"])
        elif metadata["slider"]:
            assert (control.minimum, control.maximum, control.step) == metadata["slider"]
        elif name in LORA_FIELDS:
            assert [choice[0] if isinstance(choice, tuple) else choice for choice in control.choices] == ["dog", "watercolor"]
            assert control.multiselect


def test_a_method_that_is_registered_later_can_be_picked(webui, host, monkeypatch):
    monkeypatch.setitem(METHODS, "halves", "each LoRA at half its weight")
    with gr.Blocks():
        control = panel.build("txt2img", host).fields["method"]
    assert "halves" in [choice[0] if isinstance(choice, tuple) else choice for choice in control.choices]
    assert "halves: each LoRA at half its weight." in control.webui_tooltip


def test_every_control_has_a_tooltip_and_an_element_to_carry_it(built):
    _, made, _ = built
    for control in made.arguments:
        assert len(control.webui_tooltip) > 20
        assert control.elem_id


def test_the_tabs_share_labels_but_no_element_ids(built):
    demo, made, other = built
    assert [control.label for control in made.arguments] == [control.label for control in other.arguments]
    ids = [component["props"].get("elem_id") for component in components(demo)]
    ours = [element for element in ids if element and element.startswith("dynfuse_")]
    assert len(ours) == len(set(ours)) > 2 * len(field_types())


def test_the_refresh_buttons_offer_new_loras(built, host):
    demo, *_ = built
    buttons = [block for block in demo.blocks.values() if str(block.elem_id).endswith("_refresh")]
    assert len(buttons) == 2
    host.loras["fox"] = "ff00"
    assert "fox" in buttons[0].refresh_choices()
    assert host.refreshed == 1


@pytest.fixture
def thumbnails(webui, tmp_path):
    """Build a panel on a host with previews: its fields, what a choice of subject and of style shows, and what opening the page shows."""

    def build(**previews):
        with gr.Blocks() as demo:
            made = panel.build("txt2img", FakeHost(tmp_path, previews={name: str(path) for name, path in previews.items()}))
        sides = ("subject", "style")
        return made.fields, behind(demo, *sides), opened(demo, *(f"{side}_preview" for side in sides))

    return build


def wired(demo):
    """(the function, element ids of what triggers it, of what it sets) of every event."""
    functions = list(demo.fns.values()) if isinstance(demo.fns, dict) else demo.fns
    ids = {block._id: getattr(block, "elem_id", None) for block in demo.blocks.values()}
    for event, function in zip(demo.get_config_file()["dependencies"], functions):
        targets = [target[0] if isinstance(target, (list, tuple)) else target for target in event["targets"]]
        yield function.fn, {ids.get(target) for target in targets}, [ids.get(output) for output in event["outputs"]]


def behind(demo, *names):
    """The functions behind controls of the panel."""
    return [next(function for function, targets, _ in wired(demo) if f"dynfuse_txt2img_{name}" in targets) for name in names]


def opened(demo, *names):
    """The functions that fill these elements when the page is opened."""
    return [
        next(f for f, targets, outputs in wired(demo) if targets <= {None} and outputs == [f"dynfuse_txt2img_{name}"]) for name in names
    ]


def test_choosing_a_lora_shows_its_preview(thumbnails, tmp_path):
    picture = tmp_path / "dog.preview.png"
    Image.new("RGBA", (300, 500), "red").save(picture)
    _, chosen, _ = thumbnails(dog=picture, ink=tmp_path / "gone.png")
    assert "data:image/jpeg;base64," in chosen[0](["dog"])
    assert "no preview" in chosen[1](["ink"])
    assert "no preview" in chosen[1](["unknown"])
    for nothing in (None, []):
        assert "no preview" not in chosen[0](nothing)
        assert "dynfuse-thumbnail " in chosen[0](nothing)


def test_every_chosen_lora_shows_its_preview(thumbnails, tmp_path):
    for name, colour in (("dog", "red"), ("hat", "blue")):
        Image.new("RGB", (30, 30), colour).save(tmp_path / f"{name}.png")
    _, chosen, _ = thumbnails(dog=tmp_path / "dog.png", hat=tmp_path / "hat.png")
    shown = chosen[0](["dog", "unknown", "hat"])
    assert shown.count("data:image/jpeg;base64,") == 2
    assert shown.count("no preview") == 1
    assert shown.index('alt="dog"') < shown.index("no preview") < shown.index('alt="hat"')


def test_a_page_opens_with_the_previews_of_the_users_defaults(thumbnails, tmp_path):
    picture = tmp_path / "dog.png"
    Image.new("L", (30, 20), 128).save(picture)
    fields, _, opened = thumbnails(dog=picture)
    fields["subject"].value = ["dog"]
    shown = [open_page() for open_page in opened]
    assert "data:image/jpeg;base64," in shown[0]
    assert "<img" not in shown[1]


def test_a_preview_that_is_no_picture_is_not_shown(thumbnails, tmp_path):
    film = tmp_path / "dog.png"
    film.write_bytes(b"\x00\x00\x00 ftypmp42")
    _, chosen, _ = thumbnails(dog=film)
    assert "no preview" in chosen[0](["dog"])


def test_the_buttons_of_the_presets_set_the_controls_they_are_wired_to(webui, host):
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
    names = {control._id: name for name, control in made.fields.items()}
    buttons = {block._id: block.value for block in demo.blocks.values() if str(block.elem_id).startswith("dynfuse_txt2img_preset_")}
    wired = {}
    for event in demo.config["dependencies"] if hasattr(demo, "config") else demo.get_config_file()["dependencies"]:
        for target in event["targets"]:
            pressed = target[0] if isinstance(target, (list, tuple)) else target  # gradio 4 or 3
            if pressed in buttons:
                wired[buttons[pressed]] = [names[output] for output in event["outputs"]]
    default, best, paper = behind(demo, *(f"preset_{name}" for name in ("default", "best", "paper")))
    assert set(wired) == {"Preset: default", "Preset: best", "Preset: paper"}
    assert dict(zip(wired["Preset: best"], best(), strict=True))["contrast_every"] == 1
    set_to = dict(zip(wired["Preset: paper"], paper(), strict=True))
    assert [set_to[name] for name in ("gradient", "limit", "scope", "guidance")] == ["exact", 0, "attention", True]
    for name, value in zip(wired["Preset: default"], default(), strict=True):
        assert value == getattr(FuseSettings(), name)
    assert [set_to[name] for name in ("decide", "decide_every", "vote_tokens")] == ["now", 1, 0]
    assert not set(set_to) & {"subject", "style", "subject_weight", "style_weight", "subject_prompt", "reference_seed", "hr"}


def test_the_method_is_explained_with_the_contrast_that_it_has():
    explained = panel._explained
    assert "balanced</b>, recommended: all LoRAs added" in explained("balanced", -1)
    assert "contrast 1.5, as the method has it." in explained("balanced", -0.4)
    assert "contrast 2.5." in explained("direct", 2.5)
    assert "no contrast." in explained("dynfuse", -1)
    assert "no contrast." in explained("balanced", 0)
    assert explained(None, None) == explained("gone", 1) == ""


@pytest.mark.parametrize(("hires", "exchanged"), [("", ""), ("0.7", "/0.7"), ("0.7/1", "1/0.7"), ("/0.4", "0.4")])
def test_the_swap_button_makes_the_subject_the_style(webui, host, hires, exchanged):
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
    controls = {control._id: name for name, control in made.controls.items()}
    (button,) = (block._id for block in demo.blocks.values() if block.elem_id == "dynfuse_txt2img_swap")
    (event,) = (event for event in demo.get_config_file()["dependencies"] if button in flat(event["targets"]))
    assert event["inputs"] == event["outputs"]
    names = [controls[control] for control in event["outputs"]]
    given = {"subject": ["dog"], "style": ["ink"], "subject_weight": 0.3, "style_weight": 1.1, "subject_weight_text": "1@0", "hr": hires}
    (swap,) = behind(demo, "swap")
    swapped = dict(zip(names, swap(*(given.get(name, name) for name in names)), strict=True))
    assert (swapped["subject"], swapped["style"]) == (["ink"], ["dog"])
    assert (swapped["subject_weight"], swapped["style_weight"]) == (1.1, 0.3)
    assert (swapped["subject_weight_text"], swapped["style_weight_text"]) == ("style_weight_text", "1@0")
    for part in ("blocks", "prompt", "image"):
        assert (swapped[f"subject_{part}"], swapped[f"style_{part}"]) == (f"style_{part}", f"subject_{part}")
    assert swapped["hr"] == exchanged


def flat(targets):
    """gradio 4 has pairs of component and event, 3 the components."""
    return [part for target in targets for part in (target if isinstance(target, (list, tuple)) else [target])]


@pytest.fixture
def references(webui, host):
    """What the panel's refresh button, its clear button and opening the page show of the kept references."""
    with gr.Blocks() as demo:
        panel.build("txt2img", host)
    return [*behind(demo, "references_show", "references_clear"), *opened(demo, "references")]


def test_the_kept_references_are_shown_and_cleared(references, host):
    refresh, clear, opened = references
    assert refresh() == opened() == '<p class="dynfuse-kept">No picture is kept yet.</p>'
    host.reference_cache.keep_picture(Image.new("RGB", (20, 10), "red"))
    assert "1 picture kept" in refresh()
    assert refresh().count("<img") == 1
    assert "1 picture removed" in clear()
    assert host.reference_cache.size() == 0
    assert "0 pictures removed" in clear()


@pytest.mark.parametrize("text", [None, "a picture", "a path"])
def test_a_given_picture_is_text_that_json_can_hold(built, host, tmp_path, text):
    """Distributed generation hands the script's arguments to another machine."""
    _, made, _ = built
    control = made.fields["style_image"]
    picture = Image.new("RGBA", (30, 20), (255, 0, 0, 255))
    if text is None:
        assert control.preprocess(None) is None
        return
    if text == "a path":  # what a paste brings back, and the swap button hands from one place to the other
        shown = control.postprocess(control.preprocess(sent_to(control, picture, tmp_path)))
        assert shown
    sent = json.loads(json.dumps([True, *arguments(made, style_image=control.preprocess(sent_to(control, picture, tmp_path)))]))
    settings = read_arguments(sent, host.reference_cache)
    assert host.reference_cache.picture(settings.style_image).getpixel((3, 3)) == (255, 0, 0)
    assert settings.style_image == host.reference_cache.keep_picture(picture)


def arguments(made, **given):
    values = {name: control.value for name, control in {**made.fields, **made.texts}.items()}
    return {**values, "subject": ["dog"], "style": ["watercolor"], **given}.values()


def sent_to(control, picture, folder):
    """What the page sends for a picture: gradio 3 base64, 4 a file."""
    if gr.__version__.startswith("3."):
        return picture_address(picture)
    picture.save(folder / "given.png")
    return control.data_model(path=str(folder / "given.png"))


@pytest.fixture
def paste(host):
    functions = panel.paste_functions(host)
    return lambda entries: {name: function(entries) for name, function in functions.items()}


def as_sent(pasted, host):
    """The settings that the panel sends after a paste."""
    return read_arguments([value["value"] if isinstance(value, dict) else value for value in pasted.values()], host.reference_cache)


def test_pasting_restores_every_control(paste, host):
    made = FuseSettings(
        subject="dog",
        style="watercolor",
        style_weight=0.5,
        hr="0.7/1",
        style_blocks="in4-in8=0.5,out3=0",
        criterion="cosine",
        guidance=True,
        every=3,
        reference_seed=7,
        style_prompt="ink, ",
    )
    assert as_sent(paste(infotext.settings_fields(made)), host) == made


@pytest.mark.parametrize(
    ("subject_weight", "slider", "text"),
    [(0.5, 0.5, ""), ("0@0,1@0.3", 1.0, "0@0,1@0.3"), ("1+0.5", 1.0, "1+0.5"), ("1+0@0,1@5", 1.0, "1+0@0,1@5")],
)
def test_pasting_puts_a_plain_weight_on_the_slider_and_any_other_into_its_text(paste, host, subject_weight, slider, text):
    made = FuseSettings(subject="dog+hat", style="watercolor", subject_weight=subject_weight)
    pasted = paste(infotext.settings_fields(made))
    assert (pasted["subject_weight"], pasted["subject_weight_text"]) == (slider, text)
    assert (pasted["style_weight"], pasted["style_weight_text"]) == (1.0, "")
    assert as_sent(pasted, host) == made


def test_pasting_an_image_made_without_dynfuse_switches_it_off_and_leaves_the_rest(paste):
    pasted = paste({"Steps": "20"})
    assert pasted.pop("enabled") is False
    assert set(pasted.values()) == {None}


def test_pasting_finds_loras_by_hash(paste):
    made = FuseSettings(subject="hund", style="watercolor")
    pasted = paste({**infotext.settings_fields(made), **infotext.hash_field(["hund", "watercolor"], {"hund": "aa11"}.get)})
    assert (pasted["subject"]["value"], pasted["style"]["value"]) == (["dog"], ["watercolor"])


def test_pasting_finds_each_of_several_loras_by_hash_and_keeps_those_that_are_not_here(paste):
    made = FuseSettings.from_mapping({"subject": ["fox", "hund+1"], "style": ["gone"]})
    hashes = infotext.hash_field([*made.subjects, *made.styles], {"hund+1": "aa11", "gone": "ee55"}.get)
    pasted = paste({**infotext.settings_fields(made), **hashes})
    assert (pasted["subject"]["value"], pasted["style"]["value"]) == (["fox", "dog"], ["gone"])


def test_pasting_an_impossible_value_gives_the_default_and_a_warning(paste, host, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    entries = {"DynFuse": "True", "DynFuse subject": "dog", "DynFuse criterion": "euclid"}
    assert paste(entries)["criterion"] == "kl"
    panel.warn_about_paste(entries, host)
    assert len(warnings) == 1
    assert "criterion must be one of" in warnings[0]


@pytest.mark.parametrize(
    "entries",
    [
        infotext.settings_fields(FuseSettings(subject="hund", style="gone")) | infotext.hash_field(["hund"], {"hund": "aa11"}.get),
        {"Prompt": "a dog <dynfuse:dog:gone> <lora:other:1>"},
        {"Prompt": "a dog", "Hires prompt": "a dog <dynfuse:gone:watercolor:2>"},
    ],
)
def test_pasting_a_lora_that_is_not_here_warns_at_once(host, monkeypatch, entries):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    panel.warn_about_paste(entries, host)
    assert warnings == ["DynFuse: there is no LoRA named 'gone' here"]


def pasted_picture(paste, entries, name="style_image"):
    update = paste(entries)[name]
    assert update["__type__"].endswith("update")
    return update["value"]


def test_pasting_brings_back_a_picture_that_is_still_kept(paste, host):
    digits = host.reference_cache.keep_picture(Image.new("RGB", (20, 10), "red"))
    entries = infotext.settings_fields(FuseSettings(subject="dog", style="watercolor", style_image=digits))
    assert pasted_picture(paste, entries).getpixel((3, 3)) == (255, 0, 0)
    assert pasted_picture(paste, entries, "subject_image") is None


def test_pasting_a_picture_that_is_gone_empties_its_place_and_says_so(paste, host, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    entries = infotext.settings_fields(FuseSettings(subject="dog", style="watercolor", style_image="0123456789abcdef"))
    assert pasted_picture(paste, entries) is None
    panel.warn_about_paste(entries, host)
    assert len(warnings) == 1
    assert warnings[0].startswith("DynFuse: Style picture: the reference picture 0123456789abcdef is not")


def test_pasting_a_path_shows_no_file(paste, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "secret.png")
    entries = infotext.settings_fields(FuseSettings(subject="dog", style="watercolor", style_image=str(tmp_path / "secret.png")))
    assert pasted_picture(paste, entries) is None


def test_both_tabs_are_pasted_by_the_same_functions(host):
    assert panel.paste_functions(host) is panel.paste_functions(host)
