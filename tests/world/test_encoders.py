"""The guidance's small encoders: made here, used like a user's own."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dynfuse_world.captions import caption, name_of, words
from dynfuse_world.model import WEIGHTS
from dynfuse_world.painter import CLASSES, HELD_OUT_STYLES, STYLES, SUBJECTS, Scene
from dynfuse_world.training.encoders import CLIP_MODEL, CONTEXT, clip_tokens, contrastive_loss, new_clip, new_vit, write_clip, write_vit
from dynfuse_world.training.pictures import as_floats, as_tensor
from lib_dynfuse.guidance.encoders import EncoderSources, load_encoders

pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")


def sources(folder):
    return EncoderSources(folder, clip=str(folder / "clip"), dino=str(folder / "dino"), download=False)


def pictures_of(scenes, seed=515_151):
    return as_floats(as_tensor(scenes, random.Random(seed)))


def test_every_caption_fits_and_ends_with_the_highest_number():
    subjects = [name_of(name) for name in (*CLASSES, *SUBJECTS)]
    captions = [caption(what, style) for what in subjects for style in (*STYLES, *HELD_OUT_STYLES)]
    tokens = clip_tokens([*captions, f"a {max(words(), key=len)}"])
    assert tokens.shape[1] == CONTEXT
    assert len({tuple(row) for row in tokens.tolist()}) == len(captions) + 1
    end = CLIP_MODEL["text_cfg"]["vocab_size"] - 1
    assert bool(((tokens == end).sum(1) == 1).all())  # where CLIP reads its answer
    assert int(tokens.max()) == end


def test_pictures_with_the_same_caption_are_all_right_ones():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    captions = ["a cat", "a car", "a cat", "a cup"]
    expected = 0.0
    for table in (logits, logits.T):
        for row in range(4):
            right = [column for column in range(4) if captions[column] == captions[row]]
            shares = table[row].softmax(0)
            expected -= sum(shares[column].log() for column in right) / len(right) / 4 / 2
    torch.testing.assert_close(contrastive_loss(logits, captions).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_folders_are_those_of_open_clip_and_transformers(tmp_path):
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    write_clip(new_clip(), tmp_path / "clip")
    write_vit(new_vit(), tmp_path / "dino")
    config = json.loads((tmp_path / "clip/open_clip_config.json").read_text("utf-8"))
    clip = open_clip.CLIP(**config["model_cfg"]).eval()
    clip.load_state_dict({name: tensor.float() for name, tensor in load_file(tmp_path / "clip/open_clip_model.safetensors").items()})
    vit = transformers.ViTModel.from_pretrained(tmp_path / "dino", add_pooling_layer=False, torch_dtype=torch.float32).eval()

    pictures = pictures_of([Scene("cat", "flat"), Scene("car", "neon")])
    embeddings = load_encoders(sources(tmp_path)).embed(pictures)
    with torch.no_grad():
        torch.testing.assert_close(embeddings.clip, clip.encode_image(pictures, normalize=True), rtol=1e-4, atol=1e-5)
        state = vit(pixel_values=pictures).last_hidden_state[:, 0]
        torch.testing.assert_close(embeddings.dino, F.normalize(state, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["clip", "dino"])
def test_for_the_shipped_encoders_pictures_of_one_style_are_alike(encoder):
    styles = [*STYLES, *HELD_OUT_STYLES]
    rng = random.Random(5)
    scenes = [Scene(rng.choice(CLASSES), style) for style in styles for _ in range(8)]
    embeddings = getattr(load_encoders(sources(WEIGHTS)).embed(pictures_of(scenes)), encoder)
    likeness = embeddings @ embeddings.T
    same = torch.tensor([[one.style == other.style for other in scenes] for one in scenes])
    apart = same.logical_not()
    same.fill_diagonal_(False)
    for number, style in enumerate(styles):
        rows = slice(8 * number, 8 * number + 8)
        assert likeness[rows][same[rows]].mean() > likeness[rows][apart[rows]].mean(), style


def test_the_shipped_clip_matches_pictures_with_their_captions():
    clip = new_clip().eval()
    clip.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS / "clip/open_clip_model.safetensors").items()})
    pairs = [(what, style) for what in CLASSES for style in STYLES]
    with torch.no_grad():
        texts = clip.encode_text(clip_tokens([caption(*pair) for pair in pairs]), normalize=True)
        images = clip.encode_image(pictures_of([Scene(*pair) for pair in pairs]), normalize=True)
    answers = [pairs[number] for number in (images @ texts.T).argmax(1)]
    assert sum(answer[0] == pair[0] for answer, pair in zip(answers, pairs)) >= 0.6 * len(pairs)
    assert sum(answer[1] == pair[1] for answer, pair in zip(answers, pairs)) >= 0.8 * len(pairs)
