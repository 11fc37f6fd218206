"""The LoRAs' text-encoder parts in a pipeline: summed, on the encoders only while a prompt is encoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...fusion import FusionError
from ...lora import LoraFile
from ...lora.branch import Dense, LowRank
from ...lora.matching import SiteBranch
from ...lora.naming import Site, flat
from ...settings import FuseSettings
from ..sides import text_strengths
from ..wrapping import wrapped


class SummedTextParts:
    """All LoRAs' text-encoder parts, added up on the encoders while a prompt is encoded.

    dW = te_weight * (subject_weight * dW_subject + style_weight * dW_style), with a term for every LoRA of a side; the paper chooses only
    inside the denoiser. layers: what is put on the encoders. notes: sentences about parts that fit no encoder.
    """

    def __init__(self, encoders: dict[str, nn.Module], subjects: Sequence[LoraFile], styles: Sequence[LoraFile], settings: FuseSettings):
        """encoders: by their names in LoraFile.text. Raises FusionError for a part that was made for another encoder."""
        self.notes: list[str] = []
        found: dict[tuple[str, str], SummedLayer] = {}
        for file, strength in zip((*subjects, *styles), text_strengths(settings, len(subjects), len(styles))):
            unmatched: list[str] = []
            for encoder, branches in file.text.items() if strength else ():
                layers = _layers_by_flat_name(encoders[encoder]) if encoder in encoders else {}
                for name, branch in branches.items():
                    if name not in layers:
                        unmatched.append(f"{encoder} {name}")
                        continue
                    layer = layers[name]
                    module = encoders[encoder].get_submodule(layer)
                    summed = found.setdefault((encoder, layer), SummedLayer(Site(layer), module))
                    summed.add(SiteBranch(branch, name=name, file=file.path.name), strength)
            if unmatched:
                self.notes.append(
                    f"{len(unmatched)} text-encoder layers of {file.name} fit no text encoder of this model (such as {unmatched[0]})."
                )
        self.layers = list(found.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the sums on the encoders' layers; they are off again whatever happens inside."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(wrapped(layer.module, "forward", functools.partial(layer.forward, layer.bound())))
            yield

    @contextmanager
    def during_encoding(self, pipeline: Any) -> Iterator[None]:
        """Attach around the pipeline's encode_prompt, for as long as the with-block lasts."""

        def around(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.attached():
                return encode(*args, **kwargs)

        with wrapped(pipeline, "encode_prompt", around):
            yield


class SummedLayer:
    """The changes of one linear layer of a text encoder."""

    def __init__(self, site: Site, module: nn.Module):
        self.module = module
        self._site = site
        self._terms: list[tuple[SiteBranch, float]] = []

    def add(self, branch: SiteBranch, strength: float) -> None:
        """One more term. Raises FusionError if it does not fit the layer."""
        try:
            self._terms.append((branch.fitted(self._site, tuple(self.module.weight.shape)), strength))
        except ValueError as error:
            raise FusionError(str(error)) from None

    def bound(self) -> list[tuple[LowRank | Dense, float]]:
        """The terms in a form that can be applied, with their strengths."""
        return [(branch.bind(self._site, lambda: self.module.weight), strength) for branch, strength in self._terms]

    @staticmethod
    def forward(terms: Sequence[tuple[LowRank | Dense, float]], base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The layer's output with all of them, in the type that it has without."""
        y = base(x)
        for branch, strength in terms:
            y = y + strength * _delta(branch, x, y)
        return y


def _delta(branch: LowRank | Dense, x: Tensor, y: Tensor) -> Tensor:
    """The change of a linear layer's output. x: its input. y: its output, whose device and type the change has."""
    x = x.to(y)
    if isinstance(branch, LowRank):
        change = branch.scale * F.linear(F.linear(x, branch.down.to(y)), branch.up.to(y))
    else:
        change = F.linear(x, branch.weight.to(y))
    return change if branch.bias is None else change + branch.bias.to(y)


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


__all__ = ["SummedTextParts", "text_encoders"]
