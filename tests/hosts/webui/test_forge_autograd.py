"""Gradients through models made of inference tensors, as Forge's are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib_dynfuse.hosts.webui.forge_autograd import graph_through_inference_tensors


class Block(nn.Module):
    """What Forge's models do: in-place sums and activations, buffers, a canvas that is written to piece by piece."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.convolution = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.linear, self.activation = nn.Linear(width, width), nn.SiLU(inplace=True)
        self.register_buffer("position", torch.randn(width))

    def forward(self, x):
        h = self.convolution(self.activation(self.norm(x)))
        h += x
        h *= torch.sigmoid(h)
        tokens = h.flatten(2).transpose(1, 2) + self.position
        tokens = tokens + F.scaled_dot_product_attention(self.linear(tokens), tokens, tokens)
        grown = tokens.sin().exp()
        grown += tokens
        grown.clamp_(max=3)
        canvas = torch.zeros_like(h)
        canvas[:, :, :4] += grown.transpose(1, 2).reshape(h.shape)[:, :, :4]
        canvas[:, :, 4:] += 2 * h[:, :, 4:]
        canvas /= 2
        return canvas

    def out_of_place(self, x):
        """The same without a single overwritten tensor."""
        h = self.convolution(F.silu(self.norm(x))) + x
        h = h * torch.sigmoid(h)
        tokens = h.flatten(2).transpose(1, 2) + self.position
        tokens = tokens + F.scaled_dot_product_attention(self.linear(tokens), tokens, tokens)
        grown = (tokens.sin().exp() + tokens).clamp(max=3)
        return torch.cat([grown.transpose(1, 2).reshape(h.shape)[:, :, :4], 2 * h[:, :, 4:]], 2) / 2


class Probe:
    """Something that is held by a graph."""


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*[Block(8) for _ in range(3)])


def latent():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    with torch.inference_mode():
        return blocks()


@pytest.fixture(scope="module")
def expected():
    """The gradient of the sum of squares, in float64, without any of it."""
    reference = blocks().double().requires_grad_(False)
    x = latent().double().requires_grad_()
    y = x
    for block in reference:
        y = block.out_of_place(y)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return gradient


def gradient_of(model, x, loss=lambda y: y.square().sum()):
    with graph_through_inference_tensors():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(leaf)), leaf)
    return gradient


def test_autograd_alone_refuses_them(model):
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), pytest.raises(RuntimeError, match="Inference tensors"):
        model(latent().requires_grad_())


def test_the_gradient_is_the_plain_models(model, expected):
    with torch.inference_mode():
        gradient = gradient_of(model, latent())
    assert not gradient.is_inference()
    assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_prediction_is_the_plain_forwards_to_the_bit(model):
    with torch.inference_mode():
        plain = model(latent())
        with graph_through_inference_tensors():
            prediction = model(latent().requires_grad_()).detach()
        assert torch.equal(plain, prediction)


def test_nothing_is_left_on_the_model(model):
    before = [(name, id(tensor), tensor._is_view()) for name, tensor in [*model.named_parameters(), *model.named_buffers()]]
    values = [tensor.clone() for tensor in model.state_dict().values()]
    with torch.inference_mode():
        gradient_of(model, latent())
    assert [(name, id(tensor), tensor._is_view()) for name, tensor in [*model.named_parameters(), *model.named_buffers()]] == before
    assert all(torch.equal(was, now) for was, now in zip(values, model.state_dict().values()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_afterwards_inference_goes_on_as_before(model):
    with torch.inference_mode():
        before = model(latent())
        gradient_of(model, latent())
        assert torch.is_inference_mode_enabled()
        after = model(latent())
    assert after.is_inference()
    assert torch.equal(before, after)


def test_an_exception_leaves_the_modes_as_they_were(model):
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="size of tensor"), graph_through_inference_tensors():
            model(latent().requires_grad_()).add_(torch.zeros(3))
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert model(latent()).is_inference()


def test_what_a_host_keeps_has_no_graph_afterwards(model):
    kept = {}
    with torch.inference_mode(), graph_through_inference_tensors():
        leaf = latent().requires_grad_()
        kept["latent"] = y = model(leaf)
        kept["sum"] = y.sum()
        probe = Probe()
        y.grad_fn.metadata["probe"], graph = probe, weakref.ref(probe)
        del y, probe
        gc.collect()
        assert graph() is not None
    assert not any(tensor.requires_grad for tensor in kept.values())
    gc.collect()
    assert graph() is None


def test_a_canvas_of_earlier_steps_carries_the_gradient(model):
    """Tile extensions keep one canvas, made under inference mode, and add to parts of it."""
    with torch.inference_mode():
        canvas = torch.zeros(2, 8, 8, 8)

    def tiled(x):
        canvas.zero_()
        upper = canvas[:, :, :4]
        upper += model(x)[:, :, :4]
        canvas[:, :, 4:] += 3 * x[:, :, 4:]
        return canvas.chunk(2)[0]

    with torch.inference_mode():
        gradient = gradient_of(tiled, latent(), lambda y: y.sum())
        again = gradient_of(tiled, latent(), lambda y: y.sum())
    assert torch.equal(gradient, again)
    assert torch.equal(gradient[1], torch.zeros(8, 8, 8))
    reference = blocks().double().requires_grad_(False)
    x = latent().double().requires_grad_()
    y = x
    for block in reference:
        y = block.out_of_place(y)
    (expected,) = torch.autograd.grad(y[0, :, :4].sum() + 3 * x[0, :, 4:].sum(), x)
    assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not canvas.requires_grad


def test_weights_merged_under_inference_mode_in_the_middle_of_a_call(model, expected):
    """LoRAs that Forge applies on the fly (backend/patcher/lora.py:84)."""

    @torch.inference_mode()
    def merged(weight):
        weight = weight.clone()
        weight += 1
        weight -= 1
        return weight

    def online(x):
        for block in model:
            linear = block.linear
            block.linear.forward = lambda tokens, linear=linear: F.linear(tokens, merged(linear.weight), linear.bias)
        return model(x)

    with torch.inference_mode():
        gradient = gradient_of(online, latent())
    assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda y: y.mul_(0),
        lambda y: y.__setitem__(0, 0.0),
        lambda y: torch.add(y, 1, out=y),
        lambda y: F.relu(y, inplace=True),
        lambda y: F.relu(y, True),
        lambda y: torch._foreach_mul_([y], 0),
        lambda y: y.data.mul_(0),
        lambda y: y[0, 0].zero_(),
        lambda y: y.view(-1).fill_(7),
    ],
)
def test_what_the_graph_needs_may_be_overwritten(overwrite):
    with torch.inference_mode():
        weight = torch.randn(4, 4)
    with graph_through_inference_tensors():
        leaf = torch.randn(3, 4, 4).requires_grad_()
        y = leaf @ weight
        squared = y.square()
        with torch.no_grad():
            overwrite(y)
        (gradient,) = torch.autograd.grad(squared.sum(), leaf)
        values = leaf.detach() @ weight
        assert torch.allclose(gradient, 2 * values @ weight.t(), atol=1e-5)


def test_an_overwriting_that_cannot_be_seen_is_an_error_and_no_wrong_gradient():
    with graph_through_inference_tensors():
        leaf = torch.randn(8).requires_grad_()
        y = leaf * 2
        squared = y.square()
        with torch.no_grad():
            torch.ops.aten.mul_.Scalar(y, 0)
        with pytest.raises(RuntimeError, match="overwritten"):
            torch.autograd.grad(squared.sum(), leaf)


def test_nothing_is_copied_that_is_not_overwritten():
    """Copies of all that is kept would double the memory of the way back."""
    kept = []
    with graph_through_inference_tensors():
        leaf = torch.randn(4, 4).requires_grad_()
        first = leaf.exp()
        second = first.sin()
        kept = [second.grad_fn._saved_self.data_ptr(), first.grad_fn._saved_result.data_ptr()]
        assert kept == [first.data_ptr(), first.data_ptr()]
        F.silu(first, inplace=False)
        torch.sin(first, out=None)
        assert second.grad_fn._saved_self.data_ptr() == first.data_ptr()
        first += 1
        assert second.grad_fn._saved_self.data_ptr() != first.data_ptr()


def test_memory_is_freed_after_each_gradient(model):
    with torch.inference_mode():
        gradient_of(model, latent())
        gc.collect()
        before = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
        for _ in range(3):
            gradient_of(model, latent())
        assert sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()) <= before + 1


@pytest.fixture(scope="module")
def kitchen():
    """comfy_kitchen's rotary embeddings (its backends/eager/rope.py), as it has them: operators without a backward pass."""
    library = torch.library.Library("comfy_kitchen", "FRAGMENT")

    def neighbours(x, turns):
        return torch.einsum(
            "bhtcij,bhtcj->bhtci", turns[:, :, : x.shape[2]].expand(*x.shape[:-1], -1, 2, 2), x.unflatten(-1, (-1, 2))
        ).flatten(-2)

    def halves(x, turns):
        first, second = x.chunk(2, -1)
        turned = [turns[..., n, 0] * first + turns[..., n, 1] * second for n in range(2)]
        return torch.cat(turned, -1)

    for name, one in (("apply_rope", neighbours), ("apply_rope_split_half", halves)):
        library.define(f"{name}1(Tensor x, Tensor turns) -> Tensor")
        library.impl(f"{name}1", torch.no_grad()(one), "CPU")
        library.define(f"{name}(Tensor q, Tensor k, Tensor turns) -> (Tensor, Tensor)")
        library.impl(name, torch.no_grad()(lambda q, k, turns, one=one: (one(q, turns), one(k, turns))), "CPU")
    yield {"apply_rope": neighbours, "apply_rope_split_half": halves}
    del library  # and with it the operators


@pytest.mark.parametrize(
    ("name", "rows"),
    [("apply_rope", 7), ("apply_rope", 9), ("apply_rope_split_half", 7)],
    ids=["neighbours", "neighbours, turns for more tokens", "halves"],
)
def test_gradients_pass_rotary_embeddings_without_a_backward_pass(kitchen, name, rows):
    """Not only through the values: what rotated queries and keys decide, too."""
    turns = torch.randn(1, 1, rows, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(3))

    def attended(both, one):
        def run(x):
            q, k = both(x, x.flip(2))
            return (F.scaled_dot_product_attention(q, k, one(x)) ** 2).sum()

        return run

    plain = kitchen[name]
    reference = x.double().requires_grad_()
    run = attended(lambda q, k: (plain(q, turns.double()), plain(k, turns.double())), lambda x: plain(x, turns.double()))
    (expected,) = torch.autograd.grad(run(reference), reference)
    both, one = getattr(torch.ops.comfy_kitchen, name), getattr(torch.ops.comfy_kitchen, f"{name}1")
    with torch.inference_mode():
        held = turns.clone()
        with graph_through_inference_tensors():
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(attended(lambda q, k: both(q, k, held), lambda x: one(x, held))(leaf), leaf)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
