"""The exotic kinds against LyCORIS' own functions, where a version that imports is installed."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse.lora.branch import bound
from lib_dynfuse.lora.kinds import branch_of

from .writing import random

try:
    from lycoris.functional import boft, diag_oft, loha, lokr
except Exception as error:  # 4.x fails in several ways below torch 2.4, not only with ImportError
    pytest.skip(f"needs lycoris-lora 3.4.0: {type(error).__name__}: {error}", allow_module_level=True)

OUT, IN, RANK = 16, 8, 3


def ours(tensors, weight=None):
    return bound(branch_of(tensors)[1], lambda: weight).delta_weight()


@pytest.mark.parametrize("tucker", [False, True])
def test_loha(tucker):
    a = [random(RANK, OUT, seed=s) if tucker else random(OUT, RANK, seed=s) for s in (0, 1)]
    b = [random(RANK, IN, seed=s) for s in (2, 3)]
    t = [random(RANK, RANK, 3, 3, seed=s) for s in (4, 5)] if tucker else [None, None]
    tensors = {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1], "alpha": torch.tensor(1.5)}
    if tucker:
        tensors |= {"hada_t1": t[0], "hada_t2": t[1]}
    theirs = loha.diff_weight(b[0], a[0], b[1], a[1], *t, gamma=torch.tensor(0.5))
    torch.testing.assert_close(ours(tensors), theirs)


@pytest.mark.parametrize("form", ["matrices", "convolution", "tucker"])
def test_lokr(form):
    first = random(4, 2)
    a, b, t = {
        "matrices": (random(4, 2), random(2, 4), None),
        "convolution": (random(4, 2), random(2, 4, 3, 3), None),
        "tucker": (random(2, 4), random(2, 4, seed=1), random(2, 2, 3, 3)),
    }[form]
    tensors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b} | ({} if t is None else {"lokr_t2": t})
    # Its scale is gamma over w2_a's second dimension, which is the rank except in Tucker form: so that it is 1.
    theirs = lokr.diff_weight(first, None, None, None, a, b, t, gamma=a.shape[1])
    torch.testing.assert_close(ours(tensors), theirs)


@pytest.mark.parametrize("constraint", [0.0, 0.01])
@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, IN, 3, 3)])
def test_oft_and_boft(shape, constraint):
    weight = random(*shape)
    rescale = random(OUT, *(1,) * (len(shape) - 1), seed=2)
    # diag_oft's own rescaling fails on shapes in 3.4.0.
    for blocks, function, factors in ((0.3 * random(4, 4, 4), diag_oft, None), (0.3 * random(2, 4, 4, 4), boft, rescale)):
        theirs = function.diff_weight(weight, blocks, factors, constraint=constraint * OUT)
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)} | ({} if factors is None else {"rescale": factors})
        torch.testing.assert_close(ours(tensors, weight), theirs, rtol=1e-4, atol=1e-5)
