"""Host time: what a session costs the CPU in each layer and step, when the tensors are too small to cost anything themselves."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..fusion import FusionSession, Rows
from ..lora import LoraFile
from ..settings import FuseSettings
from .denoisers import random_lora

_LAYERS, _WIDTH, _RANK, _TOKENS = 96, 16, 4, 4
_ROWS = Rows((0, 0), (False, True), 1)


class Stack(nn.Module):
    """Many small linear layers under the names of a U-Net's attention, one after another."""

    def __init__(self, layers: int = _LAYERS):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions = nn.ModuleList([nn.Module()])
        blocks = [nn.Module() for _ in range(layers // 3)]
        self.down_blocks[0].attentions[0].transformer_blocks = nn.ModuleList(blocks)
        for block in blocks:
            block.attn1 = nn.ModuleDict({name: nn.Linear(_WIDTH, _WIDTH) for name in ("to_q", "to_k", "to_v")})
        self.run = tuple(layer for block in blocks for layer in block.attn1.values())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.run:
            x = layer(x)
        return x


def stack_and_loras(count: int = 2) -> tuple[Stack, list[LoraFile]]:
    torch.manual_seed(0)
    stack = Stack().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        return stack, [random_lora(stack, _RANK, seed, Path(folder) / f"{seed}.safetensors") for seed in range(1, count + 1)]


@torch.no_grad()
def host_microseconds(ways: Mapping[str, FuseSettings], rounds: int = 40) -> dict[str, float]:
    """Median over the rounds of what each way adds to a layer and step; "plain": what a layer takes without it. Processor time of one
    thread: other programs do not count.
    """
    stack, (subject, style) = stack_and_loras()
    x = torch.randn(2, _TOKENS, _WIDTH)
    sessions = {name: FusionSession(stack, subject, style, settings) for name, settings in ways.items()}

    def step(session: FusionSession) -> None:
        session.begin()
        with session.attached(_ROWS):
            stack(x)
        session.end_step()

    def seconds(work: Callable[[], object]) -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for session in sessions.values():
            for _ in range(3):
                step(session)
        turns = [
            {"plain": seconds(partial(stack, x)), **{name: seconds(partial(step, session)) for name, session in sessions.items()}}
            for _ in range(rounds)
        ]
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(turn[name] for turn in turns) / len(stack.run) * 1e6 for name in turns[0]}
    return {name: value if name == "plain" else value - medians["plain"] for name, value in medians.items()}


__all__ = ["Stack", "host_microseconds", "stack_and_loras"]
