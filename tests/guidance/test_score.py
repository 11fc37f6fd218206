"""The score R and its terms (paper, Eqs. 16-19), against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.score import LABELS, TERMS, Targets, score, similarities
from tests.fakes.encoders import small_encoders

ENCODERS = small_encoders(seed=21)


def pictures(count=2, seed=0):
    return torch.rand(count, 3, 24, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


SUBJECT, STYLE = ENCODERS.embed(pictures(1, seed=1)), ENCODERS.embed(-pictures(1, seed=2))
TARGETS = Targets.of(SUBJECT, STYLE)


def cosine(a, b):
    a, b = (each.double().numpy() for each in (a, b))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_the_terms_are_the_cosines_with_the_two_references():
    found = similarities(pictures(), TARGETS, ENCODERS)
    embeddings = ENCODERS.embed(pictures())
    assert found.shape == (len(TERMS), 2) == (len(LABELS), 2)
    for image in range(2):
        expected = [
            cosine(embeddings.clip[image], SUBJECT.clip[0]),
            cosine(embeddings.clip[image], STYLE.clip[0]),
            cosine(embeddings.dino[image], STYLE.dino[0]),
        ]
        assert found[:, image].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_reference_is_as_similar_to_itself_as_can_be():
    found = similarities(pictures(1, seed=1), Targets.of(SUBJECT, SUBJECT), ENCODERS)
    assert torch.allclose(found, torch.ones(3, 1), atol=1e-6)
    assert score(found, (1 / 3, 1 / 3, 1 / 3)).item() == pytest.approx(0, abs=1e-6)


def test_the_score_is_one_less_the_weighted_terms():
    terms = torch.tensor([[0.5, -1.0], [0.25, 0.0], [1.0, 1.0]])
    assert score(terms, (0.5, 1.0, 0.125)).tolist() == pytest.approx([1 - 0.25 - 0.25 - 0.125, 1 + 0.5 - 0.125])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False,) * 3])
def test_unwanted_terms_are_zero_and_cost_no_encoder(monkeypatch, wanted):
    everything, runs = similarities(pictures(), TARGETS, ENCODERS), []
    for side in ("clip", "dino"):
        encoder = getattr(ENCODERS, side)
        monkeypatch.setattr(ENCODERS, side, lambda inputs, side=side, encoder=encoder: runs.append(side) or encoder(inputs))
    found = similarities(pictures(), TARGETS, ENCODERS, wanted)
    assert runs == ["clip"] * (wanted[0] or wanted[1]) + ["dino"] * wanted[2]
    assert torch.equal(found, torch.where(torch.tensor(wanted)[:, None], everything, torch.zeros(())))


def test_the_gradient_of_the_score_by_finite_differences():
    encoders = small_encoders(seed=22)
    encoders.clip.network.double(), encoders.dino.network.double()
    weights = (0.5, 0.2, 0.3)
    batch = (pictures().double() / 2).requires_grad_()  # neither black nor white: nothing is cut off

    def total(inputs):
        return score(similarities(inputs, TARGETS, encoders), weights)

    (gradient,) = torch.autograd.grad(total(batch).sum(), batch)
    direction = torch.randn(batch.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-6
    with torch.no_grad():
        difference = (total(batch + step * direction) - total(batch - step * direction)) / (2 * step)
    along = (gradient * direction).flatten(1).sum(1)
    assert along.abs().min() > 1e-4
    assert torch.allclose(along, difference, rtol=1e-5)


def test_no_image_pulls_at_another():
    batch = pictures(3).requires_grad_()
    (together,) = torch.autograd.grad(score(similarities(batch, TARGETS, ENCODERS), (1 / 3,) * 3).sum(), batch)
    for image in range(3):
        one = batch[image : image + 1].detach().requires_grad_()
        (alone,) = torch.autograd.grad(score(similarities(one, TARGETS, ENCODERS), (1 / 3,) * 3).sum(), one)
        assert torch.allclose(together[image], alone[0], atol=1e-6 * alone.abs().max().item(), rtol=1e-3)


def test_following_the_gradient_brings_the_picture_closer():
    picture = pictures(1, seed=9)
    scores = []
    for _ in range(12):
        picture = picture.detach().requires_grad_()
        value = score(similarities(picture, TARGETS, ENCODERS), (1 / 3,) * 3)
        scores.append(value.item())
        (gradient,) = torch.autograd.grad(value.sum(), picture)
        picture = picture - 0.1 * gradient / gradient.abs().max()
    assert scores[-1] < 0.7 * scores[0]


def test_targets_move_and_fit_pictures_of_any_dtype():
    targets = TARGETS.to("cpu")
    assert torch.equal(targets.content_clip, SUBJECT.clip[0])
    halved = Targets.of(*(Embeddings(each.clip.half(), each.dino.half()) for each in (SUBJECT, STYLE)))
    found = similarities(pictures().bfloat16(), halved, ENCODERS)
    assert found.dtype == torch.float32
    assert torch.allclose(found, similarities(pictures(), TARGETS, ENCODERS), atol=0.02)
