"""The paper's selection as a rule: ties, bias, balance, numbers that are not finite, and more than two LoRAs."""

import math

import pytest
import torch

from lib_dynfuse import FuseSettings
from lib_dynfuse.fusion import Step
from lib_dynfuse.fusion.rules import Member, Places, Votes
from lib_dynfuse.fusion.rules.dynfuse import DynFuse, gamma

NAN, INF = math.nan, math.inf
STEP = Step.of(0, 1)


def rule(settings=None, members="sS"):
    """members: one letter each, s for a subject and S for a style."""
    made = DynFuse()
    names = tuple(Member(letter, letter == "s") for letter in members)
    made.prepare(Places((), names, torch.ones(0, len(members), dtype=torch.bool), settings or FuseSettings(method="dynfuse"), None))
    return made


def chosen(votes, settings=None, members="sS", present=None):
    """The LoRA that each of the rows of votes, (n, B), goes to; as sites and as images."""
    votes = torch.tensor(votes)
    made = rule(settings, members)
    present = None if present is None else torch.tensor(present)
    by_site = made.weights(STEP, Votes(votes.unsqueeze(1), None if present is None else present.expand_as(votes).unsqueeze(1)))
    assert ((by_site == 0) | (by_site == 1)).all()
    assert (by_site.sum(-1) == 1).all()
    by_image = made.weights(STEP, Votes(votes.unsqueeze(0), None if present is None else present.view(1, 1, -1)))
    assert torch.equal(by_site.transpose(0, 1), by_image)
    return by_image[0].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("subject", "style", "bias", "wins"),
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
        (-INF, 1.0, 1.0, True),
        (1.0, -INF, 1.0, True),
        (0.0, 0.0, 0.0, True),
        (1.0, INF, 0.0, True),
    ],
)
def test_the_subject_wins_if_its_divergence_is_at_least_bias_times_the_styles(subject, style, bias, wins):
    assert chosen([[subject, style]], FuseSettings(method="dynfuse", bias=bias)) == [0 if wins else 1]


def test_of_more_loras_the_largest_divergence_wins_and_the_one_named_first_a_tie():
    assert chosen([[1.0, 3.0, 2.0], [1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [1.0, 2.0, INF]], members="ssS") == [1, 0, 1, 0]


def test_the_bias_is_on_styles_only():
    assert chosen([[1.0, 1.5, 1.4, 1.2]], FuseSettings(method="dynfuse", bias=2.0), members="ssSS") == [2]
    assert chosen([[1.0, 1.5, 1.4, 1.2]], FuseSettings(method="dynfuse", bias=0.5), members="ssSS") == [1]


def test_a_lora_that_does_not_change_the_site_never_wins():
    assert chosen([[9.0, 1.0, 2.0], [NAN, 1.0, 2.0]], members="ssS", present=[False, True, True]) == [2, 2]
    assert chosen([[9.0, NAN, 2.0]], members="ssS", present=[False, True, True]) == [1]


def balanced(values):
    """gamma of votes (sites, images, B) given as (sites, B, images)."""
    return gamma(Votes(torch.tensor(values).transpose(1, 2)))


def test_gamma_is_the_ratio_of_the_sums_for_every_image_apart():
    assert balanced([[[1.0, 4.0], [2.0, 1.0]], [[3.0, 0.0], [2.0, 1.0]]]).tolist() == [[1.0, 1.0], [1.0, 2.0]]


def test_gamma_leaves_out_what_is_not_finite_and_is_one_without_anything_to_compare():
    assert balanced([[[NAN, 0.0], [4.0, 0.0]], [[2.0, 3.0], [INF, 0.0]]])[:, 1].tolist() == [0.5, 1.0]


def test_gamma_of_a_criterion_that_may_be_negative_compares_sizes():
    assert balanced([[[-3.0], [1.0]], [[1.0], [-1.0]]]).tolist() == [[1.0, 2.0]]


def test_gamma_of_three_loras_makes_each_as_loud_as_the_first():
    votes = torch.rand(7, 2, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    louder = votes * torch.tensor([1.0, 5.0, 0.2])
    torch.testing.assert_close((louder * gamma(Votes(louder))).sum(0), louder[..., :1].sum(0).expand(2, 3))


def test_what_was_observed_at_the_first_step_holds_until_the_next_picture():
    made = rule(FuseSettings(method="dynfuse", balance="gamma"))
    first, later = Votes(torch.tensor([[[1.0, 4.0]]])), Votes(torch.tensor([[[1.0, 3.0]]]))
    made.observe(STEP, first)
    assert made.weights(STEP, later).tolist() == [[[1.0, 0.0]]]  # 1 against 3 / 4
    made.observe(STEP, later)
    assert made.weights(STEP, Votes(torch.tensor([[[1.0, 3.9]]]))).tolist() == [[[1.0, 0.0]]]
    made.restart()
    assert made.weights(STEP, later).tolist() == [[[0.0, 1.0]]]
