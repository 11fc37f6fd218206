"""Fused diffusers pipelines against the same pipeline with the LoRA's weights merged by hand in float64."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from lib_dynfuse import FuseSettings, FusionError, read_lora
from lib_dynfuse.hosts.diffusers import FusedPipeline, PipelineError, load_pipeline, loading, rows_of
from tests.fakes.small_model import write_random_lora
from tests.hosts.diffusers import tiny_pipelines

PROMPT, NEGATIVE = "a dog in a park", "rain"
SD = ("unet", "lora_unet"), ("text_encoder", "lora_te")
SDXL = ("unet", "lora_unet"), ("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")
FLUX = ("transformer", "lora_transformer"), ("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")


@pytest.fixture(scope="module")
def sd():
    return tiny_pipelines.sd()


@pytest.fixture(scope="module")
def loras(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, rank, seed in (("dog", 8, 1), ("watercolor", 4, 3)):
        write_random_lora(folder / f"{name}.safetensors", sd, rank=rank, strength=0.3, seed=seed)
    return read_lora(folder / "dog.safetensors"), read_lora(folder / "watercolor.safetensors")


def assert_same_latents(ours, reference):
    """To 1e-4 of the largest value: transformers has no CLIP in float64, so both sides run three steps in float32."""
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def run(pipeline, seeds=(1,), *, negative=NEGATIVE, size=64, **more):
    """Latents of a plain pipeline, one image per seed, at 3 steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = {"negative_prompt": negative} if negative else {}
    return pipeline(
        PROMPT,
        num_images_per_prompt=len(seeds),
        num_inference_steps=3,
        generator=generators,
        width=size,
        height=size,
        output_type="latent",
        **negative,
        **more,
    ).images


def run_fused(pipeline, loras, settings=None, seeds=(1,), *, negative=NEGATIVE, size=64, **more):
    fused = FusedPipeline(pipeline, *loras, settings)
    return fused(PROMPT, negative_prompt=negative, seeds=seeds, steps=3, width=size, height=size, output_type="latent", **more)


def merged(pipeline, networks, *parts):
    """A copy of the pipeline with W0 + strength (alpha / rank) B A in every layer a file names.

    parts: (path, strength of the denoiser, strength of the text encoders).
    """
    pipeline = copy.deepcopy(pipeline)
    merges = 0
    for path, denoiser_strength, text_strength in parts:
        tensors = load_file(path)
        for index, (component, prefix) in enumerate(networks):
            for name, module in getattr(pipeline, component).named_modules():
                key = f"{prefix}_{name.replace('.', '_')}"
                if f"{key}.lora_down.weight" in tensors:
                    down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
                    factor = tensors[f"{key}.alpha"].item() / down.shape[0] * (text_strength if index else denoiser_strength)
                    change = factor * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
                    module.weight.data = (module.weight.double() + change).to(module.weight.dtype)
                    merges += 1
    assert merges == sum(1 for path, *_ in parts for key in load_file(path) if key.endswith(".alpha"))
    return pipeline


def plain_modules(pipeline):
    """Nothing of ours on the pipeline or any of its modules."""
    networks = [getattr(pipeline, name) for name in ("unet", "transformer", "text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    left = [module for network in networks for module in network.modules() if "forward" in vars(module)]
    return not left and "encode_prompt" not in vars(pipeline)


def test_a_pair_of_the_same_file_is_that_lora_merged_into_the_denoiser_once_and_into_the_text_encoder_twice(sd, loras):
    settings = FuseSettings(method="dynfuse", subject_weight=0.8, style_weight=0.8, te_weight=0.5)
    fused = run_fused(sd, (loras[0], loras[0]), settings)
    reference = run(merged(sd, SD, (loras[0].path, 0.8, 2 * 0.5 * 0.8)))
    assert not torch.allclose(reference, run(sd), atol=0.1)
    assert_same_latents(torch.stack(fused.images), reference)


def test_direct_is_both_merged(sd, loras):
    fused = run_fused(sd, loras, FuseSettings(method="direct", style_weight=-0.5))
    reference = run(merged(sd, SD, (loras[0].path, 1, 1), (loras[1].path, -0.5, -0.5)))
    assert_same_latents(torch.stack(fused.images), reference)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_contrast_in_one_step_against_merged_models(sd, loras, cfg):
    """A single step is affine in the prediction: that of u + s (c - u) + k (c - c_none) follows from three plain pictures."""
    settings = FuseSettings(method="direct", te_weight=0.0, contrast=1.5)
    arguments = {"width": 64, "height": 64, "output_type": "latent"}
    made = FusedPipeline(sd, *loras, settings)(PROMPT, seeds=(1, 2), steps=1, cfg_scale=cfg, **arguments)

    def picture(pipeline, scale):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipeline(
            PROMPT, num_images_per_prompt=2, num_inference_steps=1, guidance_scale=scale, generator=generators, **arguments
        ).images

    both = merged(sd, SD, (loras[0].path, 1, 0), (loras[1].path, 1, 0))
    expected = picture(both, cfg) + 1.5 * (picture(both, 1.0) - picture(sd, 1.0))
    assert_same_latents(torch.stack(made.images), expected)
    assert not torch.allclose(expected, picture(both, cfg), atol=1e-2)


def test_the_text_encoder_sees_the_weighted_sum_of_both(sd, loras):
    settings = FuseSettings(method="dynfuse", subject_weight=0.9, style_weight=1.2, te_weight=0.5)
    fused = FusedPipeline(sd, *loras, settings)
    reference = merged(sd, SD, (loras[0].path, 0, 0.45), (loras[1].path, 0, 0.6))
    arguments = (PROMPT, "cpu", 1, True, NEGATIVE)
    with fused._text.during_encoding(sd), torch.no_grad():
        ours = sd.encode_prompt(*arguments)
    with torch.no_grad():
        theirs, plain = reference.encode_prompt(*arguments), sd.encode_prompt(*arguments)
    for a, b, c in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c, atol=1e-2)


def test_a_text_weight_of_zero_leaves_the_text_encoder_alone(sd, loras):
    fused = run_fused(sd, (loras[0], loras[0]), FuseSettings(method="dynfuse", te_weight=0))
    reference = run(merged(sd, SD, (loras[0].path, 1, 0)))
    assert_same_latents(torch.stack(fused.images), reference)


@pytest.mark.parametrize("cfg_scale", [5.0, 1.0])
def test_an_image_does_not_depend_on_its_batch_mates(sd, loras, cfg_scale):
    seeds = (3, 1, 4, 2)
    together = run_fused(sd, loras, seeds=seeds, cfg_scale=cfg_scale)
    for position, seed in enumerate(seeds):
        alone = run_fused(sd, loras, seeds=(seed,), cfg_scale=cfg_scale)
        assert_same_latents(together.images[position], alone.images[0])
        assert torch.equal(together.trace.winners[:, :, position], alone.trace.winners[:, :, 0])


def test_the_trace_has_the_steps_and_images_of_the_job(sd, loras):
    trace = run_fused(sd, loras, FuseSettings(method="dynfuse"), seeds=(1, 2)).trace
    assert trace.winners.shape[0] == 3
    assert trace.winners.shape[2] == 2
    assert trace.measured.all()
    assert 0 < trace.subject_share() < 1
    assert trace.fallbacks == 0


@pytest.mark.parametrize("cfg_scale", [5.0, 1.0])
def test_rows_say_which_rows_see_the_prompt(sd, cfg_scale):
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs["encoder_hidden_states"], rows_of(sd, args[0].shape[0])))

    hook = sd.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run(sd, seeds=(1, 2), guidance_scale=cfg_scale)
    finally:
        hook.remove()
    with torch.no_grad():
        prompt, _ = sd.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    context, rows = seen[0]
    assert rows.count == 2
    assert list(rows.conditional) == [torch.allclose(row, prompt[0]) for row in context]
    assert rows.images == ((0, 1, 0, 1) if cfg_scale > 1 else (0, 1))


def test_progress_counts_the_steps(sd, loras):
    seen = []
    run_fused(sd, loras, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_is_left_after_a_job(sd, loras):
    weights = {name: p.clone() for name, p in sd.unet.state_dict().items()}
    before = run(sd)
    run_fused(sd, loras)
    assert plain_modules(sd)
    assert torch.equal(run(sd), before)
    assert all(torch.equal(p, weights[name]) for name, p in sd.unet.state_dict().items())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_nothing_is_left_after_an_interrupt(sd, loras, step):
    def interrupt(done, total):
        if done == step:
            raise KeyboardInterrupt

    before = run(sd)
    with pytest.raises(KeyboardInterrupt):
        run_fused(sd, loras, progress=interrupt)
    assert plain_modules(sd)
    assert torch.equal(run(sd), before)


@pytest.mark.parametrize("place", ["unet.mid_block.attentions.0.proj_out", "unet.up_blocks.1.resnets.1.conv2", "text_encoder.text_model"])
def test_nothing_is_left_after_an_error_inside_a_layer(sd, loras, place):
    component, name = place.split(".", 1)

    def fail(module, args):
        raise RuntimeError("a layer failed")

    hook = getattr(sd, component).get_submodule(name).register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="a layer failed"):
            run_fused(sd, loras)
    finally:
        hook.remove()
    assert plain_modules(sd)


def test_a_forward_that_somebody_else_put_on_the_denoiser_stays(sd, loras):
    own = sd.unet.forward
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    sd.unet.forward = theirs
    try:
        run_fused(sd, loras, FuseSettings(method="direct"))
        assert sd.unet.forward is theirs
        assert len(calls) == 3
    finally:
        del sd.unet.forward


def test_text_layers_that_fit_no_encoder_are_named(sd, loras, tmp_path):
    tensors = {**load_file(loras[0].path)}
    for key in [key for key in tensors if key.startswith("lora_te_text_model_encoder_layers_2_")]:
        tensors[key.replace("layers_2_", "layers_9_")] = tensors.pop(key)
    save_file(tensors, tmp_path / "deep.safetensors")
    notes = run_fused(sd, (read_lora(tmp_path / "deep.safetensors"), loras[1])).notes
    assert any("6 text-encoder layers of deep" in note and "layers_9" in note for note in notes)


def test_a_text_part_of_another_width_is_refused(sd, loras, tmp_path):
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {**load_file(loras[0].path), f"{key}.lora_down.weight": torch.zeros(8, 32)}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises((FusionError, ValueError), match="other"):
        FusedPipeline(sd, read_lora(tmp_path / "other.safetensors"), loras[1])


def test_arguments_that_the_pipeline_refuses_are_said_in_a_sentence(sd, loras):
    with pytest.raises(PipelineError, match="divisible by 8"):
        run_fused(sd, loras, size=65)
    assert plain_modules(sd)


def test_sdxl_with_both_text_encoders(tmp_path):
    pipeline = tiny_pipelines.sdxl()
    path = tiny_pipelines.write_lora(tmp_path / "same.safetensors", pipeline, SDXL)
    lora = read_lora(path)
    fused = run_fused(pipeline, (lora, lora), FuseSettings(method="dynfuse", te_weight=0.5))
    reference = run(merged(pipeline, SDXL, (path, 1, 1)))
    assert not torch.allclose(reference, run(pipeline), atol=0.05)
    assert_same_latents(torch.stack(fused.images), reference)
    assert not fused.report.unmatched[lora.name]
    assert plain_modules(pipeline)


def test_flux_has_no_negative_prompt_and_all_its_rows_see_the_prompt(tmp_path):
    pipeline = tiny_pipelines.flux()
    path = tiny_pipelines.write_lora(tmp_path / "same.safetensors", pipeline, FLUX)
    lora = read_lora(path)
    fused = run_fused(pipeline, (lora, lora), FuseSettings(method="dynfuse", te_weight=0.5), seeds=(1, 2))
    reference = run(merged(pipeline, FLUX, (path, 1, 1)), seeds=(1, 2), negative=None)
    assert not torch.allclose(reference, run(pipeline, seeds=(1, 2), negative=None), atol=0.02)
    assert_same_latents(torch.stack(fused.images), reference)
    assert fused.trace.winners.shape[2] == 2
    assert any("Flux has none" in note for note in fused.notes)
    assert plain_modules(pipeline)


def test_a_pipeline_folder_is_loaded_and_gives_the_same_picture(sd, loras, tmp_path):
    plain = tiny_pipelines.sd()
    plain.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model", device="cpu")
    assert_same_latents(run(loaded), run(plain))
    assert loaded.unet.dtype == torch.float32
    assert load_pipeline(tmp_path / "model", device="cpu", dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_folder_with_half_precision_weights_only_is_loaded(tmp_path):
    tiny_pipelines.sd().save_pretrained(tmp_path / "model", variant="fp16")
    assert load_pipeline(tmp_path / "model", device="cpu").unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "StableDiffusionPipeline"),
        ("conditioner.embedders.1.model.ln_final.weight", "StableDiffusionXLPipeline"),
    ],
)
def test_a_checkpoint_is_loaded_as_what_its_tensors_are(monkeypatch, tmp_path, key, expected):
    import diffusers

    given = {}

    def from_single_file(path, **kwargs):
        given.update(path=path, **kwargs)
        return tiny_pipelines.sd()

    monkeypatch.setattr(getattr(diffusers, expected), "from_single_file", from_single_file)
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), key: torch.zeros(1)}, path)
    (tmp_path / "model_index.json").write_text("{}")
    load_pipeline(path, device="cpu", config=tmp_path)
    assert given == {"path": str(path), "config": str(tmp_path), "torch_dtype": torch.float32}


def test_a_checkpoint_whose_configuration_cannot_be_had_names_the_way_out(monkeypatch, tmp_path):
    import diffusers
    from huggingface_hub.utils import LocalEntryNotFoundError

    def offline(path, **kwargs):
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", offline)
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "cond_stage_model.x": torch.zeros(1)}, path)
    with pytest.raises(PipelineError, match=r"model\.safetensors cannot be loaded: .*--config"):
        load_pipeline(path, device="cpu")


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "holds no model_index.json"),
        (lambda folder: write(folder / "model_index.json", b"{").parent, "cannot be read"),
        (lambda folder: write(folder / "model_index.json", json.dumps({"_class_name": "VideoPipeline"}).encode()).parent, "VideoPipeline"),
        (lambda folder: write(folder / "cut.safetensors", b"\x99\x00\x00\x00\x00\x00\x00\x00{"), "damaged"),
        (lambda folder: write(folder / "text.ckpt", b"hello"), "damaged"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(tmp_path, make, reason):
    with pytest.raises(PipelineError, match=reason) as caught:
        load_pipeline(make(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_lora_is_no_checkpoint(loras):
    with pytest.raises(PipelineError, match="tensors are not those of"):
        load_pipeline(loras[0].path, device="cpu")


def test_a_flux_checkpoint_asks_for_the_rest_of_the_pipeline(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(PipelineError, match="--config"):
        load_pipeline(tmp_path / "flux.safetensors", device="cpu")


def test_the_best_device_is_used_unless_one_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.best_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert loading.best_device() == "cpu"


# A method that goes by what the layers are given with each side alone


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


def test_ssr_sees_each_lora_alone_under_its_own_prompt(sd, loras, monkeypatch):
    """Z Z^T of a layer, against its input in a pipeline with that LoRA merged by hand."""
    settings = FuseSettings(method="ssr", subject_prompt="a dog", style_prompt="a house", subject_weight="0@0,0.7@1")
    seen = []
    original = FusedPipeline._shown
    monkeypatch.setattr(FusedPipeline, "_shown", lambda self, *arguments: seen.append(original(self, *arguments)) or seen[-1])
    result = run_fused(sd, loras, settings, cfg_scale=3.0)
    assert not any("prompt" in note for note in result.notes)
    tensors = [load_file(lora.path) for lora in loras]
    key = f"lora_unet_{LAYER.replace('.', '_')}.lora_down.weight"
    down = torch.cat([own[key] for own in tensors]).double()
    parts = ((loras[0].path, 0.7, 0.7), "a dog"), ((loras[1].path, 1.0, 1.0), "a house")
    for correlations, (part, prompt) in zip(seen, parts, strict=True):
        pipeline, inputs = merged(sd, SD, part), []
        pipeline.unet.get_submodule(LAYER).register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        pipeline(
            prompt,
            negative_prompt=NEGATIVE,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
            width=64,
            height=64,
            output_type="latent",
        )
        z = down @ inputs[0][1].double().t()  # the row that sees the prompt, at the first step
        found = next(own for site, own in correlations.items() if site.layer == LAYER)
        torch.testing.assert_close(found.matrix.double(), z @ z.t(), rtol=1e-3, atol=1e-3 * float((z @ z.t()).abs().max()))
        assert found.of_subject.tolist() == [True] * 8 + [False] * 4


def test_ssr_says_where_both_were_shown_the_same_prompt(sd, loras):
    assert any("subject_prompt and style_prompt" in note for note in run_fused(sd, loras, FuseSettings(method="ssr")).notes)
