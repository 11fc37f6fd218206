"""Torch's own files: read as torch reads them, and nothing is believed of those that lie."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch

from lib_dynfuse.lora import LoraError, read_lora
from lib_dynfuse.lora.pickled import CodeError, PickledError, opened

from .writing import kohya, pair, random

NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def read(path) -> dict[str, torch.Tensor]:
    file = opened(path)
    return file.load(file.names)


def content() -> OrderedDict:
    whole = random(6, 4)
    tensors = OrderedDict((str(dtype), (10 * random(3, 2)).to(dtype)) for dtype in DTYPES)
    tensors |= {
        "bool": random(5) > 0,
        "number": torch.tensor(4.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(random(2, 2)),
    }
    tensors |= {
        "turned": whole.T,
        "part": whole[1:3, ::2],
        "rest": whole[3],
        "epoch": 3,
        "nested": {"of": [None, (True, 1.5, 10**12, b"x")]},
    }
    tensors._metadata = OrderedDict(version=1)
    return tensors


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_that_torch_reads(tmp_path, zipped, protocol):
    path = tmp_path / "file.pt"
    torch.save(content(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    theirs = {name: value for name, value in torch.load(path, weights_only=False).items() if isinstance(value, torch.Tensor)}
    ours = read(path)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    assert list(opened(path).load(["turned"])) == ["turned"]


def test_tensors_that_share_memory_in_the_file_do_not_share_it_here(tmp_path):
    whole = random(4, 4)
    torch.save({"a": whole, "b": whole[0]}, tmp_path / "file.pt")
    tensors = read(tmp_path / "file.pt")
    tensors["a"].zero_()
    assert torch.equal(tensors["b"], whole[0])


def repacked(source, target, replace: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            for ending, change in replace.items():
                data = change(data) if name.endswith(ending) else data
            new.writestr(name, data)


@pytest.fixture
def lora(tmp_path):
    down, up = pair(6, 768)
    torch.save(kohya(NAME, down, up), tmp_path / "dog.pt")
    return tmp_path / "dog.pt"


def test_an_archive_that_somebody_has_compressed_is_read(lora, tmp_path):
    repacked(lora, tmp_path / "small.pt", {}, zipfile.ZIP_DEFLATED)
    assert torch.equal(read(tmp_path / "small.pt")[f"{NAME}.lora_up.weight"], pair(6, 768)[1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (struct.pack("<H", 1536), struct.pack("<H", 65_535)),  # rank 2 times 768: how many numbers there are
        (struct.pack("<H", 768), struct.pack("<H", 65_000)),  # the width, as size and as stride
    ],
)
def test_numbers_that_a_pickle_only_announces_are_not_read(lora, tmp_path, old, new):
    """torch.load reads beyond its memory here."""
    repacked(lora, tmp_path / "bad.pt", {"data.pkl": lambda data: data.replace(b"M" + old, b"M" + new)})
    with pytest.raises(LoraError, match=r"bad\.pt cannot be read: it is damaged"):
        read_lora(tmp_path / "bad.pt")


def test_a_tensor_that_repeats_one_number_is_no_lora(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "wide.pt")
    with pytest.raises(PickledError, match="larger than its numbers"):
        opened(tmp_path / "wide.pt")


def bomb(path, name: str, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", b"3")
        with archive.open(name, "w") as entry:
            for _ in range(size >> 20):
                entry.write(bytes(1 << 20))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_nothing_is_inflated_that_is_larger_than_the_file(tmp_path, ending, name):
    path = tmp_path / f"bomb.{ending}"
    bomb(path, name, 96 << 20)
    tracemalloc.start()
    with pytest.raises(LoraError, match="a compressed archive that would take 96 MiB"):
        read_lora(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_directory_that_understates_its_sizes_inflates_no_more_than_it_says(tmp_path):
    path = tmp_path / "liar.pt"
    bomb(path, "archive/data.pkl", 64 << 20)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<L", 64 << 20), struct.pack("<L", 1000)))
    with pytest.raises(LoraError, match="damaged"):
        read_lora(path)


STRANGE = {
    "a million things": b"\x80\x02" + b"N" * 1_000_000 + b".",
    "the two billionth memory": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a frame of exabytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "a text of terabytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00x.",
    "marks": b"\x80\x02}" + b"(" * 1000 + b".",
    "tuples of nothing": b"\x80\x02})" + b"\x86" * 3 + b".",
    "a key whose hash takes for ever": b"\x80\x02)" + b"q\x00h\x00h\x00\x86" * 60 + b"q\x01}h\x01Ns.",
    "a number": pickle.dumps(5),
    "no tensors": pickle.dumps({"x": 1}),
    "nothing": b"\x80",
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("zipped", [True, False])
def test_strange_pickles_are_refused_at_once(tmp_path, name, zipped):
    path = tmp_path / "strange.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", STRANGE[name])
    else:
        path.write_bytes(STRANGE[name])
    tracemalloc.start()
    with pytest.raises(LoraError, match=r"strange\.pt"):
        read_lora(path)
    assert tracemalloc.get_traced_memory()[1] < 48 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("call", [b"cos\nsystem\n(X\x01\x00\x00\x00xtR.", b"c__builtin__\neval\n)R.", b"ctorch\nload\n)R.", b"}}R.", b"i"])
def test_nothing_is_called_but_what_makes_tensors(tmp_path, call):
    (tmp_path / "code.pt").write_bytes(b"\x80\x02" + call)
    with pytest.raises(Exception) as raised:
        opened(tmp_path / "code.pt")
    assert isinstance(raised.value, CodeError) or call == b"i"


def test_an_archive_of_other_files_is_named_as_such(tmp_path):
    with zipfile.ZipFile(tmp_path / "loras.zip", "w") as archive:
        archive.writestr("dog.safetensors", b"x" * 100)
    with pytest.raises(LoraError, match=r"loras\.zip cannot be read: it is a zip archive, but none that torch has written"):
        read_lora(tmp_path / "loras.zip")
