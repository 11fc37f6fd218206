"""The LoRAs' text-encoder parts in a pipeline: summed, on the encoders only while a prompt is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...fusion import FusionError
from ...fusion.layer_sum import LayerSum, Summand
from ...lora import LoraFile, text_strengths
from ...lora.matching import SiteBranch
from ...lora.naming import Site, flat
from ...settings import FuseSettings
from ..wrapping import wrapped


class SummedTextParts:
    """All LoRAs' text-encoder parts, added up on the encoders while a prompt is encoded.

    dW = te_weight * (subject_weight * dW_subject + style_weight * dW_style), with a term for every LoRA of a side; the paper chooses only
    inside the denoiser. Strengths: see text_strengths. layers: what is put on the encoders. notes: sentences about
    parts that fit no encoder.
    """

    def __init__(self, encoders: dict[str, nn.Module], subjects: Sequence[LoraFile], styles: Sequence[LoraFile], settings: FuseSettings):
        """encoders: by their names in LoraFile.text. Raises FusionError for a part that was made for another encoder."""
        self.notes: list[str] = []
        found: dict[tuple[str, str], list[tuple[SiteBranch, float]]] = {}
        for file, strengths in zip((*subjects, *styles), text_strengths(settings, subjects, styles)):
            unmatched: list[str] = []
            for encoder, branches in file.text.items():
                if not strengths[encoder]:
                    continue
                layers = _layers_by_flat_name(encoders[encoder]) if encoder in encoders else {}
                for name, branch in branches.items():
                    if name not in layers:
                        unmatched.append(f"{encoder} {name}")
                        continue
                    fitted = _fitted(SiteBranch(branch, name=name, file=file.path.name), encoders[encoder], layers[name])
                    found.setdefault((encoder, layers[name]), []).append((fitted, strengths[encoder]))
            if unmatched:
                self.notes.append(
                    f"{len(unmatched)} text-encoder layers of {file.name} fit no text encoder of this model (such as {unmatched[0]})."
                )
        summands = [Summand(name, encoders[encoder].get_submodule(name), parts) for (encoder, name), parts in found.items()]
        self._sum = LayerSum(summands, _weight_of)
        self.layers = self._sum.layers

    @contextmanager
    def during_encoding(self, pipeline: Any) -> Iterator[None]:
        """Attach around the pipeline's encode_prompt, for as long as the with-block lasts."""

        def around(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._sum.attached():
                return encode(*args, **kwargs)

        with wrapped(pipeline, "encode_prompt", around):
            yield


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders under their names in LoraFile.text."""
    second = "t5" if getattr(pipeline, "transformer", None) is not None else "te2"
    encoders = {"te1": getattr(pipeline, "text_encoder", None), second: getattr(pipeline, "text_encoder_2", None)}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def _layers_by_flat_name(encoder: nn.Module) -> dict[str, str]:
    """Flat name -> dotted name of an encoder's layers."""
    names = [name for name, module in encoder.named_modules() if getattr(module, "weight", None) is not None]
    found = {flat(name): name for name in names}
    # transformers 5 has no "text_model" between CLIPTextModel and its layers; files keep it in their names.
    return {**{f"text_model_{flat_name}": name for flat_name, name in found.items()}, **found}


def _fitted(branch: SiteBranch, encoder: nn.Module, layer: str) -> SiteBranch:
    try:
        return branch.fitted(Site(layer), tuple(encoder.get_submodule(layer).weight.shape))
    except ValueError as error:
        raise FusionError(str(error)) from None


def _weight_of(module: nn.Module) -> Tensor:
    return module.weight


__all__ = ["SummedTextParts", "text_encoders"]
