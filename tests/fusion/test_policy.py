"""Ties, bias, balance, and numbers that are not finite."""

import math

import pytest
import torch

from lib_dynfuse.fusion.policy import gamma, subject_wins

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("subject", "style", "threshold", "wins"),
    [
        (2.0, 1.0, 1.0, True),
        (1.0, 2.0, 1.0, False),
        (1.0, 1.0, 1.0, True),
        (1.0, 2.0, 0.5, True),
        (1.0, 1.0, 1.01, False),
        (-2.0, -1.0, 1.0, False),
        (NAN, 1.0, 1.0, True),
        (1.0, NAN, 1.0, True),
        (NAN, NAN, 1.0, True),
        (INF, 1.0, 1.0, True),
        (1.0, INF, 1.0, True),
        (INF, INF, 1.0, True),
        (0.0, 0.0, 0.0, True),
        (1.0, INF, 0.0, True),
    ],
)
def test_subject_wins(subject, style, threshold, wins):
    divergences = torch.tensor([[subject], [style]])
    assert subject_wins(divergences, threshold).tolist() == [wins]
    assert subject_wins(divergences, torch.tensor([threshold])).tolist() == [wins]


def test_gamma_is_the_ratio_of_the_sums_for_every_image_apart():
    divergences = torch.tensor([[[1.0, 4.0], [2.0, 1.0]], [[3.0, 0.0], [2.0, 1.0]]])  # (layers, 2, images)
    assert gamma(divergences).tolist() == [1.0, 2.0]


def test_gamma_leaves_out_what_is_not_finite_and_is_one_without_anything_to_compare():
    divergences = torch.tensor([[[NAN, 0.0], [4.0, 0.0]], [[2.0, 3.0], [INF, 0.0]]])
    assert gamma(divergences).tolist() == [0.5, 1.0]


def test_gamma_of_a_criterion_that_may_be_negative_compares_sizes():
    assert gamma(torch.tensor([[[-3.0], [1.0]], [[1.0], [-1.0]]])).tolist() == [2.0]
