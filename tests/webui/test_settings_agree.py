"""Tag, infotext, API and panel read and write the same settings: every field, with a value that is not its default."""

import dataclasses
import random

import pytest
from PIL import Image

from lib_dynfuse.settings import FuseSettings, SettingsError, field_metadata, field_types
from lib_dynfuse.text import infotext, tag
from lib_dynfuse.webui.arguments import read_arguments
from tests.text.host_infotext import create_infotext_line, parse_infotext_line

NAMES = [
    *("a:b", "a>b", "<lora:a:1>", "a,b", "a, b", "a=b", "method=direct", "error=x", "dog:0.5"),
    *("100%", "50%3A", "my%20lora", "%", "é%C3%A9", '"quoted"', 'a"b', "a\\b", "a\nb", "c#sharp", " outer "),
    *("dog (v2)", "[dog]", "a|b", "{a}", "512x512", "1.0", "True", "DynFuse", "犬", "folder/dog"),
    *("dog+hat", "+", "++", " + ", "a+b+c", "50%2B", "%2b", "%25", "%252B", "%%2B", "%2+", "%+", "+2B", "%20", " %20 ", "%20a%20", "a%"),
    *("dog/hat", "1@0.5", "0@0,1@1", "%20%20", "% 20", "\tdog\n", "é", " "),
]
PROMPTS = [
    *("a dog, sitting: on grass", "(dog:1.2), [a|b], {x}", "<lora:ink:0.5> a dog", "<dynfuse:a:b>", "a dog AND a cat"),
    *("one\ntwo\n\nthree", "\ttab\t", "a\r\nb", '"quoted, twice": "yes"', '"', "a\\, b\\", "\\", "it's", "# no comment", "100%, 50%2C"),
    *("512x512", "512x512\n", "8x8, and more", "Steps: 20, Sampler: Euler, Seed: 1", "Negative prompt: bad", "a=b, c=d", "error=no"),
    *("True", "None", "0", "犬、草の上", "line \u2028 \x85 line", "emoji 🐶", "BREAK", "a" * 3000, ", ".join(["word: (other:1.1)"] * 300)),
]
FIELDS = list(field_types())
PAIR = {"subject": "dog", "style": "watercolor"}


class OnePicture:
    """A cache of references that keeps one picture."""

    digits = "0123456789abcdef"

    def picture(self, text):
        assert text == self.digits
        return Image.new("RGB", (4, 4))

    def keep_picture(self, image):
        return self.digits


# In their shortest form, as the settings keep them.
TEXTS = {
    "subject_weight": "0@0,1@0.3,0.6@1",
    "style_weight": "0@2,1@2",
    "hr": "0.7/0@0,1@1",
    "subject_blocks": "in4-in8=0.5,out3=0",
    "style_blocks": ",".join(["1", "0.25"] * 6),
}


def other_than_default(name):
    """A permitted value that is not the field's default."""
    if name in TEXTS:
        return TEXTS[name]
    default = FuseSettings.__dataclass_fields__[name].default
    metadata = field_metadata(name)
    if metadata["choices"]:
        return next(choice for choice in metadata["choices"] if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 3
    if isinstance(default, float):
        return default - 0.3125 if metadata["maximum"] == default else default + 0.3125
    return OnePicture.digits if metadata["picture"] else f"another {name}"


def changed(*names):
    return FuseSettings(**{**PAIR, **{name: other_than_default(name) for name in names}})


def through_tag(settings):
    return tag.parse_tags(tag.find_tags(f"a dog, {tag.format_tag(settings)} in watercolor"))


def through_infotext(settings):
    return infotext.read_settings(parse_infotext_line(create_infotext_line(infotext.settings_fields(settings))))


def through_api(*arguments):
    return read_arguments([True, *arguments], OnePicture())


def through_api_names(settings):
    return through_api({name: getattr(settings, name) for name in FIELDS})


def through_api_changed_names(settings):
    return through_api(settings.non_default())


def through_api_lists(settings):
    return through_api({**settings.non_default(), "subject": list(settings.subjects), "style": settings.styles})


def through_panel(settings):
    sent = {name: getattr(settings, name) for name in FIELDS} | {"subject": list(settings.subjects), "style": list(settings.styles)}
    texts = ["", ""]
    for index, name in enumerate(("subject_weight", "style_weight")):
        if isinstance(sent[name], str):  # the slider stays where it was
            texts[index], sent[name] = sent[name], 0.25
    return through_api(*sent.values(), *texts)


WAYS = [through_tag, through_infotext, through_api_names, through_api_changed_names, through_api_lists, through_panel]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_survives_every_way_in(way, name):
    settings = changed(name)
    assert getattr(settings, name) != FuseSettings.__dataclass_fields__[name].default
    assert way(settings) == settings


@pytest.mark.parametrize("way", WAYS)
def test_all_fields_together_survive_every_way_in(way):
    settings = changed(*FIELDS)
    assert len(settings.non_default()) == len(dataclasses.fields(FuseSettings))
    assert way(settings) == settings


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("subject", NAMES)
def test_any_name_survives_every_way_in(way, subject):
    settings = FuseSettings.from_mapping({"subject": [subject], "style": [f"{subject}-style"], "te_weight": 0.5})
    assert way(settings) == settings
    assert (way(settings).subjects, way(settings).styles) == ((subject,), (f"{subject}-style",))


@pytest.mark.parametrize("way", WAYS)
def test_any_names_together_survive_every_way_in(way):
    chance = random.Random(5)
    for _ in range(200):
        *names, style = chance.sample(NAMES, chance.randint(2, 5))
        settings = FuseSettings.from_mapping({"subject": names, "style": [style]})
        assert way(settings) == settings
        assert (way(settings).subjects, way(settings).styles) == (tuple(names), (style,))


@pytest.mark.parametrize("way", WAYS)
def test_any_characters_in_names_survive_every_way_in(way):
    chance = random.Random(6)
    for _ in range(300):
        names = {"".join(chance.choices('%%%+2025Bbe :,<>=#a/@\n"', k=chance.randint(1, 9))) for _ in range(4)}
        style, *subjects = sorted(names | {"dog", "hat"})
        settings = FuseSettings.from_mapping({"subject": subjects, "style": [style]})
        assert way(settings) == settings
        assert way(settings).subjects == tuple(subjects)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_each_survives_every_way_in(way):
    several = {"subject": "dog+hat", "style": "watercolor+ink+oil"}
    settings = FuseSettings(
        **several, subject_weight="1+0@0,1@5", style_weight="0.5+1e300+-1e-07", hr="0.5+0.25/1@0,0@1", style_blocks="mid=0++x"
    )
    assert way(settings) == settings
    assert [schedule.text() for schedule in settings.subject_schedules] == ["1", "0@0,1@5"]
    assert [schedule.constant for schedule in settings.style_schedules] == [0.5, 1e300, -1e-7]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_reference_prompt_survives_every_way_in(way, prompt):
    settings = FuseSettings(**PAIR, subject_prompt=prompt, style_prompt=prompt[::-1], reference_seed=4294967295)
    assert way(settings) == settings


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-7, 0.1 + 0.2, 1e300, 12345678.875])
@pytest.mark.parametrize("way", WAYS)
def test_any_weight_survives_every_way_in(way, weight):
    settings = FuseSettings(**PAIR, subject_weight=weight, style_weight=-weight)
    assert way(settings) == settings


def test_a_setting_out_of_range_is_refused_by_tag_infotext_and_api_alike():
    for read in (
        lambda: tag.parse_tag(["dog", "watercolor", "bias=-1"]),
        lambda: infotext.read_settings({"DynFuse": "True", "DynFuse subject": "dog", "DynFuse style": "watercolor", "DynFuse bias": "-1"}),
        lambda: through_api({**PAIR, "bias": -1}),
    ):
        with pytest.raises(SettingsError, match="bias must be at least 0, not -1"):
            read()


# Presets. What "paper" means is written here once more, from sections 4.1, 4.2 and 5.1 of the paper.
PAPER = {
    **{"method": "dynfuse", "criterion": "kl", "scope": "attention", "temperature": "raw", "balance": "none", "bias": 1.0},
    **{"guidance": True, "m": 10.0, "gradient": "exact", "decoder": "vae", "limit": 0.0, "start": 0.0, "end": 1.0, "every": 1},
    **{name: pytest.approx(1 / 3) for name in ("content_weight", "style_clip_weight", "style_dino_weight")},
    **{"decide": "now", "decide_every": 1, "vote_tokens": 0},
    **{"contrast": 0.0, "style_contrast": 0.0, "subject_contrast": 0.0, "negative_weight": 1.0, "loser": 0.0},
}


def holds(settings, values):
    return {name: getattr(settings, name) for name in values} == values


def test_the_preset_is_the_paper_in_tag_and_api():
    assert holds(tag.parse_tag(["dog", "watercolor", "preset=paper"]), PAPER)
    assert holds(read_arguments([True, {**PAIR, "preset": "paper"}], OnePicture()), PAPER)


@pytest.mark.parametrize("items", [["criterion=js", "preset=paper"], ["preset=paper", "criterion=js"]])
def test_what_is_given_by_name_goes_before_the_preset(items):
    assert holds(tag.parse_tag(["dog", "watercolor", *items]), {**PAPER, "criterion": "js"})


def test_the_default_preset_changes_nothing():
    assert tag.parse_tag(["dog", "watercolor", "preset=default"]) == FuseSettings(**PAIR)


def test_an_unknown_preset_is_refused_with_the_known_names():
    with pytest.raises(SettingsError, match="preset must be one of default, best, paper, not 'papper'"):
        tag.parse_tag(["dog", "watercolor", "preset=papper"])


def test_a_preset_is_stored_as_the_values_it_stands_for():
    settings = tag.parse_tag(["dog", "watercolor", "preset=paper"])
    assert through_tag(settings) == settings
    assert "preset" not in tag.format_tag(settings)
