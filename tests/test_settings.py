"""FuseSettings as such: what its texts mean, and what it refuses."""

import pytest

from lib_dynfuse.settings import METHODS, FuseSettings, SettingsError, field_metadata, join_names, register_method, split_names
from lib_dynfuse.strength import BlockText, Schedule


def test_a_side_may_name_several_loras():
    settings = FuseSettings(subject="dog+ hat ", style="c%2B%2B")
    assert (settings.subjects, settings.styles) == (("dog", "hat"), ("c++",))
    assert settings == FuseSettings(subject=join_names(["dog", "hat"]), style=join_names(["c++"]))
    assert (FuseSettings().subjects, FuseSettings().styles) == ((), ())


@pytest.mark.parametrize("name", ["dog", "100%", "my%20lora", "50%3A", "a:b, <c>", "犬", "a b"])
def test_an_ordinary_name_is_its_own_text(name):
    assert FuseSettings(subject=name).subject == name == join_names([name])


@pytest.mark.parametrize("names", [["a+b"], ["+"], ["%2B", "+"], ["%252B", "%%"], [" a", "b ", " "], ["%20a", "a%20", "%20"]])
def test_names_with_the_joint_in_them_read_back(names):
    assert list(split_names(join_names(names))) == names


def test_a_plain_weight_stays_a_number():
    settings = FuseSettings(subject_weight="0.90", style_weight=1)
    assert (settings.subject_weight, settings.style_weight) == (0.9, 1.0)
    assert isinstance(settings.subject_weight, float)
    assert FuseSettings(style_weight="1@0,1@1") == FuseSettings()


def test_a_weight_that_varies_is_kept_in_its_shortest_text():
    assert FuseSettings(subject_weight=" 1@1.0, 0.00@0 ").subject_weight == "0@0,1@1"
    assert FuseSettings(style_weight=" 1.0 + 0.50 ").style_weight == "1+0.5"


def test_one_weight_is_for_all_loras_of_a_side_and_others_are_one_each():
    settings = FuseSettings(subject="dog+hat", style="ink+oil", subject_weight="0@0,1@1", style_weight="0.5+1@0,0@5")
    assert settings.subject_schedules == (Schedule.parse("0@0,1@1"),) * 2
    assert settings.style_schedules == (Schedule.of(0.5), Schedule.parse("1@0,0@5"))


def test_without_names_there_are_as_many_weights_as_are_written():
    assert FuseSettings().subject_schedules == (Schedule.of(1.0),)
    assert FuseSettings(style_weight="1+0.5").style_schedules == (Schedule.of(1.0), Schedule.of(0.5))


def test_blocks_are_for_all_loras_of_a_side_or_one_each():
    settings = FuseSettings(subject="dog+hat", style="ink+oil", subject_blocks="mid = 0", style_blocks="face+ in4-in8=0.50 ")
    assert (settings.subject_blocks, settings.style_blocks) == ("mid=0", "face+in4-in8=0.5")
    assert settings.subject_block_texts == (BlockText((("mid", "mid", 0.0),)),) * 2
    assert settings.style_block_texts == (BlockText(preset="face"), BlockText((("in4", "in8", 0.5),)))
    assert FuseSettings(style="ink+oil", style_blocks="+face").style_block_texts == (BlockText(), BlockText(preset="face"))
    assert FuseSettings(style="ink+oil", style_blocks=" + ") == FuseSettings(style="ink+oil")


@pytest.mark.parametrize(
    ("hr", "subject_weight", "style_weight"),
    [
        ("", "0@0,1@1", 0.5),
        ("0.7", 0.7, 0.5),
        (0.7, 0.7, 0.5),
        (" 0.7 / 1.0 ", 0.7, 1.0),
        ("/0.25", "0@0,1@1", 0.25),
        ("0.5/", 0.5, 0.5),
        ("0@0,1@3/0.3+0.6", "0@0,1@3", "0.3+0.6"),
    ],
)
def test_the_hires_pass_has_weights_of_its_own_where_they_are_given(hr, subject_weight, style_weight):
    first = {"subject": "dog", "style": "ink+oil", "subject_weight": "0@0,1@1", "style_weight": 0.5, "criterion": "js"}
    hires = FuseSettings(**first, hr=hr).for_hires()
    assert hires == FuseSettings(**{**first, "subject_weight": subject_weight, "style_weight": style_weight})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"subject": "dog++hat"}, ["subject must be names", "%2B", "'dog++hat'"]),
        ({"style": ["ink", 3]}, ["style must be text or a list of names"]),
        ({"subject": "a+b", "subject_weight": "1+1+1"}, ["subject_weight has 3 parts for 2 LoRAs"]),
        ({"style": "a", "style_weight": "1+1"}, ["style_weight has 2 parts for 1 LoRA"]),
        ({"style": "a", "style_blocks": "mid=0+"}, ["style_blocks has 2 parts for 1 LoRA"]),
        ({"subject_weight": "1+"}, ["subject_weight must be a number or points", "not ''"]),
        ({"subject_weight": ""}, ["subject_weight must be a number or points", "not ''"]),
        ({"subject_weight": [1, 2]}, ["subject_weight must be a number or points", "[1, 2]"]),
        ({"style_weight": float("inf")}, ["style_weight must be a finite number"]),
        ({"style_weight": "0@0,nan@1"}, ["style_weight must be a finite number"]),
        ({"hr": "1/2/3"}, ["hr must be"]),
        ({"hr": "much"}, ["hr must be a number or points", "'much'"]),
        ({"hr": True}, ["hr must be a number"]),
        ({"hr": ["0.7"]}, ["hr must be text"]),
        ({"style": "a", "hr": "1/1+1"}, ["hr: style_weight has 2 parts for 1 LoRA"]),
        ({"subject_blocks": "in4=x"}, ["factor of in4 in subject_blocks"]),
        ({"decide": "later"}, ["decide must be one of next, now"]),
        ({"decide_every": 0}, ["decide_every must be at least 1"]),
        ({"vote_tokens": 1.5}, ["vote_tokens must be a whole number"]),
        (
            {"method": "halves"},
            ["method must be one of ", "balanced", "dynfuse", "not 'halves'"],
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_one_sentence(values, words):
    with pytest.raises(SettingsError) as raised:
        FuseSettings(**values)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["style_weight", "bias", "every", "reference_seed", "hr"])
@pytest.mark.parametrize(
    "value", [10**309, -(10**400), 10**5000, "9" * 310, "-" + "9" * 5000], ids=["309", "-400", "5000", "text", "long text"]
)
def test_numbers_beyond_all_measure_are_refused_with_one_sentence(name, value):
    make = FuseSettings.from_text if isinstance(value, str) else FuseSettings.from_mapping
    with pytest.raises(SettingsError, match=name) as raised:
        make({name: value})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["every", "reference_seed", "vote_tokens"])
def test_whole_numbers_have_63_bits(name):
    assert getattr(FuseSettings.from_mapping({name: 2**62}), name) == 2**62
    with pytest.raises(SettingsError, match=f"{name} must be less than 9223372036854775808"):
        FuseSettings.from_text({name: str(2**63)})


def test_a_value_of_any_size_is_refused_in_a_short_sentence():
    for values in ({"subject_weight": [10**5000]}, {"criterion": "x" * 10**6}, {"a" * 10**6: 1}, {"style_weight": "1@" + "x" * 10**6}):
        with pytest.raises(SettingsError) as raised:
            FuseSettings.from_mapping(values)
        assert len(str(raised.value)) < 1000


def test_a_registered_method_is_a_choice_at_once():
    register_method("halves", "each LoRA at half its weight")
    try:
        assert FuseSettings(method="halves").method == "halves"
        assert field_metadata("method")["choices"][-1] == "halves"
        assert field_metadata("method")["tooltip"].endswith("halves: each LoRA at half its weight.")
    finally:
        del METHODS["halves"]
    with pytest.raises(SettingsError, match="method must be one of balanced, "):
        FuseSettings(method="halves")
