"""Forge Neo's latent spaces: what the guidance decodes is what the WebUI's own decoding is given (float64)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib_dynfuse.guidance.decode import VaeDecoder
from lib_dynfuse.hosts.webui.guided import Decoders, GuidedPass
from lib_dynfuse.hosts.webui.neo import NeoSamplers, latent_space
from lib_dynfuse.settings import FuseSettings


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wan(channels: int = 6) -> SimpleNamespace:
    """As huggingface_guess/latent.py, Wan21."""
    shape = (1, channels, 1, 1, 1)
    latent = SimpleNamespace(
        scale_factor=1.0, latents_mean=numbers(*shape, seed=1).float(), latents_std=numbers(*shape, seed=2).exp().float()
    )
    return SimpleNamespace(latent_format=latent, conv2=nn.Conv3d(channels, channels, 1), decoder=nn.Conv3d(channels, 3, 1))


def flux2(*, mugen: bool) -> SimpleNamespace:
    """As backend/nn/vae.py, AutoencoderKLFlux2, with three channels for 32."""
    bn = nn.BatchNorm2d(12, eps=1e-4, affine=False)
    bn.running_mean.copy_(numbers(12, seed=1))
    bn.running_var.copy_(numbers(12, seed=2).exp())
    return SimpleNamespace(
        bn=bn, bn_eps=1e-4, ps=[2, 2], mugen=mugen, latent_format=SimpleNamespace(scale_factor=1.0), post_quant_conv=None,
        decoder=nn.Conv2d(3, 3, 1),
    )  # fmt: skip


def own_units(vae: SimpleNamespace, latent: torch.Tensor) -> torch.Tensor:
    """The WebUI's process_out, and the first half of its decode, written out."""
    if hasattr(vae, "bn"):
        batch, channels, height, width = latent.shape
        if vae.mugen:
            latent = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
            latent = latent.reshape(batch, channels * 4, height // 2, width // 2)
        spread = (vae.bn.running_var.double() + vae.bn_eps).sqrt()
        latent = latent * spread.view(1, -1, 1, 1) + vae.bn.running_mean.double().view(1, -1, 1, 1)
        batch, packed, height, width = latent.shape
        latent = latent.reshape(batch, packed // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return latent.reshape(batch, packed // 4, height * 2, width * 2)
    form = vae.latent_format
    if hasattr(form, "latents_mean"):
        return (latent * form.latents_std.double() / form.scale_factor + form.latents_mean.double())[:, :, 0]
    return latent / form.scale_factor + getattr(form, "shift_factor", 0.0)


@pytest.mark.parametrize(
    ("vae", "shape"),
    [
        (wan(), (2, 6, 1, 4, 6)),
        (flux2(mugen=False), (2, 12, 4, 6)),
        (flux2(mugen=True), (2, 3, 4, 6)),
        (SimpleNamespace(latent_format=SimpleNamespace(scale_factor=0.3611, shift_factor=0.1159)), (2, 16, 4, 4)),
        (SimpleNamespace(latent_format=SimpleNamespace(scale_factor=0.18215)), (2, 4, 4, 4)),
    ],
    ids=["Wan, Qwen-Image", "Flux.2", "Mugen", "Flux", "SD 1.5"],
)
def test_the_latent_is_brought_to_the_units_of_the_vae(vae, shape):
    scale, shift, packing = latent_space(vae)
    seen = VaeDecoder(nn.Identity(), scale=scale, shift=shift, packing=packing, dtype=torch.float64)(numbers(*shape))
    torch.testing.assert_close(seen, own_units(vae, numbers(*shape)), rtol=1e-6, atol=1e-6)


def test_an_earlier_neo_has_the_numbers_on_the_vae():
    assert latent_space(SimpleNamespace(scaling_factor=0.13025, shift_factor=None)) == (0.13025, 0.0, 1)


@pytest.mark.parametrize("vae", [wan(), flux2(mugen=False), flux2(mugen=True)], ids=["Wan, Qwen-Image", "Flux.2", "Mugen"])
def test_a_gradient_comes_back_to_the_latent(vae, monkeypatch):
    monkeypatch.setattr("lib_dynfuse.hosts.webui.neo.engine_of", lambda denoiser: denoiser)
    patcher = SimpleNamespace(first_stage_model=vae, vae_dtype=torch.float32)
    own = NeoSamplers().vae(SimpleNamespace(forge_objects=SimpleNamespace(vae=patcher)))
    decoder = VaeDecoder(own.decoder, scale=own.scale, shift=own.shift, packing=own.packing)
    shape = {6: (1, 6, 1, 4, 4), 12: (1, 12, 4, 4), 3: (1, 3, 4, 4)}[
        vae.conv2.in_channels if hasattr(vae, "conv2") else 3 if vae.mugen else 12
    ]
    latent = numbers(*shape).float().requires_grad_()
    pictures = decoder(latent)
    assert pictures.shape[:2] == (1, 3)
    (gradient,) = torch.autograd.grad(pictures.square().sum(), latent)
    assert gradient.shape == latent.shape
    assert (gradient != 0).all()


def test_a_video_is_made_without_guidance_and_says_so():
    def vae(denoiser):
        raise AssertionError("nothing is decoded")

    guided = GuidedPass(SimpleNamespace(vae=vae), FuseSettings(method="dynfuse", guidance=True), SimpleNamespace(), [], Decoders())
    facts = SimpleNamespace(latent=numbers(1, 6, 3, 4, 4), schedule=object())
    assert guided.denoise(facts, None, lambda x: x + 1, (1,), {}, lambda: None) == 2
    assert guided.notes == ["The picture was not guided: it is a video, of which the references are single pictures."]
