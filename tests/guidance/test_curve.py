"""The similarity curve shows each term in its colour, higher for more similar, at any number of steps and images."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import ImageFont

from lib_dynfuse.fusion import selection_map
from lib_dynfuse.guidance.curve import COLOURS, draw
from lib_dynfuse.guidance.guide import GuidanceRecord

LEGEND = 54  # pixels at the top


def a_record(similarities, *, steps=None, total=None, wanted=(True, True, True)):
    """similarities: (steps, 3, images), or (steps, 3) of one image."""
    values = torch.as_tensor(similarities, dtype=torch.float32)
    values = values if values.dim() == 3 else values[..., None]
    steps = list(range(len(values))) if steps is None else steps
    return GuidanceRecord(steps, values, wanted, total or len(steps))


def ramp(steps, images=1, seed=0):
    """The first term rises, the second stays, the third falls; images differ a little."""
    t = torch.linspace(0, 1, steps)
    means = torch.stack([0.6 + 0.3 * t, torch.full_like(t, 0.5), 0.4 - 0.3 * t], 1)
    return means[:, :, None] + 0.02 * torch.randn(1, 3, images, generator=torch.Generator().manual_seed(seed))


def places(picture, colour, *, legend=False):
    """(x, y) of the pixels of a colour, in the legend or below it, each a float tensor."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(picture.height, picture.width, 3)
    pixels = pixels[:LEGEND] if legend else pixels[LEGEND:]
    y, x = (pixels == torch.tensor(colour, dtype=torch.uint8)).all(-1).nonzero(as_tuple=True)
    return x.float(), y.float()


def height_at(picture, colour, x):
    """Middle of the curve of a colour at a column, or of the nearest column that has it."""
    xs, ys = places(picture, colour)
    near = xs[(xs - x).abs().argmin()]
    return ys[xs == near].mean().item()


def test_the_curves_are_to_scale():
    picture = draw(a_record(ramp(21)))
    left, right = (extreme(places(picture, COLOURS[0])[0]).item() for extreme in (torch.min, torch.max))
    # 0.3 up, 0.3 down, and nothing.
    climb = height_at(picture, COLOURS[0], left) - height_at(picture, COLOURS[0], right)
    assert climb > 50
    assert height_at(picture, COLOURS[2], right) - height_at(picture, COLOURS[2], left) == pytest.approx(climb, abs=3)
    assert height_at(picture, COLOURS[1], left) == pytest.approx(height_at(picture, COLOURS[1], right), abs=1)
    between = (ramp(21)[-1, 0] - ramp(21)[-1, 2]).item() / 0.3 * climb
    assert height_at(picture, COLOURS[2], right) - height_at(picture, COLOURS[0], right) == pytest.approx(between, rel=0.03)


def test_of_several_images_the_mean_stands_before_a_line_for_each():
    mean, apart = ramp(20), torch.zeros(1, 3, 2)
    apart[0, 1] = torch.tensor([0.05, -0.05])  # of the middle curve, so that the axis stays the same
    one, two = draw(a_record(mean)), draw(a_record(mean + apart))
    for colour in COLOURS:
        assert all(torch.equal(a, b) for a, b in zip(places(one, colour), places(two, colour)))
    assert one.tobytes() != two.tobytes()


@pytest.mark.parametrize("images", [1, 4, 30])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50, 150])
def test_every_curve_can_be_seen_at_any_number_of_steps_and_images(steps, images):
    picture = draw(a_record(ramp(steps, images)))
    assert picture.mode == "RGB"
    assert picture.width == 640
    assert 200 < picture.height < 400
    for colour in COLOURS:
        assert len(places(picture, colour)[0]) >= 12
        assert len(places(picture, colour, legend=True)[0]) >= 100


def test_guided_steps_stand_where_they_are_among_all_steps():
    everything = draw(a_record(ramp(20)))
    part = draw(a_record(ramp(20)[10:15], steps=list(range(10, 15)), total=20))
    whole, some = places(everything, COLOURS[0])[0], places(part, COLOURS[0])[0]
    width = (whole.max() - whole.min()) / 19
    assert some.min() == pytest.approx(whole.min() + 10 * width, abs=6)
    assert some.max() == pytest.approx(whole.min() + 14 * width, abs=6)


def test_a_term_without_weight_has_no_curve():
    values = ramp(20)
    values[:, 1] = 0
    picture = draw(a_record(values, wanted=(True, False, True)))
    assert not len(places(picture, COLOURS[1])[0])
    assert not len(places(picture, COLOURS[1], legend=True)[0])
    # Its zeros do not stretch the axis either.
    assert height_at(picture, COLOURS[2], 600) - height_at(picture, COLOURS[0], 600) > 150


def test_how_often_the_limit_acted_stands_beside_the_curve():
    seen = []
    record = a_record(ramp(20))
    for bites in (0, 7):
        record.bites = bites
        seen.append(torch.frombuffer(bytearray(draw(record).tobytes()), dtype=torch.uint8).reshape(-1, 640, 3))
    rows, columns = (seen[0] != seen[1]).any(-1).nonzero(as_tuple=True)
    assert rows.max() < LEGEND  # a text in the heading, and nothing else
    assert columns.max() - columns.min() > 60


@pytest.mark.parametrize("value", [-1.0, -0.02, 0.0, 0.31234, 1.0])
def test_similarities_that_do_not_change_are_a_level_line_inside_the_plot(value):
    picture = draw(a_record(torch.full((10, 3), value)))
    _, y = places(picture, COLOURS[2])  # drawn last, over the others
    assert y.max() - y.min() < 12
    assert 0 < y.mean() < 230


def test_a_step_that_is_not_a_number_interrupts_the_curve():
    values = ramp(20)
    values[10] = math.nan
    x, _ = places(draw(a_record(values)), COLOURS[0])
    columns = torch.unique(x)
    assert (columns[1:] - columns[:-1]).max() > 20


def test_an_image_that_is_not_a_number_does_not_hide_the_others():
    values = ramp(20, 3)
    values[:, :, 1] = math.nan
    others = ramp(20, 3)[:, :, ::2]
    for colour in COLOURS:
        x, y = places(draw(a_record(values)), colour)
        expected_x, expected_y = places(draw(a_record(others)), colour)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize(
    "record",
    [
        GuidanceRecord([], torch.zeros(0, 3, 0), (True, True, True), 20),
        GuidanceRecord([], torch.zeros(0, 3, 0), (False, False, False), 20),
        a_record(torch.full((5, 3), math.nan)),
    ],
)
def test_without_anything_to_show_there_is_still_a_picture(record):
    picture = draw(record)
    assert picture.width == 640
    assert all(not len(places(picture, colour)[0]) for colour in COLOURS)


@pytest.mark.parametrize("bites", [0, 1200])
@pytest.mark.parametrize("width", [100, 480, 640, 1000])
def test_the_picture_has_the_width_asked_for_unless_its_text_needs_more(width, bites):
    record = a_record(ramp(50, 24))
    record.bites = bites
    picture = draw(record, width)
    assert picture.width == max(width, 480)
    # Nothing but background at the right edge: no text is cut off.
    assert all(picture.getpixel((picture.width - 2, y)) == (255, 255, 255) for y in range(picture.height))


def test_without_a_font_pillows_own_is_used(monkeypatch):
    truetype = ImageFont.truetype

    def missing(font=None, *args, **kwargs):
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return truetype(font, *args, **kwargs)  # Pillow's own, from 10.1 on

    monkeypatch.setattr(ImageFont, "truetype", missing)
    selection_map.text_font.cache_clear()
    try:
        assert draw(a_record(ramp(20, 2))).width == 640
    finally:
        monkeypatch.undo()
        selection_map.text_font.cache_clear()
