"""Each kind's change of the weight against the same formula in float64, written out by loops and plain products."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lib_dynfuse.lora.branch import Composed, Dense, FromWeight, LoraError, LowRank, NormShift, applied_size, bound, merged
from lib_dynfuse.lora.kinds import branch_of

from .writing import random

OUT, IN, RANK = 12, 8, 3


def delta(tensors: dict[str, Tensor], weight: Tensor | None = None) -> Tensor:
    """What lib_dynfuse makes of the tensors: the change of the weight."""
    made = branch_of(tensors)
    assert made is not None
    assert not isinstance(made[1], NormShift)
    return bound(made[1], lambda: weight if weight is not None else torch.empty(0)).delta_weight()


def assert_equal(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours.double(), reference.reshape(ours.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 2.0), (1.0, 1 / 3)])
def test_lora_is_alpha_over_rank_times_the_product(dtype, alpha, scale):
    down, up = random(RANK, IN, dtype=dtype), random(OUT, RANK, dtype=dtype)
    tensors = {"down": down, "up": up} | ({} if alpha is None else {"alpha": torch.tensor(alpha, dtype=dtype)})
    assert_equal(delta(tensors), scale * (up.double() @ down.double()))
    branch = branch_of(tensors)[1]
    assert branch.down.dtype == dtype, "tensors stay as they are stored"


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 0, 2)])
def test_a_locon_convolves_as_the_merged_kernel_does(stride, padding, dilation):
    down, up, weight = random(RANK, IN, 3, 3), random(OUT, RANK, 1, 1), random(OUT, IN, 3, 3)
    x = random(2, IN, 9, 9).double()
    branch = branch_of({"down": down, "up": up, "alpha": torch.tensor(1.5)})[1]
    assert isinstance(branch, LowRank)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    kernel = weight.double() + 0.5 * torch.einsum("or,rikl->oikl", up.double()[:, :, 0, 0], down.double())
    inner = functional.conv2d(x, branch.down.double(), **how)
    by_branch = functional.conv2d(x, weight.double(), **how) + branch.scale * functional.conv2d(inner, branch.up.double()[:, :, None, None])
    assert_equal(by_branch, functional.conv2d(x, kernel, **how))
    assert_equal(merged(weight, branch, 1.0), kernel)


def test_a_locon_in_cp_form_is_down_then_mid_then_up():
    down, mid, up = random(RANK, IN, 1, 1), random(RANK, RANK, 3, 3), random(OUT, RANK, 1, 1)
    branch = branch_of({"down": down, "mid": mid, "up": up})[1]
    assert isinstance(branch, LowRank)
    x = random(1, IN, 6, 6).double()
    chain = functional.conv2d(functional.conv2d(functional.conv2d(x, down.double()), mid.double(), padding=1), up.double())
    assert_equal(functional.conv2d(x, branch.delta_weight().double(), padding=1), chain)


def test_a_bias_of_lora_b_is_scaled_and_a_difference_is_not():
    tensors = {
        "down": random(RANK, IN),
        "up": random(OUT, RANK),
        "alpha": torch.tensor(6.0),
        "bias": random(OUT),
        "diff_b": random(OUT, seed=5),
    }
    assert_equal(branch_of(tensors)[1].bias, 2 * tensors["bias"].double() + tensors["diff_b"].double())


def test_loha_is_the_elementwise_product_of_two_products():
    a1, b1, a2, b2 = random(OUT, RANK), random(RANK, IN), random(OUT, RANK, seed=1), random(RANK, IN, seed=1)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.5)}
    assert_equal(delta(tensors), 0.5 * (a1.double() @ b1.double()) * (a2.double() @ b2.double()))
    assert isinstance(branch_of(tensors)[1], Composed), "nothing is multiplied out while a file is read"


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_loha_of_small_rank_is_applied_as_two_thin_matrices(kernel):
    """An elementwise product of two matrices of rank 2 has rank 4."""
    a = [random(64, 2, seed=s) for s in (0, 1)]
    b = [random(2, 48 * 9 if kernel else 48, seed=s) for s in (2, 3)]
    tensors = {f"hada_w{n + 1}_{k}": v[n] for n in (0, 1) for k, v in (("a", a), ("b", b))}
    branch = branch_of(tensors | {"alpha": torch.tensor(1.0)})[1]
    thin = bound(replace(branch, shape=(64, 48, *kernel)), torch.Tensor)
    assert isinstance(thin, LowRank)
    assert thin.down.shape == (4, 48, *kernel)
    assert applied_size(branch) == thin.down.numel() + thin.up.numel()
    expected = 0.5 * (a[0].double() @ b[0].double()) * (a[1].double() @ b[1].double())
    assert_equal(thin.delta_weight(), expected.reshape(64, 48, *kernel))


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum over i, j of t[i, j] a[i, o] b[j, c], by loops."""
    total = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:], dtype=torch.float64)
    for i in range(t.shape[0]):
        for j in range(t.shape[1]):
            total += a[i].double()[:, None, None, None] * b[j].double()[None, :, None, None] * t[i, j].double()
    return total


def test_loha_in_tucker_form_multiplies_two_kernels():
    a = [random(RANK, OUT, seed=s) for s in (0, 1)]
    b = [random(RANK, IN, seed=s) for s in (2, 3)]
    t = [random(RANK, RANK, 3, 3, seed=s) for s in (4, 5)]
    tensors = {f"hada_w{n + 1}_{k}": v[n] for n in (0, 1) for k, v in (("a", a), ("b", b))} | {"hada_t1": t[0], "hada_t2": t[1]}
    assert_equal(delta(tensors), tucker(t[0], a[0], b[0]) * tucker(t[1], a[1], b[1]))


LOKR = {
    "both whole": ({"lokr_w1": random(3, 2), "lokr_w2": random(4, 4)}, None),
    "second decomposed": ({"lokr_w1": random(3, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 4)}, 2),
    "both decomposed": (
        {"lokr_w1_a": random(3, 1), "lokr_w1_b": random(1, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 4)},
        2,
    ),
    "first decomposed": ({"lokr_w1_a": random(3, 1), "lokr_w1_b": random(1, 2), "lokr_w2": random(4, 4)}, 1),
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr_is_the_kronecker_product(case):
    tensors, rank = LOKR[case]
    first = tensors["lokr_w1"].double() if "lokr_w1" in tensors else tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    second = tensors["lokr_w2"].double() if "lokr_w2" in tensors else tensors["lokr_w2_a"].double() @ tensors["lokr_w2_b"].double()
    expected = torch.zeros(12, 8, dtype=torch.float64)
    for row in range(12):
        for column in range(8):
            expected[row, column] = first[row // 4, column // 4] * second[row % 4, column % 4]
    scale = 1.0 if rank is None else 5.0 / rank
    assert_equal(delta(tensors | {"alpha": torch.tensor(5.0)}), scale * expected)


def test_a_lokr_with_a_thin_second_factor_stays_two_small_products():
    tensors = {"lokr_w1": random(2, 2), "lokr_w2_a": random(64, 2), "lokr_w2_b": random(2, 64), "alpha": torch.tensor(1.0)}
    branch = bound(branch_of(tensors)[1], torch.Tensor)
    assert isinstance(branch, LowRank)
    expected = 0.5 * torch.kron(tensors["lokr_w1"].double(), tensors["lokr_w2_a"].double() @ tensors["lokr_w2_b"].double())
    assert_equal(branch.delta_weight(), expected)


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (16, 1)])  # put together; two small products
def test_lokr_of_a_convolution(size, rank):
    first, a, b = random(2, 2), random(size, rank), random(rank, size, 3, 3)
    second = torch.einsum("or,rikl->oikl", a.double(), b.double())
    expected = torch.zeros(2 * size, 2 * size, 3, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            expected[i * size : (i + 1) * size, j * size : (j + 1) * size] = first[i, j].double() * second
    branch = bound(branch_of({"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b})[1], torch.Tensor)
    assert isinstance(branch, LowRank if size == 16 else Dense)
    assert_equal(branch.delta_weight(), expected)
    t = random(rank, rank, 3, 3)
    tensors = {"lokr_w1": first, "lokr_w2_a": a.T.contiguous(), "lokr_w2_b": b[:, :, 0, 0], "lokr_t2": t}
    second = tucker(t, a.T, b[:, :, 0, 0])
    assert_equal(delta(tensors)[:size, size:], first[0, 1].double() * second)


def test_a_full_difference_is_added_as_it_is():
    tensors = {"diff": random(OUT, IN), "diff_b": random(OUT)}
    branch = branch_of(tensors)[1]
    assert isinstance(branch, Dense)
    assert_equal(branch.delta_weight(), tensors["diff"].double())
    assert_equal(branch.bias, tensors["diff_b"].double())


def test_normalisation_layers_shift_gain_and_offset():
    for tensors in ({"w_norm": random(5), "b_norm": random(5, seed=1)}, {"diff": random(5), "diff_b": random(5, seed=1)}):
        kind, shift = branch_of(tensors)
        assert kind == "norm"
        assert isinstance(shift, NormShift)
        torch.testing.assert_close(shift.weight, random(5))
        torch.testing.assert_close(shift.bias, random(5, seed=1))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("base", ["LoRA", "LoHa", "LoKr", "full"])
def test_dora_sets_the_length_of_each_row_or_column(kernel, on_output, base):
    weight = random(OUT, IN, *kernel, seed=9)
    tensors = {
        "LoRA": {"down": random(RANK, IN, *kernel), "up": random(OUT, RANK)},
        "LoHa": {
            "hada_w1_a": random(OUT, 2),
            "hada_w1_b": random(2, IN * math.prod(kernel)),
            "hada_w2_a": random(OUT, 2, seed=1),
            "hada_w2_b": random(2, IN * math.prod(kernel), seed=1),
        },
        "LoKr": {"lokr_w1": random(3, 2), "lokr_w2": random(4, 4, *kernel)},
        "full": {"diff": random(OUT, IN, *kernel)},
    }[base]
    change = delta(tensors | {"alpha": torch.tensor(1.0)}).double().reshape(weight.shape)
    size = (OUT, 1, *(1,) * len(kernel)) if on_output else (1, IN, *(1,) * len(kernel))
    magnitude = random(*size, seed=3).abs()
    kind, branch = branch_of(tensors | {"alpha": torch.tensor(1.0), "dora_scale": magnitude})
    assert kind.startswith("DoRA")
    assert isinstance(branch, FromWeight)
    moved = weight.double() + change
    expected = moved.clone()
    for index in range(OUT if on_output else IN):
        line = moved[index] if on_output else moved[:, index]
        target = expected[index] if on_output else expected[:, index]
        target.copy_(line / line.norm() * magnitude.flatten()[index].double())
    assert_equal(branch.bind(weight).delta_weight(), expected - weight.double())


def test_pefts_magnitudes_are_per_output_row_even_on_a_square_layer():
    tensors = {"down": random(2, 6), "up": random(6, 2)}
    magnitude, weight = random(6, seed=2).abs(), random(6, 6, seed=4)
    ours = delta(tensors | {"magnitude": magnitude}, weight)
    moved = weight.double() + tensors["up"].double() @ tensors["down"].double()
    assert_equal(ours, moved / moved.norm(dim=1, keepdim=True) * magnitude.double()[:, None] - weight.double())


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_multiplies_rows_or_columns_of_the_weight(kernel, on_input):
    weight = random(OUT, IN, *kernel)
    factors = random(IN if on_input else OUT, seed=1)
    stored = factors if not kernel else factors.reshape(1, -1, 1, 1)
    expected = weight.double().clone()
    for index, factor in enumerate(factors.double()):
        (expected[:, index] if on_input else expected[index]).mul_(factor)
    assert_equal(delta({"weight": stored, "on_input": torch.tensor(int(on_input))}, weight), expected)


def cayley(block: Tensor) -> Tensor:
    skew = (block - block.T).double()
    one = torch.eye(len(block), dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft_turns_blocks_of_output_rows(kernel, rescaled):
    weight, blocks = random(OUT, IN, *kernel), 0.3 * random(3, 4, 4)
    rows = random(OUT, seed=7)
    expected = weight.double().clone().flatten(1)
    for index in range(3):
        expected[4 * index : 4 * index + 4] = cayley(blocks[index]).T @ expected[4 * index : 4 * index + 4].clone()
    if rescaled:
        expected = rows.double()[:, None] * expected
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)} | (
        {"rescale": rows.reshape(-1, *(1,) * (1 + len(kernel)))} if rescaled else {}
    )
    assert_equal(delta(tensors, weight), expected.reshape(weight.shape) - weight.double())


def test_oft_keeps_the_rotation_within_its_constraint():
    weight, blocks = random(OUT, IN), random(3, 4, 4)
    skew = (blocks - blocks.transpose(1, 2)).double()
    shrunk = blocks * (0.01 * OUT / skew.norm())
    assert_equal(delta({"oft_blocks": blocks, "alpha": torch.tensor(0.01)}, weight), delta({"oft_blocks": shrunk}, weight).double())


def test_old_oft_files_hold_the_rotation_itself():
    weight, blocks = random(OUT, IN), 0.3 * random(3, 4, 4)
    rotations = torch.stack([cayley(block) for block in blocks]).float()
    assert_equal(delta({"oft_diag": rotations}, weight), delta({"oft_blocks": blocks}, weight).double())


def test_boft_turns_pairs_of_rows_that_are_ever_farther_apart():
    """Two stages with blocks of two on eight rows: pairs one apart, then two apart; found from the orthogonal matrix it applies."""
    out, blocks = 8, 0.4 * random(2, 4, 2, 2)
    ours = delta({"oft_blocks": blocks}, torch.eye(out)).double() + torch.eye(out, dtype=torch.float64)
    matrices = []
    for stage, apart in enumerate((1, 2)):
        matrix = torch.eye(out, dtype=torch.float64)
        pairs = [(i, i + apart) for i in range(out) if (i // apart) % 2 == 0]
        for rotation, (i, j) in zip(blocks[stage], pairs, strict=True):
            index = torch.tensor([i, j])
            matrix[index[:, None], index] = cayley(rotation)
        matrices.append(matrix)
    assert_equal(ours, matrices[1] @ matrices[0])
    assert_equal(ours @ ours.T, torch.eye(out, dtype=torch.float64))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_glora_adds_a_product_with_the_weight_and_one_without(kernel):
    weight = random(OUT, IN, *kernel)
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN), random(OUT, RANK), random(RANK, IN, *kernel)
    expected = torch.einsum("oi...,ij->oj...", weight.double(), a1.double() @ a2.double())
    expected = 0.5 * (expected + (b1.double() @ b2.double().flatten(1)).reshape(weight.shape))
    stored = [t if not kernel else t.reshape(*t.shape, 1, 1) for t in (a1, a2, b1)]
    tensors = dict(zip(("a1", "a2", "b1"), stored, strict=True)) | {"b2": b2, "alpha": torch.tensor(1.5)}
    assert_equal(delta(tensors, weight), expected)
    if not kernel:
        old_order = {"a1": a2, "a2": a1, "b1": b2, "b2": b1, "alpha": torch.tensor(1.5)}
        assert_equal(delta(old_order, weight), expected)


def test_glora_with_a_kernel_between_its_factors():
    weight, bm = random(OUT, IN, 3, 3), random(RANK, RANK, 3, 3)
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN), random(OUT, RANK), random(RANK, IN)
    own = torch.einsum("oikl,ij->ojkl", weight.double(), a1.double() @ a2.double())
    expected = own + torch.einsum("on,nmkl,mi->oikl", b1.double(), bm.double(), b2.double())
    assert_equal(delta({"a1": a1, "a2": a2, "b1": b1, "b2": b2, "bm": bm}, weight), expected)


def test_a_lone_bias_changes_no_weight():
    branch = branch_of({"diff_b": random(OUT)})[1]
    weight = random(OUT, IN)
    assert not bound(branch, lambda: weight).delta_weight().any()
    torch.testing.assert_close(bound(branch, lambda: weight).bias, random(OUT))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"down": random(3, 8)}, "it has lora_down but no lora_up"),
        ({"up": random(8, 3), "alpha": torch.tensor(1.0)}, "it has lora_up but no lora_down"),
        ({"down": random(3, 8), "up": random(12, 4)}, "its two halves differ in rank: 12 × 4 and 3 × 8"),
        ({"down": random(3, 8), "up": random(12, 3), "mid": random(2, 3, 3, 3)}, "do not fit each other"),
        ({"down": random(1, 8), "up": random(12, 1), "mid": random(1, 1, 110, 110)}, "larger than any layer's"),
        ({"down": random(3), "up": random(12, 3)}, "neither matrices nor kernels"),
        ({"down": random(3, 8), "up": random(12, 3), "alpha": torch.tensor(float("nan"))}, "its alpha is nan"),
        ({"down": random(3, 8), "up": random(12, 3), "alpha": random(2)}, "should be one number"),
        ({"down": random(3, 8), "up": random(12, 3), "diff_b": random(5)}, "its bias is 5 for 12 rows"),
        ({"down": random(3, 8), "up": random(12, 3), "dora_scale": random(5, 1)}, "its magnitudes are 5 × 1"),
        ({"down": random(3, 8), "up": random(12, 3), "hada_w1_a": random(3, 3)}, "mixes the tensors of two kinds"),
        ({"down": torch.ones(3, 8, dtype=torch.int8), "up": random(12, 3)}, "whole numbers"),
        ({"hada_w1_a": random(4, 2), "hada_w1_b": random(2, 4)}, "but no hada_w2_a, hada_w2_b"),
        (
            {"hada_w1_a": random(4, 2), "hada_w1_b": random(2, 4), "hada_w2_a": random(5, 2), "hada_w2_b": random(2, 4)},
            "its two factors make up 4 × 4 and 5 × 4",
        ),
        ({"lokr_w1": random(2, 2)}, "its second factor is incomplete"),
        ({"lokr_w1": random(2, 2), "lokr_w2_a": random(4, 2)}, "its second factor is incomplete"),
        ({"oft_blocks": random(3, 4, 5)}, "not square blocks"),
        ({"oft_blocks": random(3, 3, 2, 2)}, "do not make up a butterfly"),
        ({"oft_blocks": random(3, 4, 4), "rescale": random(5)}, "it rescales 5 rows of 12"),
        ({"oft_blocks": random(3, 4, 4), "dora_scale": random(12, 1)}, "which OFT cannot have"),
        ({"a1": random(8, 3), "a2": random(3, 8), "b1": random(12, 2), "b2": random(3, 8)}, "do not fit each other"),
        ({"w_norm": random(4), "b_norm": random(5)}, "differ in length"),
        ({"a1": random(3), "a2": random(3), "b1": random(3), "b2": random(3)}, "do not fit each other: a1 3, a2 3, b1 3, b2 3"),
        ({"down": random(3, 8), "up": random(12, 3), "dora_scale": random(0)}, "its magnitudes are 0"),
        ({"down": random(3, 8), "up": random(12, 3), "bias": random(12), "diff_b": random(5)}, "do not fit"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(tensors, reason):
    with pytest.raises(LoraError) as error:
        branch_of(tensors)
    assert reason in str(error.value)


@pytest.mark.parametrize("tensors", [{"alpha": torch.tensor(1.0)}, {"weight": random(4)}, {"dora_scale": random(4)}])
def test_what_changes_nothing_is_no_branch(tensors):
    assert branch_of(tensors) is None
