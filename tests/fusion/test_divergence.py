"""The criteria against float64 brute force from their definitions."""

import math

import pytest
import torch

from lib_dynfuse.fusion.divergence import CRITERIA, token_divergences


def brute_force(criterion, y0, d):
    """The definitions, written out over python floats: (N, T, C) and (N, T, C) in float64 -> (N, T)."""
    changed = y0 + d
    p, q = torch.softmax(y0, -1), torch.softmax(changed, -1)
    r = (p + q) / 2
    if criterion == "kl":
        return (q * (torch.log_softmax(changed, -1) - torch.log_softmax(y0, -1))).sum(-1)
    if criterion == "js":
        return (torch.xlogy(q, q / r).sum(-1) + torch.xlogy(p, p / r).sum(-1)) / 2
    if criterion == "cosine":
        return 1 - (y0 * changed).sum(-1) / (y0.norm(dim=-1) * changed.norm(dim=-1))
    return (y0 * y0).sum(-1) - (changed * y0).sum(-1)


def features(scale, spread=2.0, channels=320, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y0 = spread * torch.randn(2, 16, channels, dtype=torch.float64, generator=generator)
    d = scale * torch.randn(2, 2, 16, channels, dtype=torch.float64, generator=generator)
    return y0, d


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0, 5.0])
def test_divergence_equals_its_definition_in_float64(criterion, scale):
    y0, d = features(scale)
    expected = torch.stack([brute_force(criterion, y0, side) for side in d])
    measured = token_divergences(criterion, y0.float(), d.float())
    # The brute force itself cancels: its own error at d = 1e-3 is about 1e-16 / 5e-7.
    torch.testing.assert_close(measured.double(), expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scale", [20.0, 60.0, 200.0])
def test_a_change_beyond_the_range_of_exp_has_a_divergence_all_the_same(criterion, scale):
    """A far too strong LoRA, or a model of random weights: exp(d) alone leaves float32 at d = 88."""
    y0, d = features(scale)
    expected = torch.stack([brute_force(criterion, y0, side) for side in d])
    measured = token_divergences(criterion, y0.float(), d.float())
    torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", ["kl", "js", "cosine"])
@pytest.mark.parametrize("scale", [1e-5, 1e-4])
def test_small_changes_keep_their_digits_in_float32(criterion, scale):
    """Against the series' leading term, exact to about `scale`: KL = Var_p(d)/2, JS = Var_p(d)/8, cosine = |d_perp|^2/2|y0|^2."""
    y0, d = features(scale)
    p = torch.softmax(y0, -1)
    if criterion == "cosine":
        across = d - y0 * ((y0 * d).sum(-1) / (y0 * y0).sum(-1)).unsqueeze(-1)
        expected = across.square().sum(-1) / (2 * y0.square().sum(-1))
    else:
        variance = (p * d.square()).sum(-1) - (p * d).sum(-1).square()
        expected = variance / (2 if criterion == "kl" else 8)
    measured = token_divergences(criterion, y0.float(), d.float()).double()
    torch.testing.assert_close(measured.mean(-1), expected.mean(-1), rtol=5e-3, atol=0)


def test_kl_is_of_the_changed_features_from_the_base_and_not_the_reverse():
    """Two channels, so that both directions are known by hand: p = (1/2, 1/2), q = (3/4, 1/4)."""
    y0 = torch.zeros(1, 1, 2)
    d = torch.tensor([[[[math.log(3.0), 0.0]]], [[[0.0, 0.0]]]])
    changed_from_base = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    base_from_changed = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    measured = token_divergences("kl", y0, d)[0, 0, 0].item()
    assert measured == pytest.approx(changed_from_base, rel=1e-6)
    assert abs(measured - base_from_changed) > 0.01


def test_a_change_that_softmax_does_not_see_has_no_divergence():
    y0, d = features(0.1)
    constant = torch.full_like(d, 3.0)
    measured = token_divergences("kl", y0.float(), constant.float())
    assert measured.abs().max() < 1e-6


@pytest.mark.parametrize("criterion", CRITERIA)
def test_rms_divides_both_by_the_spread_of_the_base(criterion):
    y0, d = features(0.3, spread=4.0)
    spread = y0.std(-1, keepdim=True, unbiased=False)
    expected = torch.stack([brute_force(criterion, y0 / spread, side / spread) for side in d])
    measured = token_divergences(criterion, y0.float(), d.float(), rms=True)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-6)


def test_many_tokens_are_measured_as_few_are():
    """More elements than one chunk holds."""
    generator = torch.Generator().manual_seed(3)
    y0, d = torch.randn(1, 1000, 320, generator=generator), torch.randn(2, 1, 1000, 320, generator=generator)
    whole = token_divergences("kl", y0, d)
    for token in (0, 409, 410, 999):
        torch.testing.assert_close(whole[..., token], token_divergences("kl", y0[:, token : token + 1], d[:, :, token : token + 1])[..., 0])


def test_a_token_of_zeros_has_no_direction_to_lose():
    assert token_divergences("cosine", torch.zeros(1, 1, 8), torch.ones(2, 1, 1, 8)).eq(0).all()


@pytest.mark.parametrize("relative", [1e-3, 1e-2])
def test_bfloat16_features_decide_as_float64_does_in_close_calls(relative):
    """The change as its own bfloat16 tensor keeps the choice; added to a bfloat16 base first it would lose it."""
    generator = torch.Generator().manual_seed(5)
    trials = 200
    y0 = torch.randn(trials, 64, 320, generator=generator).bfloat16()
    subject = (relative * torch.randn(trials, 64, 320, generator=generator)).bfloat16()
    style = (relative * 1.01 * torch.randn(trials, 64, 320, generator=generator)).bfloat16()
    deltas = torch.stack([subject, style])
    exact = torch.stack([brute_force("kl", y0.double(), d.double()).mean(-1) for d in deltas])
    ours = token_divergences("kl", y0, deltas).mean(-1)
    rounded = torch.stack([brute_force("kl", y0.double(), (y0 + d).double() - y0.double()).mean(-1) for d in deltas])
    wrong = ((ours[0] >= ours[1]) != (exact[0] >= exact[1])).float().mean()
    wrong_rounded = ((rounded[0] >= rounded[1]) != (exact[0] >= exact[1])).float().mean()
    assert wrong <= 0.01
    assert wrong_rounded > wrong
