import pytest

from lib_dynfuse.settings import FuseSettings, SettingsError
from lib_dynfuse.text import tag


def read(prompt):
    return tag.parse_tags(tag.find_tags(prompt))


def test_two_names_are_enough():
    assert read("a dog <dynfuse:dog:watercolor> on grass") == FuseSettings(subject="dog", style="watercolor")


def test_weights_follow_the_names():
    settings = read("<dynfuse:dog:watercolor:0.9:1.1>")
    assert (settings.subject_weight, settings.style_weight) == (0.9, 1.1)


def test_one_weight_is_the_subjects():
    settings = read("<dynfuse:dog:watercolor:0.9>")
    assert (settings.subject_weight, settings.style_weight) == (0.9, 1.0)


def test_named_settings_stand_anywhere():
    expected = FuseSettings(subject="dog", style="watercolor", style_weight=0.5, criterion="js", te_weight=0.0)
    assert read("<dynfuse:dog:watercolor:criterion=js:style_weight=0.5:te_weight=0>") == expected
    assert read("<dynfuse:te_weight=0:dog:watercolor:1:0.5:criterion=js>") == expected
    assert read("<dynfuse: dog : watercolor : 1 : 0.5 : te_weight = 0 : criterion = js >") == expected
    assert read("<dynfuse:style=watercolor:subject=dog:style_weight=0.5:criterion=js:te_weight=0>") == expected


def test_several_loras_are_joined_by_a_plus_and_weights_may_be_points():
    settings = read("<dynfuse:dog+hat:watercolor + ink:1+0.5:0@0,1@0.3:decide=now:hr=0.7:style_blocks=in4-in8=0.5,out3=0>")
    assert settings.subjects == ("dog", "hat")
    assert settings.styles == ("watercolor", "ink")
    assert (settings.subject_weight, settings.style_weight, settings.hr) == ("1+0.5", "0@0,1@0.3", "0.7")
    assert settings.style_blocks == "in4-in8=0.5,out3=0"


def test_a_plus_inside_a_name_is_written_out():
    assert read("<dynfuse:c%2B%2B+my%2blora:ink>").subjects == ("c++", "my+lora")


def test_a_prompt_without_a_tag_asks_for_nothing():
    assert read("a dog <lora:dog:1> <dynfuse> dynfuse:a:b") is None


def test_the_shortest_tag_is_written():
    assert tag.format_tag(FuseSettings(subject="dog", style="watercolor")) == "<dynfuse:dog:watercolor>"
    assert tag.format_tag(FuseSettings(subject="dog", style="watercolor", subject_weight=0.5)) == "<dynfuse:dog:watercolor:0.5>"
    assert tag.format_tag(FuseSettings(subject="dog", style="watercolor", style_weight=0.5)) == "<dynfuse:dog:watercolor:1:0.5>"
    assert tag.format_tag(FuseSettings(subject="dog", style="watercolor", method="direct")) == "<dynfuse:dog:watercolor:method=direct>"


@pytest.mark.parametrize(
    "text",
    [
        "<dynfuse:dog+hat:ink:1+0.5:0@0,1@0.3:hr=0.7/1>",
        "<dynfuse:c%2B%2B:100% a%2Cb:1:0@2,1@5:subject_blocks=in4-in8=0.5,out3=0:style_blocks=face>",
    ],
)
def test_what_people_write_is_written_as_they_write_it(text):
    assert tag.format_tag(read(text)) == text


def test_a_written_tag_is_one_tag_for_the_host_whatever_the_names_hold():
    settings = FuseSettings(subject="a>b:c", style="<lora:x:1>#, \n")
    text = tag.format_tag(settings)
    assert not set("#,\n") & set(text)
    assert text.count("<") == text.count(">") == 1


def test_percent_signs_of_a_file_name_may_be_typed_as_they_are():
    assert read("<dynfuse:100% dog:my%20lora>") == FuseSettings(subject="100% dog", style="my%20lora")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<dynfuse:dog>", ["no style LoRA", "<dynfuse:SUBJECT:STYLE>"]),
        ("<dynfuse::>", ["no subject and no style LoRA"]),
        ("<dynfuse::watercolor>", ["no subject LoRA"]),
        ("<dynfuse:dog:dog>", ["same LoRA", "'dog'"]),
        ("<dynfuse:dog:watercolor:strong>", ["subject_weight must be a number", "'strong'", "<dynfuse:dog:watercolor:strong>"]),
        ("<dynfuse:dog:watercolor:nan>", ["subject_weight must be a finite number"]),
        ("<dynfuse:dog+:watercolor>", ["subject must be names of LoRAs", "%2B"]),
        ("<dynfuse:dog+ink:watercolor+ink>", ["same LoRA, 'ink', is named twice"]),
        ("<dynfuse:dog:watercolor:1+0.5>", ["subject_weight has 2 parts for 1 LoRA"]),
        ("<dynfuse:dog:watercolor:1@9.5,0@0>", ["place of '1@9.5' in subject_weight", "step"]),
        ("<dynfuse:dog:watercolor:1:1:js>", ["too many parts", "key=value"]),
        ("<dynfuse:dog:watercolor:xyz=js>", ["unknown setting 'xyz'", "docs/settings.md"]),
        ("<dynfuse:dog:watercolor:contrst=2>", ["unknown setting 'contrst'; did you mean contrast"]),
        ("<dynfuse:dog:watercolor:criterion=euclid>", ["criterion must be one of kl, js, cosine, dot", "'euclid'"]),
        ("<dynfuse:dog:watercolor:0.5:subject_weight=0.6>", ["subject_weight twice"]),
        ("<dynfuse:dog:watercolor:bias=-1>", ["bias must be at least 0"]),
        ("<dynfuse:dog:watercolor> <dynfuse:cat:ink>", ["more than one"]),
        # The LoRAs' names hold characters of the tag's own: v1:dog, v1:2, a=b, dog>2.
        ("<dynfuse:v1:dog:watercolor>", ["'watercolor'", "in a LoRA's name : is written %3A"]),
        ("<dynfuse:v1:2:watercolor:0.8:1>", ["too many parts", ": is written %3A"]),
        ("<dynfuse:a=b:watercolor>", ["unknown setting 'a'", "= is written %3D"]),
        ("<dynfuse:dog>2:watercolor>", ["no style LoRA", "> is written %3E"]),
    ],
)
def test_a_malformed_tag_is_answered_with_one_sentence(prompt, words):
    with pytest.raises(SettingsError) as raised:
        read(prompt)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_misspelt_setting_is_not_taken_for_a_name():
    with pytest.raises(SettingsError) as error:
        read("<dynfuse:dog:watercolor:contrst=2>")
    assert "%3D" not in str(error.value)


def test_a_mistake_made_elsewhere_travels_in_a_tag():
    sentence = "unknown setting 'colour': it is > 3, or <b> = \"100%\"\nreally"
    with pytest.raises(SettingsError) as raised:
        read("a dog " + tag.format_error(sentence))
    assert str(raised.value) == sentence


def test_a_mistake_made_elsewhere_goes_before_a_second_tag():
    with pytest.raises(SettingsError, match="the other"):
        read(tag.format_error("the other") + "<dynfuse:dog:watercolor>")
