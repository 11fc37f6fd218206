import base64
import io

import pytest
from PIL import Image

from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.settings import FuseSettings, SettingsError, field_types
from lib_dynfuse.webui import arguments as script_arguments

PAIR = {"subject": "dog", "style": "watercolor"}


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "references")


@pytest.fixture
def read_arguments(cache):
    return lambda arguments: script_arguments.read_arguments(arguments, cache)


def picture(colour="red", mode="RGB"):
    return Image.new(mode, (40, 30), colour)


def in_base64(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def in_places(**values):
    """The panel's values behind the switch, in their public order."""
    return [True, *({**PAIR, **values}.get(name) for name in field_types())]


def test_a_dict_after_the_switch_names_the_settings(read_arguments):
    assert read_arguments([True, {**PAIR, "style_weight": 1}]) == FuseSettings(**PAIR, style_weight=1.0)


def test_the_panels_own_values_behind_a_dict_do_not_count(read_arguments):
    assert read_arguments([True, PAIR, "fox", 0.2, 0.3, "direct"]) == FuseSettings(**PAIR)


def test_leading_values_are_enough(read_arguments):
    assert read_arguments([True, "dog", "watercolor", 0.5]) == FuseSettings(**PAIR, subject_weight=0.5)


def test_a_weights_text_behind_the_fields_goes_before_its_number():
    for texts, expected in (
        (["0@0,1@1", ""], ("0@0,1@1", 0.5)),
        (["", " 0.75 "], (0.5, 0.75)),
        ([None, None], (0.5, 0.5)),
        ([], (0.5, 0.5)),
    ):
        settings = script_arguments.read_arguments([*in_places(subject_weight=0.5, style_weight=0.5), *texts], None)
        assert (settings.subject_weight, settings.style_weight) == expected


def test_the_panel_sends_names_as_they_are(read_arguments):
    settings = read_arguments([True, ["dog+1", "50%2B"], ["a, b", ""], 1.0])
    assert (settings.subjects, settings.styles) == (("dog+1", "50%2B"), ("a, b",))


def test_a_text_names_loras_joined_by_a_plus(read_arguments):
    settings = read_arguments([True, {"subject": "dog + hat", "style": "c%2B%2B", "subject_weight": "1 + 0.5"}])
    assert (settings.subjects, settings.styles) == (("dog", "hat"), ("c++",))
    assert [schedule.constant for schedule in settings.subject_schedules] == [1.0, 0.5]


def test_an_emptied_control_means_the_default(read_arguments):
    assert read_arguments([True, "dog", "watercolor", *[None] * (len(field_types()) - 2)]) == FuseSettings(**PAIR)


@pytest.mark.parametrize("arguments", [[], [False], [False, {"nonsense": 1}], [False, "dog", "dog"]])
def test_switched_off_asks_for_nothing(arguments, read_arguments):
    assert read_arguments(arguments) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([True, {**PAIR, "colour": 1, "weight": 2}], ["unknown setting 'colour', 'weight'", "did you mean"]),
        ([True, {**PAIR, "subject_weight": "half"}], ["subject_weight must be a number or points such as 0@0,1@0.3,0.6@1, not 'half'"]),
        ([True, {**PAIR, "subject_weight": True}], ["subject_weight must be a number or points", "not True"]),
        ([True, {**PAIR, "subject_weight": None}], ["subject_weight must be a number or points", "not None"]),
        ([True, {**PAIR, "method": 3}], ["method must be text, not 3"]),
        (
            [True, {**PAIR, "method": "sum"}],
            ["method must be one of ", "balanced", "dynfuse", "not 'sum'"],
        ),
        ([True, {**PAIR, "subject": [3]}], ["subject must be text or a list of names, not [3]"]),
        ([True, {**PAIR, "subject": "dog+"}], ["subject must be names", "%2B", "'dog+'"]),
        ([True, {**PAIR, "subject": []}], ["no subject LoRA"]),
        ([True, {"subject": ["dog", "hat"], "style": "hat"}], ["same LoRA, 'hat'"]),
        ([True, {"subject": "hat+dog+hat", "style": "ink"}], ["same LoRA, 'hat'"]),
        ([True, {**PAIR, "subject_weight": "1+0.5"}], ["subject_weight has 2 parts for 1 LoRA"]),
        ([True, {**PAIR, "hr": "1/1/1"}], ["hr must be the subject's weight, or SUBJECT/STYLE"]),
        ([True, {**PAIR, "hr": "1/1+1"}], ["style_weight has 2 parts for 1 LoRA"]),
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
def test_a_mistake_is_named(arguments, words, read_arguments):
    with pytest.raises(SettingsError) as raised:
        read_arguments(arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_picture_from_the_panel_becomes_the_digits_that_stand_for_it(read_arguments, cache):
    settings = read_arguments(in_places(subject_image=picture("red"), style_image=picture("blue")))
    assert cache.picture(settings.subject_image).getpixel((5, 5)) == (255, 0, 0)
    assert cache.picture(settings.style_image).getpixel((5, 5)) == (0, 0, 255)
    assert len(settings.subject_image) == 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_a_picture_may_be_of_any_kind(read_arguments, cache, mode):
    settings = read_arguments(in_places(style_image=Image.new(mode, (7, 5))))
    assert cache.picture(settings.style_image).size == (7, 5)


def test_the_same_picture_from_panel_and_api_is_the_same_setting(read_arguments):
    image = picture()
    expected = read_arguments(in_places(subject_image=image))
    for text in (in_base64(image), "data:image/png;base64," + in_base64(image), expected.subject_image):
        assert read_arguments([True, {**PAIR, "subject_image": text}]) == expected


def test_a_photo_held_upright_stands_upright(read_arguments, cache):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    text = in_base64(picture(), "JPEG", exif=orientation)
    assert cache.picture(read_arguments([True, {**PAIR, "style_image": text}]).style_image).size == (30, 40)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_picture_is_none(read_arguments, nothing):
    assert read_arguments([True, {**PAIR, "subject_image": nothing}]) == FuseSettings(**PAIR)


def test_a_path_or_an_address_is_no_picture_even_of_a_picture_that_is_there(read_arguments, tmp_path):
    file = tmp_path / "abcd"
    picture().save(file, "PNG")
    for text in (str(file), f"file={file}", f"/file={file}", f"file://{file}", f"http://127.0.0.1/file={file}", "abcd", "../abcd"):
        with pytest.raises(SettingsError, match="^subject_image: .*base64"):
            read_arguments([True, {**PAIR, "subject_image": text}])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0123456789abcdef", "not .*kept"),
        ("data:image/png;base64,iVBORw0KGgo=", "no picture"),
        ("data:text/plain;base64,aGVsbG8=", "no picture"),
        (in_base64(picture())[:-40], "no picture"),
        ({"image": "x", "mask": "y"}, "not of type dict"),
        (["x"], "not of type list"),
        (7, "not of type int"),
    ],
)
def test_what_is_no_picture_is_named(read_arguments, value, words):
    for arguments in ([True, {**PAIR, "style_image": value}], in_places(style_image=value)):
        with pytest.raises(SettingsError, match=f"^style_image.*{words}") as raised:
            read_arguments(arguments)
        assert len(str(raised.value)) < 250
        assert "\n" not in str(raised.value)


def test_a_picture_that_cannot_be_kept_is_named(read_arguments, cache):
    cache.folder.write_text("a file in the place of the folder")
    with pytest.raises(SettingsError, match="^style_image: the picture cannot be read and kept"):
        read_arguments(in_places(style_image=picture()))


def test_a_panel_that_is_switched_off_keeps_no_picture(read_arguments, cache):
    assert read_arguments([False, *in_places(style_image=picture())[1:]]) is None
    assert cache.size() == 0
