"""Forge decides how much of a model fits into the device's memory; it must know of the branches that come beside it."""

from types import SimpleNamespace

import pytest
import torch

from lib_dynfuse import FuseSettings
from lib_dynfuse.hosts.webui.forge import FORGE
from lib_dynfuse.hosts.webui.host import WebUIHost
from lib_dynfuse.hosts.webui.passes import FusionPass, Request
from lib_dynfuse.hosts.webui.record import FusionJob
from lib_dynfuse.lora.branch import Dense, LowRank


class Unet:
    def __init__(self, reserved=1000):
        self.model = SimpleNamespace(computation_dtype=torch.float16)
        self.reserved = reserved

    def clone(self):
        return Unet(self.reserved)

    def add_extra_preserved_memory_during_sampling(self, memory):
        self.reserved += memory


class Processing:
    width, height, batch_size = 512, 256, 2

    def __init__(self):
        self.sd_model = SimpleNamespace(forge_objects=SimpleNamespace(unet=Unet()))


def test_the_branches_size_is_reserved_on_a_copy_of_the_patcher():
    p = Processing()
    before = p.sd_model.forge_objects.unet
    subject = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(4, 10), torch.zeros(20, 4)), "b": Dense(torch.zeros(6, 7))})
    style = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(2, 10), torch.zeros(20, 2))})
    job = p.dynfuse = FusionJob(p)
    job.begin(FusionPass(FORGE, request=Request(FuseSettings(method="direct"), (subject,), (style,), frozenset(), (), None)))
    WebUIHost(FORGE).before_sampling(p)
    numbers = 4 * (10 + 20) + 6 * 7 + 2 * (10 + 20)
    assert p.sd_model.forge_objects.unet.reserved == 1000 + 2 * numbers
    assert before.reserved == 1000  # the patcher that other jobs use


def test_a_plain_job_reserves_nothing():
    p = Processing()
    unet = p.sd_model.forge_objects.unet
    WebUIHost(FORGE).before_sampling(p)
    assert p.sd_model.forge_objects.unet is unet


@pytest.mark.parametrize(
    ("given", "samples", "terms"),
    [
        # One layer, 10 to 20, is changed by both: 64 of its places for two images, and four float32 tensors of what comes out of it.
        ({"method": "dynfuse"}, 64 * 2 * (10 + 20), 4 * 4 * 64 * 2 * 20),
        ({"method": "dynfuse", "decide": "now"}, 0, 4 * 4 * 64 * 2 * 20),
        ({"method": "dynfuse", "decide": "now", "vote_tokens": 0}, 0, 4 * 4 * (64 * 32) * 2 * 20),
        ({"method": "direct"}, 0, 0),
    ],
)
def test_what_measuring_takes_is_reserved_too(given, samples, terms):
    p = Processing()
    subject = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(4, 10), torch.zeros(20, 4)), "b": Dense(torch.zeros(6, 7))})
    style = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(2, 10), torch.zeros(20, 2))})
    job = p.dynfuse = FusionJob(p)
    job.begin(FusionPass(FORGE, request=Request(FuseSettings(**given), (subject,), (style,), frozenset(), (), None)))
    WebUIHost(FORGE).before_sampling(p)
    numbers = 4 * (10 + 20) + 6 * 7 + 2 * (10 + 20)
    assert p.sd_model.forge_objects.unet.reserved == 1000 + 2 * (numbers + samples) + terms
