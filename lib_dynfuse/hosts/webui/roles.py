"""What differs between the WebUIs, by who asks for it. Their modules (a1111, forge, neo, ldm_forge) have a class for each role, and a Roles
for each WebUI.

a pass           Denoisers: the model that is fused, its weights, the rows of its calls
its sampling     Samplers: what a denoiser call's numbers mean, and what guidance needs of VAE and autograd
the text parts   TextEncoders
a reference      Checkpoints
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...fusion import FusionError, Rows
from ...guidance.correction import Kind
from ...guidance.decode import ZeroToOne
from .capabilities import Seam, Value
from .references import BaseIdentity, file_identity
from .text_parts import TextParts

# (the model call's first argument, its keyword arguments) -> the call's rows; kept for the calls of one denoiser step.
RowLayout = Callable[[Tensor, Mapping[str, Any]], Rows]


class Denoisers(ABC):
    """What a pass asks about the denoiser. cfg_denoiser: the CFGDenoiser whose forward is being called."""

    @abstractmethod
    def denoiser(self, cfg_denoiser: Any) -> nn.Module:
        """The diffusion model that the next model calls go to. Raises FusionError where its layers would not be run."""

    def loaded(self) -> nn.Module | None:
        """The diffusion model of the checkpoint that is loaded now; None where there is none yet. Never loads one."""
        return None

    @abstractmethod
    def identity(self, cfg_denoiser: Any) -> object:
        """Changes when the denoiser or the checkpoint in it changes."""

    @abstractmethod
    def merged_loras(self, cfg_denoiser: Any) -> object:
        """Changes when other LoRAs are merged into the denoiser: kinds that depend on its weights are then made anew."""

    @abstractmethod
    def weight_of(self, layer: nn.Module) -> Tensor:
        """A layer's weight as the model computes with it, dequantised: other LoRAs merged, ours not."""

    @abstractmethod
    def own_weight(self, layer: nn.Module) -> Tensor | None:
        """The tensor that the layer's forward will compute with as it is, other LoRAs merged: ours may stand in its place for that forward.
        None where the forward adds to it, or may write to it.
        """

    @abstractmethod
    def row_layout(self, cfg_denoiser: Any, cond: Any) -> RowLayout:
        """How the rows of the model calls of one step are ordered. cond: the step's positive conditioning."""

    def adjusted_rows(self, arguments: dict[str, Any], positions: tuple[int, ...], batch: int) -> dict[str, Any] | None:
        """See fusion.batches.Adjust. arguments: of a call of the diffusion model. positions: of conditional rows."""
        return arguments

    def model_calls(self, around: Callable[..., Any]) -> AbstractContextManager[None]:
        """Inside, around(original, ...) makes all model calls of a step, and may make them again; where the WebUI has no such place,
        around is never called.
        """
        return nullcontext()

    def scale_of_calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The CFG scale in the arguments of the function that model_calls wraps; None where it is not among them."""
        return kwargs.get("cond_scale")

    def reserve(self, p: Any, elements: int, bytes_: int) -> None:
        """Tell the host what will come beside the model, where it keeps account: so many numbers of the denoiser's type, and bytes."""
        return


class Samplers(ABC):
    """What the sampling of a pass is made of. Everything of one call is put into one value: see facts.Sampling."""

    @abstractmethod
    def noise_levels(self, cfg_denoiser: Any, values: Tensor) -> Tensor:
        """What the sampler hands the denoiser as sigma -> sigma in VE units, or the flow time."""

    @abstractmethod
    def works_on_eps(self, cfg_denoiser: Any) -> bool:
        """Whether x is VP-scaled, and the prediction the noise (DDIM, PLMS, UniPC); else x is VE or flow, and the prediction D."""

    def denoised(self, cfg_denoiser: Any, x: Tensor, s: float, prediction: Tensor) -> Tensor:
        """D of the call that has just returned its prediction. x: its argument."""
        if not self.works_on_eps(cfg_denoiser):
            return prediction
        return x * (1.0 + s**2) ** 0.5 - s * prediction

    def cfg_scale(self, cfg_denoiser: Any, sigma: Tensor, scale: float, s_min_uncond: float) -> float:
        """What the call combines its rows with, as far as its arguments tell; see Denoisers.scale_of_calls."""
        return scale

    def kind(self, cfg_denoiser: Any) -> Kind:
        """Of the model's noise levels."""
        return "vp"

    def rectified_ancestral(self, cfg_denoiser: Any) -> bool:
        """Whether ancestral samplers take the form for rectified flows."""
        return False

    @abstractmethod
    def vae(self, cfg_denoiser: Any) -> HostVae:
        """The VAE that decodes this model's latents. Raises NotGuidable."""

    def taesd_decoder(self, cfg_denoiser: Any) -> nn.Module | None:
        """Latent -> picture in [-1, 1]; None if the WebUI has none for this model. May raise whatever looking for it raises."""
        from modules import sd_vae_taesd

        decoder = sd_vae_taesd.decoder_model()
        return ZeroToOne(decoder) if decoder is not None else None

    def attention(self) -> Callable[..., Tensor] | None:
        """By which the denoiser computes attention, where the WebUI has one function for all: (q, k, v, heads), each (B, tokens, width)."""
        return None

    @abstractmethod
    def differentiable(self, cfg_denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Inside, CFGDenoiser.forward called with the (args, kwargs) that it yields has a graph to its x. Restores everything."""


class TextEncoders(ABC):
    """The host's text encoders."""

    @abstractmethod
    def add(self, text: TextParts) -> list[str]:
        """Merge the parts by the host's own means, beside the LoRAs that it merges. Returns the layers that this model does not have."""

    @abstractmethod
    def remove(self) -> None:
        """Take out whatever add has put in, at any time, also of a job that died."""

    def take_leftovers_back(self, of_others: bool) -> None:
        """Before a pass: take out what the host will not, of the parts' layers. of_others: whatever LoRA is in whichever layer."""
        return

    def aside(self) -> AbstractContextManager[None]:
        """Inside, the denoiser is run, which the parts do not concern."""
        return nullcontext()


class Checkpoints:
    """What a reference depends on beside the LoRAs."""

    def arguments(self, p: Any) -> dict[str, Any]:
        """Arguments of a reference's job, StableDiffusionProcessingTxt2Img, that only this WebUI has."""
        return {}

    def prepare(self, job: Any) -> None:
        """Give a reference's job what this WebUI asks of it beside its arguments."""

    def identity(self, p: Any) -> BaseIdentity:
        """What tells the checkpoint and the VAE apart from others."""
        from modules import sd_vae, shared

        info = shared.sd_model.sd_checkpoint_info
        vae = getattr(sd_vae, "loaded_vae_file", None)
        return BaseIdentity(getattr(info, "sha256", None) or file_identity(info.filename), file_identity(vae))


class NotGuidable(RuntimeError):
    """Pictures of this model cannot be guided in this WebUI. One sentence; the job goes on."""


@dataclass(frozen=True)
class HostVae:
    """A WebUI's VAE. decoder: from the VAE's own units to pictures in [-1, 1]. scale, shift, packing: from the model's latents to those
    units (guidance.decode.VaeDecoder). identity: changes with the VAE.
    """

    decoder: nn.Module
    scale: float | Tensor
    shift: float | Tensor
    dtype: torch.dtype
    identity: object
    packing: int = 1


@dataclass(frozen=True)
class Roles:
    """One WebUI.

    needs: what it must have, and can be looked up before a model is loaded. barred: modules of WebUIs that look like it and are not.
    schedules: where its samplers find their noise levels, beside A1111's two places.
    """

    name: str
    denoisers: Denoisers
    samplers: Samplers
    text_encoders: TextEncoders
    checkpoints: Checkpoints
    needs: tuple[Value, ...] = ()
    barred: tuple[str, ...] = ()
    schedules: tuple[Seam, ...] = ()


def refuse_replaced_denoiser() -> None:
    """Raises FusionError where another program (TensorRT) computes in place of the model's layers."""
    try:
        from modules import sd_unet
    except ImportError:
        return  # a WebUI without the choice
    if getattr(sd_unet, "current_unet", None) is not None:
        raise FusionError("DynFuse works on the model's own layers; set 'SD Unet' to None in the settings.")


__all__ = [
    "Checkpoints",
    "Denoisers",
    "HostVae",
    "NotGuidable",
    "Roles",
    "RowLayout",
    "Samplers",
    "TextEncoders",
    "refuse_replaced_denoiser",
]
