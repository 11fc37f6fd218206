"""Blocks: the same names in every layout, and the factors that texts give them."""

from __future__ import annotations

import pytest

from lib_dynfuse.errors import SettingsError
from lib_dynfuse.lora import Blocks, Site, block_factors, denoiser_aliases
from lib_dynfuse.lora.families import FAMILIES, reference_aliases, reference_layers
from lib_dynfuse.strength import BlockText

from .test_families import diffusers_layers

SD1, SD2, SDXL, FLUX = (family.name for family in FAMILIES[:4])


def blocks_of(family: str) -> Blocks:
    return Blocks.of_model(reference_layers(family))


def numbered(group: str, count: int) -> list[str]:
    return [f"{group}{n}" for n in range(count)]


def factors_of(family: str, *assignments: tuple[str, str, float], numbers=(), preset="") -> dict[str, float]:
    return block_factors(BlockText(assignments, tuple(numbers), preset), blocks_of(family))


def on(factors: dict[str, float]) -> set[str]:
    return {name for name, factor in factors.items() if factor}


def test_blocks_are_listed_in_the_order_in_which_data_meets_them():
    unet = ["embed", *numbered("in", 12), "mid", *numbered("out", 12), "last"]
    assert list(blocks_of(SD1).names) == list(blocks_of(SD2).names) == unet
    assert list(blocks_of(SDXL).names) == ["embed", *numbered("in", 9), "mid", *numbered("out", 9), "last"]
    assert list(blocks_of(FLUX).names) == ["embed", "first", *numbered("double", 19), *numbered("single", 38), "last"]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_layer_is_in_the_same_block_in_both_layouts(family):
    layers = diffusers_layers(family)
    containers = {name[:end] for name in layers for end, character in enumerate(name) if character == "."}
    theirs, ours = Blocks.of_model(["", *containers, *layers]), blocks_of(family)
    assert (theirs.names, theirs.forms, theirs.presets) == (ours.names, ours.forms, ours.presets)
    forth = reference_aliases(family)
    for flat_name, targets in denoiser_aliases(layers).items():
        (there,) = {theirs.of(alias.site) for alias in targets}
        (here,) = {ours.of(alias.site) for alias in forth[flat_name]}
        assert there == here != "rest", flat_name


def test_ranges_run_along_the_data():
    factors = factors_of(SD1, ("in4", "in8", 0.5), ("in10", "out2", 0.0), ("out3", "out3", 2.0))
    assert [factors[f"in{n}"] for n in range(12)] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0, 0]
    assert factors["mid"] == factors["out0"] == factors["out2"] == 0
    assert factors["out3"] == 2
    assert factors["out4"] == factors["base"] == factors["embed"] == factors["last"] == factors["rest"] == 1
    assert factors_of(SD1, ("out2", "in10", 0.0)) == factors_of(SD1, ("in10", "out2", 0.0))
    assert on(factors_of(FLUX, ("double1", "single36", 0.0))) == {"base", "t5", "embed", "first", "double0", "single37", "last", "rest"}


def test_a_later_assignment_counts():
    factors = factors_of(SD1, ("in0", "out11", 0.0), ("mid", "mid", 1.0))
    assert on(factors) == {"base", "embed", "mid", "last", "rest"}


@pytest.mark.parametrize("written", ["IN04", "in04", "in4", " In4 "])
def test_names_of_blocks_may_be_written_as_block_weight_users_do(written):
    assert blocks_of(SD1).within(written) == ("in4",)


@pytest.mark.parametrize(
    ("family", "written", "name"),
    [
        (SD1, "IN00", "in0"),
        (SD1, "M00", "mid"),
        (SD1, "MID", "mid"),
        (SD1, "BASE", "base"),
        (SD1, "OUT10", "out10"),
        (FLUX, "D07", "double7"),
        (FLUX, "S37", "single37"),
        (FLUX, "CLIP", "base"),
        (FLUX, "T5", "t5"),
    ],
)
def test_the_extensions_names_are_understood(family, written, name):
    assert blocks_of(family).within(written) == (name,)


@pytest.mark.parametrize("name", ["in12", "in", "mid1", "middle2", "double0", "up1", "", "-", "t5", "in4.1"])
def test_a_block_that_does_not_exist_is_refused_with_the_list(name):
    with pytest.raises(SettingsError) as error:
        factors_of(SD1, (name, name, 1.0))
    assert str(error.value) == (
        f"There is no block {name!r} in this model. Its blocks are base, embed, in0 to in11, mid, out0 to out11, last."
    )


# number of values -> blocks in their order, by sd-webui-lora-block-weight's documentation
FORMS = {
    (SD1, 17): "base in1 in2 in4 in5 in7 in8 mid out3 out4 out5 out6 out7 out8 out9 out10 out11".split(),
    (SD1, 26): ["base", *numbered("in", 12), "mid", *numbered("out", 12)],
    (SDXL, 12): "base in4 in5 in7 in8 mid out0 out1 out2 out3 out4 out5".split(),
    (SDXL, 20): ["base", *numbered("in", 9), "mid", *numbered("out", 9)],
}


@pytest.mark.parametrize(("family", "count"), FORMS)
def test_a_form_of_numbers_gives_each_block_its_own(family, count):
    assert len(FORMS[family, count]) == count
    numbers = [n / 10 for n in range(1, count + 1)]
    factors = factors_of(family, numbers=numbers)
    assert [factors[name] for name in FORMS[family, count]] == numbers
    left_out = factors.keys() - set(FORMS[family, count])
    assert {name for name in left_out if factors[name]} == {"embed", "last", "rest"}, "blocks with numbers that are left out are off"


def test_the_61_numbers_of_flux_name_its_encoders_apart():
    numbers = [float(n) for n in range(61)]
    factors = factors_of(FLUX, numbers=numbers)
    assert (factors["base"], factors["t5"], factors["embed"], factors["first"]) == (0, 1, 2, 2)
    assert [factors[f"double{n}"] for n in range(19)] == numbers[3:22]
    assert [factors[f"single{n}"] for n in range(38)] == numbers[22:60]
    assert factors["last"] == 60


@pytest.mark.parametrize(
    ("family", "count", "known"), [(SD1, 12, "17 (base, in1, in2, in4"), (SDXL, 17, "12 (base, in4"), (FLUX, 17, "61")]
)
def test_numbers_of_another_form_are_refused_with_the_forms(family, count, known):
    with pytest.raises(SettingsError) as error:
        factors_of(family, numbers=[1.0] * count)
    assert str(error.value).startswith(f"{count} numbers are no form of this model's blocks. The forms are ")
    assert known in str(error.value)


def test_a_model_of_another_size_has_blocks_but_no_forms():
    layers = [name for name in reference_layers(SD1) if not name.startswith(("input_blocks.11", "output_blocks.0."))]
    blocks = Blocks.of_model(layers)
    assert blocks.of(Site("input_blocks.10.0.in_layers.2")) == "in10"
    with pytest.raises(SettingsError, match="have no form of numbers. Name them: base, embed, in0 to in10, mid, out1 to out11, last."):
        block_factors(BlockText(numbers=(1.0,) * 17), blocks)
    assert set(block_factors(BlockText(preset="none"), blocks).values()) == {0.0}
    with pytest.raises(SettingsError, match=r"no preset 'INS' .* There are ALL, NONE\."):
        block_factors(BlockText(preset="INS"), blocks)


# What the extension's 17 numbers of these presets say for the blocks that they have.
PRESETS = {
    "ALL": "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "NONE": "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "INS": "1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "IND": "1 0 0 0 1 1 1 0 0 0 0 0 0 0 0 0 0",
    "INALL": "1 1 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0",
    "MIDD": "1 0 0 0 1 1 1 1 1 1 1 1 0 0 0 0 0",
    "OUTD": "1 0 0 0 0 0 0 0 1 1 1 1 0 0 0 0 0",
    "OUTS": "1 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1",
    "OUTALL": "1 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 1",
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", [SD1, SD2])
def test_a_preset_agrees_with_the_extensions_where_that_speaks(family, preset):
    factors = factors_of(family, preset=preset.lower())
    assert [factors[name] for name in FORMS[SD1, 17]] == [float(word) for word in PRESETS[preset].split()]


def test_presets_of_halves_and_ends_make_up_the_whole():
    for family in (SD1, SDXL):
        names = {name for name in blocks_of(family).names if name[-1].isdigit()}
        halves = [on(factors_of(family, preset=name)) - {"base"} for name in ("INALL", "OUTALL")]
        assert halves[0] | halves[1] == names
        for whole, parts in (("INALL", ("INS", "IND")), ("OUTALL", ("OUTD", "OUTS"))):
            sets = [on(factors_of(family, preset=name)) - {"base"} for name in (*parts, whole)]
            assert sets[0] | sets[1] == sets[2]
            assert not sets[0] & sets[1]
    assert len(on(factors_of(FLUX, preset="single"))) == 38 + 2
    assert len(on(factors_of(FLUX, preset="DOUBLE"))) == 19 + 2


def test_assignments_change_a_preset():
    factors = factors_of(SDXL, ("mid", "mid", 0.3), preset="INS")
    assert on(factors) == {"base", *numbered("in", 6), "mid"}
    assert factors["mid"] == 0.3


def test_a_model_of_an_unknown_scheme_has_blocks_by_its_own_names():
    blocks = Blocks.of_model(["", "blocks", "blocks.0", "blocks.0.attn.to_q", "blocks.10.mlp", "head"])
    assert blocks.names == ("blocks", "blocks0", "blocks10", "head")
    assert blocks.of(Site("blocks.0.attn.to_q")) == "blocks0"
    assert block_factors(BlockText((("blocks10", "", 0.5),)), blocks)["blocks10"] == 0.5
