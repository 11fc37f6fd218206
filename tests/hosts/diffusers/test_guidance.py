"""Guided diffusers pipelines: against loops written out by hand, and the promises that people rely on."""

# ruff: noqa: E402 (what needs diffusers comes after the skip)

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="the standalone part needs diffusers, which A1111 does not have")

from lib_dynfuse import FuseSettings, read_lora
from lib_dynfuse.fusion import FusionSession
from lib_dynfuse.guidance.encoders import ImageEncoder
from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.guidance.score import Targets, score, similarities
from lib_dynfuse.guidance.weights import EncoderError, EncoderSources
from lib_dynfuse.hosts.diffusers import FusedPipeline, GuidanceSources, PipelineError, rows_of
from lib_dynfuse.hosts.diffusers import guidance as guidance_module
from tests.fakes.encoders import small_encoders
from tests.hosts.diffusers import tiny_pipelines
from tests.hosts.diffusers.test_pipeline import FLUX, SD, SDXL, plain_modules

SIZE, STEPS, CFG = 32, 4, 3.0
GRADIENTS = pytest.mark.parametrize("gradient", ["fast", "exact"])


@pytest.fixture(scope="module")
def sd():
    return tiny_pipelines.sd()


@pytest.fixture(scope="module")
def encoders():
    return small_encoders()


@pytest.fixture(scope="module")
def loras(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, rank, seed in (("dog", 8, 1), ("watercolor", 4, 3)):
        tiny_pipelines.write_lora(folder / f"{name}.safetensors", sd, SD, rank=rank, strength=0.3, seed=seed)
    return read_lora(folder / "dog.safetensors"), read_lora(folder / "watercolor.safetensors")


@pytest.fixture
def sources(encoders, tmp_path):
    return GuidanceSources(encoders, ReferenceCache(tmp_path / "references"))


def noise_picture(seed, size=48):
    """Smooth colours."""
    values = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte().numpy()
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def given(sources):
    """Settings with two given references."""
    return {
        "guidance": True,
        "subject_image": sources.cache.keep_picture(noise_picture(1)),
        "style_image": sources.cache.keep_picture(noise_picture(2)),
    }


def run(pipeline, loras, sources, seeds=(1,), *, steps=STEPS, watch=None, **settings):
    """The latents (images, C, h, w) and the result; watch collects the latents after each step."""

    def on_step_end(pipeline, step, timestep, tensors):
        if watch is not None:
            watch.append(tensors["latents"].clone())
        return tensors

    result = FusedPipeline(pipeline, *loras, FuseSettings(**settings), sources)(
        "a dog",
        negative_prompt="rain",
        seeds=seeds,
        steps=steps,
        cfg_scale=CFG,
        width=SIZE,
        height=SIZE,
        output_type="latent",
        **({} if watch is None else {"callback_on_step_end": on_step_end}),
    )
    return torch.stack(result.images), result


def plain(pipeline, loras, sources, **more):
    return run(pipeline, loras, sources, **more)[0]


# Against a loop by hand, in float64


def doubled(encoders):
    """The encoders in float64."""
    twins = copy.deepcopy(encoders)
    for encoder in (twins.clip, twins.dino):
        assert isinstance(encoder, ImageEncoder)
        encoder.network.double()
    return twins


@pytest.fixture(scope="module")
def double(sd, encoders):
    """The pipeline in float64, its text encoder replaced by fixed features (transformers has no CLIP in float64); and encoders."""
    pipeline = copy.deepcopy(sd)
    pipeline.unet.double()
    pipeline.vae.double()
    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod.double()
    pipeline.scheduler.final_alpha_cumprod = pipeline.scheduler.final_alpha_cumprod.double()
    features = torch.randn(2, 1, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pipeline.encode_prompt = lambda prompt, device, count, *args, **kwargs: tuple(f.repeat(count, 1, 1) for f in features)
    return pipeline, doubled(encoders), features


def pictures_of(pipeline, latent):
    return pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample


def by_hand(double, loras, targets, latent, m, gradient, prediction, weights=(1 / 3, 1 / 3, 1 / 3)):
    """DDIM from `latent`, each step followed by Eq. 20 (exact), or with D moved by the fast rule: one image."""
    pipeline, encoders, features = double
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    alphas, final = pipeline.scheduler.alphas_cumprod, pipeline.scheduler.final_alpha_cumprod
    scheduler.set_timesteps(STEPS)
    timesteps = [int(t) for t in scheduler.timesteps]
    session = FusionSession(pipeline.unet, *loras, FuseSettings(method="dynfuse"))
    context = torch.cat([features[1], features[0]])
    steps_m = m * 50 / STEPS

    def denoised(x, timestep, alpha):
        with session.attached(rows_of(type("", (), {"do_classifier_free_guidance": True}), 2)):
            uncond, cond = pipeline.unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
        output = uncond + CFG * (cond - uncond)
        if prediction == "epsilon":
            return (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return alpha.sqrt() * x - (1 - alpha).sqrt() * output if prediction == "v_prediction" else output

    def distance(d):
        return score(similarities(pictures_of(pipeline, d), targets, encoders), weights).sum()

    for position, timestep in enumerate(timesteps):
        alpha = alphas[timestep]
        after = alphas[timesteps[position + 1]] if position + 1 < len(timesteps) else final
        session.begin()
        x = latent.detach().requires_grad_()
        d = denoised(x, timestep, alpha)
        sigma, sigma_after = ((1 - alpha) / alpha).sqrt(), ((1 - after) / after).sqrt()
        if gradient == "fast":
            leaf = d.detach().requires_grad_()
            (slope,) = torch.autograd.grad(distance(leaf), leaf)
            d = d.detach() - steps_m * sigma / (sigma - sigma_after) * slope
            correction = 0
        else:
            (slope,) = torch.autograd.grad(distance(d), x)
            d, correction = d.detach(), steps_m * slope
        noise = (x.detach() - alpha.sqrt() * d) / (1 - alpha).sqrt()
        latent = after.sqrt() * d + (1 - after).sqrt() * noise - correction
    return latent


@GRADIENTS
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_guided_picture_is_that_of_a_loop_by_hand(double, loras, sources, given, gradient, prediction):
    pipeline, encoders, _ = double
    own = pipeline.scheduler
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(own.config, prediction_type=prediction)
    pipeline.scheduler.alphas_cumprod, pipeline.scheduler.final_alpha_cumprod = own.alphas_cumprod, own.final_alpha_cumprod
    targets = Targets.of(*(encoders.embed_picture(noise_picture(seed)) for seed in (1, 2)))
    guided_sources = GuidanceSources(encoders, sources.cache)
    try:
        results = []
        for m in (0.0, 0.01):
            ours, _ = run(pipeline, loras, guided_sources, **given, method="dynfuse", m=m, gradient=gradient, limit=0.0)
            latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            expected = by_hand(double, loras, targets, latent, m, gradient, prediction)
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-8 * float(expected.detach().abs().max()))
            results.append(ours)
        unguided, guided = results
        assert (guided - unguided).abs().max() > 1e-4 * unguided.abs().max()
    finally:
        pipeline.scheduler = own


# Promises


@GRADIENTS
def test_without_strength_weight_or_switch_the_picture_is_the_unguided_one_to_the_bit(sd, loras, sources, given, gradient):
    expected = plain(sd, loras, sources)
    nothing = {"content_weight": 0.0, "style_clip_weight": 0.0, "style_dino_weight": 0.0}
    for off in ({"m": 0.0}, {"guidance": False}, nothing, {"start": 1.0}):
        assert torch.equal(plain(sd, loras, sources, gradient=gradient, **{**given, **off}), expected)
    assert not torch.equal(plain(sd, loras, sources, gradient=gradient, **given), expected)


@GRADIENTS
def test_three_images_at_once_are_three_single_jobs(sd, loras, sources, given, gradient):
    seeds = (3, 1, 4)
    settings = {**given, "gradient": gradient, "m": 1.0, "limit": 0.0}
    together, result = run(sd, loras, sources, seeds, **settings)
    assert result.guidance.similarities.shape == (STEPS, 3, 3)
    for position, seed in enumerate(seeds):
        alone, single = run(sd, loras, sources, (seed,), **settings)
        torch.testing.assert_close(together[position], alone[0], rtol=0, atol=2e-3 * float(alone.abs().max()))
        torch.testing.assert_close(result.guidance.similarities[..., position], single.guidance.similarities[..., 0], atol=2e-3, rtol=0)


@GRADIENTS
def test_every_second_step_is_corrected_and_the_others_are_not(sd, loras, sources, given, gradient, monkeypatch):
    corrected = []
    own = guidance_module.GuidedCall._corrected

    def look(self, output, sample, step, leaf):
        new = own(self, output, sample, step, leaf)
        corrected.append((self._calls - 1, not torch.equal(new, output.detach())))
        return new

    monkeypatch.setattr(guidance_module.GuidedCall, "_corrected", look)
    _, result = run(sd, loras, sources, **given, gradient=gradient, every=2)
    assert corrected == [(0, True), (2, True)]
    assert result.guidance.steps == [0, 2]
    assert result.guidance.total_steps == STEPS


@GRADIENTS
def test_before_the_range_the_latents_are_the_unguided_ones_to_the_bit(sd, loras, sources, given, gradient):
    guided, unguided = [], []
    run(sd, loras, sources, watch=guided, **given, gradient=gradient, start=0.5)
    run(sd, loras, sources, watch=unguided)
    assert [torch.equal(a, b) for a, b in zip(guided, unguided, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
@GRADIENTS
def test_every_scheduler_is_guided_at_every_step_and_keeps_its_seed(sd, loras, sources, given, name, more, gradient):
    own = sd.scheduler
    sd.scheduler = getattr(diffusers, name).from_config(own.config, prediction_type="epsilon", **more)
    try:
        unguided = plain(sd, loras, sources)
        first, result = run(sd, loras, sources, **given, gradient=gradient)
        assert torch.equal(plain(sd, loras, sources), unguided)
        assert torch.equal(plain(sd, loras, sources, **given, gradient=gradient), first)
        assert torch.equal(plain(sd, loras, sources, **given, gradient=gradient, m=0.0), unguided)
    finally:
        sd.scheduler = own
    assert result.guidance.steps == [0, 1, 2, 3]
    assert result.guidance.non_finite == 0
    assert not torch.equal(first, unguided)


@pytest.mark.parametrize("make", [tiny_pipelines.sdxl, tiny_pipelines.flux])
def test_sdxl_and_flux_are_guided(make, sources, given, tmp_path):
    pipeline = make()
    networks = SDXL if make is tiny_pipelines.sdxl else FLUX
    pair = [
        read_lora(tiny_pipelines.write_lora(tmp_path / f"{name}.safetensors", pipeline, networks, seed=seed))
        for seed, name in enumerate(("dog", "watercolor"))
    ]
    unguided = plain(pipeline, pair, sources)
    for gradient in ("fast", "exact"):
        guided, result = run(pipeline, pair, sources, **given, gradient=gradient, m=1e6)
        assert result.guidance.steps == [0, 1, 2, 3]
        assert result.guidance.bites == 4
        assert not any("guidance" in note or "gradient" in note for note in result.notes)
        moved = (guided - unguided).square().mean() / unguided.square().mean()
        assert 1e-4 < moved < 0.25
    assert plain_modules(pipeline)
    assert torch.equal(plain(pipeline, pair, sources), unguided)


@pytest.mark.parametrize("choice", ["vae", "vae-small", "taesd"])
def test_each_decoder_can_be_used(sd, loras, sources, given, choice):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4
        )
    sources = GuidanceSources(sources.encoders, sources.cache, taesd=tiny)
    guided, result = run(sd, loras, sources, **given, decoder=choice)
    assert result.guidance.similarities.shape == (STEPS, 3, 1)
    assert not torch.equal(guided, plain(sd, loras, sources))


def test_taesd_without_one_is_refused_before_any_step(sd, loras, sources, given):
    with pytest.raises(PipelineError, match="taesd"):
        run(sd, loras, sources, **given, decoder="taesd", watch=(steps := []))
    assert not steps


def test_a_scheduler_that_is_not_known_is_refused_before_any_step(sd, loras, sources, given):
    own = sd.scheduler
    sd.scheduler = diffusers.HeunDiscreteScheduler.from_config(own.config)
    try:
        with pytest.raises(PipelineError, match="HeunDiscreteScheduler"):
            run(sd, loras, sources, **given, watch=(steps := []))
    finally:
        sd.scheduler = own
    assert not steps


def test_without_encoders_nothing_is_made_or_if_told_so_the_unguided_picture(sd, loras, sources, tmp_path):
    missing = EncoderSources(tmp_path / "nowhere", download=False)
    with pytest.raises(EncoderError, match="nowhere"):
        run(sd, loras, GuidanceSources(missing, sources.cache), guidance=True, watch=(steps := []))
    assert not steps
    picture, result = run(sd, loras, GuidanceSources(missing, sources.cache, go_on=True), guidance=True)
    assert torch.equal(picture, plain(sd, loras, sources))
    assert any("without guidance" in note and "nowhere" in note for note in result.notes)
    assert result.guidance is None


def everything_as_before(pipeline, encoders):
    weights = [*pipeline.unet.parameters(), *pipeline.vae.parameters()]
    devices = {weight.device.type for encoder in (encoders.clip, encoders.dino) for weight in encoder.network.parameters()}
    return (
        plain_modules(pipeline) and "step" not in vars(pipeline.scheduler) and all(w.requires_grad for w in weights) and devices == {"cpu"}
    )


@GRADIENTS
@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_interrupt_leaves_nothing_behind(sd, loras, sources, given, gradient, step):
    def interrupt(done, total):
        if done == step:
            raise KeyboardInterrupt

    before = plain(sd, loras, sources)
    fused = FusedPipeline(sd, *loras, FuseSettings(**given, gradient=gradient), sources)
    with pytest.raises(KeyboardInterrupt):
        fused("a dog", steps=STEPS, width=SIZE, height=SIZE, progress=interrupt)
    assert everything_as_before(sd, sources.encoders)
    assert torch.is_grad_enabled()
    assert torch.equal(plain(sd, loras, sources), before)


@GRADIENTS
def test_an_error_between_denoiser_and_scheduler_leaves_nothing_behind(sd, loras, sources, given, gradient, monkeypatch):
    monkeypatch.setattr(guidance_module.GuidedCall, "_corrected", lambda *args: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            run(sd, loras, sources, **given, gradient=gradient)
        assert not torch.is_grad_enabled()
    assert everything_as_before(sd, sources.encoders)


def test_a_caller_under_inference_mode_is_served(sd, loras, sources, given):
    expected = plain(sd, loras, sources, **given)
    with torch.inference_mode():
        assert torch.equal(plain(sd, loras, sources, **given), expected)


def test_when_memory_runs_out_in_the_denoiser_the_fast_gradient_takes_over(sd, loras, sources, given):
    def short(module, args):
        if torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory")

    hook = sd.unet.mid_block.register_forward_pre_hook(short)
    try:
        picture, result = run(sd, loras, sources, **given, gradient="exact")
    finally:
        hook.remove()
    assert torch.equal(picture, plain(sd, loras, sources, **given, gradient="fast"))
    assert sum("exact" in note and "fast" in note for note in result.notes) == 1


@pytest.mark.parametrize(("choice", "after"), [("vae", "vae-small"), ("vae-small", "vae-small at 128 pixels")])
def test_when_memory_runs_out_in_the_decoder_a_smaller_one_takes_over(sd, loras, sources, given, choice, after):
    calls = []

    def short(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory")

    hook = sd.vae.decoder.register_forward_pre_hook(short)
    try:
        _, result = run(sd, loras, sources, **given, decoder=choice)
    finally:
        hook.remove()
    assert result.guidance.steps == [0, 1, 2, 3]
    assert sum("Memory ran out" in note and after in note for note in result.notes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@GRADIENTS
def test_models_in_half_precision_are_guided(dtype, loras, sources, given, gradient):
    pipeline = tiny_pipelines.sd().to(dtype)
    unguided = plain(pipeline, loras, sources)
    guided, result = run(pipeline, loras, sources, **given, gradient=gradient)
    assert guided.dtype == dtype
    assert result.guidance.non_finite == 0
    assert not torch.equal(guided, unguided)
    assert torch.isfinite(guided).all()


# References


def counted(pipeline, job):
    """How often the denoiser ran."""
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        job()
    finally:
        hook.remove()
    return len(calls)


def test_references_are_made_with_one_lora_alone_and_its_own_prompt(sd, loras, sources):
    _, result = run(sd, loras, sources, guidance=True, subject_prompt="a small dog", style_weight=0.8, reference_seed=5)
    assert [(reference.side, reference.prompt, reference.given) for reference in result.references] == [
        ("subject", "a small dog", False),
        ("style", "a dog", False),
    ]
    for index, (prompt, weight) in enumerate((("a small dog", 1.0), ("a dog", 0.8))):
        weights = {"subject_weight": weight if index == 0 else 0.0, "style_weight": weight if index else 0.0}
        alone = FusedPipeline(sd, *loras, FuseSettings(method="direct", **weights))(
            prompt, negative_prompt="rain", seeds=[5], steps=STEPS, cfg_scale=CFG, width=SIZE, height=SIZE
        )
        assert result.references[index].picture.tobytes() == alone.images[0].tobytes()
        expected = sources.encoders.embed_picture(alone.images[0])
        torch.testing.assert_close(result.references[index].embeddings.clip, expected.clip)
        torch.testing.assert_close(result.references[index].embeddings.dino, expected.dino)


def test_the_same_job_finds_its_references_and_another_one_makes_its_own(sd, loras, sources, tmp_path):
    settings = {"guidance": True, "reference_seed": 5}

    def job(lora_pair=loras, steps=STEPS, prompt="a dog", negative="rain", size=SIZE, cfg=CFG, seeds=(1,), **more):
        FusedPipeline(sd, *lora_pair, FuseSettings(**{**settings, **more}), sources)(
            prompt, negative_prompt=negative, seeds=seeds, steps=steps, cfg_scale=cfg, width=size, height=SIZE, output_type="latent"
        )

    assert counted(sd, job) == 3 * STEPS
    assert counted(sd, job) == STEPS
    assert counted(sd, lambda: job(seeds=(2, 3), m=3.0, criterion="js", style_clip_weight=0.2)) == STEPS
    one_changed = {"subject_weight": 0.7}, {"style_prompt": "rain"}
    for changed in one_changed:
        assert counted(sd, lambda changed=changed: job(**changed)) == 2 * STEPS
    both_changed = {"te_weight": 0.5}, {"reference_seed": 6}, {"negative": "snow"}, {"cfg": 2.0}, {"size": 40}, {"prompt": "a cat"}
    for changed in both_changed:
        assert counted(sd, lambda changed=changed: job(**changed)) == 3 * STEPS
    assert counted(sd, lambda: job(steps=3)) == 9
    other = tmp_path / "other.safetensors"
    tiny_pipelines.write_lora(other, sd, SD, rank=8, strength=0.3, seed=9)
    assert counted(sd, lambda: job((read_lora(other), loras[1]))) == 2 * STEPS
    own = sd.scheduler
    sd.scheduler = diffusers.DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
    try:
        assert counted(sd, job) == 3 * STEPS
    finally:
        sd.scheduler = own
    weight = sd.unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        assert counted(sd, job) == 3 * STEPS
    finally:
        with torch.no_grad():
            weight.div_(1.01)


def test_a_prompt_of_its_own_comes_from_the_settings_else_the_loras_file_else_the_job(sd, loras, sources, tmp_path):
    path = tmp_path / "dog.safetensors"
    path.write_bytes(loras[0].path.read_bytes())
    (tmp_path / "dog.json").write_text(json.dumps({"activation text": " sks dog, ", "preferred weight": 1}))
    pair = read_lora(path), loras[1]
    _, result = run(sd, pair, sources, guidance=True)
    assert [reference.prompt for reference in result.references] == ["sks dog,", "a dog"]
    _, result = run(sd, pair, sources, guidance=True, subject_prompt="a puppy")
    assert result.references[0].prompt == "a puppy"
    (tmp_path / "dog.json").write_text("[]")
    _, result = run(sd, pair, sources, guidance=True)
    assert result.references[0].prompt == "a dog"


def test_a_reference_that_does_not_count_is_not_made(sd, loras, sources):
    _, result = run(sd, loras, sources, guidance=True, content_weight=0.0)
    assert [reference.side for reference in result.references] == ["style"]
    assert result.guidance.wanted == (False, True, True)
    assert result.guidance.similarities[:, 0].abs().max() == 0


def test_progress_is_told_of_the_references_and_may_interrupt_them(sd, loras, sources):
    seen = []

    def stop(side, done, total):
        seen.append((side, done, total))
        if side == "style" and done == 2:
            raise KeyboardInterrupt

    fused = FusedPipeline(sd, *loras, FuseSettings(method="dynfuse", guidance=True), sources)
    arguments = {"steps": 3, "width": SIZE, "height": SIZE}
    with pytest.raises(KeyboardInterrupt):
        fused("a dog", **arguments, reference_progress=stop)
    assert seen == [("subject", 1, 3), ("subject", 2, 3), ("subject", 3, 3), ("style", 1, 3), ("style", 2, 3)]
    assert everything_as_before(sd, sources.encoders)
    assert [entry.side for entry in sources.cache.entries()] == ["subject"]


# A method that compares the pictures of each LoRA alone


def test_est_lora_goes_by_the_pictures_of_each_lora_alone(sd, loras, sources, encoders):
    """Against a fusion that is told the similarity of two pictures made by hand."""
    ours, result = run(sd, loras, sources, method="est-lora", subject_prompt="not this")
    assert result.guidance is None
    pictures = []
    for weights in ({"style_weight": 0.0}, {"subject_weight": 0.0}):
        made = FusedPipeline(sd, *loras, FuseSettings(method="direct", **weights))(
            "a dog", negative_prompt="rain", seeds=(1,), steps=STEPS, cfg_scale=CFG, width=SIZE, height=SIZE
        )
        pictures.append(encoders.embed_picture(made.images[0]).dino)
    cosine = float((pictures[0] * pictures[1]).sum())
    told = []
    for value in (cosine, -5.0):

        class Told(FusedPipeline):
            def _similarity(self, *arguments, value=value):
                return value

        told.append(
            torch.stack(
                Told(sd, *loras, FuseSettings(method="est-lora"), sources)(
                    *("a dog",),
                    negative_prompt="rain",
                    seeds=(1,),
                    steps=STEPS,
                    cfg_scale=CFG,
                    width=SIZE,
                    height=SIZE,
                    output_type="latent",
                ).images
            )
        )
    torch.testing.assert_close(ours, told[0], rtol=0, atol=1e-6)
    assert not torch.equal(told[0], told[1])
