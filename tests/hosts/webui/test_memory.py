"""Forge decides how much of a model fits into the device's memory; it must know of the branches that come beside it."""

from types import SimpleNamespace

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
    def __init__(self):
        self.sd_model = SimpleNamespace(forge_objects=SimpleNamespace(unet=Unet()))


def test_the_branches_size_is_reserved_on_a_copy_of_the_patcher():
    p = Processing()
    before = p.sd_model.forge_objects.unet
    subject = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(4, 10), torch.zeros(20, 4)), "b": Dense(torch.zeros(6, 7))})
    style = SimpleNamespace(denoiser={"a": LowRank(torch.zeros(2, 10), torch.zeros(20, 2))})
    job = p.dynfuse = FusionJob(p)
    job.begin(FusionPass(FORGE, request=Request(FuseSettings(method="dynfuse"), (subject,), (style,), frozenset(), (), None)))
    WebUIHost(FORGE).before_sampling(p)
    numbers = 4 * (10 + 20) + 6 * 7 + 2 * (10 + 20)
    assert p.sd_model.forge_objects.unet.reserved == 1000 + 2 * numbers
    assert before.reserved == 1000  # the patcher that other jobs use


def test_a_plain_job_reserves_nothing():
    p = Processing()
    unet = p.sd_model.forge_objects.unet
    WebUIHost(FORGE).before_sampling(p)
    assert p.sd_model.forge_objects.unet is unet
