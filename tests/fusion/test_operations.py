"""What a session dispatches: nothing that waits for a GPU or copies to it, and not much.

The meta device stands for the GPU: it shows every copy between it and the host. Only of tensors that are made of Python's numbers it
shows nothing, and the CPU does.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.bench.denoisers import Denoiser, Loras
from lib_dynfuse.bench.dispatched import added
from lib_dynfuse.fusion import FusionSession

from .models import BLOCK, Nested, lora_file

META, CPU = torch.device("meta"), torch.device("cpu")


def device(*shape, dtype=torch.float32):
    return torch.empty(*shape, device=META, dtype=dtype)


class Stalls(AssertionError):
    """An operation would wait for the device, or copy to it."""


class NothingStalls(TorchDispatchMode):
    """Fails at an operation after which a GPU's host thread waits, or which copies between host and GPU."""

    # The size of the result, or the result itself, is a number on the host.
    reads = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "allclose",
        "unique_dim",
        "_unique",
        "_unique2",
        "unique_consecutive",
        "bincount",
    )
    # torch.tensor and its like: Python's numbers become a tensor on the host first.
    copies = ("lift", "lift_fresh", "lift_fresh_copy", "_pin_memory")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in self.reads or name in self.copies:
            raise Stalls(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Stalls(f"{name}: the size of the result is the sum of a tensor")
        if name in ("_to_copy", "copy_", "_copy_from", "copy"):
            source, target = (args[1], args[0].device) if name != "_to_copy" else (args[0], kwargs.get("device") or args[0].device)
            if source.device != torch.device(target):
                raise Stalls(f"{name} from {source.device} to {target}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise Stalls(f"{name} with a mask counts it first")
                if index is not None and index.device != args[0].device:
                    raise Stalls(f"{name} with indices from {index.device}")
        return function(*args, **kwargs)


def _meta_gathers():
    """torch 2.1 does not get the shape of index_select(out=) right there, as a mode sees it."""
    try:
        with NothingStalls():
            torch.index_select(device(4, 2), 0, device(3, dtype=torch.long), out=device(3, 2))
    except RuntimeError:
        return False
    return True


PLANTED = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "a mask written to": lambda x: x.__setitem__(x > 0, device(4)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(device(4, dtype=torch.long)),
    "to": lambda x: torch.ones(4).to(META),
    "copy_": lambda x: x.copy_(torch.ones(4)),
    "an index from the host": lambda x: x[torch.arange(2)],
    "an index from the host written to": lambda x: x.__setitem__(torch.arange(2), device(2)),
}


PLANTED_NUMBERS = {
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=x.device),
    "a number": lambda x: x * torch.tensor(2.0),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "a list of indices": lambda x: x[[0, 2]],
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_would_stall_is_noticed(kind):
    with pytest.raises(Stalls), NothingStalls():
        PLANTED[kind](device(4))


@pytest.mark.parametrize("kind", PLANTED_NUMBERS)
def test_a_tensor_of_pythons_numbers_is_noticed(kind):
    x = torch.zeros(4)
    with pytest.raises(Stalls), NothingStalls():
        PLANTED_NUMBERS[kind](x)


def test_what_runs_on_the_device_alone_is_not():
    x = device(4)
    with NothingStalls():
        x.to(torch.float16).copy_(x)
        torch.full((4,), 2.0, device=META).masked_fill_(x > 0, 1.0)
        torch.arange(4, device=META)
        x[1:].index_select(0, device(2, dtype=torch.long))
        torch.where(x > 0, x, -x)
        x[device(2, dtype=torch.long)]


WIDE = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"]
POINTWISE, KERNEL, PART = "input_blocks.1.1.proj_in", "input_blocks.3.0.op", f"{BLOCK}.attn2.to_v"
NAMES = [*WIDE, POINTWISE, KERNEL, PART]


class SeesTokensOrPixels(Nested):
    """Linear layers see tokens, convolutions the same as pixels."""

    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        pixels = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
        return {
            name: layer(pixels if isinstance(layer, nn.Conv2d) else x) for name, layer in ((n, self.get_submodule(n)) for n in self.order)
        }


def network():
    layers = {name: nn.Linear(16, 16) for name in NAMES}
    layers[POINTWISE], layers[KERNEL] = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
    layers[WIDE[2]] = nn.Linear(16, 32)
    return SeesTokensOrPixels(layers).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return {CPU: network(), **({META: network().to(META)} if _meta_gathers() else {})}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Three LoRAs, of which one changes a layer less."""
    folder = tmp_path_factory.mktemp("loras")
    return [lora_file(folder / f"{seed}.safetensors", models[CPU], NAMES[: 7 - (seed == 2)], seed=seed) for seed in (1, 2, 3)]


C, U = True, False
ONE = [Rows((0, 0), (U, C), 1)]
CALLS = {
    "one image": ONE,
    "two images": [Rows((0, 1, 0, 1), (C, C, U, U), 2)],
    "three images": [Rows((0, 1, 2) * 2, (U,) * 3 + (C,) * 3, 3)],
    "AND": [Rows((0, 0, 0), (C, C, U), 1)],
    "AND of two images": [Rows((0, 0, 1, 1, 0, 1), (C, C, C, C, U, U), 2)],
    "AND in several calls": [Rows((0,), (C,), 1), Rows((0,), (C,), 1), Rows((0,), (U,), 1)],
    "negative first": [Rows((0,), (U,), 1), Rows((0,), (C,), 1)],
    "image by image": [Rows((0,), (C,), 2), Rows((1,), (C,), 2), Rows((0, 1), (U, U), 2)],
}
SETTINGS = {
    "now": {"decide": "now"},
    "next": {"decide": "next"},
    "next of few places": {"decide": "next", "vote_tokens": 4},
    "next of all places": {"decide": "next", "vote_tokens": 0},
    "now, every third": {"decide": "now", "decide_every": 3},
    "next, every third": {"decide": "next", "decide_every": 3},
    "balanced": {"decide": "next", "balance": "gamma", "bias": 1.1},
    "direct": {"method": "direct"},
    "scheduled": {"decide": "next", "subject_weight": "0@0,1@1"},
    "scheduled now": {"decide": "now", "subject_weight": "0@0,1@1"},
    "scheduled direct": {"method": "direct", "style_weight": "0@0,1@1"},
    "by row": {"granularity": "row"},
    "by token": {"granularity": "token"},
    "cosine": {"decide": "next", "criterion": "cosine", "temperature": "rms"},
}
STEPS = 6


@torch.no_grad()
def steps(session, model, calls, count, fold=1):
    """fold: tiles that a row is cut into."""
    where = next(model.parameters()).device
    for _ in range(count):
        session.begin()
        for rows in calls:
            with session.attached(rows):
                model(torch.full((len(rows.images) * fold, 16, 16), 0.5, device=where))
        if session.undecided:
            session.repeat()
            with session.attached(calls[0]):
                model(torch.full((len(calls[0].images) * fold, 16, 16), 0.5, device=where))
        session.end_step()


def assert_only_the_first_step_stalls(models, calls, subjects, styles, settings, fold=1):
    for model in models.values():
        session = FusionSession(model, subjects, styles, FuseSettings(**settings), steps=STEPS)
        steps(session, model, calls, 1, fold)
        with NothingStalls():
            steps(session, model, calls, STEPS - 1, fold)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
def test_no_step_but_the_first_stalls(models, files, calls, settings):
    assert_only_the_first_step_stalls(models, calls, files[:1], files[1:2], settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("calls", [CALLS["one image"], CALLS["AND of two images"]], ids=["one image", "AND of two images"])
def test_three_loras_do_not_stall(models, files, calls, settings):
    assert_only_the_first_step_stalls(models, calls, files[:2], files[2:], settings)


@pytest.mark.parametrize("decide", ["now", "next"])
def test_tiles_do_not_stall(models, files, decide):
    assert_only_the_first_step_stalls(models, ONE, files[:1], files[1:2], {"decide": decide}, fold=4)


def test_a_host_that_cuts_its_calls_otherwise_in_the_middle_does_not_stall(models, files):
    for model in models.values():
        session = FusionSession(model, files[0], files[1], FuseSettings(method="dynfuse", decide="next"))
        steps(session, model, CALLS["two images"], 1)
        with NothingStalls():
            steps(session, model, CALLS["image by image"], 2)
            steps(session, model, CALLS["AND of two images"], 2)


def unet_like():
    """SDXL's shapes of layers, narrow: square, cross attention's, both of the feed-forward, for two widths and in several blocks."""
    layers = {}
    for number, (width, blocks) in enumerate(((8, 3), (16, 5)), 1):
        for block in range(blocks):
            name = f"input_blocks.{number}.1.transformer_blocks.{block}"
            layers.update({f"{name}.attn1.to_{part}": nn.Linear(width, width) for part in ("q", "k", "v", "out.0")})
            layers.update({f"{name}.attn2.to_{part}": nn.Linear(width, width) for part in ("q", "out.0")})
            layers.update({f"{name}.attn2.to_{part}": nn.Linear(24, width) for part in ("k", "v")})
            layers[f"{name}.ff.net.0.proj"] = nn.Linear(width, 8 * width)
            layers[f"{name}.ff.net.2"] = nn.Linear(4 * width, width)
        layers[f"input_blocks.{number}.1.proj_in"] = nn.Linear(width, width)
    return layers


class EveryLayerAlone(Nested):
    def forward(self, x):
        return [layer(x[..., : layer.in_features]) for layer in map(self.get_submodule, self.order)]


@pytest.mark.skipif(not _meta_gathers(), reason="this PyTorch cannot count on the meta device")
@pytest.mark.parametrize("loras", [2, 4])
@pytest.mark.parametrize("vote_tokens", [64, 0])
def test_a_fused_step_adds_four_operations_a_layer_and_at_most_250(tmp_path, loras, vote_tokens):
    layers = unet_like()
    unet = EveryLayerAlone(layers).eval().requires_grad_(False)
    files = [lora_file(tmp_path / f"{seed}.safetensors", unet, list(layers), seed=seed) for seed in range(loras)]
    denoiser = Denoiser("small", 64, unet.to(META), {"x": device(2, 100, 128)})
    count = added(denoiser, Loras.split(files).session(denoiser, FuseSettings(method="dynfuse", decide="next", vote_tokens=vote_tokens)))
    assert count.layers == len(layers)
    assert 2 < count.per_layer <= 4
    assert 50 < count.per_step <= 250
