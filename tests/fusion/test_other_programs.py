"""Models that torch.compile has been at, weights that are somewhere else, and layers that are called in other ways: fused, or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lib_dynfuse import FuseSettings, fuse, read_lora
from lib_dynfuse.fusion import FusionError
from lib_dynfuse.lora.branch import merged

from .models import ATTENTION, lora_file, tokens_model

METHODS = ["direct", "dynfuse", "balanced"]


@pytest.fixture
def model():
    return tokens_model()


@pytest.fixture
def pair(tmp_path, model):
    return [lora_file(tmp_path / f"{name}.safetensors", model, ATTENTION, seed=seed) for seed, name in enumerate(("subject", "style"))]


@pytest.fixture
def x():
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(7))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    block = model.get_submodule("input_blocks.1.1.transformer_blocks")
    block._modules["0"] = compiled(block._modules["0"])
    layer = block.get_submodule("0._orig_mod.ff.net")
    layer._modules["2"] = compiled(layer._modules["2"])
    return model


def compiled_in_place(model):
    if not hasattr(model, "compile"):
        pytest.skip("this PyTorch compiles no module in place")
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", [compiled, compiled_inside, compiled_in_place])
@torch.no_grad()
def test_a_compiled_model_is_fused_as_the_model_itself(model, pair, x, program, method):
    plain = {name: output.clone() for name, output in model(x).items()}
    with fuse(model, *pair, FuseSettings(method=method)):
        fused = [model(x) for _ in range(3)]
    other = program(model)
    other(x)  # what it runs is made by now
    with fuse(other, *pair, FuseSettings(method=method)) as session:
        again = [other(x) for _ in range(3)]
    for one, two in zip(fused, again):
        for name, output in one.items():
            assert torch.equal(two[name], output)
    assert not torch.equal(again[0][ATTENTION[0]], plain[ATTENTION[0]])
    assert set(session.shapes) == set(model.order)
    for name, output in other(x).items():
        assert torch.equal(output, plain[name])


@pytest.mark.parametrize("program", [compiled, compiled_inside, compiled_in_place])
@torch.no_grad()
def test_so_it_is_where_a_host_attaches_the_session_to_each_call(model, pair, x, program):
    with fuse(model, *pair):
        fused = model(x)
    other = program(model)
    other(x)
    session = fuse(other, *pair)
    session.begin()
    with session.attached():
        again = other(x)
    session.end_step()
    for name, output in fused.items():
        assert torch.equal(again[name], output)


@torch.no_grad()
def test_its_program_is_back_afterwards(model, pair, x):
    other = compiled(model)
    forward = other.forward
    with fuse(other, *pair):
        other(x)
        assert other.forward is not forward
    with fuse(other, *pair), pytest.raises(TypeError):
        other(x, "and more than it takes")
    assert other.forward is forward
    assert "forward" not in vars(model)


@torch.no_grad()
def test_a_program_that_never_comes_to_the_layers_is_refused(model, pair, x):
    weights = {name: model.get_submodule(name) for name in model.order}

    def elsewhere(x):
        return {name: nn.functional.linear(x, layer.weight, layer.bias) for name, layer in weights.items()}

    session = fuse(model, *pair)
    session.begin()
    with pytest.raises(FusionError, match="another program computes in their place"), session.attached():
        elsewhere(x)


@torch.no_grad()
def test_a_cache_may_leave_all_layers_out_of_a_later_step(model, pair, x):
    session = fuse(model, *pair)
    session.begin()
    with session.attached():
        model(x)
    session.begin()
    with session.attached():
        pass
    session.end_step()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_input_may_be_given_by_name(model, pair, x, method):
    with fuse(model, *pair, FuseSettings(method=method)):
        expected = model(x)
    session = fuse(model, *pair, FuseSettings(method=method))
    session.begin()
    with session.attached():
        outputs = {name: model.get_submodule(name)(input=x) for name in model.order}
    for name, output in expected.items():
        assert torch.equal(outputs[name], output)


@torch.no_grad()
def test_kinds_that_depend_on_the_weight_find_it_where_accelerate_keeps_it(tmp_path, model, x):
    accelerate = pytest.importorskip("accelerate")
    for seed, name in enumerate(("subject", "style")):
        lora_file(tmp_path / "lora.safetensors", model, ATTENTION, seed=seed)
        tensors = load_file(tmp_path / "lora.safetensors")
        keys = [key for key in tensors if key.endswith("lora_up.weight")]
        tensors |= {key.replace("lora_up.weight", "dora_scale"): torch.full((16, 1), 1.5) for key in keys}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    pair = [read_lora(tmp_path / f"{name}.safetensors") for name in ("subject", "style")]
    weight = model.get_submodule(ATTENTION[0]).weight
    branches = [file.denoiser[ATTENTION[0].replace(".", "_")] for file in pair]
    delta = sum(merged(weight, branch, 1.0) - weight for branch in branches)
    expected = nn.functional.linear(x, weight + delta, model.get_submodule(ATTENTION[0]).bias)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.get_submodule(ATTENTION[0]).weight.is_meta
    with fuse(model, *pair, FuseSettings(method="direct")):
        outputs = model(x)
    torch.testing.assert_close(outputs[ATTENTION[0]], expected)


@torch.no_grad()
def test_weights_that_are_nowhere_are_a_sentence(tmp_path, model):
    from lib_dynfuse.fusion.session import weight_in_memory

    layer = nn.Linear(4, 4, device="meta")
    layer._hf_hook = object()
    with pytest.raises(FusionError, match="not in memory"):
        weight_in_memory(layer)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_float32_layer_under_autocast_is_fused_in_the_types_of_its_output(model, pair, x, method):
    with fuse(model, *pair, FuseSettings(method=method)):
        expected = [model(x) for _ in range(2)]
    with fuse(model, *pair, FuseSettings(method=method)), torch.autocast("cpu", torch.bfloat16):
        outputs = [model(x) for _ in range(2)]
    for one, two in zip(expected, outputs):
        for name, output in two.items():
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), one[name], rtol=0.05, atol=0.1)


def test_a_lora_of_another_family_is_refused_though_its_layers_fit(tmp_path):
    q = "transformer_blocks.{}.attn.to_q"
    model = tokens_model((q.format(0), "single_transformer_blocks.0.attn.to_q"))  # Flux' names
    own = lora_file(tmp_path / "own.safetensors", model, [q.format(0)], prefix="transformer.")
    names = [f"transformer_blocks.{n}.{layer}" for n in range(2) for layer in ("attn.to_q", "attn.to_k", "img_mod.1", "img_mlp.net.2")]
    tensors = {}
    for name in names:
        tensors |= {f"transformer.{name}.lora_A.weight": torch.randn(2, 3072), f"transformer.{name}.lora_B.weight": torch.randn(3072, 2)}
    tensors |= {f"transformer.{names[2]}.lora_B.weight": torch.randn(6 * 3072, 2)}
    tensors |= {f"transformer.{names[3]}.lora_A.weight": torch.randn(2, 4 * 3072)}
    tensors |= {f"transformer.{names[6]}.lora_B.weight": torch.randn(6 * 3072, 2)}
    tensors |= {f"transformer.{names[7]}.lora_A.weight": torch.randn(2, 4 * 3072)}
    save_file(tensors, tmp_path / "qwen.safetensors")
    other = read_lora(tmp_path / "qwen.safetensors")
    assert other.family == "Qwen-Image"
    with pytest.raises(FusionError, match="qwen.safetensors was made for Qwen-Image, and the model is Flux"):
        fuse(model, other, [], FuseSettings(method="direct"))
    assert fuse(model, own, [], FuseSettings(method="direct")).layers


class Keeping(nn.Linear):
    """Hands out what it keeps: `kept` may be the output, or a larger memory that it lies in."""

    def forward(self, x):
        return self.kept if self.whole else self.kept[0]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_layer_keeps_of_its_output_is_not_written_to(pair, x, mode, whole):
    name = ATTENTION[0]
    model = tokens_model((name,))
    layer = model.get_submodule(name)
    layer.__class__, layer.whole = Keeping, whole
    with mode():
        output = nn.functional.linear(x, layer.weight, layer.bias)
        layer.kept = output.clone() if whole else torch.stack([output, output])
        before = layer.kept.clone()
        with fuse(model, *pair, FuseSettings(method="direct")):
            fused = [model(x)[name].clone() for _ in range(3)]
        assert torch.equal(layer.kept, before)
        assert not torch.equal(fused[0], output)
        torch.testing.assert_close(fused[2], fused[0])
