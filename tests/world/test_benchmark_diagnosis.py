"""What a trace is said to tell, on traces written by hand."""

import pytest
import torch

from dynfuse_world.benchmark.diagnosis import depth, diagnosis, flips, kind, loudness, over_pairs
from lib_dynfuse.fusion import Trace
from lib_dynfuse.fusion.rules import Member
from lib_dynfuse.lora.naming import Site

SELF = Site("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q")
CROSS = Site("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0")
ALONE = Site("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_v")


def trace(winners, divergences=None):
    """winners: (steps, 2 sites, images); a third site belongs to the subject alone."""
    winners = torch.tensor(winners, dtype=torch.bool)
    steps, _, images = winners.shape
    winners = torch.cat([winners, torch.ones(steps, 1, images, dtype=torch.bool)], 1)
    if divergences is None:
        divergences = torch.ones(steps, 3, images, 2)
    return recorded(torch.stack([winners, ~winners], -1).float(), divergences)


def recorded(weights, divergences):
    """weights: (steps, 3 sites, images, 2)."""
    reached = torch.ones(weights.shape[:2], dtype=torch.bool)
    measured = reached & torch.tensor([True, True, False])
    present = torch.tensor([[True, True], [True, True], [True, False]])
    members = (Member("zib", True), Member("blueprint", False))
    return Trace((SELF, CROSS, ALONE), members, weights, divergences, reached, measured, present)


def test_sites_are_told_apart_by_kind_and_depth():
    assert [kind(site) for site in (SELF, CROSS, ALONE, Site("conv_in"))] == ["self q", "cross out", "self v", "other"]
    assert [depth(site) for site in (SELF, CROSS, ALONE, Site("conv_in"))] == ["down 0", "mid", "up 3", "other"]


def test_shares_are_of_the_choices_alone():
    found = diagnosis(trace([[[1, 1], [0, 1]], [[1, 1], [0, 0]]]))
    assert found.share == pytest.approx(5 / 8)
    assert found.by_kind == {"self q": 1.0, "cross out": pytest.approx(1 / 4)}
    assert found.by_depth == {"down 0": 1.0, "mid": pytest.approx(1 / 4)}
    assert found.by_step == pytest.approx([3 / 4, 1 / 2])
    assert found.flips == pytest.approx(1 / 4)
    assert found.agreement is None


def test_no_choice_no_diagnosis():
    none = torch.zeros(0, 3, 0, 2)
    assert diagnosis(recorded(none, none)) is None


def test_flips_between_all_steps_none_and_one_step():
    assert flips(torch.tensor([[[True]], [[False]], [[True]]])) == 1
    assert flips(torch.ones(3, 2, 1, dtype=torch.bool)) == 0
    assert flips(torch.ones(1, 2, 1, dtype=torch.bool)) == 0


def test_loudness_is_the_geometric_mean_over_pictures_of_the_ratio_of_sums():
    divergences = torch.tensor([[[[1.0, 1.0], [8.0, 1.0]]], [[[3.0, 0.0], [0.0, 1.0]]]])  # two steps, a site, two pictures
    assert loudness(divergences) == pytest.approx((4 * 4) ** 0.5)
    assert loudness(-divergences) == pytest.approx(4)
    assert loudness(divergences * torch.tensor([1.0, -1.0])) is None
    assert loudness(torch.zeros(1, 1, 1, 2)) is None


def test_rows_agree_where_both_choose_alike():
    """The first half of the images are the unconditional rows."""
    found = diagnosis(trace([[[1, 0, 1, 1], [0, 0, 0, 1]]]), all_rows=True)
    assert found.agreement == pytest.approx(2 / 4)
    assert found.share == pytest.approx(3 / 4)  # of the conditional rows


def test_over_pairs_shares_are_averaged_and_loudness_multiplied():
    loud = torch.ones(1, 3, 1, 2) * torch.tensor([16.0, 1.0])
    first, second = diagnosis(trace([[[1], [1]]], loud)), diagnosis(trace([[[1], [0]]]))
    found = over_pairs([first, second])
    assert found.share == pytest.approx(3 / 4)
    assert found.by_kind["cross out"] == pytest.approx(1 / 2)
    assert found.loudness == pytest.approx(4)
