"""Decoding for the encoders: the model's units, the small picture, and copies of a host's decoder that gradients go through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_dynfuse.guidance.decode import LatentDecoder, OneFrame, VaeDecoder, private_copy


class Decoder(nn.Module):
    """A VAE's decoder in small: 8 pixels per latent pixel, a buffer of numbers, one of counts, and a weight that is used twice."""

    def __init__(self, factor=8):
        super().__init__()
        self.inward, self.outward = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 1)
        self.middle_again = self.middle
        self.factor = factor

    def forward(self, latent):
        hidden = self.middle_again(torch.tanh(self.middle(self.norm(self.inward(latent)))))
        return torch.tanh(self.outward(hidden.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)))


def a_decoder(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder().eval()


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_latent_is_brought_to_the_units_of_the_vae():
    seen = []
    VaeDecoder(lambda latent: seen.append(latent) or latent, scale=0.3611, shift=0.1159)(latents(2, 16, 4, 4))
    torch.testing.assert_close(seen[0], latents(2, 16, 4, 4) / 0.3611 + 0.1159)


def test_every_channel_may_have_its_own_mean_and_spread():
    mean, std = latents(16, seed=1).double(), latents(16, seed=2).double().exp()
    seen = []
    latent = latents(2, 16, 1, 6, 4).double()
    VaeDecoder(lambda given: seen.append(given) or given, scale=1 / std, shift=mean, dtype=torch.float64)(latent)
    expected = latent[:, :, 0]
    expected = torch.stack([expected[:, c] * std[c] + mean[c] for c in range(16)], 1)
    torch.testing.assert_close(seen[0], expected)


def test_a_packed_latent_is_unpacked_after_its_statistics_and_before_it_is_reduced():
    mean, std = latents(12, seed=1).double(), latents(12, seed=2).double().exp()
    latent = latents(1, 12, 4, 4).double()
    full = torch.empty(1, 3, 8, 8, dtype=torch.float64)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                channel = c * 4 + i * 2 + j
                full[:, c, i::2, j::2] = latent[:, channel] * std[channel] + mean[channel]
    whole = VaeDecoder(nn.Identity(), scale=1 / std, shift=mean, packing=2, dtype=torch.float64)
    torch.testing.assert_close(whole(latent), full)
    small = VaeDecoder(nn.Identity(), scale=1 / std, shift=mean, packing=2, dtype=torch.float64, pixels=32)
    assert small.latent_size(8, 8) == (4, 4)
    torch.testing.assert_close(small(latent), full.reshape(1, 3, 4, 2, 4, 2).mean((3, 5)))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_statistics_may_repeat_over_the_places(height, width):
    scale, latent = latents(3, 2, 2, seed=3).exp(), latents(2, 3, height, width)
    pictures = VaeDecoder(nn.Identity(), scale=scale)(latent)
    for row in range(height):
        for column in range(width):
            torch.testing.assert_close(pictures[:, :, row, column], latent[:, :, row, column] / scale[:, row % 2, column % 2])


@pytest.mark.parametrize("stretches", [True, False])
def test_a_decoder_of_videos_makes_pictures(stretches):
    first, second = nn.Conv3d(4, 5, 1), nn.Conv3d(5, 3, (1, 3, 3), padding=(0, 1, 1))

    class Videos(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = second

        def forward(self, latent):
            frames = self.last(latent)
            return [frames] if stretches else frames

    latent = latents(2, 4, 6, 6)
    expected = second(first(latent.unsqueeze(2)))[:, :, 0]
    torch.testing.assert_close(OneFrame(first, Videos())(latent), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_vae_works_in_its_own_dtype_and_pictures_are_float32(dtype):
    seen = []
    pictures = VaeDecoder(lambda latent: seen.append(latent.dtype) or latent, dtype=dtype)(latents(1, 4, 4, 4).half())
    assert seen == [dtype]
    assert pictures.dtype == torch.float32


def test_in_full_the_latent_is_decoded_as_it_is():
    decoder = a_decoder()
    assert torch.equal(VaeDecoder(decoder)(latents(2, 4, 5, 7)), decoder(latents(2, 4, 5, 7)))


class TestSmall:
    @pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 96), (152, 104), (96, 168), (40, 300)])
    def test_the_picture_has_about_the_pixels_asked_for_and_keeps_its_aspect(self, height, width):
        small_height, small_width = VaeDecoder(nn.Identity(), pixels=256).latent_size(height, width)
        assert 64 * small_height * small_width == pytest.approx(256**2, rel=0.08)
        assert small_height / small_width == pytest.approx(height / width, rel=0.08)

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24), (1, 1), (64, 16)])
    def test_a_latent_is_never_enlarged(self, height, width):
        assert VaeDecoder(nn.Identity(), pixels=256).latent_size(height, width) == (height, width)

    def test_a_very_long_latent_keeps_at_least_a_row(self):
        assert VaeDecoder(nn.Identity(), pixels=16).latent_size(1, 1000)[0] == 1

    def test_the_latent_is_the_mean_of_the_area(self):
        latent = latents(1, 4, 64, 64)
        small = VaeDecoder(nn.Identity(), pixels=128)(latent)
        torch.testing.assert_close(small, latent.reshape(1, 4, 16, 4, 16, 4).mean((3, 5)))

    @pytest.mark.parametrize(("height", "width"), [(24, 39), (37, 24), (104, 152)])
    def test_so_it_is_where_the_sizes_do_not_divide(self, height, width):
        latent, decoder = latents(2, 4, height, width), VaeDecoder(nn.Identity(), pixels=128)
        small_height, small_width = decoder.latent_size(height, width)
        # Each pixel cut into as many parts as there are smaller pixels: then the sizes divide.
        parts = latent.double().repeat_interleave(small_height, 2).repeat_interleave(small_width, 3)
        expected = parts.reshape(2, 4, small_height, height, small_width, width).mean((3, 5))
        torch.testing.assert_close(decoder(latent), expected.float())

    def test_a_vae_of_another_factor_gives_a_picture_of_that_size(self):
        decoder = VaeDecoder(Decoder(factor=16).eval(), pixels=256, factor=16)
        assert decoder(latents(1, 4, 64, 64)).shape[-2:] == (256, 256)

    def test_its_gradient_reaches_every_latent_pixel(self):
        latent = latents(1, 4, 40, 56).requires_grad_()
        VaeDecoder(a_decoder(), pixels=64)(latent).square().sum().backward()
        assert (latent.grad != 0).all()


def test_decoders_have_the_names_of_the_setting():
    assert VaeDecoder(nn.Identity()).name == "vae"
    assert VaeDecoder(nn.Identity(), pixels=256).name == "vae-small"
    assert VaeDecoder(nn.Identity(), name="taesd").name == "taesd"
    assert isinstance(VaeDecoder(nn.Identity()), LatentDecoder)


def test_a_module_is_moved_and_a_function_is_left_alone():
    assert next(VaeDecoder(a_decoder()).to(torch.device("meta")).decode.parameters()).device.type == "meta"
    function = VaeDecoder(torch.tanh)
    assert function.to(torch.device("cpu")) is function


def test_weights_moved_under_inference_mode_still_let_gradients_through():
    decoder = VaeDecoder(a_decoder().requires_grad_(False), dtype=torch.float64)
    with torch.inference_mode():
        decoder.to(torch.float64)  # stands for another device: both make new weights
    latent = latents(1, 4, 4, 4).double().requires_grad_()
    decoder(latent).sum().backward()
    assert latent.grad.abs().sum() > 0


def host_of(kind):
    """A host's decoder: as it is made anywhere, in half precision, and as Forge makes it."""
    if kind == "inference":
        with torch.inference_mode():
            decoder = a_decoder().half()
        assert next(decoder.parameters()).is_inference()
        return decoder
    return a_decoder().to({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind])


class TestPrivateCopy:
    @pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "inference"])
    def test_it_decodes_alike_and_gradients_go_through_it(self, kind, under):
        host = host_of(kind)
        reference = a_decoder()
        reference.load_state_dict({key: value.clone() for key, value in host.state_dict().items()})
        with under():
            twin = private_copy(host, torch.float32, "cpu")
        with torch.inference_mode(False), torch.enable_grad():
            latent, same = (latents(2, 4, 4, 4).requires_grad_() for _ in range(2))
            pictures = twin(latent)
            torch.testing.assert_close(pictures, reference(same))
            torch.testing.assert_close(
                torch.autograd.grad(pictures.square().sum(), latent), torch.autograd.grad(reference(same).square().sum(), same)
            )

    @pytest.mark.parametrize("kind", ["float32", "float16", "inference"])
    def test_the_hosts_decoder_is_untouched_and_nothing_is_shared(self, kind):
        host = host_of(kind)
        with torch.inference_mode():
            before = {key: value.clone() for key, value in host.state_dict().items()}
            places = {key: (value.data_ptr(), value.dtype, value.is_inference()) for key, value in host.state_dict().items()}
        host.train()
        twin = private_copy(host, torch.float32, "cpu")
        with torch.no_grad():
            for values in (*twin.parameters(), *twin.buffers()):
                values.zero_()
        after = host.state_dict()
        assert {key: (value.data_ptr(), value.dtype, value.is_inference()) for key, value in after.items()} == places
        assert all(torch.equal(value, before[key]) for key, value in after.items())
        assert host.training

    def test_it_is_made_of_normal_tensors_without_gradient_in_the_dtype_and_place_asked_for(self):
        twin = private_copy(host_of("inference").train(), torch.bfloat16, "meta")
        assert not twin.training
        for values in (*twin.parameters(), *twin.buffers()):
            assert not values.is_inference()
            assert not values.requires_grad
            assert values.device.type == "meta"
            assert values.dtype == (torch.bfloat16 if values.is_floating_point() else torch.int64)

    def test_a_weight_that_is_used_twice_stays_one_weight(self):
        twin = private_copy(a_decoder(), torch.float32, "cpu")
        assert twin.middle is twin.middle_again

    def test_a_hosts_hooks_do_not_run_in_it(self):
        host, calls = a_decoder(), []
        host.register_forward_pre_hook(lambda *_: calls.append("before"))
        host.middle.register_forward_hook(lambda *_: calls.append("after"))
        private_copy(host, torch.float32, "cpu")(latents(1, 4, 4, 4))
        assert calls == []
        host(latents(1, 4, 4, 4))
        assert calls == ["before", "after", "after"]

    def test_a_decoder_that_accelerate_moves_about_is_copied_without_that(self):
        accelerate = pytest.importorskip("accelerate")
        host = a_decoder()
        expected = host(latents(1, 4, 4, 4))

        class Refusing(accelerate.hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                raise AssertionError("the host's hook ran")

        accelerate.hooks.add_hook_to_module(host, Refusing())
        twin = private_copy(host, torch.float32, "cpu")
        torch.testing.assert_close(twin(latents(1, 4, 4, 4)), expected)
        with pytest.raises(AssertionError, match="hook ran"):
            host(latents(1, 4, 4, 4))
