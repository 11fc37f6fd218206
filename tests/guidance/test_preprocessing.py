"""Pictures as an encoder takes them, against Pillow's own resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lib_dynfuse.guidance.preprocessing import prepared

SIZES = [(32, 32), (64, 48), (49, 131), (256, 256), (20, 100), (33, 31), (512, 256)]  # up, down and both, square and not


def picture(height, width, kind, seed=0):
    """(H, W, 3) uint8."""
    generator = np.random.default_rng(seed)
    if kind == "noise":  # only black and white: the filter overshoots everywhere
        return generator.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    if kind == "edges":
        y, x = np.mgrid[:height, :width]
        return np.repeat((((x // 5 + y // 7) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    low = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return np.asarray(low.resize((width, height), Image.Resampling.BICUBIC))


def tensor(pixels):
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


NOTHING = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("kind", ["smooth", "edges", "noise"])
@pytest.mark.parametrize("size", SIZES)
def test_resized_like_pillows_bicubic(size, kind):
    pixels = picture(*size, kind)
    by_pillow = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)) / 255
    ours = prepared(tensor(pixels).float(), 48, *NOTHING)[0].permute(1, 2, 0).numpy()
    # Pillow rounds to whole 255ths after each of its two passes: half of one, and what the kernel makes of the first half.
    assert np.abs(ours - by_pillow).max() < 0.005


@pytest.mark.parametrize("size", SIZES)
def test_the_filter_is_torchs_antialiased_one(size):
    inputs = torch.rand(1, 3, *size, dtype=torch.float64) * 0.2 - 0.1  # far from black and white, where nothing is cut off
    resized = F.interpolate((inputs + 1) / 2, (48, 48), mode="bicubic", antialias=True, align_corners=False)
    assert (prepared(inputs, 48, *NOTHING) - resized).abs().max() < 1e-12


def test_a_picture_of_the_right_size_is_only_normalised():
    pixels = picture(16, 16, "noise")
    mean, std = (0.5, 0.25, 0.125), (0.5, 2.0, 0.25)
    expected = (pixels / 255 - mean) / std
    assert np.abs(prepared(tensor(pixels), 16, mean, std)[0].permute(1, 2, 0).numpy() - expected).max() < 1e-12


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_computes_in_float32_at_least(dtype, result):
    assert prepared(torch.zeros(1, 3, 8, 8, dtype=dtype), 4, *NOTHING).dtype == result


def test_what_leaves_the_range_is_cut_off():
    inputs = torch.cat([torch.full((1, 3, 20, 20), 1.6), torch.full((1, 3, 20, 20), -1.6)])
    resized = prepared(inputs, 8, *NOTHING)
    assert torch.allclose(resized[0], torch.ones(3, 8, 8))
    assert torch.allclose(resized[1], torch.zeros(3, 8, 8), atol=1e-6)


def test_a_pixel_out_of_range_still_has_the_gradient_of_one_in_range():
    weights = torch.rand(1, 3, 8, 8, dtype=torch.float64)

    def gradient(value):
        inputs = torch.full((1, 3, 20, 16), value, dtype=torch.float64, requires_grad=True)
        (prepared(inputs, 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)) * weights).sum().backward()
        return inputs.grad

    assert gradient(1.3).abs().min() > 0
    assert torch.equal(gradient(1.3), gradient(0.0))
    assert torch.equal(gradient(-1.3), gradient(0.0))


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    inputs = (torch.rand(2, 3, 7, 9, dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda pictures: prepared(pictures, 5, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), inputs)
    assert torch.autograd.gradcheck(lambda pictures: prepared(pictures, 12, *NOTHING), inputs * 0.2)


def test_no_picture_depends_on_its_neighbours_in_the_batch():
    batch = torch.rand(3, 3, 40, 24)
    together = prepared(batch, 16, *NOTHING)
    assert torch.equal(together, torch.cat([prepared(picture[None], 16, *NOTHING) for picture in batch]))


def test_what_was_first_used_in_inference_mode_can_be_differentiated_later():
    with torch.inference_mode():
        prepared(torch.zeros(1, 3, 37, 41), 13, *NOTHING)
    inputs = torch.zeros(1, 3, 37, 41, requires_grad=True)
    prepared(inputs, 13, *NOTHING).sum().backward()
    assert inputs.grad is not None
