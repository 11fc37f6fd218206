"""Metrics against the libraries' own whole models and processors, and numpy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.metrics import EncoderNames, Metric, Shelf, known_metrics, metric_class
from lib_dynfuse.evaluate.metrics import encoders as encoders_module
from lib_dynfuse.guidance.weights import EncoderError
from lib_dynfuse.settings import FuseSettings
from tests.evaluate.plans import evaluation_in, noise
from tests.fakes.encoders import clip_model, dino_model, write_clip, write_dino

CLIP_MEAN, CLIP_STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
HALF = np.array([0.5] * 3)


def cropped(picture, shorter, size, mean, std):
    """By Pillow and numpy: the shorter side to `shorter`, the middle square, normalised."""
    width, height = picture.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    picture = picture.resize(scaled, Image.BICUBIC)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return normalised(picture.crop((left, top, left + size, top + size)), mean, std)


def squeezed(picture, size, filter, mean, std):
    return normalised(picture.resize((size, size), filter), mean, std)


def normalised(picture, mean, std):
    return ((np.asarray(picture, dtype=np.float64) / 255 - mean) / std).transpose(2, 0, 1)


def similarity(features, pictures, references):
    """Mean cosine of each picture to the references, float64. features: (B, 3, S, S) double -> (B, C)."""

    def unit(arrays):
        rows = features(torch.from_numpy(np.stack(arrays))).detach().numpy().astype(np.float64)
        return rows / np.sqrt((rows**2).sum(1, keepdims=True))

    return (unit(pictures) @ unit(references).T).mean(1)


def small(kind, **more):
    """A vision model of transformers with random weights that is not blind."""
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind.removesuffix('Model')}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, initializer_range=0.2, **more
    )
    torch.manual_seed(3)
    model = getattr(transformers, kind)(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture
def evaluation(tmp_path):
    return evaluation_in(tmp_path / "evaluation", pairs=1)


def scored(name, evaluation, **encoders):
    """By the metric, of all pictures of the first pair; and these, with the references it should compare them with."""
    pair = evaluation.pairs[0]
    paths = [evaluation.path(picture) for picture in evaluation.pictures()]
    metric = metric_class(name)(Shelf(EncoderNames({key: str(value) for key, value in encoders.items()}, download=False)))
    (side,) = metric.needs_references
    references = getattr(pair, f"{side}_references")
    return metric.scores(pair, paths), [Image.open(path) for path in paths], [Image.open(path) for path in references]


@pytest.mark.parametrize(("name", "side"), [("style-sim", "style"), ("clip-score", "subject")])
def test_clip(evaluation, tmp_path, name, side):
    scores, pictures, references = scored(name, evaluation, clip=write_clip(tmp_path / "clip"))
    assert metric_class(name).side == side
    model = clip_model()[0].double()
    prepared = [[cropped(picture, 32, 32, CLIP_MEAN, CLIP_STD) for picture in group] for group in (pictures, references)]
    np.testing.assert_allclose(scores, similarity(model.encode_image, *prepared), atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_dino(evaluation, tmp_path):
    scores, *groups = scored("dino-score", evaluation, dino=write_dino(tmp_path / "dino"))
    model = dino_model().double()
    prepared = [[cropped(picture, 36, 32, IMAGENET_MEAN, IMAGENET_STD) for picture in group] for group in groups]
    expected = similarity(lambda pixels: model(pixels).last_hidden_state[:, 0], *prepared)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 0.01


@pytest.mark.parametrize(
    ("name", "kind", "encoder", "prepare", "feature"),
    [
        ("vit-content", "ViTModel", "vit", lambda p: squeezed(p, 32, Image.BILINEAR, HALF, HALF), lambda o: o.last_hidden_state[:, 0]),
        ("vit-style", "ViTModel", "vit", lambda p: squeezed(p, 32, Image.BILINEAR, HALF, HALF), lambda o: o.last_hidden_state[:, 0]),
        ("dinov2-content", "Dinov2Model", "dinov2", lambda p: cropped(p, 36, 32, IMAGENET_MEAN, IMAGENET_STD), lambda o: o.pooler_output),
        ("siglip-style", "SiglipVisionModel", "siglip", lambda p: squeezed(p, 32, Image.BICUBIC, HALF, HALF), lambda o: o.pooler_output),
    ],
)
def test_vision_models_of_transformers(evaluation, tmp_path, name, kind, encoder, prepare, feature):
    model = small(kind, intermediate_size=64) if kind != "Dinov2Model" else small(kind)
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    scores, *groups = scored(name, evaluation, **{encoder: tmp_path / "model"})
    model = model.double()
    expected = similarity(lambda pixels: feature(model(pixels)), *[[prepare(picture) for picture in group] for group in groups])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(scores) > 1e-3


def test_blip2(evaluation, tmp_path):
    if not hasattr(transformers, "Blip2VisionModelWithProjection"):
        pytest.skip(f"transformers {transformers.__version__} has no Blip2VisionModelWithProjection")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    qformer = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 32}
    config = transformers.Blip2Config(vision, {**qformer, "vocab_size": 64}, num_query_tokens=4, image_text_hidden_size=16)
    torch.manual_seed(0)
    model = transformers.Blip2VisionModelWithProjection(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    scores, *groups = scored("blip2-style", evaluation, blip2=tmp_path / "model")
    model = model.double()

    def features(pixels):
        queries = model(pixels).image_embeds
        return (queries / queries.norm(dim=-1, keepdim=True)).mean(1)

    prepared = [[squeezed(picture, 32, Image.BICUBIC, CLIP_MEAN, CLIP_STD) for picture in group] for group in groups]
    np.testing.assert_allclose(scores, similarity(features, *prepared), atol=1e-4)
    assert np.ptp(scores) > 1e-3


def test_csd(evaluation, tmp_path, monkeypatch):
    """Its published checkpoint's names: a tower without a projection under "module.backbone.", its own projection beside it."""
    import open_clip

    whole, config = clip_model(quick_gelu=True)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    projection = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    tower = {f"module.backbone.{key}": value for key, value in whole.visual.state_dict().items() if key != "proj"}
    torch.save({"model_state_dict": {**tower, "module.last_layer_style": projection}}, tmp_path / "checkpoint.pth")
    scores, *groups = scored("csd-style", evaluation, csd=tmp_path / "checkpoint.pth")
    whole.visual.proj = None
    tower = whole.visual.double()
    prepared = [[cropped(picture, 32, 32, CLIP_MEAN, CLIP_STD) for picture in group] for group in groups]
    np.testing.assert_allclose(scores, similarity(lambda pixels: tower(pixels) @ projection.double(), *prepared), atol=1e-5)


def test_the_mean_is_over_all_references_and_a_picture_is_encoded_once_for_all_metrics_of_an_encoder(tmp_path):
    clip, paths = write_clip(tmp_path / "clip"), []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        noise(number).save(paths[-1])
    shelf = Shelf(EncoderNames({"clip": str(clip)}, download=False))
    rows = shelf.encoded("clip", paths).double().numpy()
    calls = []
    encoder = shelf.encoder("clip")
    encoder.network.register_forward_hook(lambda *_: calls.append(1))
    pair = evaluation_in(tmp_path / "e", pairs=1).pairs[0]
    several = type(pair)(pair.name, "s0", "t0", ("a",), tuple(paths[1:]), tuple(paths[1:]))
    for name in ("style-sim", "clip-score"):
        (score,) = metric_class(name)(shelf).scores(several, paths[:1])
        assert score == pytest.approx((rows[0] @ rows[1] + rows[0] @ rows[2]) / 2, abs=1e-6)
    assert calls == []


@pytest.mark.parametrize(
    ("name", "names", "sentence"),
    [
        ("vit-content", {"vit": "no/such-model"}, "The encoder no/such-model cannot be loaded"),
        ("clip-score", {"clip": "ViT-B-32/nobody"}, "ViT-B-32/nobody"),
        ("csd-style", {}, "CSD's checkpoint"),
        ("csd-style", {"csd": "setup.txt"}, "CSD's checkpoint setup.txt"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_told_in_a_sentence(tmp_path, name, names, sentence):
    metric = metric_class(name)(Shelf(EncoderNames(names, folder=tmp_path, download=False)))
    with pytest.raises(EncoderError, match=sentence):
        metric.prepare()


def test_an_encoder_that_an_older_library_does_not_have_is_told_in_a_sentence(monkeypatch):
    class Older:
        __version__ = "4.30.2"

    monkeypatch.setattr(encoders_module, "imported", lambda package, module: Older)
    with pytest.raises(EncoderError, match=r"transformers 4\.30\.2 has no SiglipVisionModel, which the encoder .* needs: use a newer one"):
        metric_class("siglip-style")(Shelf(EncoderNames(download=False))).prepare()


def test_a_metric_of_ones_own_is_named_by_module_and_class():
    assert metric_class(f"{__name__}:Brightness") is Brightness
    for name in (f"{__name__}:noise", f"{__name__}:Nothing", "nothing"):
        with pytest.raises(EvaluationError, match="metrics: "):
            metric_class(name)


class Brightness(Metric):
    name, side, family, protocol = "brightness", "style", "own", "The mean of all values."

    def scores(self, pair, pictures):
        return [float(np.asarray(Image.open(path)).mean()) for path in pictures]


def test_metrics_warn_of_methods_that_raise_them():
    guided, compares = FuseSettings(guidance=True), FuseSettings(method="est-lora")
    warned = {name for name in known_metrics() if metric_class(name).optimised_by(guided)}
    assert warned == {"style-sim", "clip-score", "dino-score"}
    assert {name for name in known_metrics() if metric_class(name).optimised_by(compares)} == {"dino-score"}
    for harmless in (FuseSettings(), FuseSettings(guidance=True, m=0)):
        assert not any(metric_class(name).optimised_by(harmless) for name in known_metrics())


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    picture = noise(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert encoders_module.opened(Path(tmp_path / "turned.png")).tobytes() == picture.transpose(Image.ROTATE_270).tobytes()
