"""The selection map shows each choice in its LoRA's colour, at any number of layers and steps, with or without a font."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageFont

from lib_dynfuse.fusion import selection_map
from lib_dynfuse.fusion.rules import Member
from lib_dynfuse.fusion.selection_map import ONE_SIDED, STYLE, SUBJECT, draw
from lib_dynfuse.fusion.trace import Trace
from lib_dynfuse.lora.naming import Site

PAIR = (Member("dog", True), Member("ink", False))


def a_trace(winners, *, layers=None, one_sided=()):
    """winners: (steps, sites, images) bool, True for the subject. one_sided: sites that only the style changes."""
    return weighted(torch.stack([winners, ~winners], -1).float(), layers=layers, one_sided=one_sided)


def weighted(weights, *, members=PAIR, layers=None, one_sided=()):
    """weights: (steps, sites, images, B)."""
    steps, sites, _, _ = weights.shape
    names = layers or [f"input_blocks.{i * 9 // sites}.1.transformer_blocks.0.attn1.to_q" for i in range(sites)]
    present = torch.ones(sites, len(members), dtype=torch.bool)
    present[list(one_sided), 0] = False
    reached = torch.ones(steps, sites, dtype=torch.bool)
    return Trace(tuple(map(Site, names)), members, weights, torch.zeros_like(weights), reached, reached & (present.sum(-1) > 1), present)


def places(picture, colour):
    """(x, y) of the pixels of a colour below the legend, each a float tensor."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(picture.height, picture.width, 3)[54:]
    y, x = (pixels == torch.tensor(colour, dtype=torch.uint8)).all(-1).nonzero(as_tuple=True)
    return x.float(), y.float()


def area(picture, colour):
    return len(places(picture, colour)[0])


def test_the_areas_of_the_two_colours_are_the_shares_of_the_wins():
    winners = torch.rand(20, 100, 1, generator=torch.Generator().manual_seed(0)) < 0.3
    picture = draw(a_trace(winners))
    share = area(picture, SUBJECT) / (area(picture, SUBJECT) + area(picture, STYLE))
    assert share == pytest.approx(winners.float().mean().item(), abs=0.01)


def test_steps_go_down_and_layers_go_right():
    winners = torch.zeros(2, 2, 1, dtype=torch.bool)
    winners[0, 1] = True  # the first step's second layer
    picture = draw(a_trace(winners, layers=["input_blocks.1.1.proj_in", "output_blocks.1.1.proj_in"]))
    (x, y), (others_x, others_y) = places(picture, SUBJECT), places(picture, STYLE)
    assert x.min() > others_x.mean()
    assert y.max() < others_y.mean()


def test_diffusers_middle_block_stands_between_down_and_up_although_it_is_registered_last():
    layers = ["down_blocks.0.attentions.0.proj_in", "up_blocks.1.attentions.0.proj_in", "mid_block.attentions.0.proj_in"]
    winners = torch.tensor([[[False], [False], [True]]])
    picture = draw(a_trace(winners, layers=layers))
    assert picture.width / 3 < places(picture, SUBJECT)[0].mean() < picture.width * 2 / 3


def test_a_layer_of_one_lora_is_neutral():
    picture = draw(a_trace(torch.ones(4, 10, 1, dtype=torch.bool), one_sided=(3,)))
    assert area(picture, SUBJECT) == pytest.approx(9 * area(picture, ONE_SIDED), rel=0.1)
    assert area(picture, STYLE) == 0


@pytest.mark.parametrize("layers", [1, 5, 40, 282, 505, 794, 1500])
@pytest.mark.parametrize("steps", [1, 20, 50, 150])
def test_every_layer_and_step_gets_at_least_a_pixel_and_the_picture_stays_readable(layers, steps):
    winners = torch.zeros(steps, layers, 1, dtype=torch.bool)
    winners[::2, ::2] = True
    picture = draw(a_trace(winners))
    assert picture.mode == "RGB"
    assert 560 <= picture.width <= max(1150, layers + 700)
    assert picture.height <= 800
    assert area(picture, SUBJECT) >= winners.sum()


def test_each_image_of_a_batch_has_its_panel_and_more_are_counted():
    winners = torch.zeros(5, 30, 3, dtype=torch.bool)
    winners[:, :, 1] = True
    picture = draw(a_trace(winners))
    assert area(picture, STYLE) == pytest.approx(2 * area(picture, SUBJECT), rel=0.01)
    assert draw(a_trace(winners), most_images=1).height < picture.height


def test_long_names_stay_inside_the_picture():
    winners = torch.zeros(2, 10, 1, dtype=torch.bool)
    short, long = (draw(a_trace(winners), name, name) for name in ("dog", "a_very_long_name_of_a_lora_" * 8))
    assert long.size == short.size
    edge = long.crop((long.width - 4, 0, long.width, 54))
    assert edge.getcolors() == [(4 * 54, (255, 255, 255))]


@pytest.mark.parametrize("name", ["corgi", "Коргі", "柯基"])
def test_it_is_drawn_on_a_system_without_fonts(monkeypatch, name):
    truetype = ImageFont.truetype

    def no_font(font=None, *args, **kwargs):
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return truetype(font, *args, **kwargs)  # Pillow's own, from 10.1 on

    monkeypatch.setattr(ImageFont, "truetype", no_font)
    selection_map.text_font.cache_clear()
    try:
        assert isinstance(draw(a_trace(torch.ones(3, 7, 1, dtype=torch.bool)), name, name), Image.Image)
    finally:
        selection_map.text_font.cache_clear()


def test_a_job_without_choices_says_so():
    assert draw(a_trace(torch.zeros(0, 5, 0, dtype=torch.bool))).height < 60


def test_a_mixture_is_between_its_loras_colours():
    """One layer that uses three parts of the subject and one of the style, of the same strength at each step."""
    weights = torch.tensor([0.75, 0.25]).expand(4, 6, 1, 2).clone()
    mixed = tuple(round(0.75 * s + 0.25 * t) for s, t in zip(SUBJECT, STYLE, strict=True))
    picture = draw(weighted(weights))
    assert area(picture, mixed) > 100 * 300
    assert area(picture, SUBJECT) == area(picture, STYLE) == 0


def test_a_lora_that_comes_in_later_is_paler_before():
    """Half of a style's strength is half way from white to its colour; none of it is white."""
    weights = torch.zeros(3, 5, 1, 2)
    weights[1, :, :, 1], weights[2, :, :, 1] = 0.5, 1.0
    picture = draw(weighted(weights))
    half = tuple(round(255 - 0.5 * (255 - c)) for c in STYLE)
    assert area(picture, STYLE) == pytest.approx(area(picture, half), rel=0.02)


def test_every_one_of_several_loras_has_a_colour_of_its_own():
    members = (Member("a", True), Member("b", True), Member("c", False), Member("d", False))
    weights = torch.eye(4).reshape(1, 4, 1, 4).expand(3, 4, 1, 4).clone()
    picture = draw(weighted(weights, members=members))
    colours = selection_map.colours_of(members)
    assert len(set(colours)) == 4
    areas = [area(picture, colour) for colour in colours]
    assert min(areas) == pytest.approx(max(areas), rel=0.02)
    assert picture.height > draw(a_trace(torch.ones(3, 4, 1, dtype=torch.bool))).height  # two lines of names
