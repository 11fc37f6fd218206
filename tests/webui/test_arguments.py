import pytest

from lib_dynfuse.settings import FuseSettings, SettingsError, field_types
from lib_dynfuse.webui.arguments import read_arguments

PAIR = {"subject": "dog", "style": "watercolor"}


def test_a_dict_after_the_switch_names_the_settings():
    assert read_arguments([True, {**PAIR, "style_weight": 1}]) == FuseSettings(**PAIR, style_weight=1.0)


def test_the_panels_own_values_behind_a_dict_do_not_count():
    assert read_arguments([True, PAIR, "fox", 0.2, 0.3, "direct"]) == FuseSettings(**PAIR)


def test_leading_values_are_enough():
    assert read_arguments([True, "dog", "watercolor", 0.5]) == FuseSettings(**PAIR, subject_weight=0.5)


def test_an_emptied_control_means_the_default():
    assert read_arguments([True, "dog", "watercolor", *[None] * (len(field_types()) - 2)]) == FuseSettings(**PAIR)


@pytest.mark.parametrize("arguments", [[], [False], [False, {"nonsense": 1}], [False, "dog", "dog"]])
def test_switched_off_asks_for_nothing(arguments):
    assert read_arguments(arguments) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([True, {**PAIR, "colour": 1, "weight": 2}], ["unknown setting 'colour', 'weight'", "known are subject, style"]),
        ([True, {**PAIR, "subject_weight": "0.5"}], ["subject_weight must be a number, not '0.5'"]),
        ([True, {**PAIR, "subject_weight": True}], ["subject_weight must be a number, not True"]),
        ([True, {**PAIR, "subject_weight": None}], ["subject_weight must be a number, not None"]),
        ([True, {**PAIR, "method": 3}], ["method must be text, not 3"]),
        ([True, {**PAIR, "method": "sum"}], ["method must be one of dynfuse, direct, not 'sum'"]),
        ([True, {**PAIR, "subject": ["dog"]}], ["subject must be text"]),
        ([True, {"subject": "dog"}], ["no style LoRA"]),
        ([True, {}], ["no subject and no style LoRA"]),
        ([True], ["no subject and no style LoRA"]),
        ([True, None, None, 1.0, 1.0], ["no subject and no style LoRA"]),
        ([True, "dog", "dog"], ["same LoRA"]),
        ([True, "dog", "watercolor", "strong"], ["subject_weight must be a number"]),
        ([{"subject": "dog", "style": "watercolor"}], ["first argument must be true or false", "[true, {...}]"]),
        ([1, PAIR], ["first argument must be true or false"]),
        ([True, *["dog"] * 99], ["99 values"]),
    ],
)
def test_a_mistake_is_named(arguments, words):
    with pytest.raises(SettingsError) as raised:
        read_arguments(arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
