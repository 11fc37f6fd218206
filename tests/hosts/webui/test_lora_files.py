from __future__ import annotations

import json
import os

import pytest
import torch

from lib_dynfuse.hosts.webui import lora_files
from lib_dynfuse.hosts.webui.lora_files import LoraFiles
from lib_dynfuse.lora import LoraError
from tests.fakes.models import UNet, write_lora
from tests.lora.writing import pair, peft, saved


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


def test_a_file_is_read_again_when_what_lies_beside_it_changes(tmp_path, reads):
    """A file of PEFT's without metadata has its strength from adapter_config.json."""
    path = str(
        saved(
            tmp_path,
            peft("base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", *pair(640, 768, 2)),
            "adapter_model.safetensors",
        )
    )
    files = LoraFiles()

    def scale():
        (branch,) = files.read(path)[1].denoiser.values()
        return branch.scale

    before = scale()
    for alpha in (4, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
        assert scale() == alpha / 2
    (tmp_path / "adapter_config.json").unlink()
    assert scale() == before
    assert len(reads) == 4


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
