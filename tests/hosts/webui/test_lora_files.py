from __future__ import annotations

import os

import pytest
import torch

from lib_dynfuse.hosts.webui import lora_files
from lib_dynfuse.hosts.webui.lora_files import LoraFiles
from lib_dynfuse.lora import LoraError
from tests.fakes.models import UNet, write_lora


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read."""
    paths = []
    original = lora_files.read_lora
    monkeypatch.setattr(lora_files, "read_lora", lambda path: paths.append(str(path)) or original(path))
    return paths


def test_a_file_is_read_once(tmp_path, reads):
    path = write_lora(tmp_path / "a.safetensors", 0, UNet())
    files = LoraFiles()
    assert files.read(path)[1] is files.read(path)[1]
    assert len(reads) == 1


def test_another_path_to_the_same_file_is_the_same_file(tmp_path, reads):
    path = write_lora(tmp_path / "a.safetensors", 0, UNet())
    os.symlink(path, tmp_path / "link.safetensors")
    files = LoraFiles()
    files.read(path)
    files.read(str(tmp_path / "link.safetensors"))
    assert len(reads) == 1


def test_a_changed_file_is_read_again(tmp_path, reads):
    path = write_lora(tmp_path / "a.safetensors", 0, UNet())
    files = LoraFiles()
    before, _ = files.read(path)
    write_lora(tmp_path / "a.safetensors", 1, UNet())
    os.utime(path, (1, 1))
    after, _ = files.read(path)
    assert len(reads) == 2
    assert before != after


def test_only_the_last_few_are_kept(tmp_path, reads):
    paths = [write_lora(tmp_path / f"{i}.safetensors", i, UNet()) for i in range(3)]
    files = LoraFiles(limit=2)
    for path in (*paths, paths[2], paths[1], paths[0]):
        files.read(path)
    assert reads == [*paths, paths[0]]


def test_a_damaged_file_is_not_remembered(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    files = LoraFiles()
    with pytest.raises(LoraError):
        files.read(str(path))
    write_lora(path, 0, UNet())
    assert files.read(str(path))[1].denoiser


def test_tensors_read_under_inference_mode_are_ordinary_ones(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", 0, UNet())
    with torch.inference_mode():
        _, file = LoraFiles().read(path)
    branch = next(iter(file.denoiser.values()))
    assert not branch.up.is_inference()
