"""What guidance asks of Forge's side, on a fake of it."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from lib_dynfuse.guidance.decode import private_copy
from lib_dynfuse.hosts.webui.forge import ForgeCheckpoints, ForgeDenoisers, ForgeSamplers
from tests.fakes import forge as fakes
from tests.fakes.forge import FakeForge
from tests.fakes.webui import SCALE, Conditioning, Processing, decoder


@pytest.fixture
def webui(loras):
    with FakeForge(loras) as running:
        yield running


@pytest.fixture
def denoiser(webui):
    """A CFGDenoiser in the middle of a sampling."""
    return cfg_denoiser(webui, Processing("a cat"))


def cfg_denoiser(webui, p):
    sampler = types.SimpleNamespace(last_latent=None)
    return webui.modules["modules.sd_samplers_cfg_denoiser"].CFGDenoiser(webui, sampler, p)


def arguments(webui, images=2):
    """Of CFGDenoiser.forward, as a sampler makes them: inference tensors."""
    with torch.inference_mode():
        cond = webui.encode(["a cat"])[0]
        x = torch.randn(images, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        more = {"uncond": [cond * 0] * images, "cond": Conditioning([[cond]] * images), "cond_scale": 5.0, "s_min_uncond": 0}
        return (x, torch.full((images,), 2.0)), more | {"image_cond": None}


def forward(denoiser, args, kwargs):
    denoiser.step = 0
    return type(denoiser).forward(denoiser, *args, **kwargs)


class TestDifferentiable:
    def gradient(self, denoiser, args, kwargs, weights):
        with torch.inference_mode(), ForgeSamplers().differentiable(denoiser, args, kwargs) as (given, more):
            x = given[0] if given else more["x"]
            assert x.is_leaf
            (gradient,) = torch.autograd.grad((forward(denoiser, given, more) * weights).sum(), x)
        return gradient, x

    def test_the_gradient_is_that_of_the_same_model_in_float64(self, webui, denoiser):
        args, kwargs = arguments(webui)
        weights = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        gradient, _ = self.gradient(denoiser, args, kwargs, weights)
        unet = private_copy(webui.shared.sd_model.forge_objects.unet.model.diffusion_model, torch.float64, "cpu")
        x = torch.tensor(args[0].tolist(), dtype=torch.float64).requires_grad_()
        cond = torch.tensor(kwargs["cond"].batch[0][0].tolist(), dtype=torch.float64)
        times = torch.full((2,), 2.0, dtype=torch.float64)
        parts = [x - unet(x, times, context=torch.stack([c, c])) for c in (cond, cond * 0)]
        (expected,) = torch.autograd.grad(((parts[1] + 5.0 * (parts[0] - parts[1])) * weights).sum(), x)
        assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def test_x_may_be_given_by_name(self, webui, denoiser):
        args, kwargs = arguments(webui)
        by_position, _ = self.gradient(denoiser, args, kwargs, 1.0)
        by_name, _ = self.gradient(denoiser, (), {"x": args[0], "sigma": args[1], **kwargs}, 1.0)
        assert torch.equal(by_position, by_name)

    def test_the_samplers_own_x_is_not_touched(self, webui, denoiser):
        args, kwargs = arguments(webui)
        _, leaf = self.gradient(denoiser, args, kwargs, 1.0)
        assert args[0].is_inference()
        assert leaf.data_ptr() != args[0].data_ptr()
        assert not leaf.requires_grad

    def test_without_unconditional_rows_and_with_short_memory(self, webui, denoiser):
        args, kwargs = arguments(webui)
        together, _ = self.gradient(denoiser, args, kwargs, 1.0)
        webui.memory_is_short = True
        apart, _ = self.gradient(denoiser, args, kwargs, 1.0)
        assert torch.allclose(together, apart, atol=1e-5)
        alone, _ = self.gradient(denoiser, args, kwargs | {"cond_scale": 1.0}, 1.0)
        assert alone.abs().max() > 0

    def test_what_forge_keeps_of_the_step_has_no_graph(self, webui, denoiser):
        self.gradient(denoiser, *arguments(webui), 1.0)
        assert not denoiser.sampler.last_latent.requires_grad
        assert not webui.state.current_latent.requires_grad
        assert webui.state.preview.shape == (2, 4, 4, 4)

    @pytest.mark.parametrize("error", [RuntimeError("as wanted"), KeyboardInterrupt()])
    def test_an_exception_leaves_nothing(self, webui, denoiser, error):
        common = webui.modules["modules.sd_samplers_common"]
        before = common.store_latent
        args, kwargs = arguments(webui)
        raised = False
        with torch.inference_mode():
            try:
                with ForgeSamplers().differentiable(denoiser, args, kwargs) as (given, more):
                    forward(denoiser, given, more)
                    raise error
            except type(error):
                raised = True
            assert torch.is_inference_mode_enabled()
        assert raised
        assert common.store_latent == before
        assert not denoiser.sampler.last_latent.requires_grad
        unet = webui.shared.sd_model.forge_objects.unet.model
        assert not any("forward" in vars(module) or module._forward_hooks for module in unet.modules())
        assert all(parameter.is_inference() and parameter.grad is None for parameter in unet.parameters())

    def test_loras_that_forge_applies_on_the_fly(self, webui, denoiser):
        """backend/operations.py:13: they are merged into a copy of the weight in every call, under inference mode."""
        args, kwargs = arguments(webui)
        linear = webui.shared.sd_model.forge_objects.unet.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
        with torch.inference_mode():
            change = 0.1 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(2))

        @torch.inference_mode()
        def merged(weight):
            weight = weight.clone()
            weight += change
            return weight

        plain = linear.weight
        with torch.inference_mode():
            linear.weight = nn.Parameter(merged(plain), requires_grad=False)
            expected, _ = self.gradient(denoiser, args, kwargs, 1.0)
            linear.weight = plain
            linear.forward = lambda x: nn.functional.linear(x, merged(linear.weight), linear.bias)
            online, _ = self.gradient(denoiser, args, kwargs, 1.0)
        assert torch.equal(online, expected)


class TestModel:
    @pytest.mark.parametrize(
        ("predictor", "kind", "rectified"),
        [("Prediction", "vp", False), ("PredictionDiscreteFlow", "flow", False), ("PredictionFlux", "flow", True)],
    )
    def test_its_kind_is_told_by_what_it_predicts(self, webui, denoiser, predictor, kind, rectified):
        webui.shared.sd_model = webui.checkpoint("another", seed=1, predictor=getattr(fakes, predictor))
        samplers = ForgeSamplers()
        assert samplers.kind(denoiser) == kind
        assert samplers.rectified_ancestral(denoiser) == rectified

    def test_the_vaes_decoder_can_be_copied_and_decodes_as_it_does(self, webui, denoiser):
        model = webui.shared.sd_model.forge_objects.vae.first_stage_model
        with torch.inference_mode():
            model.post_quant_conv = nn.Conv2d(4, 4, 1)
            z = torch.randn(1, 4, 4, 4)
            expected = model.decoder(model.post_quant_conv(z))
            vae = ForgeSamplers().vae(denoiser)
            copied = private_copy(vae.decoder, torch.float32, "cpu")
        assert torch.allclose(copied(z.clone()), expected, atol=1e-6)
        assert not any(parameter.is_inference() for parameter in copied.parameters())
        assert (vae.scale, vae.shift, vae.dtype) == (SCALE, 0.0, torch.float32)
        assert vae.identity == ForgeSamplers().vae(denoiser).identity

    def test_another_checkpoint_has_another_vae(self, webui, denoiser):
        first = ForgeSamplers().vae(denoiser).identity
        kept, webui.shared.sd_model = webui.shared.sd_model, webui.checkpoint("another", seed=1)
        assert ForgeSamplers().vae(denoiser).identity != first
        assert kept is not webui.shared.sd_model

    def test_taesds_pictures_are_brought_to_the_range_of_the_vaes(self, webui, denoiser):
        network = decoder()
        webui.modules["modules.sd_vae_taesd"].decoder_model = lambda: network
        taesd = ForgeSamplers().taesd_decoder(denoiser)
        latent = torch.randn(1, 4, 4, 4)
        assert torch.equal(taesd(latent), network(latent) * 2 - 1)

    def test_the_memory_of_a_guided_step_is_reserved_beside_that_of_the_pair(self, webui):
        p = Processing("a cat", sd_model=webui.shared.sd_model)
        before = webui.shared.sd_model.forge_objects.unet
        ForgeDenoisers().reserve(p, 100, 5000)
        assert webui.shared.sd_model.forge_objects.unet.extra_preserved_memory_during_sampling == 5400
        assert before.extra_preserved_memory_during_sampling == 0

    def test_a_reference_is_made_with_the_jobs_distilled_guidance(self):
        assert ForgeCheckpoints().arguments(Processing("a cat", distilled_cfg_scale=2.5)) == {"distilled_cfg_scale": 2.5}

    def test_other_text_encoders_or_a_rounded_model_are_another_base(self, webui):
        loaded = webui.modules["modules.sd_models"].model_data.forge_loading_parameters
        p = Processing("a cat")
        first = ForgeCheckpoints().identity(p)
        loaded["additional_modules"] = ["/models/t5.safetensors"]
        second = ForgeCheckpoints().identity(p)
        loaded["unet_storage_dtype"] = torch.float8_e4m3fn
        assert len({first, second, ForgeCheckpoints().identity(p)}) == 3


class TestSamplersOnEps:
    @pytest.fixture
    def ddim(self, webui, denoiser):
        denoiser.classic_ddim_eps_estimation = True
        webui.shared.sd_model.alphas_cumprod = torch.linspace(0.99, 0.01, 1000)
        return denoiser

    def test_timesteps_become_noise_levels_as_forge_rounds_them(self, ddim):
        alphas = ddim.inner_model.inner_model.alphas_cumprod
        levels = ForgeSamplers().noise_levels(ddim, torch.tensor([0.0, 1.4, 500.6, 999.0]))
        assert torch.allclose(levels, ((1 - alphas) / alphas).sqrt()[[0, 1, 501, 999]])

    def test_d_is_read_off_the_noise(self, ddim):
        x, d, s = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), 3.0
        eps = (x - d) / s
        assert torch.allclose(ForgeSamplers().denoised(ddim, x / (1 + s**2) ** 0.5, s, eps), d, atol=1e-5)

    def test_with_a_mask_d_is_what_forge_keeps_as_the_last_latent(self, ddim):
        ddim.mask, ddim.sampler.last_latent = torch.ones(1), torch.randn(1, 4, 2, 2)
        assert ForgeSamplers().denoised(ddim, torch.zeros(1), 3.0, torch.zeros(1)) is ddim.sampler.last_latent

    def test_other_samplers_hand_out_d(self, denoiser):
        d = torch.randn(1, 4, 2, 2)
        assert ForgeSamplers().denoised(denoiser, torch.zeros(1), 3.0, d) is d
        assert torch.equal(ForgeSamplers().noise_levels(denoiser, torch.tensor([3.0])), torch.tensor([3.0]))
