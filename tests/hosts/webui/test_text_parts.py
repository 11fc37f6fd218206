"""The text-encoder parts, merged by the hosts' means, against W0 + dW in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from lib_dynfuse.hosts.webui.a1111 import TextNetwork, text_modules
from lib_dynfuse.hosts.webui.forge import ForgeDenoisers, text_patches
from lib_dynfuse.hosts.webui.lora_files import FileVersion
from lib_dynfuse.hosts.webui.text_parts import TextPart, TextParts, text_parts
from lib_dynfuse.lora.branch import Dense, FromWeight, LowRank
from lib_dynfuse.settings import FuseSettings

WIDTH = 6
Q, K, V, OUT = (f"text_model_encoder_layers_0_self_attn_{part}_proj" for part in "q k v out".split())
FC1, FC2 = (f"text_model_encoder_layers_0_mlp_fc{number}" for number in (1, 2))


def low_rank(seed, out=WIDTH, inputs=WIDTH, rank=2, bias=False):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    return LowRank(down, up, 0.5, torch.randn(out, generator=generator) if bias else None)


def exact(branch):
    return branch.scale * branch.up.double() @ branch.down.double()


def parts(*encoders, strengths=(0.7, 1.3)):
    """TextParts of LoRAs given as {encoder: {layer: branch}}."""
    return TextParts("both", tuple(TextPart(f"file{i}", e, s) for i, (e, s) in enumerate(zip(encoders, strengths))))


class TestWhatIsMerged:
    def files(self, *texts):
        return [(types.SimpleNamespace(name=f"file{i}", text=t, family="Flux"),) for i, t in enumerate(texts)]

    def versions(self, time=1):
        return [FileVersion("a", time, 1), FileVersion("b", 1, 1)]

    def test_strengths_are_the_users_times_the_text_encoder_weight(self):
        made = text_parts(
            FuseSettings("a", "b", 0.5, 2.0, te_weight=0.5),
            *self.files({"te1": {Q: low_rank(0)}}, {"te1": {Q: low_rank(1)}}),
            self.versions(),
        )
        assert [part.strength for part in made.parts] == [0.25, 1.0]

    def test_block_weights_count_for_each_encoder(self):
        text = {"te1": {Q: low_rank(0)}, "t5": {Q: low_rank(1)}}
        made = text_parts(
            FuseSettings("a", "b", 0.5, subject_blocks="base=0.5,t5=3", style_blocks="base=0"), *self.files(text, text), self.versions()
        )
        assert [(list(part.encoders), part.strength) for part in made.parts] == [(["te1"], 0.25), (["t5"], 1.5), (["t5"], 1.0)]

    def test_nothing_without_text_parts_or_without_weight(self):
        with_text = self.files({"te1": {Q: low_rank(0)}}, {})
        assert text_parts(FuseSettings("a", "b"), *self.files({}, {"te1": {}}), self.versions()) is None
        assert text_parts(FuseSettings("a", "b", te_weight=0), *with_text, self.versions()) is None
        assert text_parts(FuseSettings("a", "b", subject_weight=0), *with_text, self.versions()) is None

    def test_the_label_follows_contents_and_strengths(self):
        files = self.files({"te1": {Q: low_rank(0)}}, {"te1": {Q: low_rank(1)}})
        labels = {
            text_parts(FuseSettings("a", "b", **settings), *files, self.versions(time)).label
            for settings, time in (({}, 1), ({"subject_weight": 0.5}, 1), ({"te_weight": 0.5}, 1), ({}, 2), ({"criterion": "js"}, 1))
        }
        assert len(labels) == 4  # the criterion changes nothing in the text encoder


class TestA1111:
    def layers(self, *names):
        return {name: nn.Linear(WIDTH, WIDTH) for name in names}

    @pytest.mark.parametrize("prefix", ["transformer_", "0_transformer_"])
    def test_both_loras_are_summed_on_a_layer(self, prefix):
        one, two = low_rank(1), low_rank(2)
        layers = self.layers(prefix + FC1)
        modules, unmatched = text_modules(parts({"te1": {FC1: one}}, {"te1": {FC1: two}}), layers)
        change, shift = modules[prefix + FC1].calc_updown(layers[prefix + FC1].weight)
        torch.testing.assert_close(change.double(), 0.7 * exact(one) + 1.3 * exact(two), atol=1e-6, rtol=1e-5)
        assert shift is None
        assert unmatched == []

    def test_a_change_of_the_bias_comes_along(self):
        one, two = low_rank(1, bias=True), low_rank(2, bias=True)
        layers = self.layers("transformer_" + FC1)
        modules, _ = text_modules(parts({"te1": {FC1: one}}, {"te1": {FC1: two}}), layers)
        _, shift = modules["transformer_" + FC1].calc_updown(layers["transformer_" + FC1].weight)
        torch.testing.assert_close(shift, 0.7 * one.bias + 1.3 * two.bias)

    def test_kinds_that_need_the_weight_get_it(self):
        layers = self.layers("transformer_" + FC1)
        doubling = FromWeight(lambda weight: weight)
        modules, _ = text_modules(parts({"te1": {FC1: doubling}}, {}), layers)
        weight = layers["transformer_" + FC1].weight
        change, _ = modules["transformer_" + FC1].calc_updown(weight)
        torch.testing.assert_close(change, 0.7 * weight)

    def test_sdxls_packed_attention_gets_all_four_parts(self):
        """networks.py:487 merges q, k, v, out only together; the mlp layers have open_clip's names."""
        attention = nn.MultiheadAttention(WIDTH, 2)
        layers = {
            "1_model_transformer_resblocks_0_attn": attention,
            "1_model_transformer_resblocks_0_mlp_c_fc": nn.Linear(WIDTH, WIDTH),
            "0_transformer_" + Q: nn.Linear(WIDTH, WIDTH),
        }
        k, fc = low_rank(1), low_rank(2)
        modules, unmatched = text_modules(parts({"te2": {K: k}}, {"te2": {FC1: fc, FC2: fc}}), layers)
        stem = "1_model_transformer_resblocks_0_attn"
        assert {name for name in modules if name.startswith(stem)} == {f"{stem}_{part}_proj" for part in "q k v out".split()}
        rows = attention.in_proj_weight.chunk(3, 0)
        changes = torch.vstack([modules[f"{stem}_{part}_proj"].calc_updown(row)[0] for part, row in zip("qkv", rows)])
        torch.testing.assert_close(changes[WIDTH : 2 * WIDTH].double(), 0.7 * exact(k), atol=1e-6, rtol=1e-5)
        assert not changes[:WIDTH].any()
        assert not changes[2 * WIDTH :].any()
        assert "1_model_transformer_resblocks_0_mlp_c_fc" in modules
        assert unmatched == [f"te2 {FC2} of file1"]

    def test_sd2s_only_encoder_is_open_clips(self):
        layers = {"model_transformer_resblocks_0_attn": nn.MultiheadAttention(WIDTH, 2)}
        modules, unmatched = text_modules(parts({"te1": {OUT: low_rank(1)}}, {}), layers)
        assert "model_transformer_resblocks_0_attn_out_proj" in modules
        assert unmatched == []

    def test_clip_g_is_never_taken_for_clip_l(self):
        layers = self.layers("0_transformer_" + Q)
        modules, unmatched = text_modules(parts({"te2": {Q: low_rank(1)}}, {}), layers)
        assert not modules
        assert unmatched == [f"te2 {Q} of file0"]

    def test_under_the_functional_option_the_change_is_added_to_the_output(self):
        layers = self.layers("transformer_" + FC1)
        branch = low_rank(3, bias=True)
        modules, _ = text_modules(parts({"te1": {FC1: branch}}, {}), layers)
        x, y = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
        expected = y.double() + 0.7 * (x.double() @ exact(branch).T + branch.bias.double())
        torch.testing.assert_close(modules["transformer_" + FC1].forward(x, y).double(), expected, atol=1e-5, rtol=1e-5)

    def test_it_looks_like_a_network_of_the_extension(self):
        net = TextNetwork("label", {})
        assert not net.network_on_disk.shorthash
        assert net.mentioned_name is None
        assert not net.bundle_embeddings
        assert (net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) == ("label", 1.0, 1.0, None)


class TestForge:
    def names(self, *keys):
        return {key: torch.zeros(WIDTH, WIDTH) for key in keys}

    def merged(self, patch, weight):
        """backend/patcher/lora.py:84, for the two kinds of patches used."""
        kind, tensors = patch
        if kind == "diff":
            return weight + tensors[0]
        up, down, alpha, mid, dora = tensors
        assert mid is None
        assert dora is None
        return weight + alpha / down.shape[0] * up @ down

    def test_encoders_are_found_by_forges_names(self):
        clip_l = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
        clip_g = clip_l.replace("clip_l", "clip_g")
        t5 = "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
        part = TextPart(
            "file", {"te1": {Q: low_rank(1)}, "te2": {Q: low_rank(2)}, "t5": {"encoder_block_0_layer_0_SelfAttention_q": low_rank(3)}}, 1.0
        )
        patches, missing = text_patches(part, self.names(clip_l, clip_g, t5), None)
        assert set(patches) == {clip_l, clip_g, t5}
        assert missing == []
        for key, seed in ((clip_l, 1), (clip_g, 2), (t5, 3)):
            torch.testing.assert_close(
                self.merged(patches[key], torch.zeros(WIDTH, WIDTH)).double(), exact(low_rank(seed)), rtol=1e-5, atol=1e-5
            )

    def test_sd2s_encoder_is_clip_h(self):
        key = "clip_h.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
        patches, missing = text_patches(TextPart("file", {"te1": {FC1: low_rank(1)}}, 1.0), self.names(key), None)
        assert set(patches) == {key}
        assert missing == []

    def test_layers_that_the_model_does_not_have_are_named(self):
        patches, missing = text_patches(TextPart("file", {"te2": {Q: low_rank(1)}}, 1.0), self.names(), None)
        assert patches == {}
        assert missing == [f"te2 {Q}"]

    def test_a_full_matrix_a_bias_and_a_kind_that_needs_the_weight(self):
        stem = "clip_l.transformer.text_model.encoder.layers.0.mlp."
        names = {
            f"{stem}fc1.weight": torch.ones(WIDTH, WIDTH),
            f"{stem}fc1.bias": torch.ones(WIDTH),
            f"{stem}fc2.weight": torch.ones(WIDTH, WIDTH),
        }
        dense = Dense(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH))
        part = TextPart("file", {"te1": {FC1: dense, FC2: FromWeight(lambda weight: 2 * weight)}}, 1.0)
        patches, _ = text_patches(part, names, lambda key: names[key])
        torch.testing.assert_close(patches[f"{stem}fc1.weight"][1][0], dense.weight)
        torch.testing.assert_close(patches[f"{stem}fc1.bias"][1][0], dense.bias)
        torch.testing.assert_close(patches[f"{stem}fc2.weight"][1][0], torch.full((WIDTH, WIDTH), 2.0))


class TestForgesQuantisedWeights:
    """weight_of gives what the layer computes with."""

    class Blocks(torch.Tensor):
        """A GGUF parameter: packed data, values only by way of its class."""

    def packed(self, values, baked):
        parameter = values.clone().as_subclass(self.Blocks)
        parameter.gguf_cls, parameter.baked = Halved, baked
        parameter.copy_with_data = lambda data: self.packed(data.as_subclass(torch.Tensor), False)
        return parameter

    @pytest.fixture(autouse=True)
    def _backend(self, monkeypatch):
        operations = types.ModuleType("backend.operations")

        def get_weight_and_bias(layer, weight_args=None, weight_fn=None):
            return weight_fn(layer.weight).to(**weight_args) * getattr(layer, "scale_weight", 1.0), None

        operations.get_weight_and_bias = get_weight_and_bias
        gguf = types.ModuleType("backend.operations_gguf")
        gguf.dequantize_tensor = lambda parameter: parameter.gguf_cls.dequantize_pytorch(parameter)
        for module in (types.ModuleType("backend"), operations, gguf):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    @pytest.mark.parametrize("baked", [True, False])
    def test_gguf(self, baked):
        values = torch.randn(3, 3)
        layer = types.SimpleNamespace(weight=self.packed(values, baked))
        torch.testing.assert_close(ForgeDenoisers().weight_of(layer).as_subclass(torch.Tensor), values / 2)
        assert layer.weight.baked is baked

    def test_fp8_with_a_scale(self):
        values = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
        layer = types.SimpleNamespace(weight=values.to(torch.float8_e4m3fn), scale_weight=torch.tensor(3.0))
        weight = ForgeDenoisers().weight_of(layer)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, 3 * values)


class Halved:
    """A quantisation whose values are half of what is stored, once it is baked."""

    @staticmethod
    def bake(parameter):
        parameter.baked = True

    @staticmethod
    def dequantize_pytorch(parameter):
        assert parameter.baked
        return parameter.as_subclass(torch.Tensor) / 2
