"""Sums that stay go into copies of the layers' weights: the same numbers, no work in the layers, and nothing left behind."""

import pytest
import torch
from torch import nn

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.bench.dispatched import Dispatched
from lib_dynfuse.fusion import FusionSession, folding

from .models import BLOCK, Nested, delta_weights, lora_file

LINEAR, KERNEL, POINTWISE = f"{BLOCK}.attn1.to_q", "input_blocks.3.0.op", "input_blocks.1.1.proj_in"
NAMES = [LINEAR, f"{BLOCK}.ff.net.2", KERNEL, POINTWISE]


class SeesPixels(Nested):
    """Convolutions see pixels, linear layers the same as tokens."""

    def forward(self, x):
        return {name: self.one(self.get_submodule(name), x) for name in self.order}

    def one(self, layer, x):
        return layer(x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2))


def network():
    torch.manual_seed(0)
    layers = {LINEAR: nn.Linear(8, 8), NAMES[1]: nn.Linear(8, 12, bias=False)}
    layers |= {KERNEL: nn.Conv2d(8, 8, 3, padding=1), POINTWISE: nn.Conv2d(8, 8, 1)}
    return SeesPixels(layers).eval().requires_grad_(False)


@pytest.fixture
def model():
    return network()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, like = tmp_path_factory.mktemp("loras"), network()
    found = [folder / "subject.safetensors", folder / "style.safetensors"]
    for seed, path in enumerate(found):
        lora_file(path, like, NAMES if not seed else NAMES[1:], seed=seed + 1, alpha=3)
    return found


@pytest.fixture
def files(paths):
    from lib_dynfuse.lora import read_lora

    return [read_lora(path) for path in paths]


def session_on(model, files, **settings):
    return FusionSession(model, *files, FuseSettings(**{"method": "direct", **settings}), steps=8)


def x(seed=5, batch=2):
    return torch.randn(batch, 8, 4, 4, generator=torch.Generator().manual_seed(seed))


def step(session, model, value=None, rows=None):
    session.begin()
    with session.attached(rows):
        result = model(x() if value is None else value)
    session.end_step()
    return result


def merged(model, paths, value, weights=(1.0, 1.0)):
    """The layers with the LoRAs merged into their weights, in float64."""
    deltas = [delta_weights(path, NAMES if not number else NAMES[1:]) for number, path in enumerate(paths)]
    other = network().double()
    for name in NAMES:
        own = model.get_submodule(name)
        layer = other.get_submodule(name)
        total = own.weight.double() + sum(weight * found[name] for weight, found in zip(weights, deltas) if name in found)
        layer.weight.copy_(total)
        if own.bias is not None:
            layer.bias.copy_(own.bias)
    return other(value.double())


def assert_close(found, expected, tolerance=2e-6):
    for name, values in expected.items():
        assert (found[name].double() - values).abs().max() < tolerance * values.abs().max(), name


def all_folded(session):
    return all(layer.folded is not None for layer in session.layers)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [({}, (1.0, 1.0)), ({"subject_weight": 0.7, "style_weight": -1.2}, (0.7, -1.2)), ({"method": "balanced", "contrast": 0.0}, None)],
    ids=["direct", "weights", "balanced"],
)
def test_steps_after_the_first_are_the_merge(model, files, paths, settings, weights):
    session = session_on(model, files, **settings)
    first = step(session, model)
    assert all_folded(session)
    second = step(session, model)
    if weights is None:  # what the first step added is told by the record
        weights = session.trace.weights[0, 1, 0].tolist()
    expected = merged(model, paths, x(), weights)
    assert_close(first, expected)
    assert_close(second, expected)


def test_a_part_of_a_fused_layer_goes_into_its_rows(tmp_path):
    name = "double_blocks.0.img_attn.qkv"
    torch.manual_seed(1)
    model = Nested({name: nn.Linear(8, 24)}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    tensors, total = {}, torch.zeros(24, 8, dtype=torch.float64)
    for place, part in enumerate("qkv"):
        key = f"transformer.transformer_blocks.0.attn.to_{part}"
        down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        total[8 * place : 8 * place + 8] += up.double() @ down.double()
    from safetensors.torch import save_file

    from lib_dynfuse.lora import read_lora

    path = tmp_path / "split.safetensors"
    save_file(tensors, str(path))
    session = session_on(model, [read_lora(path)] * 2)
    value = torch.randn(2, 5, 8, generator=generator)
    step(session, model, value)
    assert all_folded(session)
    found = step(session, model, value)[name]
    layer = model.get_submodule(name)
    expected = value.double() @ (layer.weight.double() + 2 * total).t() + layer.bias.double()
    assert (found - expected).abs().max() < 1e-5


def test_nothing_is_computed_beside_the_model(model, files):
    session = session_on(model, files)
    step(session, model)
    with Dispatched() as plain:
        model(x())
    with Dispatched() as fused:
        step(session, model)
    assert fused.operations == plain.operations


def test_the_layers_own_weight_is_there_and_untouched(model, files):
    before = {name: (layer.weight, layer.weight.clone()) for name, layer in ((n, model.get_submodule(n)) for n in NAMES)}
    session = session_on(model, files)
    step(session, model)
    step(session, model)
    for name, (weight, copy) in before.items():
        assert model.get_submodule(name).weight is weight
        assert torch.equal(weight, copy)


def test_an_exception_in_the_forward_puts_the_own_weight_back(model, files):
    session = session_on(model, files)
    step(session, model)
    own = model.get_submodule(LINEAR).weight
    session.begin()
    with pytest.raises(RuntimeError), session.attached():
        model.get_submodule(LINEAR)(torch.zeros(2, 3))
    assert model.get_submodule(LINEAR).weight is own


def written_to(layer):
    layer.weight.mul_(1.5)


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)


def moved(layer):
    layer.weight.data = layer.weight.data * 1.5


@pytest.mark.parametrize("change", [written_to, replaced, moved])
def test_another_weight_under_the_layer_is_noticed_in_the_same_step(model, files, paths, change):
    session = session_on(model, files)
    step(session, model)
    change(model.get_submodule(LINEAR))
    change(model.get_submodule(KERNEL))
    expected = merged(model, paths, x())
    assert_close(step(session, model), expected)
    assert all_folded(session)  # made anew
    assert_close(step(session, model), expected)


def test_a_host_that_changes_its_weights_at_every_step_is_not_run_after(model, files, paths):
    session = session_on(model, files)
    for _ in range(8):
        step(session, model)
        written_to(model.get_submodule(LINEAR))
    assert_close(step(session, model), merged(model, paths, x()))
    assert {layer.name for layer in session.layers if layer.folded is None} == {LINEAR}


@pytest.mark.parametrize("free", [0, 9_000])
def test_where_memory_is_short_the_layers_add(model, files, paths, monkeypatch, free):
    size = sum(4 * model.get_submodule(name).weight.numel() for name in NAMES)
    assert free < 3 * size
    monkeypatch.setattr(folding, "free_memory", lambda device: free)
    session = session_on(model, files)
    step(session, model)
    assert not any(layer.folded for layer in session.layers)
    assert_close(step(session, model), merged(model, paths, x()))


def test_memory_that_runs_out_on_the_way_folds_nothing(model, files, paths, monkeypatch):
    made = folding.Folding._folded

    def runs_out(self, layer, *arguments):
        if layer.name == KERNEL:
            raise RuntimeError("CUDA out of memory")
        return made(self, layer, *arguments)

    monkeypatch.setattr(folding.Folding, "_folded", runs_out)
    session = session_on(model, files)
    step(session, model)
    assert not any(layer.folded for layer in session.layers)
    assert_close(step(session, model), merged(model, paths, x()))


def test_a_contrast_moves_away_from_the_unfused_model(model, files, paths):
    name = KERNEL
    session = session_on(model, files, contrast=0.5, contrast_every=1)

    def call(positions):
        return model(x() if positions is None else x()[list(positions)])[name]

    rows = Rows((0, 0), (True, False), 1)
    for _ in range(3):
        session.begin()
        found = session.predict(call, rows, scale=2.0)
        session.end_step()
    fused, base = merged(model, paths, x())[name], network().double()(x().double())[name]
    expected = fused.clone()
    expected[0] += 0.5 / 2.0 * (fused[0] - base[0])
    assert all_folded(session)
    assert (found.double() - expected).abs().max() < 1e-5


def test_a_gradient_flows_through(model, files, paths):
    session = session_on(model, files)
    step(session, model)
    leaf = x().requires_grad_()
    session.begin()
    with session.attached():
        model(leaf)[KERNEL].square().sum().backward()
    session.end_step()
    other = x().double().requires_grad_()
    with torch.enable_grad():
        merged(model, paths, other)[KERNEL].square().sum().backward()
    assert (leaf.grad.double() - other.grad).abs().max() < 1e-4 * other.grad.abs().max()


def put_a_forward_on(layer):
    layer.forward = type(layer).forward.__get__(layer)


def in_another_type(layer):
    class Quantised(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize("change", [put_a_forward_on, in_another_type])
def test_layers_that_compute_in_their_own_way_are_left_to_it(model, files, paths, change):
    change(model.get_submodule(LINEAR))
    session = session_on(model, files)
    step(session, model)
    folded = {layer.name for layer in session.layers if layer.folded is not None}
    assert folded == set(NAMES) - {LINEAR}
    assert_close(step(session, model), merged(model, paths, x()))


@pytest.mark.parametrize(
    "settings",
    [
        {"subject_weight": "0@0,1@1"},
        {"negative_weight": 0.5},
        {"method": "switch"},
        {"method": "composite"},
        {"method": "dynfuse", "decide": "next"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_sums_that_do_not_stay_are_not_folded(model, files, settings):
    session = session_on(model, files, **settings)
    step(session, model)
    step(session, model)
    assert not any(layer.folded for layer in session.layers)


def test_between_pictures_the_memory_is_free(model, files, paths):
    session = session_on(model, files)
    step(session, model)
    session.unfold()
    assert not any(layer.folded for layer in session.layers)
    session.restart()
    for _ in range(3):
        found = step(session, model)
    assert all_folded(session)
    assert_close(found, merged(model, paths, x()))


def test_released_and_used_again(model, files, paths):
    session = session_on(model, files)
    step(session, model)
    session.release()
    assert not any(layer.folded for layer in session.layers)
    step(session, model)
    assert_close(step(session, model), merged(model, paths, x()))
