"""What the benchmark says of a picture's colours, against pixel by pixel."""

import numpy as np
import pytest

from dynfuse_world.benchmark.colour import colour


def pixel_by_pixel(picture):
    """Saturation, contrast, clipped."""
    chroma, luma, clipped = [], [], 0
    for row in picture.tolist():
        for red, green, blue in row:
            chroma.append(max(red, green, blue) - min(red, green, blue))
            luma.append(0.299 * red + 0.587 * green + 0.114 * blue)
            clipped += any(channel in (0, 1, 254, 255) for channel in (red, green, blue))
    mean = sum(luma) / len(luma)
    deviation = (sum((value - mean) ** 2 for value in luma) / len(luma)) ** 0.5
    return sum(chroma) / len(chroma) / 255, deviation / 255, clipped / len(luma)


def test_each_picture_is_measured_as_its_pixels_say():
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    pictures[1] = rng.integers(2, 254, (6, 5, 3))  # nothing clipped, to the last value that is not
    pictures[1, 0, 0], pictures[1, 0, 1] = (2, 2, 2), (253, 253, 253)
    pictures[2, :2] = (1, 100, 200)
    pictures[2, 2:] = (254, 100, 200)
    pictures[3] = 77
    found = colour(pictures)
    for number, picture in enumerate(pictures):
        assert [measure[number] for measure in found] == pytest.approx(pixel_by_pixel(picture), abs=1e-12)
    assert found.clipped[1] == 0
    assert found.clipped[2] == 1
    assert (found.saturation[3], found.contrast[3]) == (0, 0)


def test_a_picture_that_is_pushed_is_more_saturated_and_more_clipped():
    picture = np.random.default_rng(4).integers(60, 196, (1, 8, 8, 3))
    pushed = (128 + 2.5 * (picture - 128)).clip(0, 255)
    before, after = (colour(each.astype(np.uint8)) for each in (picture, pushed))
    assert all(more > less for more, less in zip(after, before, strict=True))


def test_black_and_white_stand_for_contrast_and_a_pure_colour_for_saturation():
    halves = np.zeros((1, 4, 4, 3), np.uint8)
    halves[:, 2:] = 255
    assert [float(measure[0]) for measure in colour(halves)] == pytest.approx([0, 0.5, 1])
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert colour(red).saturation == 1
