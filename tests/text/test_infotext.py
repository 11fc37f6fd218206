from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.text import infotext
from tests.text.host_infotext import create_infotext_line, parse_infotext_line

PAIR = {"subject": "dog", "style": "watercolor"}


def renaming(here):
    """A rename for a WebUI that has LoRAs here: name -> hash."""
    by_hash = {value: name for name, value in here.items()}
    return infotext.known_name(here.__contains__, by_hash.get)


def written_with_hashes(hashes):
    """The infotext's entries, as pasted, of an image of PAIR."""
    written = {**infotext.settings_fields(FuseSettings(**PAIR)), **infotext.hash_field(PAIR.values(), hashes.get)}
    return parse_infotext_line(create_infotext_line(written))


def test_only_values_that_differ_from_the_defaults_are_written():
    assert infotext.settings_fields(FuseSettings(**PAIR, te_weight=0.5)) == {
        "DynFuse": "True",
        "DynFuse subject": "dog",
        "DynFuse style": "watercolor",
        "DynFuse method": "balanced",  # another version may have another default
        "DynFuse te weight": "0.5",
    }


def test_an_image_made_without_the_panel_switches_it_off():
    entries = parse_infotext_line(create_infotext_line({}))
    assert not infotext.is_enabled(entries)
    assert infotext.read_settings(entries) is None


def test_a_lora_that_has_another_name_here_is_found_by_its_hash():
    written = {
        **infotext.settings_fields(FuseSettings(**PAIR)),
        **infotext.hash_field(PAIR.values(), {"dog": "aa11", "watercolor": "bb22"}.get),
    }
    entries = parse_infotext_line(create_infotext_line(written))
    assert infotext.read_settings(entries, renaming({"my dog": "aa11", "watercolor": "cc33"})) == FuseSettings(
        subject="my dog", style="watercolor"
    )


def test_a_lora_that_is_not_here_keeps_its_name():
    entries = written_with_hashes({"dog": "aa11"})
    assert infotext.read_settings(entries, renaming({"fox": "ff00"})) == FuseSettings(**PAIR)


def test_each_of_several_loras_is_found_by_its_hash():
    made = FuseSettings.from_mapping({"subject": ["dog", "c++"], "style": ["100%"], "subject_weight": "1+0.5"})
    hashes = {"dog": "aa11", "c++": "bb22", "100%": "cc33"}
    written = {**infotext.settings_fields(made), **infotext.hash_field(hashes, hashes.get)}
    entries = parse_infotext_line(create_infotext_line(written))
    assert infotext.read_hashes(entries) == hashes
    here = renaming({"dog": "aa11", "a, b+": "bb22", "50%2B": "cc33"})
    read = infotext.read_settings(entries, here)
    assert (read.subjects, read.styles, read.subject_weight) == (("dog", "a, b+"), ("50%2B",), "1+0.5")


def test_an_infotext_shows_names_weights_and_blocks_as_people_write_them():
    made = FuseSettings(subject="dog+hat", style="ink", style_weight="0@0,1@0.3", hr="0.7/1", subject_blocks="in4-in8=0.5,out3=0")
    assert infotext.settings_fields(made) == {
        "DynFuse": "True",
        "DynFuse subject": "dog+hat",
        "DynFuse style": "ink",
        "DynFuse style weight": "0@0,1@0.3",
        "DynFuse method": "balanced",
        "DynFuse hr": "0.7/1",
        "DynFuse subject blocks": "in4-in8=0.5,out3=0",
    }


def test_hashes_survive_names_with_the_hosts_own_characters():
    hashes = {"a: b, c": "aa11", '"x"': "bb22", "512x512": "cc33", "100%": "dd44"}
    entries = parse_infotext_line(create_infotext_line(infotext.hash_field(hashes, hashes.get)))
    assert infotext.read_hashes(entries) == hashes


def test_no_entry_is_written_when_no_hash_is_known():
    assert infotext.hash_field(["dog", ""], lambda name: None) == {}


def test_a_pasted_tag_gets_the_names_of_this_webui_and_keeps_the_rest():
    prompt = "a dog <dynfuse:dog:watercolor:0.9:criterion=js> <lora:dog:1>, <dynfuse:broken>"
    renamed = infotext.renamed_tags(prompt, {"dog": "aa11", "watercolor": "bb22"}, renaming({"a=b": "aa11", "watercolor": "bb22"}))
    assert renamed == "a dog <dynfuse:a%3Db:watercolor:0.9:criterion=js> <lora:dog:1>, <dynfuse:broken>"


def test_a_pasted_tag_of_several_loras_gets_the_names_of_this_webui():
    prompt = "<dynfuse:dog+hat:ink:1+0@0,1@5>"
    renamed = infotext.renamed_tags(prompt, {"hat": "aa11", "ink": "bb22"}, renaming({"c+": "aa11", "dog": "x", "ink": "bb22"}))
    assert renamed == "<dynfuse:dog+c%2B:ink:1+0@0,1@5>"


def test_a_pasted_tag_with_known_names_is_not_rewritten():
    prompt = "<dynfuse: dog :watercolor:1.0>"
    assert infotext.renamed_tags(prompt, {"dog": "aa11"}, renaming({"dog": "ee55", "watercolor": "bb22"})) == prompt
