"""PEFT's OFT, BOFT and IA3 against PEFT's definitions, written out in float64 with whole matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from lib_dynfuse.lora import LoraError, Site, branches_by_site, denoiser_aliases, read_lora

from .writing import random, saved

NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"
OUT, IN = 6, 8


def delta(tmp_path, tensors: dict[str, Tensor], weight: Tensor, config=None, name: str = NAME, prefix="base_model.model.") -> Tensor:
    """The change that a file of these tensors makes to a layer of this weight."""
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = read_lora(saved(tmp_path, {f"{prefix}{name}.{role}": t for role, t in tensors.items()}, "adapter_model.safetensors"))
    assert file.unmatched == []
    found = branches_by_site(file, denoiser_aliases([name]))[0][Site(name)]
    return found.fitted(Site(name), tuple(weight.shape)).bind(Site(name), lambda: weight).delta_weight()


def assert_equal(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


def skew(blocks: Tensor) -> Tensor:
    return (blocks.double() - blocks.double().transpose(-1, -2)) / 2


def cayley(q: Tensor) -> Tensor:
    """PEFT's: (1 - Q)(1 + Q)^-1."""
    one = torch.eye(q.shape[-1], dtype=torch.float64)
    return (one - q) @ torch.linalg.inv(one + q)


def triangle(vectors: Tensor, size: int) -> Tensor:
    q = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    for block, vector in zip(q, vectors.double(), strict=True):
        at = iter(vector)
        for row in range(size):
            for column in range(row + 1, size):
                block[row, column] = next(at)
                block[column, row] = -block[row, column]
    return q


def projected(blocks: Tensor, eps: float) -> Tensor:
    return torch.stack(
        [b if b.norm() <= eps / math.sqrt(len(blocks)) else b * eps / math.sqrt(len(blocks)) / b.norm() for b in blocks.double()]
    )


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("kernel", "out", "size"), [((), 6, 3), ((3, 3), 6, 2), ((), 7, 3)])
def test_the_oft_of_peft_before_0_14_turns_rows(tmp_path, kernel, out, size, shared, coft):
    """W'^T = W^T M with M block-diagonal, cut to the rows where they do not divide."""
    count = 1 if shared else math.ceil(out / size)
    blocks, weight = 0.3 * random(count, size, size), random(out, IN, *kernel, seed=1)
    used = projected(blocks, 1e-2 * size**2) if coft else blocks
    matrix = torch.block_diag(*cayley(skew(used)).expand(math.ceil(out / size), -1, -1))[:out, :out]
    expected = (weight.double().flatten(1).T @ matrix).T.reshape(weight.shape)
    config = {"peft_type": "OFT", "coft": True, "eps": 1e-2} if coft else None
    assert_equal(delta(tmp_path, {"oft_r": blocks}, weight, config, CONV if kernel else NAME), expected - weight.double())


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_oft_of_peft_0_14_turns_columns_and_scales_rows(tmp_path, kernel, shared, coft):
    size, columns = 4, IN * math.prod(kernel)
    number = columns // size
    blocks, weight, scales = 0.3 * random(1 if shared else number, size, size), random(OUT, IN, *kernel, seed=1), random(OUT, 1, seed=2)
    used = projected(blocks, 0.1 * math.ceil(OUT / number) ** 2) if coft else blocks
    matrix = torch.block_diag(*cayley(skew(used)).expand(number, -1, -1))
    expected = ((matrix @ weight.double().flatten(1).T).T * scales.double()).reshape(weight.shape)
    config = {"coft": True, "eps": 0.1} if coft else None
    assert_equal(delta(tmp_path, {"oft_r": blocks, "oft_s": scales}, weight, config, CONV if kernel else NAME), expected - weight.double())


SERIES = {
    "exact": ({"use_cayley_neumann": False}, None),
    "0.18": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.18.1"}, [1, 2, 2, 2, 1]),
    "0.18, three terms": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "peft_version": "0.19.0.dev0@abc"}, [1, 2, 2, 1]),
    "0.18, two terms": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2, "peft_version": "1.0.0"}, [1, 2]),
    "0.17": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, [1, 2, 2, 2, 2]),
    "0.17, four terms": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 4}, [1, 2, 2, 2]),
}


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", SERIES)
def test_the_oft_of_peft_since_0_16_turns_the_input(tmp_path, case, shared, coft):
    """y = W0 (x R), with R by the exact formula or by the series, which PEFT writes with the other sign of Q."""
    config, coefficients = SERIES[case]
    size, number = 4, 2
    vectors, weight = 0.2 * random(1 if shared else number, 6), random(OUT, IN, seed=1)
    q = triangle(vectors, size)
    if coft:
        config, q = {**config, "coft": True, "eps": 0.05}, projected(q, 0.05)
    turns = cayley(q) if coefficients is None else sum(c * torch.linalg.matrix_power(q, k) for k, c in enumerate(coefficients))
    x = random(5, IN, seed=3).double()
    expected = (x.reshape(5, number, 1, size) @ turns).reshape(5, IN) @ weight.double().T
    ours = delta(tmp_path, {"oft_R.weight": vectors}, weight, {"peft_type": "OFT", **config}).double()
    assert_equal(x @ (weight.double() + ours).T, expected)


def test_rotations_as_vectors_need_pefts_settings(tmp_path):
    with pytest.raises(LoraError, match=r"oft_R\) can be read only with PEFT's adapter_config\.json beside it"):
        delta(tmp_path, {"oft_R.weight": random(2, 6)}, random(OUT, IN))


def butterfly(count: int, size: int, stage: int) -> Tensor:
    """PEFT's permutation of a stage: in groups of size * 2^stage, halves of even number go before those of odd number."""
    halves = [list(range(start, start + size // 2)) for start in range(0, count * size, size // 2)]
    group = 2 ** (stage + 1)
    order = []
    for first in range(0, len(halves), group):
        inner = halves[first : first + group]
        order += [index for half in (*inner[::2], *inner[1::2]) for index in half]
    matrix = torch.zeros(count * size, count * size, dtype=torch.float64)
    matrix[torch.arange(count * size), torch.tensor(order)] = 1
    return matrix


@pytest.mark.parametrize(
    ("stages", "count", "size", "kernel"),
    [(1, 2, 4, ()), (1, 8, 1, ()), (2, 2, 4, ()), (2, 4, 2, ()), (3, 4, 2, ()), (1, 18, 4, (3, 3)), (1, 72, 1, (3, 3)), (4, 8, 4, (2, 2))],
)
def test_the_boft_of_peft_turns_columns_between_its_permutations(tmp_path, stages, count, size, kernel):
    blocks, weight, scales = 0.3 * random(stages, count, size, size), random(OUT, IN, *kernel, seed=1), random(OUT, 1, seed=2)
    whole = torch.eye(count * size, dtype=torch.float64)
    for stage in range(stages):
        order = butterfly(count, size, stage) if stages > 1 else torch.eye(count * size, dtype=torch.float64)
        whole = order @ torch.block_diag(*cayley(skew(blocks[stage]))) @ order.T @ whole
    expected = ((whole @ weight.double().flatten(1).T).T * scales.double()).reshape(weight.shape)
    stored = {"boft_R": blocks, "boft_s": scales.T if kernel else scales}
    assert_equal(delta(tmp_path, stored, weight, name=CONV if kernel else NAME), expected - weight.double())


@pytest.mark.parametrize(
    ("factors", "kernel", "config"),
    [
        (random(OUT, 1), (), None),
        (random(1, IN), (), None),
        (random(1, IN, 1, 1), (3, 3), None),
        (random(1, IN, 1, 1), (3, 3), {"feedforward_modules": ["conv1"]}),
    ],
)
def test_the_ia3_of_peft_multiplies_rows_or_columns(tmp_path, factors, kernel, config):
    weight = random(OUT, IN, *kernel, seed=1)
    expected = weight.double().clone()
    for index, factor in enumerate(factors.double().flatten()):
        (expected[index] if factors.shape[0] == OUT else expected[:, index]).mul_(factor)
    assert_equal(delta(tmp_path, {"ia3_l": factors}, weight, config, CONV if kernel else NAME), expected - weight.double())


@pytest.mark.parametrize(
    ("name", "factors", "weight", "config"),
    [
        (NAME.replace("to_k", "to_out.0"), random(OUT, 1), random(OUT, IN), None),  # the output layer has a bias
        (CONV, random(1, OUT, 1, 1), random(OUT, IN, 3, 3), None),  # so have all convolutions
        (CONV, random(1, IN, 1, 1), random(IN, IN, 3, 3), None),  # it may be both
        (CONV, random(1, IN, 1, 1), random(IN, IN, 3, 3), {"feedforward_modules": ["ff"]}),
    ],
)
def test_an_ia3_that_would_scale_a_bias_is_refused(tmp_path, name, factors, weight, config):
    with pytest.raises(LoraError, match="bias"):
        delta(tmp_path, {"ia3_l": factors}, weight, config, name)


def test_square_convolutions_are_told_by_pefts_settings(tmp_path):
    weight, factors = random(IN, IN, 3, 3), random(1, IN, 1, 1)
    ours = delta(tmp_path, {"ia3_l": factors}, weight, {"feedforward_modules": ["conv1"]}, CONV)
    assert_equal(ours, weight.double() * (factors.double() - 1))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"oft_r": random(2, 3, 4)}, "not square blocks"),
        ({"oft_r": random(4)}, "its rotations are 4, not square blocks"),
        ({"oft_r": random(2, 2, 2)}, "are for 4 rows or columns, where the layer has 6"),
        ({"oft_r": random(3, 4, 4), "oft_s": random(OUT, 1)}, "are for 12 rows or columns, where the layer has 8"),
        ({"oft_r": torch.zeros(0, 2, 2)}, "it has no rotations"),
        ({"boft_R": random(2, 3, 2, 2)}, "do not make up a butterfly"),
        ({"boft_R": random(1, 3, 2, 2)}, "are for 6 columns, where the layer has 8"),
        (
            {"oft_s": random(6, 1), "oft_r": random(2, 4, 4), "lora_A.weight": random(2, 8), "lora_B.weight": random(6, 2)},
            "mixes the tensors of two kinds",
        ),
        ({"ia3_l": random(2, 3)}, "its factors are 2 × 3"),
        ({"ia3_l": random(OUT, 1, seed=2)[:4]}, r"changes a weight of 4 × 8, where this model has 6 × 8"),
    ],
)
def test_rotations_that_do_not_fit_are_refused(tmp_path, tensors, words):
    with pytest.raises(LoraError) as raised:
        delta(tmp_path, tensors, random(OUT, IN))
    assert words in str(raised.value)


@pytest.mark.parametrize("numbers", [0, 2, 7])
def test_vectors_that_make_up_no_triangle_are_refused(tmp_path, numbers):
    with pytest.raises(LoraError, match=r"no triangle|not vectors"):
        delta(tmp_path, {"oft_R.weight": torch.tensor(1.0)}, random(OUT, IN), {"use_cayley_neumann": False})
    with pytest.raises(LoraError, match=r"no triangle|not vectors"):
        delta(tmp_path, {"oft_R.weight": random(2, numbers)}, random(OUT, IN), {"use_cayley_neumann": False})


@pytest.mark.parametrize("ending", ["", ".default"])
def test_an_adapters_name_may_stand_in_the_key(tmp_path, ending):
    tensors = {"oft_r": 0.3 * random(2, 4, 4), "oft_s": random(OUT, 1)}
    plain = delta(tmp_path, tensors, random(OUT, IN), prefix="unet.")
    named = delta(tmp_path, {f"{role}{ending}": t for role, t in tensors.items()}, random(OUT, IN), prefix="unet.")
    assert torch.equal(plain, named)


OTHER_KINDS = {"fourierft_spectrum": "FourierFT", "vera_lambda_b": "VeRA", "hra_u": "HRA", "ln_tuning_layers.weight": "LN tuning"}


@pytest.mark.parametrize("role", OTHER_KINDS)
def test_other_kinds_of_peft_are_refused_by_name(tmp_path, role):
    with pytest.raises(LoraError, match=f"an adapter of PEFT's kind {OTHER_KINDS[role]}"):
        read_lora(saved(tmp_path, {f"base_model.model.{NAME}.{role}": random(20)}))
