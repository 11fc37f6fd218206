"""A training loop that can be killed at any time and goes on where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

_SAVE_EVERY = 120.0  # seconds


class TrainingLoop:
    """AdamW, or SGD with Nesterov's momentum, with a warm-up, a cosine decay, clipped gradients and an average of the weights.

        loop = TrainingLoop("base", {"unet": unet}, steps=10_000, rate=1.5e-3, checkpoint=folder / "base.pt")
        for _ in loop:
            loop.descend(loss_of_a_batch())
        loop.finish()

    seconds: spent so far, over all runs. figures: running means of what descend was told, for the record.
    """

    def __init__(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        *,
        steps: int,
        rate: float,
        checkpoint: Path,
        seed: int = 0,
        warm_up: int = 150,
        last_rate: float = 0.03,
        average: float = 0.998,
        decay: float = 0.0,
        momentum: float | None = None,
    ) -> None:
        """rate: at its height. last_rate: at the end, as a share of it. average: of the weights' moving average, 0 for none.
        momentum: of SGD; None for AdamW.

        Loads the checkpoint, if there is one.
        """
        self.name, self.steps = name, steps
        self.seconds = 0.0
        self.figures: dict[str, float] = {}
        self._networks = dict(networks)
        self._parameters: list[Tensor] = [
            parameter for network in networks.values() for parameter in network.parameters() if parameter.requires_grad
        ]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._keep, self._rate, self._warm_up, self._last_rate = average, rate, warm_up, last_rate
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, foreach=True)
            if momentum is None
            else torch.optim.SGD(self._parameters, lr=rate, momentum=momentum, nesterov=True, weight_decay=decay)
        )
        self._path, self._seed = checkpoint, seed
        self.step = 0
        if checkpoint.is_file():
            self._load(torch.load(checkpoint, weights_only=True))

    def __iter__(self) -> Iterator[int]:
        """Steps from the one that was reached to the last."""
        torch.manual_seed(self._seed + self.step)
        before, started, saved = self.seconds, time.monotonic(), time.monotonic()
        with tqdm(total=self.steps, initial=self.step, unit="step", desc=self.name, mininterval=5) as bar:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                self.seconds = before + time.monotonic() - started
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in self.figures.items()}, refresh=False)
                if time.monotonic() - saved > _SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def descend(self, loss: Tensor, **figures: Tensor | float) -> None:
        """One step down the loss. figures: whatever is worth watching."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate_now()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1 - min(self._keep, (self.step + 1) / (self.step + 10)))
        for name, value in {"loss": loss, **figures}.items():
            now = float(value)
            self.figures[name] = 0.98 * self.figures.get(name, now) + 0.02 * now

    def finish(self) -> None:
        """Leave the networks with their averaged weights, in evaluation mode."""
        with torch.no_grad():
            for parameter, mean in zip(self._parameters, self._average, strict=True):
                parameter.copy_(mean)
        for network in self._networks.values():
            network.eval()

    def save(self) -> None:
        """The whole state, under a temporary name first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".part")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "figures": self.figures,
            "networks": {name: network.state_dict() for name, network in self._networks.items()},
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, network in self._networks.items():
            network.load_state_dict(state["networks"][name])
        with torch.no_grad():
            for mean, kept in zip(self._average, state["average"], strict=True):
                mean.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.figures = state["step"], state["seconds"], dict(state["figures"])

    def _rate_now(self) -> float:
        warm = min(1.0, (self.step + 1) / self._warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self._rate * warm * (self._last_rate + (1 - self._last_rate) * fall)


__all__ = ["TrainingLoop"]
