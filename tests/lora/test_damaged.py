"""Damaged files of every kind: read or refused in one sentence, in bounded memory and time.

DYNFUSE_DAMAGED=1000 tries that many of each kind, chosen anew at each run.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lib_dynfuse.inspection import inspect_files
from lib_dynfuse.lora import LoraError, branches_by_site, denoiser_aliases, read_lora

from .writing import random

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    pytest.skip("needs hypothesis 6.122.3", allow_module_level=True)

EXAMPLES = int(os.environ.get("DYNFUSE_DAMAGED", "0"))
BOUNDED = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=timedelta(seconds=5),
    suppress_health_check=list(HealthCheck),
)
FEW = settings(BOUNDED, max_examples=(EXAMPLES or 60) // 10)  # where each example takes time to make
SPARE = 64 << 20

OUT, IN = 6, 8
KINDS = {
    "LoRA": {"lora_down.weight": (2, IN), "lora_up.weight": (OUT, 2), "alpha": ()},
    "LoRA with mid": {"lora_down.weight": (2, IN, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (OUT, 2, 1, 1)},
    "PEFT": {"lora_A.weight": (2, IN), "lora_B.weight": (OUT, 2), "lora_B.bias": (OUT,), "lora_magnitude_vector": (OUT,)},
    "LoHa": {"hada_w1_a": (OUT, 2), "hada_w1_b": (2, IN), "hada_w2_a": (OUT, 2), "hada_w2_b": (2, IN)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)},
    "full": {"diff": (OUT, IN), "diff_b": (OUT,)},
    "norm": {"w_norm": (OUT,), "b_norm": (OUT,)},
    "DoRA": {"lora_down.weight": (2, IN), "lora_up.weight": (OUT, 2), "dora_scale": (OUT, 1)},
    "IA3": {"weight": (IN,), "on_input": ()},
    "OFT": {"oft_blocks": (2, 3, 3), "rescale": (OUT, 1)},
    "BOFT": {"oft_blocks": (1, 3, 2, 2)},
    "GLoRA": {"a1.weight": (IN, 2), "a2.weight": (2, IN), "b1.weight": (OUT, 2), "b2.weight": (2, IN)},
    "PEFT's OFT": {"oft_r": (2, 4, 4), "oft_s": (OUT, 1)},
    "PEFT's OFT since 0.16": {"oft_R.weight": (2, 6)},
    "PEFT's BOFT": {"boft_R": (1, 2, 4, 4), "boft_s": (OUT, 1)},
    "PEFT's IA3": {"ia3_l": (OUT, 1)},
}
LAYERS = [f"down_blocks.{level}.attentions.{n}.transformer_blocks.0.attn2.to_{x}" for level in range(3) for n in (0, 1) for x in "qkv"]
ROLES = sorted({role for roles in KINDS.values() for role in roles})
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
SETTINGS = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 1}, "unet.use_cayley_neumann": False})


def named(kind: str, number: int) -> dict[str, torch.Tensor]:
    """A layer of a kind, in the dialect that its kind is written in."""
    name = LAYERS[number % len(LAYERS)]
    name = f"unet.{name}" if "PEFT" in kind else f"lora_unet_{name.replace('.', '_')}"
    return {f"{name}.{role}": 0.1 * torch.ones(()) if shape == () else 0.1 * random(*shape) for role, shape in KINDS[kind].items()}


EVERY_KIND = {key: tensor for number, kind in enumerate(KINDS) for key, tensor in named(kind, number).items()}
SAFETENSORS = save(EVERY_KIND, {"lora_adapter_metadata": SETTINGS, "ss_tag_frequency": '{"10_dog": {"dog": 3}}'})


def torchs_own(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": EVERY_KIND, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


ARCHIVE, STREAM = torchs_own(True), torchs_own(False)


def highest_memory() -> int | None:
    """The most main memory that the process has had since the last call, in bytes; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), None)


def examine(content: bytes, ending: str = "safetensors", beside: bytes | None = None) -> str:
    """Inspect a file of this content, and fit what it holds to a model. Fails if anything but a sentence comes of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"adapter_model.{ending}"
        path.write_bytes(content)
        if beside is not None:
            (Path(folder) / "adapter_config.json").write_bytes(beside)
        out, err = io.StringIO(), io.StringIO()
        highest_memory()
        before = highest_memory()
        code = inspect_files([str(path)], out, err)
        if code == 0:
            fit(path)
        after = highest_memory()
    assert before is None or after is None or after - before < SPARE + len(content)
    assert code in (0, 2)
    text = out.getvalue() + err.getvalue()
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines())) < 1000
    if code == 2:
        assert err.getvalue().startswith("adapter_model.")
        assert err.getvalue().endswith(".\n")
    return text


def fit(path: Path) -> None:
    file = read_lora(path)
    for site, binding in branches_by_site(file, denoiser_aliases(LAYERS))[0].items():
        try:
            binding.fitted(site, (OUT, IN)).bind(site, lambda: torch.ones(OUT, IN)).delta_weight()
        except LoraError:
            continue


@st.composite
def damaged(draw: Callable, content: bytes, where: int | None = None) -> bytes:
    """Bytes with a few of them changed, left out, put in or repeated; most often in the first `where`."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(where or len(data), len(data)) - 1, 0)))
        length = draw(st.integers(1, 64))
        change = draw(st.sampled_from(["byte", "number", "text", "cut", "erase", "put in", "repeat", "move"]))
        if change == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "number":
            number, width = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from([1, 2, 4, 8]))
            data[at : at + width] = struct.pack("<Q", number)[:width]
        elif change == "text":
            data[at : at + 1] = draw(st.sampled_from(["99999999999", "-1", "[", "{", '"', "}", ",", ".", "\0", "\x1b[2J"])).encode()
        elif change == "cut":
            del data[at:]
        elif change == "erase":
            del data[at : at + length]
        elif change == "put in":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif change == "repeat":
            data[at:at] = data[at : at + length]
        else:
            moved = data[at : at + length]
            del data[at : at + length]
            to = draw(st.integers(0, len(data)))
            data[to:to] = moved
    return bytes(data)


HEADER = 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]


@BOUNDED
@given(st.one_of(damaged(SAFETENSORS, HEADER), damaged(SAFETENSORS)))
def test_safetensors(content):
    examine(content)


@BOUNDED
@given(damaged(SAFETENSORS[8:HEADER]), st.integers(-3, 3))
def test_safetensors_whose_header_has_its_own_length(header, off):
    examine(struct.pack("<Q", max(len(header) + off, 0)) + header + SAFETENSORS[HEADER:])


@st.composite
def reshaped(draw: Callable) -> dict[str, torch.Tensor]:
    """Whole files whose tensors are not what their names say."""
    chosen = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
    tensors = {key: tensor for number, kind in enumerate(chosen) for key, tensor in named(kind, number).items()}
    for _ in range(draw(st.integers(1, 5))):
        key = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        change = draw(st.sampled_from(["shape", "type", "leave out", "rename", "role", "fill", "size"]))
        if change == "shape":
            count = tensor.numel()
            sides = [side for side in range(1, count + 1) if count % side == 0]
            side = draw(st.sampled_from(sides or [0]))
            rest = count // side if side else 0
            tensors[key] = tensor.reshape(
                draw(st.sampled_from([(count,), (side, rest), (rest, side, 1, 1), (1, side, rest), (1, 1, rest, side)]))
            )
        elif change == "type":
            types = [
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.float8_e4m3fn,
                torch.float8_e5m2,
                torch.int64,
                torch.uint8,
                torch.bool,
            ]
            tensors[key] = tensor.float().to(draw(st.sampled_from(types)))
        elif change == "leave out" and len(tensors) > 1:
            del tensors[key]
        elif change == "rename":
            tensors[draw(st.text(max_size=30))] = tensors.pop(key)
        elif change == "role":
            tensors[f"{key.split('.')[0]}.{draw(st.sampled_from(ROLES))}"] = tensor
        elif change == "fill":
            filling = draw(st.sampled_from([0.0, 1e30, -1e30, float("nan"), float("inf"), 1e-40]))
            tensors[key] = torch.full(tensor.shape, filling)
        else:
            tensors[key] = torch.zeros(draw(st.lists(st.integers(0, 9), max_size=5)))
    return tensors


def storable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


@BOUNDED
@given(reshaped(), st.sampled_from([None, {"lora_adapter_metadata": SETTINGS}]))
def test_tensors_that_are_not_what_their_names_say(tensors, metadata):
    examine(save(storable(tensors), metadata))


@BOUNDED
@given(reshaped(), st.booleans())
def test_tensors_of_torchs_own_files_that_are_not_what_their_names_say(tensors, zipped):
    file = io.BytesIO()
    tensors = {
        key: tensor.half() if "float8" in str(tensor.dtype) else tensor for key, tensor in tensors.items()
    }  # torch 2.1 cannot save them
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    examine(file.getvalue(), "pt")


@BOUNDED
@given(st.one_of(damaged(ARCHIVE), damaged(STREAM), damaged(STREAM, 6000)), st.sampled_from(["pt", "safetensors"]))
def test_torchs_own_files(content, ending):
    examine(content, ending)


def entries() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


PICKLE = next(name for name in entries() if name.endswith("data.pkl"))


@BOUNDED
@given(damaged(entries()[PICKLE]), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_archives_whose_sums_agree(pickle, compression):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        for name, data in {**entries(), PICKLE: pickle}.items():
            archive.writestr(name, data)
    examine(file.getvalue(), "pt")


@FEW
@given(st.integers(0, 3), st.binary(max_size=32), st.integers(1, 60))
def test_archives_that_inflate(where, filling, size):
    file = io.BytesIO()
    held = entries()
    name = [PICKLE, PICKLE.replace("data.pkl", "data/0"), "x", "../x"][where]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        held[name] = (filling or b"\0") * ((size << 20) // max(len(filling), 1))
        for entry, data in held.items():
            archive.writestr(entry, data)
    examine(file.getvalue(), "pt")


NUMBER = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**30), 2**63]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=20), inner, max_size=4)),
    max_leaves=12,
)
NAMES = ["r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps"]
NAMES += ["peft_version", "init_lora_weights", "feedforward_modules", "alpha"]
PATTERNS = st.dictionaries(st.one_of(st.text(max_size=20), st.sampled_from(["to_k", ".*", "(a|b)", "(a*)*", "^x$", "["])), JSON, max_size=4)
SENSIBLE = {"r": 2, "lora_alpha": 4, "use_cayley_neumann": False}
CONFIG = st.dictionaries(st.sampled_from(NAMES), st.one_of(JSON, PATTERNS, st.sampled_from([2, 4, True, False])), max_size=6)
FILE = storable(
    {
        key: tensor
        for number, kind in enumerate(("PEFT", "LoHa", "LoKr", "PEFT's OFT since 0.16", "PEFT's IA3"))
        for key, tensor in named(kind, number).items()
    }
)
DEEP = st.integers(1, 200_000).map(lambda depth: "[" * depth + "]" * depth)


def dumped(value: object) -> str:
    return json.dumps(value)


@BOUNDED
@given(CONFIG.map(lambda config: {**SENSIBLE, **config}), st.sampled_from(["metadata", "sidecar"]))
def test_settings_of_any_shape(config, where):
    if where == "sidecar":
        examine(save(FILE), beside=dumped(config).encode())
    else:
        examine(save(FILE, {"lora_adapter_metadata": dumped({f"unet.{name}": value for name, value in config.items()})}))


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), JSON.map(dumped), DEEP, st.text("x\x1b\n", min_size=1).map(lambda text: text * 9999)
)
TAGS = st.dictionaries(st.text(max_size=9), st.one_of(JSON, st.dictionaries(st.text(max_size=9), NUMBER, max_size=4)), max_size=3).map(
    dumped
)
ENTRIES = ["ss_tag_frequency", "ss_output_name", "modelspec.title", "modelspec.trigger_phrase", "lora_adapter_metadata"]


@BOUNDED
@given(
    st.dictionaries(st.sampled_from(ENTRIES), st.one_of(TEXT, TAGS), max_size=5), st.one_of(st.none(), st.binary(), DEEP.map(str.encode))
)
def test_metadata_of_any_shape(metadata, beside):
    examine(save(storable(named("LoRA", 0)), metadata), beside=beside)
    examine(save(FILE, metadata), beside=beside)


def test_the_bound_on_memory_would_be_seen():
    highest_memory()
    before = highest_memory()
    if before is None:
        pytest.skip("this system does not tell how much memory was taken")
    taken = b"x" * (SPARE + (1 << 20))
    after = highest_memory()
    assert after is not None
    assert after - before > len(taken) - (8 << 20)
