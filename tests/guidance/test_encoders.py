"""The encoders, against the real libraries' own models, and what they make of damaged and hostile files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import sys
import warnings
import zipfile

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTForImageClassification

from lib_dynfuse.guidance import encoders as module
from lib_dynfuse.guidance.encoders import EncoderError, EncoderSources, load_encoders
from tests.fakes.encoders import clip_model, dino_model, small_encoders, write_clip, write_dino

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def models(tmp_path):
    """Folders of both models; load(clip=..., dino=...) by them or by others."""
    clip, dino = write_clip(tmp_path / "clip"), write_dino(tmp_path / "dino")

    class Models:
        folder = tmp_path
        clip_weights, dino_weights = clip / "open_clip_model.safetensors", dino / "model.safetensors"
        clip_config, dino_config = clip / "open_clip_config.json", dino / "config.json"

        @staticmethod
        def load(**names):
            return load_encoders(EncoderSources(tmp_path, **{"clip": str(clip), "dino": str(dino), "download": False, **names}))

    return Models


@pytest.fixture
def small_architecture(monkeypatch):
    """open_clip's table has one architecture, "small", that of clip_model()."""
    config = clip_model()[1]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(config) if name == "small" else None)
    return config


def photo(height=50, width=37, seed=0):
    low = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    return low.resize((width, height), Image.Resampling.BICUBIC)


def by_pillow(picture, size, mean, std):
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None].float()


def pictures(count=2, height=40, width=56, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normalised(features):
    return F.normalize(features, dim=-1)


# --- what they compute


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_clip_is_open_clips_own_image_encoder(tmp_path, models, quick_gelu):
    model, _ = clip_model(seed=3, quick_gelu=quick_gelu)
    encoders = models.load(clip=str(write_clip(tmp_path / "other", seed=3, quick_gelu=quick_gelu)))
    with torch.no_grad():
        expected = normalised(model.encode_image(by_pillow(photo(), 32, OPENAI_MEAN, OPENAI_STD)))
    assert torch.allclose(encoders.embed_picture(photo()).clip, expected, atol=0.01)  # Pillow's rounding
    inputs = module.prepared(pictures(), 32, OPENAI_MEAN, OPENAI_STD)
    with torch.no_grad():
        assert torch.allclose(encoders.clip(pictures()), normalised(model.encode_image(inputs)), atol=1e-6)


def test_dino_is_the_class_token_of_transformers_own_vit(tmp_path, models):
    model = dino_model(seed=3)
    encoders = models.load(dino=str(write_dino(tmp_path / "other", seed=3)))
    with torch.no_grad():
        expected = model(by_pillow(photo(), 32, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]
    assert torch.allclose(encoders.embed_picture(photo()).dino, normalised(expected), atol=0.01)
    with torch.no_grad():
        expected = model(module.prepared(pictures(), 32, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]
    assert torch.allclose(encoders.embed(pictures()).dino, normalised(expected), atol=1e-6)


def test_the_files_numbers_for_preprocessing_count(models):
    before = models.load().embed(pictures())
    config = json.loads(models.clip_config.read_text())
    models.clip_config.write_text(json.dumps({**config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    (models.folder / "dino" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    encoders = models.load()
    assert encoders.clip.mean == encoders.clip.std == encoders.dino.mean == encoders.dino.std == (0.5, 0.5, 0.5)
    after = encoders.embed(pictures())
    assert not torch.allclose(before.clip, after.clip, atol=1e-3)
    assert not torch.allclose(before.dino, after.dino, atol=1e-3)


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(models):
    encoders, batch = models.load(), pictures(3)
    together = encoders.embed(batch)
    for side in ("clip", "dino"):
        embedding = getattr(together, side)
        assert embedding.shape == (3, 32)
        assert torch.allclose(embedding.norm(dim=-1), torch.ones(3))
        alone = torch.cat([getattr(encoders.embed(picture[None]), side) for picture in batch])
        assert torch.allclose(embedding, alone, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_picture_gives_float32(models, dtype):
    encoders, batch = models.load(), pictures().to(dtype)
    assert encoders.embed(batch).clip.dtype == encoders.embed(batch).dino.dtype == torch.float32
    assert torch.allclose(encoders.embed(batch).clip, encoders.embed(batch.float()).clip)


def test_the_gradient_by_finite_differences(models):
    encoders = models.load()
    for encoder in (encoders.clip, encoders.dino):
        encoder.network.double()
    target = normalised(torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    batch = (pictures(1, 12, 9).double() / 2).requires_grad_()  # neither black nor white: nothing is cut off
    step = 1e-5
    for encoder in (encoders.clip, encoders.dino):
        (gradient,) = torch.autograd.grad(encoder(batch).squeeze(0) @ target, batch)
        for y, x in ((3, 4), (11, 8), (0, 5)):
            shift = torch.zeros_like(batch)
            shift[0, 1, y, x] = step
            with torch.no_grad():
                difference = ((encoder(batch + shift) - encoder(batch - shift)).squeeze(0) @ target) / (2 * step)
            assert gradient[0, 1, y, x].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-9)


# --- inside a host's job


def test_built_and_moved_in_inference_mode_they_can_be_differentiated_through():
    with torch.inference_mode():
        encoders = small_encoders(seed=11).to("cpu")
        inside = pictures()
        assert not encoders.embed(inside).clip.is_inference()
        assert not encoders.embed_picture(photo()).dino.is_inference()
        with torch.inference_mode(False), torch.enable_grad():
            batch = inside.clone().requires_grad_()
            (encoders.clip(batch).sum() + encoders.dino(batch).sum()).backward()
    assert batch.grad.abs().sum() > 0
    for encoder in (encoders.clip, encoders.dino):
        assert not any(parameter.requires_grad or parameter.is_inference() for parameter in encoder.network.parameters())
        assert not encoder.network.training


def test_a_hosts_autocast_changes_nothing(models):
    encoders = models.load()

    def results(autocast):
        batch = pictures().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert (F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16) == autocast
            embeddings = encoders.clip(batch), encoders.dino(batch)
        (embeddings[0][:, 0] + embeddings[1][:, 0]).sum().backward()
        return *embeddings, batch.grad

    assert all(torch.equal(one, other) for one, other in zip(results(False), results(True)))


def test_classes_that_a_host_patches_change_nothing(models, monkeypatch):
    plain = models.load().embed(pictures())

    def halved(original):
        return lambda self, *inputs, **options: original(self, *(each.bfloat16().float() for each in inputs), **options)

    for kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.MultiheadAttention):
        monkeypatch.setattr(kind, "forward", halved(kind.forward))
    assert not torch.equal(nn.Linear(2, 2)(torch.tensor([[1.001, 1.001]])), F.linear(torch.ones(1, 2), torch.ones(2, 2)))
    for encoders in (models.load(), models.load(clip=str(write_clip(models.folder / "again")))):  # loaded before, and now
        patched = encoders.embed(pictures())
        assert torch.equal(plain.clip, patched.clip)
        assert torch.equal(plain.dino, patched.dino)


def test_they_are_moved_in_place():
    encoders = small_encoders()
    assert encoders.to("cpu") is encoders
    assert encoders.to(torch.device("cpu")) is encoders
    tower = sum(weight.numel() * 4 for weight in clip_model()[0].visual.parameters())
    vit = sum(weight.numel() * 4 for name, weight in dino_model().named_parameters() if not name.startswith("pooler"))
    assert encoders.memory == tower + vit  # no text tower, no pooling layer


def test_a_picture_of_any_mode_is_embedded(models):
    encoders = models.load()
    plain = encoders.embed_picture(photo())
    assert torch.equal(encoders.embed_picture(photo().convert("RGBA")).clip, plain.clip)
    grey = encoders.embed_picture(photo().convert("L"))
    assert torch.equal(grey.clip, encoders.embed_picture(photo().convert("L").convert("RGB")).clip)


# --- where their files come from


def test_loaded_once_as_long_as_the_files_are_the_same(models):
    first = models.load()
    assert models.load() is first
    write_clip(models.clip_weights.parent, seed=1)
    os.utime(models.clip_weights, (1, 1))
    second = models.load()
    assert second is not first
    assert second.identity != first.identity
    assert not torch.allclose(first.embed(pictures()).clip, second.embed(pictures()).clip, atol=1e-3)


def test_the_identity_of_local_models_is_their_content(models, tmp_path):
    elsewhere = models.load(clip=str(write_clip(tmp_path / "copy")), dino=str(write_dino(tmp_path / "copy of dino")))
    assert elsewhere.identity == models.load().identity
    assert models.load(dino=str(write_dino(tmp_path / "another", seed=1))).identity != elsewhere.identity


def test_models_by_name_are_identified_by_it(tmp_path, small_architecture):
    write_dino(tmp_path / "facebook--dino-vits16")
    write_clip(tmp_path / "small--openai")
    encoders = load_encoders(EncoderSources(tmp_path, clip="small/openai", download=False))
    assert encoders.identity == "small/openai facebook/dino-vits16"


def test_openais_training_wants_its_gelu(tmp_path, models, small_architecture):
    folder = write_clip(tmp_path / "small--openai")
    (folder / "open_clip_config.json").unlink()
    with torch.no_grad():
        expected = normalised(clip_model(quick_gelu=True)[0].visual(module.prepared(pictures(), 32, OPENAI_MEAN, OPENAI_STD)))
    assert torch.allclose(models.load(clip="small/openai").embed(pictures()).clip, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["safetensors", "state", "training", "legacy", "half"])
def test_a_weight_file_of_an_architecture(models, tmp_path, small_architecture, form):
    state = clip_model()[0].state_dict()
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, file)
    elif form == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": weight for name, weight in state.items()}}, file)
    else:
        state = {name: weight.half() for name, weight in state.items()} if form == "half" else state
        torch.save(state, file, _use_new_zipfile_serialization=form != "legacy")
    assert torch.allclose(
        models.load(clip=f"small={file}").embed(pictures()).clip,
        models.load().embed(pictures()).clip,
        atol=1e-2 if form == "half" else 1e-6,
    )


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.visual = model.visual
        self.register_buffer("input_resolution", torch.tensor(32))
        self.logit_scale = model.logit_scale

    def forward(self, pictures):
        return self.visual(pictures) * self.logit_scale.exp()


def archive(file, model, half=False):
    wrapped = Wrapped(model).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing fixes once and for all does not matter here
        scripted = torch.jit.trace(wrapped, torch.zeros(1, 3, 32, 32), check_trace=False)
    (scripted.half() if half else scripted).save(str(file))


@pytest.mark.parametrize("half", [False, True])
def test_openais_archives_are_read_without_running_them(models, tmp_path, small_architecture, monkeypatch, half):
    file = tmp_path / "small.pt"
    archive(file, clip_model(quick_gelu=True)[0], half)
    reference = torch.jit.load(str(file)).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    state = module.torchscript_state(file)
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[name], weight) and state[name].dtype == weight.dtype for name, weight in reference.items())
    with torch.no_grad():
        expected = normalised(clip_model(quick_gelu=True)[0].visual(module.prepared(pictures(), 32, OPENAI_MEAN, OPENAI_STD)))
    assert torch.allclose(models.load(clip=f"small={file}").embed(pictures()).clip, expected, atol=1e-2 if half else 1e-6)


def test_dino_from_a_pickle_or_a_classifier(models):
    expected = models.load().embed(pictures()).dino
    state = load_file(models.dino_weights)
    models.dino_weights.unlink()
    torch.save(state, models.folder / "dino" / "pytorch_model.bin")
    assert torch.equal(models.load().embed(pictures()).dino, expected)
    classifier = ViTForImageClassification(dino_model().config)
    classifier.vit.load_state_dict(state, strict=False)
    classifier.save_pretrained(models.folder / "dino", safe_serialization=True)
    assert torch.equal(models.load().embed(pictures()).dino, expected)


def test_building_them_draws_none_of_a_jobs_random_numbers(models):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.load()
    assert torch.equal(torch.rand(3), expected)


def test_building_them_needs_no_network(models, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = json.loads(models.clip_config.read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}
    models.clip_config.write_text(json.dumps(config))
    models.load()


# --- damaged, foreign, hostile


class Hostile:
    def __init__(self, folder):
        self.mark = folder / "executed"

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_not_opened(models, tmp_path, small_architecture):
    mark = tmp_path / "executed"
    torch.save({"visual.proj": Hostile(tmp_path)}, tmp_path / "hostile.pt")
    with pytest.raises(EncoderError, match="might be code, and was not opened"):
        models.load(clip=f"small={tmp_path / 'hostile.pt'}")
    models.dino_weights.unlink()
    torch.save({"cls": Hostile(tmp_path)}, models.folder / "dino" / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="might be code, and was not opened"):
        models.load()
    assert not mark.exists()


def test_an_archive_that_would_run_code_is_not_opened(models, tmp_path, small_architecture):
    archive(tmp_path / "plain.pt", clip_model()[0])
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "hostile.pt", "w") as hostile:
        for name in plain.namelist():
            hostile.writestr(name, pickle.dumps(Hostile(tmp_path)) if name.endswith("/data.pkl") else plain.read(name))
    with pytest.raises(EncoderError, match="might be code, and was not opened"):
        models.load(clip=f"small={tmp_path / 'hostile.pt'}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", ["safetensors", "pickle", "archive", "empty", "text"])
def test_a_damaged_file_is_refused_in_one_sentence(models, tmp_path, small_architecture, form):
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(clip_model()[0].state_dict(), file)
    elif form == "archive":
        archive(file, clip_model()[0])
    else:
        torch.save(clip_model()[0].state_dict(), file)
    content = {"empty": b"", "text": b"<html>not found</html>"}.get(form, file.read_bytes()[: file.stat().st_size // 2])
    file.write_bytes(content)
    with pytest.raises(EncoderError) as error:
        models.load(clip=f"small={file}")
    assert str(error.value).startswith(f"The encoder small={file} cannot be loaded from {file}: it is damaged")
    assert str(error.value).endswith((").", "opened."))
    assert "\n" not in str(error.value)


def test_damaged_bytes_inside_an_archive_are_noticed(models, tmp_path, small_architecture):
    file = tmp_path / "small.pt"
    archive(file, clip_model()[0])
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as plain:
        largest = max(plain.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 1000] ^= 0xFF
    file.write_bytes(bytes(content))
    with pytest.raises(EncoderError, match="it is damaged"):
        models.load(clip=f"small={file}")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "none of its tensors has a name that begins with visual."),
        ({"text_projection": torch.zeros(2)}, "none of its tensors has a name that begins with visual."),
        ({"visual.proj": torch.zeros(2)}, "its weights are of another model, they lack class_embedding"),
    ],
)
def test_weights_of_another_model_are_refused(models, weights, reason):
    save_file(weights, models.clip_weights)
    with pytest.raises(EncoderError, match=f": {reason}"):
        models.load()


def test_weights_of_another_size_are_refused(models, tmp_path):
    narrow = write_dino(tmp_path / "narrow", width=16)
    (models.folder / "dino" / "model.safetensors").write_bytes((narrow / "model.safetensors").read_bytes())
    with pytest.raises(
        EncoderError, match=r"its weights are of another model, embeddings\.cls_token is 1 × 1 × 16 instead of 1 × 1 × 32\.$"
    ):
        models.load()
    deep = write_clip(tmp_path / "deep", layers=3)
    models.clip_weights.write_bytes((deep / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(EncoderError, match=r"its weights are of another model, which has transformer\.resblocks\.2"):
        models.load()


def test_weights_that_are_not_finite_are_refused(models):
    state = load_file(models.clip_weights)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, models.clip_weights)
    with pytest.raises(EncoderError, match=r"its weights are damaged, proj is not finite\.$"):
        models.load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read: "),
        ("[]", "cannot be read: it describes no model."),
        ('{"model_cfg": {"embed_dim": 32}}', r"open_clip_torch [\d.]+ cannot build it \('vision_cfg'\)"),
        ('{"model_cfg": {"embed_dim": 32, "vision_cfg": {"future": 1}}}', r"open_clip_torch [\d.]+ cannot build it \(.*'future'\)"),
    ],
)
def test_a_clip_configuration_that_cannot_be_understood_is_refused(models, content, reason):
    models.clip_config.write_text(content)
    with pytest.raises(EncoderError, match=reason):
        models.load()


def test_an_architecture_that_open_clip_does_not_know_is_refused(models):
    with pytest.raises(EncoderError, match=r"open_clip_torch [\d.]+ knows no architecture ViT-Q\.$"):
        models.load(clip=f"ViT-Q={models.clip_weights}")


def test_another_kind_of_vision_model_is_refused(models):
    models.dino_config.write_text('{"model_type": "dinov2"}')
    with pytest.raises(EncoderError, match=r"config\.json describes a model of type dinov2, and only vit is supported\.$"):
        models.load()


@pytest.mark.parametrize("missing", ["open_clip", "transformers"])
def test_a_missing_package_is_named(models, monkeypatch, missing):
    load_encoders.__globals__["_loaded"].clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EncoderError, match="The guidance needs the Python package"):
        models.load()
