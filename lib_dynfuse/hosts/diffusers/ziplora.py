"""Training ZipLoRA's mergers on a pipeline, without pictures: the LoRAs make their own.

The paper takes x_c and x_s from the pictures that the LoRAs were trained on. Here each LoRA alone makes some pictures of its own prompt,
and x are the latents on their way, with their times, prompts and that LoRA's own predictions, which are what the merged model is to
predict. Only the rows that see the prompt count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fusion import FusionError, FusionSession
from ...fusion.batches import ModelCall
from ...fusion.ziplora import Mergers
from ..references import alone
from ..sides import SIDES
from ..wrapping import wrapped
from .loading import PipelineError
from .pipeline import FusedPipeline, denoiser, rows_of

Progress = Callable[[str, int, int], None]
"""(side whose pictures are made, steps done, steps in all)"""


@dataclass(frozen=True)
class Recipe:
    """How mergers are trained. steps, rate, weight: of the paper, weight its lambda.

    pictures: that each LoRA makes; batch: of these at once, and of the latents in a step for each LoRA. picture_steps, cfg_scale, size: of
    the pictures; None for the pipeline's own. low_memory: compute activations anew on the way back.
    """

    steps: int = 100
    rate: float = 0.01
    weight: float = 0.01
    pictures: int = 4
    batch: int = 1
    picture_steps: int = 20
    cfg_scale: float | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    low_memory: bool = False


@dataclass(frozen=True)
class Loss:
    """Of a step. subject, style: mean squared differences of the predictions; similarity: sum of |cos|, without lambda."""

    subject: float
    style: float
    similarity: float

    def total(self, weight: float) -> float:
        return self.subject + self.style + weight * self.similarity


@dataclass(frozen=True)
class Lesson:
    """A model call of a LoRA alone, and what it predicted for the rows that see its prompt."""

    call: ModelCall
    positions: tuple[int, ...]
    target: Tensor


def lessons(fused: FusedPipeline, prompts: dict[str, str], recipe: Recipe, progress: Progress | None = None) -> dict[str, list[Lesson]]:
    """By side: of all its pictures and steps. prompts: by side. Raises PipelineError."""
    return {side: list(_lessons(fused, side, prompts[side], recipe, progress)) for side in SIDES}


def _lessons(fused: FusedPipeline, side: str, prompt: str, recipe: Recipe, progress: Progress | None) -> Iterator[Lesson]:
    pipeline = fused.pipeline
    found: list[Lesson] = []
    network = denoiser(pipeline)
    single = FusedPipeline(pipeline, fused.subjects, fused.styles, alone(fused.settings, side))

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        latent = next((kwargs[name] for name in ("sample", "hidden_states") if name in kwargs), args[0] if args else None)
        assert latent is not None
        call = ModelCall(forward, args, kwargs, latent.shape[0])
        prediction = call(None)
        rows = rows_of(pipeline, latent.shape[0]).voting
        found.append(Lesson(call, rows, prediction[list(rows)].detach().float()))
        return call.of(prediction)

    width, height = recipe.size or (None, None)
    rounds = -(-recipe.pictures // recipe.batch)
    for number in range(rounds):
        seeds = range(recipe.seed + number * recipe.batch, recipe.seed + min(recipe.pictures, (number + 1) * recipe.batch))

        def shown(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(side, number * total + done, rounds * total)

        with wrapped(network, "forward", around):
            single(
                prompt,
                seeds=list(seeds),
                steps=recipe.picture_steps,
                cfg_scale=recipe.cfg_scale,
                width=width,
                height=height,
                progress=shown,
                output_type="latent",
            )
    yield from found


def train(
    fused: FusedPipeline, lessons: Mapping[str, Sequence[Lesson]], recipe: Recipe, done: Callable[[Loss], None] | None = None
) -> Mergers:
    """The mergers after recipe.steps steps of Adam. done: called with each step's loss.

    Nothing is left on the model. Raises FusionError where no layer has both LoRAs, PipelineError where the loss is no number.
    """
    network = denoiser(fused.pipeline)
    session = FusionSession(network, fused.subjects, fused.styles, fused.settings)
    mergers = Mergers(session)
    if not mergers.columns:
        raise FusionError("There is nothing to train: the two LoRAs have no layer in common.")
    optimizer = torch.optim.Adam(list(mergers.columns.values()), lr=recipe.rate)
    chance = random.Random(recipe.seed)
    with _frozen(network, recipe.low_memory), torch.inference_mode(False), torch.enable_grad(), mergers.attached():
        for step in range(recipe.steps):
            optimizer.zero_grad()
            differences = {}
            for side in SIDES:  # one after the other: the memory of one graph is enough
                difference = _difference(chance.choice(lessons[side]))
                difference.backward()
                differences[side] = difference.item()
            similarity = mergers.similarity()
            (recipe.weight * similarity).backward()
            loss = Loss(differences["subject"], differences["style"], similarity.item())
            if not math.isfinite(loss.total(recipe.weight)):
                raise PipelineError(f"The loss is no number at step {step + 1}: try a smaller --learning-rate, or --dtype float32.")
            optimizer.step()
            if done is not None:
                done(loss)
    return mergers


def _difference(lesson: Lesson) -> Tensor:
    return F.mse_loss(lesson.call(lesson.positions).float(), lesson.target)


@contextmanager
def _frozen(network: nn.Module, low_memory: bool) -> Iterator[None]:
    """No weight of the model has a gradient. low_memory: activations are made anew on the way back, which diffusers does in training."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    own: Any = network
    training = network.training
    for parameter in wanted:
        parameter.requires_grad_(False)
    if low_memory:
        own.enable_gradient_checkpointing()
        for module in network.modules():  # not dropout and the like
            module.training = hasattr(module, "gradient_checkpointing")
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        if low_memory:
            own.disable_gradient_checkpointing()
            network.train(training)


__all__ = ["Lesson", "Loss", "Progress", "Recipe", "lessons", "train"]
