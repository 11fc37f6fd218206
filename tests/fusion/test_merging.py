"""A fusion as one LoRA file: merged into the model by hand, in float64, it gives what the fusion gave, or its mean."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lib_dynfuse import FuseSettings, FusionError, LoraError, Rows, SettingsError, read_lora
from lib_dynfuse.fusion import RULES, FusionSession, Step
from lib_dynfuse.fusion.merging import Means, describe_merged, merge_files, merge_pictures
from lib_dynfuse.fusion.rules import Rule
from lib_dynfuse.lora import branches_by_site, denoiser_aliases, text_strengths
from lib_dynfuse.lora.families import SD1, SDXL, reference_layers

from .models import CONVOLUTION, Nested, lora_file, tokens_model

LDM = [
    f"{block}.1.transformer_blocks.0.attn1.to_{q}"
    for block in ("input_blocks.1", "input_blocks.4", "middle_block", "output_blocks.5")
    for q in "qv"
]
FEED_FORWARD = ["input_blocks.1.1.transformer_blocks.0.ff.net.2", "middle_block.1.transformer_blocks.0.ff.net.2"]
NORM = "middle_block.1.transformer_blocks.0.norm1"
NAMES = [*LDM, *FEED_FORWARD]


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def loras(tmp_path, model):
    """Three; only the first has feed-forward layers."""
    layers = (NAMES, LDM, LDM[2:])
    return [
        lora_file(tmp_path / f"{name}.safetensors", model, own, seed=n, scale=0.3, rank=3 + n)
        for n, (name, own) in enumerate(zip(("dog", "hat", "ink"), layers))
    ]


def run(session, model, inputs, images=1):
    """Each input a step: the outputs by layer."""
    outputs = []
    for number, x in enumerate(inputs):
        session.begin(Step.of(number, len(inputs)))
        with torch.no_grad(), session.attached(Rows(tuple(range(images)), (True,) * images, images)):
            outputs.append({name: output.clone() for name, output in model(x).items()})
        session.end_step()
    return outputs


def inputs_of(steps, images=1):
    return torch.randn(steps, images, 2, 16, generator=torch.Generator().manual_seed(4))


def merged_by_hand(model, path):
    """(layer, input) -> output of W0 + dW in float64, dW straight from the file's matrices by the definition (alpha / rank) B A."""
    tensors = load_file(path)
    changes = {}
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        base = key.removesuffix(".lora_down.weight")
        down, up = tensors[key].double(), tensors[f"{base}.lora_up.weight"].double()
        change = tensors[f"{base}.alpha"].item() / down.shape[0] * up.flatten(1) @ down.flatten(1)
        changes[base] = change

    aliases = denoiser_aliases(name for name, _ in model.named_modules())

    def output(layer, x):
        module = model.get_submodule(layer)
        own = [change for key, change in changes.items() if aliases[key.removeprefix("lora_unet_")][0].site.layer == layer]
        assert len(own) <= 1
        weight = module.weight.double() + (own[0].reshape(module.weight.shape) if own else 0)
        return torch.nn.functional.linear(x.double(), weight, module.bias.double())

    return output


SETTINGS = [
    {},
    {"subject_weight": 0.7, "style_weight": -0.4},
    {"scope": "attention", "subject_weight": "0.5+1.5"},
    {"one_sided": "skip"},
    {"subject_blocks": "in1=0.5,mid=0", "style_blocks": "out5=2"},
    {"subject_blocks": "NONE+in4=0.25", "style_weight": 0.3},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_a_sum_is_exact(tmp_path, model, loras, values):
    dog, hat, ink = loras
    settings = FuseSettings(subject="dog+hat", style="ink", method="direct", **values)
    session = FusionSession(model, [dog, hat], ink, settings)
    x = inputs_of(1)
    fused = run(session, model, x)[0]
    path = tmp_path / "both.safetensors"
    merged = merge_pictures(path, [dog, hat], [ink], settings, [session.trace], session.shapes, dtype=torch.float32)
    assert merged.means.constant
    output = merged_by_hand(model, path)
    for name in NAMES:
        torch.testing.assert_close(fused[name].double(), output(name, x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_a_sum_needs_no_picture(tmp_path, model, loras, values):
    dog, hat, ink = loras
    settings = FuseSettings(subject="dog+hat", style="ink", method="direct", **values)
    session = FusionSession(model, [dog, hat], ink, settings)
    foreseen = session.foreseen(3)
    run(session, model, inputs_of(3))
    trace = session.trace
    assert torch.equal(foreseen.weights, trace.weights)
    assert torch.equal(foreseen.strengths, trace.strengths)
    assert torch.equal(foreseen.reached, trace.reached)


@pytest.mark.parametrize("decide", ["now", "next"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_selection_becomes_its_mean(tmp_path, model, loras, decide, images):
    """The mean of the fused outputs of one input, had each step's and image's weights been used on it."""
    dog, hat, ink = loras
    settings = FuseSettings(
        method="dynfuse", subject="dog+hat", style="ink", decide=decide, vote_tokens=0, subject_weight="0.9+1.1", style_blocks="in4=1.1"
    )
    session = FusionSession(model, [dog, hat], ink, settings)
    run(session, model, inputs_of(5, images), images)
    trace = session.trace
    assert not Means.of([trace]).constant, "or the test shows nothing"
    path = tmp_path / "both.safetensors"
    merged = merge_pictures(path, [dog, hat], [ink], settings, [trace], session.shapes, dtype=torch.float32)
    assert (merged.means.constant, merged.means.steps, merged.means.images) == (False, 5, images)
    output, x = merged_by_hand(model, path), inputs_of(1)[0]
    changes = [
        {site.layer: binding.bind(site, torch.Tensor).delta_weight().double() for site, binding in found.items()}
        for found, _ in (branches_by_site(file, denoiser_aliases(NAMES)) for file in loras)
    ]
    for row, site in enumerate(trace.sites):
        module = model.get_submodule(site.layer)
        base = torch.nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
        each = [
            base + sum(w * x.double() @ own[site.layer].T for w, own in zip(weights.tolist(), changes) if site.layer in own)
            for weights in trace.weights[:, row].flatten(0, 1)
        ]
        torch.testing.assert_close(output(site.layer, x), torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_several_batches_count_by_their_images(model, loras):
    dog, _, ink = loras
    traces = []
    for seed, images in ((1, 2), (2, 1)):
        session = FusionSession(model, dog, ink, FuseSettings(method="dynfuse"))
        torch.manual_seed(seed)
        run(session, model, torch.randn(4, images, 10, 16), images)
        traces.append(session.trace)
    means = Means.of(traces)
    expected = (2 * traces[0].weights.mean((0, 2)) + traces[1].weights.mean((0, 2))) / 3
    torch.testing.assert_close(means.weights.float(), expected)
    assert (means.images, means.steps) == (3, 4)


def test_a_step_that_did_not_run_a_layer_does_not_count_there(model, loras):
    dog, _, ink = loras
    session = FusionSession(model, dog, ink, FuseSettings(method="direct", subject_weight=0.5))
    for number in range(2):
        session.begin(Step.of(number, 2))
        with torch.no_grad(), session.attached(Rows((0,), (True,), 1)):
            for name in NAMES[number:]:
                model.get_submodule(name)(inputs_of(1)[0])
        session.end_step()
    means = Means.of([session.trace])
    assert set(means.weights[:, 0].tolist()) == {0.5}
    assert means.constant


def test_weights_over_the_steps_become_their_mean(tmp_path, model, loras):
    dog, _, ink = loras
    settings = FuseSettings(subject="dog", style="ink", method="direct", subject_weight="0@0,1@1", style_weight=2.0, style_blocks="mid=0.5")
    session = FusionSession(model, dog, ink, settings)
    run(session, model, inputs_of(5))
    means = Means.of([session.trace])
    at = {site.layer: number for number, site in enumerate(means.sites)}
    assert means.weights[at[LDM[2]]].tolist() == pytest.approx([0.5, 2.0])
    assert means.weights[at[LDM[4]]].tolist() == pytest.approx([0.5, 1.0])
    assert means.strengths.tolist() == pytest.approx([0.5, 2.0])
    assert not means.constant


def with_norms(path, seed):
    """A file for one linear layer and one normalisation layer."""
    generator = torch.Generator().manual_seed(seed)
    flat, norm = (f"lora_unet_{name.replace('.', '_')}" for name in (LDM[4], NORM))
    tensors = {
        f"{flat}.lora_down.weight": torch.randn(2, 16, generator=generator),
        f"{flat}.lora_up.weight": torch.randn(16, 2, generator=generator),
        f"{norm}.w_norm": torch.randn(16, generator=generator),
        f"{norm}.b_norm": torch.randn(16, generator=generator),
    }
    save_file(tensors, str(path))
    return read_lora(path), tensors[f"{norm}.w_norm"], tensors[f"{norm}.b_norm"]


@pytest.mark.parametrize("method", ["direct", "dynfuse"])
def test_normalisation_layers_are_summed_whatever_is_chosen(tmp_path, method):
    model = Nested({LDM[0]: nn.Linear(16, 16), NORM: nn.LayerNorm(16), LDM[4]: nn.Linear(16, 16)}).eval().requires_grad_(False)
    dog, gain_dog, offset_dog = with_norms(tmp_path / "dog.safetensors", 1)
    ink, gain_ink, offset_ink = with_norms(tmp_path / "ink.safetensors", 2)
    settings = FuseSettings(subject="dog", style="ink", method=method, subject_weight="0@0,1@1", style_weight=0.5, style_blocks="mid=0.5")
    session = FusionSession(model, dog, ink, settings)
    x = inputs_of(3)
    outputs = run(session, model, x)
    path = tmp_path / "both.safetensors"
    merge_pictures(path, [dog], [ink], settings, [session.trace], session.shapes, dtype=torch.float32)
    tensors = load_file(path)
    gain, offset = (next(tensor for key, tensor in tensors.items() if key.endswith(end)) for end in ("w_norm", "b_norm"))
    torch.testing.assert_close(gain, 0.5 * gain_dog + 0.25 * gain_ink)
    torch.testing.assert_close(offset, 0.5 * offset_dog + 0.25 * offset_ink)
    # At the middle step the weights are their means.
    torch.testing.assert_close(outputs[1][NORM], torch.nn.functional.layer_norm(x[1], (16,), 1 + gain, offset), rtol=1e-4, atol=1e-5)
    other = FuseSettings(subject="dog", style="ink", method=method, scope="attention")
    attention = FusionSession(model, dog, ink, other)
    run(attention, model, x)
    merge_pictures(tmp_path / "attention.safetensors", [dog], [ink], other, [attention.trace], attention.shapes)
    assert not any("norm" in key for key in load_file(tmp_path / "attention.safetensors"))


@pytest.fixture
def sd_pair(tmp_path):
    """Files for SD 1.x as published, with a text encoder, and the model's own layers of their names."""
    shapes = reference_layers(SD1.name)
    names = [LDM[0], LDM[5], CONVOLUTION, "output_blocks.5.1.proj_in", "input_blocks.2.1.transformer_blocks.0.attn2.to_k"]
    files = []
    for seed, name in enumerate(("dog", "ink")):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for layer in names[: 5 - seed]:
            key = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, *shapes[layer][1:], generator=generator) / 30
            tensors[f"{key}.lora_up.weight"] = torch.randn(shapes[layer][0], 4, *(1,) * len(shapes[layer][2:]), generator=generator)
        key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, 768, generator=generator) / 30
        tensors[f"{key}.lora_up.weight"] = torch.randn(768, 4, generator=generator)
        save_file(tensors, str(tmp_path / f"{name}.safetensors"))
        files.append(read_lora(tmp_path / f"{name}.safetensors"))
    return files


def text_change(path):
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = load_file(path)
    scale = tensors[f"{key}.alpha"].item() / len(tensors[f"{key}.lora_down.weight"]) if f"{key}.alpha" in tensors else 1.0
    return scale * tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()


def test_text_encoders_are_summed_at_full_weight_times_their_block(tmp_path, sd_pair):
    settings = FuseSettings(
        subject="dog",
        style="ink",
        method="direct",
        te_weight=0.5,
        subject_weight="0@0,0.8@1",
        style_weight=2.0,
        style_blocks="base=0.25,in1=3",
    )
    merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], settings, dtype=torch.float32)
    dog, ink = (text_change(tmp_path / f"{name}.safetensors") for name in ("dog", "ink"))
    torch.testing.assert_close(text_change(tmp_path / "both.safetensors"), 0.5 * 0.8 * dog + 0.5 * 2.0 * 0.25 * ink, rtol=1e-5, atol=1e-6)
    assert text_strengths(settings, sd_pair[:1], sd_pair[1:])[1]["te1"] == 0.25


def test_without_a_picture_the_published_models_blocks_and_shapes_hold(tmp_path, sd_pair):
    settings = FuseSettings(
        subject="dog", style="ink", method="direct", subject_weight=0.7, subject_blocks=",".join(["1"] * 5 + ["0"] * 12)
    )
    merged = merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], settings)
    averages = {site.layer: weights for site, weights in zip(merged.means.sites, merged.means.weights.tolist())}
    assert averages[LDM[0]] == pytest.approx([0.7, 1.0])
    assert averages["middle_block.1.transformer_blocks.0.attn1.to_v"] == pytest.approx([0.0, 1.0])
    assert read_lora(tmp_path / "both.safetensors").family == SD1.name
    with pytest.raises(FusionError, match="no block 'in99'"):
        merge_files(tmp_path / "other.safetensors", sd_pair[:1], sd_pair[1:], FuseSettings(method="direct", style_blocks="in99=0"))


def test_what_varies_without_being_measured_is_averaged_over_the_steps(tmp_path, sd_pair):
    settings = FuseSettings(subject="dog", style="ink", method="direct", subject_weight="0@0,1@4")
    merged = merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], settings, steps=4)
    assert merged.means.averages == pytest.approx([0.5, 1.0])
    assert "means over 4 steps" in describe_merged(merged)[2]
    more = merge_files(tmp_path / "more.safetensors", sd_pair[:1], sd_pair[1:], settings, steps=7)
    assert more.means.averages == pytest.approx([(0 + 1 / 3 + 2 / 3 + 1 + 1 + 1 + 1) / 7, 1.0])


class Alternating(Rule):
    """One LoRA after the other, and the first by its size."""

    name = "alternating"
    summary = "one after the other"

    def weights(self, step, votes):
        sizes = torch.zeros(len(self.places.sites), 1, len(self.places.members))
        for site, row in enumerate(self.places.present.tolist()):
            for member, there in enumerate(row):
                if there and member == step.index % len(row):
                    sizes[site, 0, member] = float(self.places.change(site, member).delta_weight().abs().max() > 0)
        return sizes


def test_another_rule_that_does_not_measure_is_merged_too(tmp_path, sd_pair, monkeypatch):
    monkeypatch.setitem(RULES, "alternating", Alternating)
    monkeypatch.setattr("lib_dynfuse.settings.METHODS", {"alternating": "", "direct": ""})
    merged = merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], FuseSettings(method="alternating"), steps=4)
    assert merged.means.averages == pytest.approx([0.5, 0.5])
    assert not merged.means.constant


def test_the_file_says_what_it_was_made_of(tmp_path, sd_pair):
    settings = FuseSettings(subject="dog", style="ink", method="direct", style_weight=0.5, guidance=True, subject_prompt="mine")
    path = tmp_path / "both.safetensors"
    merged = merge_files(path, sd_pair[:1], sd_pair[1:], settings)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["dynfuse_settings"]) == {"subject": "dog", "style": "ink", "style_weight": 0.5, "method": "direct"}
    assert metadata["dynfuse_weights"] == "the same at every step"
    text = "\n".join(describe_merged(merged))
    assert text.startswith("both.safetensors\n")
    for words in (
        "SD 1.x",
        "dog 1, ink 0.5; the same at every step",
        "of rank 8",
        "of rank 4",
        "CLIP-L (1 layer)",
        "none but rounding to float16",
    ):
        assert words in text, words
    assert "guidance" in text
    assert not any(
        "guidance" in line
        for line in describe_merged(merge_files(tmp_path / "2.safetensors", sd_pair[:1], sd_pair[1:], FuseSettings(method="direct")))
    )


def test_a_reduction_tells_what_it_lost(tmp_path, sd_pair):
    settings = FuseSettings(subject="dog", style="ink", method="direct")
    calls = []
    path = tmp_path / "both.safetensors"
    merged = merge_files(path, sd_pair[:1], sd_pair[1:], settings, rank=3, progress=lambda done, total: calls.append((done, total)))
    assert 0 < merged.report.error < 1
    text = describe_merged(merged)
    assert f"{merged.report.error:.2%} of the change is lost to the reduction to rank 3" in "\n".join(text)
    assert calls == [(number + 1, 5) for number in range(5)]
    assert read_lora(path).ranks == {3: 6}


def test_what_is_left_out_is_named(tmp_path, sd_pair):
    tensors = load_file(tmp_path / "dog.safetensors")
    tensors |= {"bundle_emb.dogtoken.string_to_param.*": torch.zeros(1, 768), "mystery": torch.zeros(1)}
    tensors["lora_unet_input_blocks_99_1_proj_in.lora_down.weight"] = torch.ones(4, 320, 1, 1)
    tensors["lora_unet_input_blocks_99_1_proj_in.lora_up.weight"] = torch.ones(320, 4, 1, 1)
    save_file(tensors, str(tmp_path / "more.safetensors"))
    merged = merge_files(
        tmp_path / "both.safetensors", [read_lora(tmp_path / "more.safetensors")], sd_pair[1:], FuseSettings(method="direct")
    )
    text = "\n".join(describe_merged(merged))
    assert "2 keys of more that fit no layer of the model" in text
    assert "1 key of more of no known kind (such as mystery)" in text
    assert "the embeddings inside more (dogtoken)" in text


def test_a_rule_that_measures_needs_a_picture(tmp_path, sd_pair):
    with pytest.raises(LoraError, match=r"dynfuse goes by what it sees of pictures.*generate --save-lora FILE.*--method direct"):
        merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], FuseSettings(method="dynfuse"))
    assert not (tmp_path / "both.safetensors").exists()


def test_files_that_tell_no_base_model_need_a_picture(tmp_path, loras):
    with pytest.raises(LoraError, match=r"does? not tell|do not tell"):
        merge_files(tmp_path / "both.safetensors", loras[:1], loras[1:], FuseSettings(method="direct"))


def dora(path, model, scale=1.0):
    weight = model.get_submodule(LDM[0]).weight
    key = f"lora_unet_{LDM[0].replace('.', '_')}"
    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{key}.lora_down.weight": torch.randn(2, 16, generator=generator),
        f"{key}.lora_up.weight": 0.3 * torch.randn(16, 2, generator=generator),
        f"{key}.dora_scale": 1.3 * weight.norm(dim=0, keepdim=True),
    }
    save_file(tensors, str(path))
    return read_lora(path)


def test_kinds_that_depend_on_the_model_are_merged_with_it_only(tmp_path, model, loras):
    subject = dora(tmp_path / "dora.safetensors", model)
    settings = FuseSettings(subject="dora", style="ink", method="direct")
    session = FusionSession(model, subject, loras[2], settings)
    x = inputs_of(1)
    fused = run(session, model, x)[0]
    arguments = ([subject], [loras[2]], settings, [session.trace], session.shapes)
    with pytest.raises(LoraError, match=r"dora.safetensors cannot be merged .* \(DoRA.*\) depend .* generate --save-lora"):
        merge_pictures(tmp_path / "without.safetensors", *arguments)
    merge_pictures(
        tmp_path / "with.safetensors", *arguments, rank=16, dtype=torch.float32, weight_of=lambda name: model.get_submodule(name).weight
    )
    output = merged_by_hand(model, tmp_path / "with.safetensors")
    torch.testing.assert_close(fused[LDM[0]].double(), output(LDM[0], x[0]), rtol=1e-3, atol=1e-4)


def test_layers_of_another_model_are_refused(tmp_path, sd_pair):
    shapes = reference_layers(SDXL.name)
    layer = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    key = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, shapes[layer][1]), f"{key}.lora_up.weight": torch.ones(shapes[layer][0], 2)}
    save_file(tensors, str(tmp_path / "xl.safetensors"))
    with pytest.raises((LoraError, FusionError), match="different base models|same base model"):
        merge_files(tmp_path / "both.safetensors", sd_pair[:1], [read_lora(tmp_path / "xl.safetensors")], FuseSettings(method="direct"))


def test_nothing_at_all_is_not_written(tmp_path, sd_pair):
    settings = FuseSettings(method="direct", subject_weight=0, style_weight=0)
    with pytest.raises(LoraError, match="Nothing is left"):
        merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], settings)
    with pytest.raises(SettingsError, match="rank"):
        merge_files(tmp_path / "both.safetensors", sd_pair[:1], sd_pair[1:], FuseSettings(method="direct"), rank=0)
