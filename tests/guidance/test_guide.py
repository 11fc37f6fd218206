"""The guide's corrections are gradients of R, per image, at the steps it should act on, whatever the host runs under."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_dynfuse.guidance.correction import Level, Schedule, effective_m, exact_factor, fast_factor
from lib_dynfuse.guidance.decode import VaeDecoder, private_copy
from lib_dynfuse.guidance.encoders import Encoders, ImageEncoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.score import Targets
from lib_dynfuse.settings import FuseSettings

from ..fakes.encoders import small_encoders

LEVELS = (14.6, 7.0, 3.0, 1.5, 0.7, 0.3, 0.1)
LEVEL = Level("vp", 3.0, 1.5)
SHAPE = (4, 6, 5)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Decoder(nn.Module):
    """Pictures stay well inside [-1, 1], so that nothing is cut off and finite differences see what the gradient sees."""

    def __init__(self, seed=0):
        super().__init__()
        self.inward, self.outward = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(noise(*weight.shape, seed=seed + i) / 3)

    def forward(self, latent):
        large = torch.tanh(self.inward(latent)).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return 0.6 * torch.tanh(self.outward(large))


@pytest.fixture(scope="module")
def encoders():
    return small_encoders()


@pytest.fixture(scope="module")
def encoders64(encoders):
    def wide(encoder):
        return ImageEncoder(copy.deepcopy(encoder.network).double(), encoder.size, encoder.mean, encoder.std)

    return Encoders(wide(encoders.clip), wide(encoders.dino), "float64")


def targets_of(encoders, seed=10):
    """Of pictures that the decoder could have made."""
    with torch.no_grad():
        pictures = Decoder()(noise(2, *SHAPE, seed=seed).float())
        return Targets.of(encoders.embed(pictures[:1]), encoders.embed(pictures[1:]))


def a_guide(encoders, *, decoders=None, targets=None, levels=LEVELS, kind="vp", **settings):
    settings = {"guidance": True, "limit": 0.0, **settings}
    weight = next(encoders.clip.network.parameters())
    decoders = decoders or [VaeDecoder(Decoder().to(weight.dtype), dtype=weight.dtype)]
    return Guide(FuseSettings(**settings), targets or targets_of(encoders), encoders, decoders, Schedule(kind, levels))


def cosine(embedding, target):
    return F.cosine_similarity(embedding, target[None], dim=1)


def r_of(pictures, encoders, targets, weights=(1 / 3, 1 / 3, 1 / 3)):
    """Eq. 19, (B,)."""
    clip, dino = encoders.clip(pictures), encoders.dino(pictures)
    terms = cosine(clip, targets.content_clip), cosine(clip, targets.style_clip), cosine(dino, targets.style_dino)
    return 1 - sum(weight * term for weight, term in zip(weights, terms))


@torch.no_grad()
def slope(function, at, direction, step=1e-4):
    """Of the sum of function, by central differences, Richardson-extrapolated."""

    def central(h):
        return ((function(at + h * direction) - function(at - h * direction)).sum() / (2 * h)).item()

    return (4 * central(step) - central(2 * step)) / 3


def denoiser(x):
    """x: (B, C, h, w) in VE units."""
    return torch.tanh(torch.roll(x, 1, -1)) * 0.8 + 0.1 * x


WEIGHTS = {"content_weight": 0.5, "style_clip_weight": 0.2, "style_dino_weight": 0.4}


class TestGradient:
    @pytest.mark.parametrize("pixels", [None, 24])
    def test_fast_is_the_gradient_with_respect_to_the_prediction(self, encoders64, pixels):
        decoder = VaeDecoder(Decoder().double(), scale=0.7, shift=0.1, dtype=torch.float64, pixels=pixels)
        guide = a_guide(encoders64, decoders=[decoder], m=3.0, **WEIGHTS)
        denoised = noise(2, *SHAPE)
        shift = guide.fast_shift(denoised, LEVEL)

        def r(latent):
            return r_of(decoder(latent), encoders64, targets_of(encoders64), tuple(WEIGHTS.values()))

        gradient = -shift / (effective_m(3.0, len(LEVELS)) * fast_factor(LEVEL))
        for seed in range(3):
            direction = noise(2, *SHAPE, seed=20 + seed)
            assert (gradient * direction).sum().item() == pytest.approx(slope(r, denoised, direction), rel=1e-6)

    @pytest.mark.parametrize("unit", [1.0, (1 + LEVEL.s**2) ** -0.5])
    def test_exact_is_the_gradient_with_respect_to_the_noisy_latent_whatever_its_unit(self, encoders64, unit):
        guide = a_guide(encoders64, m=3.0, gradient="exact", **WEIGHTS)
        x = noise(2, *SHAPE, seed=1)
        leaf = (x * unit).requires_grad_()
        shift = guide.exact_shift(denoiser(leaf / unit), leaf, LEVEL, unit=unit)
        decoder = VaeDecoder(Decoder().double(), dtype=torch.float64)

        def r(latent):
            return r_of(decoder(denoiser(latent)), encoders64, targets_of(encoders64), tuple(WEIGHTS.values()))

        gradient = -shift / (effective_m(3.0, len(LEVELS)) * exact_factor(LEVEL))
        for seed in range(3):
            direction = noise(2, *SHAPE, seed=20 + seed)
            assert (gradient * direction).sum().item() == pytest.approx(slope(r, x, direction), rel=1e-6)

    def test_float32_agrees_with_float64(self, encoders, encoders64):
        denoised = noise(2, *SHAPE)
        narrow = a_guide(encoders).fast_shift(denoised.float(), LEVEL)
        torch.testing.assert_close(
            narrow.double(), a_guide(encoders64).fast_shift(denoised, LEVEL), rtol=1e-3, atol=1e-3 * narrow.abs().max()
        )

    def test_a_decoder_in_half_precision_does_not_lose_the_small_gradients_of_pixels(self, encoders):
        # R hardly depends on any one pixel: without scaling, most of this gradient is below float16's smallest number.
        def decode(latent):
            return latent[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2) * 0.2

        weights = {"content_weight": 1e-6, "style_clip_weight": 1e-6, "style_dino_weight": 0.0}
        denoised = noise(2, *SHAPE).float()
        expected, half = (
            a_guide(encoders, decoders=[VaeDecoder(decode, dtype=dtype)], **weights).fast_shift(denoised, LEVEL)
            for dtype in (torch.float32, torch.float16)
        )
        assert F.cosine_similarity(expected.flatten(1), half.flatten(1)).min() > 0.999
        assert half.norm() / expected.norm() == pytest.approx(1, abs=0.01)

    def test_a_denoiser_in_half_precision_does_not_lose_them_either(self, encoders):
        def through(dtype):
            guide = a_guide(encoders, gradient="exact", content_weight=1e-6, style_clip_weight=1e-6, style_dino_weight=0)
            leaf = noise(2, *SHAPE).float().requires_grad_()
            return guide.exact_shift((leaf.to(dtype) * 0.8).float(), leaf, LEVEL)

        expected, half = through(torch.float32), through(torch.float16)
        assert F.cosine_similarity(expected.flatten(1), half.flatten(1)).min() > 0.99

    def test_the_shift_has_the_predictions_dtype_and_shape(self, encoders):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            shift = a_guide(encoders).fast_shift(noise(2, *SHAPE).to(dtype), LEVEL)
            assert shift.dtype == dtype
            assert shift.shape == (2, *SHAPE)
            assert not shift.requires_grad

    def test_the_strength_of_a_step_is_that_of_fifty_steps_in_all(self, encoders):
        denoised = noise(1, *SHAPE).float()
        few = a_guide(encoders, levels=[3.0, 1.5, 0.5, 0.1]).fast_shift(denoised, LEVEL)
        fifty = a_guide(encoders, levels=torch.logspace(1, -1, 50).tolist()).fast_shift(denoised, LEVEL)
        torch.testing.assert_close(few, fifty * 50 / 4)

    def test_a_term_without_weight_does_not_count_and_its_encoder_does_not_run(self, encoders):
        class Refusing(ImageEncoder):
            def __call__(self, pictures):
                raise AssertionError("ran")

        blind = Encoders(encoders.clip, Refusing(encoders.dino.network, 32, (0.5,) * 3, (0.5,) * 3), "")
        weights = {"content_weight": 0.5, "style_clip_weight": 0.0, "style_dino_weight": 0.0}
        guide = Guide(FuseSettings(guidance=True, **weights), targets_of(encoders), blind, [VaeDecoder(Decoder())], Schedule("vp", LEVELS))
        guide.fast_shift(noise(1, *SHAPE).float(), LEVEL)
        record = guide.record
        assert record.wanted == (True, False, False)
        assert (record.similarities[:, 0] != 0).all()
        assert (record.similarities[:, 1:] == 0).all()


class TestBatch:
    @pytest.mark.parametrize("limit", [0.0, 0.01])
    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_three_images_at_once_are_three_single_jobs(self, encoders64, gradient, limit):
        x = noise(3, *SHAPE) * torch.tensor([0.3, 1.0, 2.0])[:, None, None, None]

        def shift(rows):
            guide = a_guide(encoders64, gradient=gradient, limit=limit)
            leaf = rows.clone().requires_grad_()
            denoised = denoiser(leaf)
            return (guide.fast_shift(denoised, LEVEL) if gradient == "fast" else guide.exact_shift(denoised, leaf, LEVEL)), guide.record

        together, record = shift(x)
        alone = [shift(row[None]) for row in x]
        torch.testing.assert_close(together, torch.cat([single for single, _ in alone]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(record.similarities, torch.cat([single.similarities for _, single in alone], 2))
        assert record.bites == sum(single.bites for _, single in alone)

    def test_an_image_without_a_finite_gradient_is_left_alone_and_counted(self, encoders):
        denoised = noise(3, *SHAPE).float()
        alone = a_guide(encoders, limit=0.05).fast_shift(denoised[::2], LEVEL)
        denoised[1, 0, 0, 0] = math.nan
        guide = a_guide(encoders, limit=0.05)
        shift = guide.fast_shift(denoised, LEVEL)
        assert torch.equal(shift[1], torch.zeros(SHAPE))
        torch.testing.assert_close(shift[::2], alone)
        assert guide.record.non_finite == 1
        assert guide.record.notes == ["1 corrections were left out, because their gradient was not a finite number."]

    def test_the_same_on_the_way_through_the_denoiser(self, encoders):
        guide = a_guide(encoders, gradient="exact")
        leaf = noise(2, *SHAPE).float().requires_grad_()
        # The square root's slope at 0 is infinite, its value is not.
        rows = torch.stack([leaf[0] * 0.5, (leaf[1] * 0).abs().sqrt() + leaf[1].detach()])
        shift = guide.exact_shift(rows, leaf, LEVEL)
        assert shift[0].abs().sum() > 0
        assert torch.equal(shift[1], torch.zeros(SHAPE))
        assert guide.record.non_finite == 1

    def test_the_limit_is_kept_and_its_bites_are_counted_per_image(self, encoders):
        denoised = noise(2, *SHAPE).float()
        free = a_guide(encoders).fast_shift(denoised, LEVEL)
        sizes = free.flatten(1).norm(dim=1) / denoised.flatten(1).norm(dim=1)
        assert sizes[0] != sizes[1]
        guide = a_guide(encoders, limit=float(sizes.mean()))
        kept = guide.fast_shift(denoised, LEVEL)
        guide.fast_shift(denoised, LEVEL)
        small, large = int(sizes.argmin()), int(sizes.argmax())
        torch.testing.assert_close(kept[small], free[small])
        assert (kept[large].norm() / denoised[large].norm()).item() == pytest.approx(float(sizes.mean()), rel=1e-5)
        assert guide.record.bites == 2

    def test_where_the_mask_keeps_the_picture_it_stays(self, encoders):
        denoised = noise(2, *SHAPE).float()
        mask = (noise(1, 1, *SHAPE[1:], seed=3) > 0).double()
        guide = a_guide(encoders)
        torch.testing.assert_close(guide.fast_shift(denoised, LEVEL, mask), guide.fast_shift(denoised, LEVEL) * mask.float())
        leaf = denoised.clone().requires_grad_()
        shift = guide.exact_shift(leaf * 0.5, leaf, LEVEL, mask=mask)
        assert (shift[(mask == 0).expand_as(shift)] == 0).all()
        assert shift.abs().sum() > 0


def guided_steps(guide, levels=LEVELS):
    return [i for i, s in enumerate(levels) if guide.wants(s)]


class TestWhen:
    TEN = tuple(10.0 - i for i in range(10))

    @pytest.mark.parametrize("settings", [{"m": 0.0}, {"content_weight": 0.0, "style_clip_weight": 0.0, "style_dino_weight": 0.0}])
    def test_no_strength_or_no_weights_is_no_guidance(self, encoders, settings):
        guide = a_guide(encoders, **settings)
        assert guided_steps(guide) == []
        assert guide.record.steps == []

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({}, range(10)),
            ({"every": 2}, range(0, 10, 2)),
            ({"every": 3, "start": 0.2}, (2, 5, 8)),
            ({"start": 0.3}, range(3, 10)),
            ({"end": 0.3}, range(3)),
            ({"start": 0.25, "end": 0.55}, range(3, 6)),
            ({"start": 0.1 + 0.2, "end": 0.7000000000000001}, range(3, 7)),
            ({"start": 0.9}, (9,)),
            ({"start": 0.5, "end": 0.5}, ()),
            ({"start": 1.0}, ()),
            ({"every": 20}, (0,)),
        ],
    )
    def test_the_range_is_in_fractions_of_the_steps(self, encoders, settings, steps):
        assert guided_steps(a_guide(encoders, levels=self.TEN, **settings), self.TEN) == list(steps)

    def test_image_to_image_counts_from_the_first_level_it_sees(self, encoders):
        guide = a_guide(encoders, levels=self.TEN, start=0.5, every=2)
        assert guided_steps(guide, self.TEN[4:]) == [3, 5]
        guide.fast_shift(noise(1, *SHAPE).float(), guide.schedule.level(self.TEN[7]))
        record = guide.record
        assert record.steps == [3]
        assert record.total_steps == 6

    def test_heuns_inner_calls_belong_to_the_step_whose_level_they_are_at(self, encoders):
        guide = a_guide(encoders, levels=self.TEN, every=2)
        calls = [s for pair in pairwise(self.TEN) for s in pair]
        assert [guide.wants(s) for s in calls] == [self.TEN.index(s) % 2 == 0 for s in calls]

    def test_calls_between_two_levels_belong_to_the_step_they_are_in(self, encoders):
        guide = a_guide(encoders, levels=self.TEN, every=2)
        assert [guide.wants(s) for s in (10.0, 9.5, 9.0, 8.5, 8.0, 7.5, 0.4)] == [True, True, False, False, True, True, False]


def sample(guide, denoise, x):
    """Euler in VE coordinates. Returns the latents, noisy to clean."""
    schedule, latents = guide.schedule, [x]
    for s in schedule.levels:
        level = schedule.level(s)
        if guide.gradient == "exact" and guide.wants(s):
            leaf = x.detach().requires_grad_()
            denoised = denoise(leaf, s)
            denoised = denoised.detach() + guide.exact_shift(denoised, leaf, level)
        else:
            denoised = denoise(x, s)
            if guide.wants(s):
                denoised = denoised + guide.fast_shift(denoised, level)
        x = x + (x - denoised) / s * (level.s_next - s)
        latents.append(x)
    return latents


class TestSampling:
    LEVELS = torch.logspace(math.log10(14.6), math.log10(0.03), 12).tolist()

    @staticmethod
    def data(x, s):
        """The best denoiser of data with mean 0 and variance 1."""
        return x / (1 + s**2)

    def r_at_the_end(self, encoders, **settings):
        guide = a_guide(encoders, levels=self.LEVELS, **settings)
        final = sample(guide, self.data, self.LEVELS[0] * noise(8, *SHAPE, seed=5).float())[-1]
        with torch.no_grad():
            return r_of(Decoder()(final), encoders, targets_of(encoders)), guide.record

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_r_falls_and_more_with_more_strength(self, encoders, gradient):
        ends = [self.r_at_the_end(encoders, gradient=gradient, m=m, limit=0.05)[0] for m in (0.0, 0.01, 0.03, 0.1, 0.3)]
        for weaker, stronger in pairwise(ends):
            assert stronger.mean() < weaker.mean() - 0.01
        assert (ends[-1] < ends[0]).all()

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_r_falls_along_the_steps(self, encoders, gradient):
        _, record = self.r_at_the_end(encoders, gradient=gradient, m=0.3)
        r = 1 - record.similarities.mean(1).mean(1)
        assert record.steps == list(range(12))
        assert r[-1] < r[6] < r[0]

    def test_once_the_limit_bites_at_every_step_more_strength_changes_nothing(self, encoders):
        (strong, record), (stronger, record_of_stronger) = (self.r_at_the_end(encoders, m=m, limit=0.01) for m in (1e4, 1e5))
        assert record.bites == record_of_stronger.bites == 12 * 8
        torch.testing.assert_close(strong, stronger, rtol=1e-4, atol=1e-4)
        assert strong.mean() < self.r_at_the_end(encoders, m=0.0)[0].mean()

    def test_every_other_step_leaves_the_steps_between_alone(self, encoders):
        start = self.LEVELS[0] * noise(1, *SHAPE, seed=5).float()
        guide = a_guide(encoders, levels=self.LEVELS, every=2)
        latents = sample(guide, self.data, start)
        for i, (x, after) in enumerate(pairwise(latents)):
            s, s_next = self.LEVELS[i], [*self.LEVELS, 0.0][i + 1]
            plain = x + (x - self.data(x, s)) / s * (s_next - s)
            assert torch.equal(after, plain) == (i % 2 == 1)
        assert guide.record.steps == list(range(0, 12, 2))

    def test_with_m_zero_nothing_is_changed(self, encoders):
        start = self.LEVELS[0] * noise(1, *SHAPE, seed=5).float()
        latents = sample(a_guide(encoders, levels=self.LEVELS, m=0.0), self.data, start)
        plain = sample(a_guide(encoders, levels=self.LEVELS, start=1.0), self.data, start)
        assert all(torch.equal(a, b) for a, b in zip(latents, plain))


def failing(error):
    def decode(latent):
        raise error

    return decode


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:83] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    MemoryError(),
]


class TestMemory:
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:12])
    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_when_memory_runs_out_the_next_decoder_takes_over_and_says_so(self, encoders, error, gradient):
        large, small = VaeDecoder(failing(error), name="vae"), VaeDecoder(Decoder(), name="vae-small")
        guide, expected = a_guide(encoders, decoders=[large, small], gradient=gradient), a_guide(encoders, gradient=gradient)

        def shift(guide):
            leaf = noise(2, *SHAPE).float().requires_grad_()
            return guide.fast_shift(leaf.detach(), LEVEL) if gradient == "fast" else guide.exact_shift(denoiser(leaf), leaf, LEVEL)

        for _ in range(2):
            torch.testing.assert_close(shift(guide), shift(expected))
        assert guide.decoder is small
        (note,) = guide.record.notes
        assert "vae: it goes on with vae-small" in note

    def test_after_the_last_decoder_the_picture_is_finished_without_guidance(self, encoders):
        guide = a_guide(encoders, decoders=[VaeDecoder(failing(OUT_OF_MEMORY[0]), name=name) for name in ("vae", "vae-small")])
        assert guide.wants(LEVELS[0])
        denoised = noise(2, *SHAPE).float()
        assert torch.equal(guide.fast_shift(denoised, LEVEL), torch.zeros_like(denoised))
        leaf = denoised.clone().requires_grad_()
        assert torch.equal(guide.exact_shift(leaf * 2, leaf, LEVEL), torch.zeros_like(denoised))
        assert not any(guide.wants(s) for s in LEVELS)
        record = guide.record
        assert record.steps == []
        assert record.similarities.shape == (0, 3, 0)
        assert "without it" in record.notes[-1]
        assert len(record.notes) == 2

    def test_any_other_error_is_not_hidden(self, encoders):
        guide = a_guide(encoders, decoders=[VaeDecoder(failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))])
        with pytest.raises(RuntimeError, match="mat1"):
            guide.fast_shift(noise(1, *SHAPE).float(), LEVEL)

    def test_without_memory_for_the_way_through_the_denoiser_the_fast_gradient_takes_over(self, encoders):
        class NoWayBack(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        guide = a_guide(encoders, gradient="exact")
        leaf = noise(1, *SHAPE).float().requires_grad_()
        shift = guide.exact_shift(NoWayBack.apply(leaf), leaf, LEVEL)
        torch.testing.assert_close(shift, a_guide(encoders).fast_shift(leaf.detach(), LEVEL))
        assert guide.gradient == "fast"
        assert "memory ran out" in guide.record.notes[0]

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Trying to backward through comfy_kitchen.apply_rope.default but no autograd formula was registered."),
            NotImplementedError("derivative for aten::_fused is not implemented"),
        ],
        ids=["a kernel of another library", "a kernel of torch"],
    )
    def test_a_kernel_without_a_backward_pass_gets_the_fast_gradient(self, encoders, error):
        class NoWayBack(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise error

        guide = a_guide(encoders, gradient="exact")
        leaf = noise(1, *SHAPE).float().requires_grad_()
        shift = guide.exact_shift(NoWayBack.apply(leaf), leaf, LEVEL)
        torch.testing.assert_close(shift, a_guide(encoders).fast_shift(leaf.detach(), LEVEL))
        assert guide.record.notes == ["The exact gradient was given up for the fast one: a part of the denoiser has no backward pass."]

    def test_a_host_whose_denoiser_gives_no_graph_gets_the_fast_gradient(self, encoders):
        guide = a_guide(encoders, gradient="exact")
        denoised = noise(1, *SHAPE).float()
        shift = guide.exact_shift(denoised, denoised.clone().requires_grad_(), LEVEL)
        torch.testing.assert_close(shift, a_guide(encoders).fast_shift(denoised, LEVEL))
        assert guide.gradient == "fast"

    def test_the_exact_gradient_is_given_up_once_and_the_reason_is_told(self, encoders):
        guide = a_guide(encoders, gradient="exact")
        assert guide.gradient == "exact"
        guide.abandon_exact("its weights are quantised")
        guide.abandon_exact("its weights are quantised")
        assert guide.gradient == "fast"
        assert guide.record.notes == ["The exact gradient was given up for the fast one: its weights are quantised."]

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_nothing_keeps_a_graph_after_the_shift_is_returned(self, encoders, gradient):
        decoded = []

        def decode(latent):
            pictures = Decoder()(latent)
            decoded.append(weakref.ref(pictures))
            return pictures

        guide = a_guide(encoders, decoders=[VaeDecoder(decode)], gradient=gradient)
        leaf = noise(1, *SHAPE).float().requires_grad_()
        gc.disable()
        try:
            shift = guide.fast_shift(leaf.detach(), LEVEL) if gradient == "fast" else guide.exact_shift(denoiser(leaf), leaf, LEVEL)
            assert [ref() for ref in decoded] == [None]
        finally:
            gc.enable()
        assert shift.grad_fn is None
        assert not guide.record.similarities.requires_grad

    def test_a_failed_decoding_does_not_hold_on_to_its_memory_while_the_next_decodes(self, encoders):
        large_ones = []

        def large(latent):
            large_ones.append(weakref.ref(hidden := latent.repeat_interleave(4, -1)))
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory ({hidden.shape}).")

        def small(latent):
            assert [ref() for ref in large_ones] == [None]
            return Decoder()(latent)

        gc.disable()
        try:
            a_guide(encoders, decoders=[VaeDecoder(large), VaeDecoder(small)]).fast_shift(noise(1, *SHAPE).float(), LEVEL)
        finally:
            gc.enable()
        assert large_ones


class TestHosts:
    @pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
    def test_a_host_without_gradients_gets_the_same_shift(self, encoders, under):
        expected = a_guide(encoders, limit=0.05).fast_shift(noise(2, *SHAPE).float(), LEVEL)
        with under():
            # As on Forge, everything that the host makes is an inference tensor.
            decoder = private_copy(Decoder(), torch.float32, "cpu")
            targets = targets_of(encoders)
            targets = Targets(targets.content_clip.clone(), targets.style_clip.clone(), targets.style_dino.clone())
            guide = a_guide(encoders, decoders=[VaeDecoder(decoder)], targets=targets, limit=0.05)
            denoised, mask = noise(2, *SHAPE).float(), torch.ones(1, 1, *SHAPE[1:])
            shift = guide.fast_shift(denoised, LEVEL, mask)
            denoised += shift
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(shift, expected)

    def test_a_host_can_differentiate_inside_its_own_inference_mode(self, encoders):
        leaf = noise(2, *SHAPE).float().requires_grad_()
        expected = a_guide(encoders).exact_shift(denoiser(leaf), leaf, LEVEL)
        with torch.inference_mode():
            x = noise(2, *SHAPE).float()
            guide = a_guide(encoders, decoders=[VaeDecoder(private_copy(Decoder(), torch.float32, "cpu"))])
            with torch.inference_mode(False), torch.enable_grad():
                leaf = x.clone().requires_grad_()
                denoised = denoiser(leaf)
            shift = guide.exact_shift(denoised, leaf, LEVEL)
        torch.testing.assert_close(shift, expected)

    def test_the_hosts_autocast_does_not_reach_the_score(self, encoders):
        seen = []

        def decode(latent):
            pictures = Decoder()(latent)
            seen.append(pictures.dtype)
            return pictures

        denoised = noise(1, *SHAPE).float()
        expected = a_guide(encoders).fast_shift(denoised, LEVEL)
        guide = a_guide(encoders, decoders=[VaeDecoder(decode)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shift = guide.fast_shift(denoised, LEVEL)
        assert seen == [torch.float32]
        torch.testing.assert_close(shift, expected)

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_a_guided_step_never_waits_for_the_device(self, encoders, gradient):
        class Watching(TorchDispatchMode):
            waiting: tuple[str, ...] = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                assert name not in self.waiting, f"{name} waits for the device"
                return function(*args, **(kwargs or {}))

        guide = a_guide(encoders, gradient=gradient, limit=0.05)
        leaf, mask = noise(2, *SHAPE).float().requires_grad_(), torch.ones(1, 1, *SHAPE[1:])

        def step():
            level = guide.schedule.level(3.0)
            assert guide.wants(3.0)
            if gradient == "fast":
                return guide.fast_shift(leaf.detach(), level, mask)
            return guide.exact_shift(denoiser(leaf), leaf, level, mask=mask)

        with Watching():
            step()
        with pytest.raises(AssertionError, match="waits"), Watching():
            step().sum().item()

    def test_encoders_and_decoder_are_moved_once(self, encoders):
        moves = []

        class Moving(Encoders):
            def to(self, device):
                moves.append("encoders")
                return self

        class MovingDecoder(VaeDecoder):
            def to(self, device):
                moves.append("decoder")
                return self

        guide = a_guide(Moving(encoders.clip, encoders.dino, ""), decoders=[MovingDecoder(Decoder())])
        for _ in range(3):
            guide.fast_shift(noise(1, *SHAPE).float(), LEVEL)
        assert moves == ["encoders", "decoder"]


class TestRecord:
    def test_similarities_are_those_before_the_correction(self, encoders):
        guide, targets = a_guide(encoders), targets_of(encoders)
        first, second = noise(2, *SHAPE).float(), noise(2, *SHAPE, seed=1).float()
        guide.fast_shift(first, guide.schedule.level(LEVELS[0]))
        guide.fast_shift(second, guide.schedule.level(LEVELS[2]))
        record = guide.record
        assert record.steps == [0, 2]
        assert record.total_steps == len(LEVELS)
        with torch.no_grad():
            for denoised, similarities in zip((first, second), record.similarities):
                r = r_of(Decoder()(denoised), encoders, targets)
                torch.testing.assert_close(1 - similarities.mean(0), r)

    def test_a_second_call_of_a_step_takes_the_place_of_the_first(self, encoders):
        guide = a_guide(encoders)
        for seed, s in enumerate((LEVELS[0], LEVELS[1], LEVELS[1])):
            guide.fast_shift(noise(1, *SHAPE, seed=seed).float(), guide.schedule.level(s))
        record = guide.record
        assert record.steps == [0, 1]
        again = a_guide(encoders)
        again.fast_shift(noise(1, *SHAPE, seed=2).float(), LEVEL)
        torch.testing.assert_close(record.similarities[1], again.record.similarities[0])

    def test_there_is_no_guide_without_a_decoder(self, encoders):
        with pytest.raises(ValueError, match="decoder"):
            Guide(FuseSettings(guidance=True), targets_of(encoders), encoders, [], Schedule("vp", LEVELS))
