"""Guided jobs inside a WebUI, on fakes of A1111 and of Forge."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lib_dynfuse.guidance.encoders import load_encoders
from lib_dynfuse.text.tag import escape
from tests.fakes import webui as fakes
from tests.fakes.encoders import write_dino
from tests.fakes.webui import Processing

TAG = "<dynfuse:dog:watercolor:guidance=true>"
PLAIN = "<dynfuse:dog:watercolor>"
WEIGHTS = (0.5, 0.3, 0.2)
TERMS = "content_weight=0.5:style_clip_weight=0.3:style_dino_weight=0.2"


def tag(**settings):
    items = "".join(f":{name}={value}" for name, value in {"guidance": "true", **settings}.items())
    return f"<dynfuse:dog:watercolor{items}>"


def last(webui, p):
    return webui.host.passes(p)[-1]


def job(webui, prompt, **settings):
    """(images, what became of the last pass)"""
    done = webui.process(Processing(prompt, **settings))
    return done.images, last(webui, done.p)


def score(webui, latents, references):
    """Eqs. 16-19, one per image, written out."""
    encoders = load_encoders(webui.host.storage.encoder_sources())
    pictures = fakes.decoder()(latents / fakes.SCALE)
    by_side = {}
    for reference in references:
        pixels = torch.tensor(np.asarray(reference.picture), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        by_side[reference.side] = (encoders.clip(pixels), encoders.dino(pixels))
    terms = (
        F.cosine_similarity(encoders.clip(pictures), by_side["subject"][0]),
        F.cosine_similarity(encoders.clip(pictures), by_side["style"][0]),
        F.cosine_similarity(encoders.dino(pictures), by_side["style"][1]),
    )
    return 1 - sum(weight * term for weight, term in zip(WEIGHTS, terms))


class TestCorrection:
    def test_the_last_step_is_moved_by_the_gradient_of_the_score(self, guided):
        # One step, from level 1 to 0: the image is D, and D is moved by -m_eff grad R times s/(s - s') = 1.
        plain, _ = job(guided, f"a cat {PLAIN}", steps=1, batch_size=2)
        moved, done = job(guided, f"a cat {tag(m=0.02, limit=0)[:-1]}:{TERMS}>", steps=1, batch_size=2)
        with torch.inference_mode(False):
            latents = plain.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(score(guided, latents, done.guidance.references).sum(), latents)
        expected = -0.02 * 50 * gradient
        assert expected.abs().max() > 1e-4
        assert torch.allclose(moved - plain, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-3)

    def test_the_exact_gradient_goes_through_the_denoiser(self, guided, monkeypatch):
        # The same step with grad_x R and the factor s sqrt(1 + s^2) sqrt(1 + s'^2)/(s - s') = sqrt 2. Its product with any direction v is
        # that of grad_D R with the change of D along v, taken by differences.
        pair = "<dynfuse:dog:watercolor:method=direct"
        plain, _ = job(guided, f"a cat {pair}>", steps=1)
        moved, done = job(guided, f"a cat {pair}:guidance=true:m=0.02:limit=0:gradient=exact:{TERMS}>", steps=1)
        assert not done.notes
        with torch.inference_mode(False):
            latents = plain.clone().requires_grad_()
            (by_denoised,) = torch.autograd.grad(score(guided, latents, done.guidance.references).sum(), latents)
        through = (moved - plain) / (-0.02 * 50 * 2**0.5)
        noise, generator = fakes.noise, torch.Generator().manual_seed(0)
        for _ in range(3):
            direction = torch.randn(plain.shape[1:], generator=generator)
            ends = []
            for step in (0.01, -0.01):
                monkeypatch.setattr(fakes, "noise", lambda seed, size=4, move=step * direction: noise(seed, size) + move)
                ends.append(guided.run(f"a cat {pair}>", steps=1))
            along = (ends[0] - ends[1]) / 0.02
            assert float((through * direction).sum()) == pytest.approx(float((by_denoised * along).sum()), rel=0.01, abs=1e-4)

    @pytest.mark.parametrize("refuses", [False, True])
    def test_under_an_attention_kernel_without_a_way_back_exact_goes_on_as_fast_and_says_so(self, guided, host_name, refuses):
        if host_name == "a1111":
            pytest.skip("no function of its own for all of the attention")

        class NoWayBack(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q):
                return q.clone()

        def kernel(q, k, v, heads, mask=None):
            return NoWayBack.apply(q) if refuses else q.detach().clone()

        module, name = {
            "reforge": ("ldm_patched.ldm.modules.attention", "optimized_attention"),
            "classic": ("ldm_patched.ldm.modules.attention", "optimized_attention"),
        }.get(host_name, ("backend.attention", "attention_function"))
        fast, _ = job(guided, f"a cat {tag(gradient='fast')}")
        exact, done = job(guided, f"a cat {tag(gradient='exact')}")
        assert not done.notes
        assert not torch.equal(exact, fast)
        setattr(guided.modules[module], name, kernel)
        without, done = job(guided, f"a cat {tag(gradient='exact')}")
        assert torch.equal(without, fast)
        assert done.notes == ["The exact gradient was given up for the fast one: the WebUI's attention kernel has no backward pass."]

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_a_batch_of_three_equals_three_single_jobs(self, guided, gradient):
        prompt = f"a cat {tag(gradient=gradient, reference_seed=4, contrast=1)}"
        batch, _ = job(guided, prompt, batch_size=3, seed=10)
        for i in range(3):
            single, _ = job(guided, prompt, seed=10 + i)
            assert (batch[i] - single[0]).abs().max() < 1e-3 * batch.abs().max()

    @pytest.mark.parametrize("settings", [{"m": 0}, {"content_weight": 0, "style_clip_weight": 0, "style_dino_weight": 0}])
    def test_without_strength_it_is_the_unguided_image_to_the_bit(self, guided, settings):
        plain, _ = job(guided, f"a cat {PLAIN}")
        unmoved, done = job(guided, f"a cat {tag(**settings)}")
        assert torch.equal(unmoved, plain)
        assert done.guidance is None
        assert guided.jobs == 2  # no references either

    def test_every_second_step(self, guided):
        _, all_steps = job(guided, f"a cat {tag()}", steps=5)
        _, some = job(guided, f"a cat {tag(every=2)}", steps=5)
        _, late = job(guided, f"a cat {tag(start=0.4, end=0.8)}", steps=5)
        assert all_steps.guidance.record.steps == [0, 1, 2, 3, 4]
        assert some.guidance.record.steps == [0, 2, 4]
        assert late.guidance.record.steps == [2, 3]

    def test_what_is_kept_by_an_inpainting_mask_is_not_moved(self, guided):
        nmask = torch.zeros(4, 4, 4)
        nmask[:, :2] = 1.0
        mask = 1.0 - nmask
        plain, _ = job(guided, f"a cat {PLAIN}", steps=1, mask=mask, nmask=nmask)
        moved, _ = job(guided, f"a cat {TAG}", steps=1, mask=mask, nmask=nmask)
        assert torch.equal(moved[:, :, 2:], plain[:, :, 2:])
        assert not torch.equal(moved[:, :, :2], plain[:, :, :2])

    @pytest.mark.parametrize("gradient", ["fast", "exact"])
    def test_a_guided_job_leaves_nothing_behind(self, guided, pristine, gradient):
        with pristine() as untouched:
            before = untouched.run("a cat <lora:dog:1>")
        guided.run(f"a cat {tag(gradient=gradient)}")
        assert torch.equal(guided.run("a cat <lora:dog:1>"), before)
        state = guided.state
        assert state.textinfo is None
        assert state.job == ""

    def test_the_refiner_is_not_guided(self, guided):
        refiner = guided.checkpoint("refiner", seed=5)
        _, done = job(guided, f"a cat {tag()}", steps=4, refiner=refiner, refiner_step=2)
        assert done.guidance.record.steps == [0, 1]
        assert any("refiner" in note for note in done.notes)


class TestSamplers:
    @pytest.mark.parametrize("host_name", ["reforge", "classic"], indirect=True)
    def test_one_with_a_schedule_of_its_own_is_guided_at_every_step(self, guided):
        plain, _ = job(guided, f"a cat {PLAIN}", sampler_name="DDPM")
        moved, done = job(guided, f"a cat {TAG}", sampler_name="DDPM")
        assert not done.notes
        assert done.guidance.record.steps == [0, 1, 2]
        assert not torch.equal(moved, plain)


class TestReferences:
    def test_they_are_made_with_one_lora_each(self, guided):
        _, done = job(guided, f"a cat {tag(style_prompt='a field')}", seed=3, steps=4)
        subject, style = done.guidance.references
        alone = guided.run("a cat <dynfuse:dog:watercolor:1:0:method=direct>", seed=3, steps=4)
        assert subject.picture.tobytes() == guided.picture(alone[0]).tobytes()
        alone = guided.run("a field <dynfuse:dog:watercolor:0:1:method=direct>", seed=3, steps=4)
        assert style.picture.tobytes() == guided.picture(alone[0]).tobytes()
        assert (subject.prompt, style.prompt, subject.given) == ("a cat", "a field", False)

    def test_they_equal_what_the_host_makes_with_that_lora(self, guided, pristine):
        _, done = job(guided, f"a cat {tag()}", steps=4)
        with pristine() as untouched:
            alone = untouched.run("a cat <lora:dog:1>", steps=4)
            assert np.abs(np.asarray(done.guidance.references[0].picture, int) - np.asarray(guided.picture(alone[0]), int)).max() <= 1

    def test_the_same_job_finds_them(self, guided):
        first, _ = job(guided, f"a cat {TAG}")
        assert guided.jobs == 3
        again, _ = job(guided, f"a cat {TAG}")
        assert guided.jobs == 4
        assert torch.equal(first, again)

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 2},
            {"steps": 4},
            {"cfg_scale": 4.0},
            {"negative_prompt": "dark"},
            {"sampler_name": "Heun"},
            {"scheduler": "Karras"},
            {"width": 64},
            {"height": 64},
            {"eta": 0.5},
            {"tiling": True},
        ],
    )
    def test_a_change_of_the_job_makes_them_anew(self, guided, change):
        guided.run(f"a cat {TAG}")
        made = guided.jobs
        guided.run(f"a cat {TAG}", **change)
        assert guided.jobs == made + 3

    @pytest.mark.parametrize(
        ("option", "value", "new"), [("skip_early_cond", 0.2, 2), ("uni_pc_order", 2, 2), ("samples_format", "jpg", 0)]
    )
    def test_an_option_of_the_webui_that_a_picture_depends_on_makes_them_anew(self, guided, option, value, new):
        guided.run(f"a cat {TAG}")
        made = guided.jobs
        setattr(guided.shared.opts, option, value)
        guided.run(f"a cat {TAG}")
        assert guided.jobs == made + 1 + new

    def test_token_merging_by_which_a_job_differs_from_the_options_makes_them_anew(self, guided, monkeypatch):
        guided.run(f"a cat {TAG}")
        made = guided.jobs
        monkeypatch.setattr(Processing, "get_token_merging_ratio", lambda p: 0.5, raising=False)
        guided.run(f"a cat {TAG}")
        assert guided.jobs == made + 3

    def test_what_is_kept_holds_no_option_as_it_is_written(self, guided):
        guided.shared.opts.another_api_key = "secret-7f3a"
        guided.run(f"a cat {TAG}")
        entries = guided.host.reference_cache.entries()
        assert entries
        assert all(b"secret-7f3a" not in entry.path.read_bytes() for entry in entries)

    @pytest.mark.parametrize(
        ("settings", "new"),
        [
            ({"subject_weight": 0.9}, 1),
            ({"style_weight": 0.9}, 1),
            ({"te_weight": 0.5}, 2),
            ({"subject_prompt": "a dog"}, 1),
            ({"style_prompt": "a dog"}, 1),
            ({"reference_seed": 77}, 2),
            ({"m": 5, "limit": 0.1, "criterion": "js", "every": 2, "decoder": "vae"}, 0),
        ],
    )
    def test_only_settings_that_change_them_make_them_anew(self, guided, settings, new):
        guided.run(f"a cat {TAG}")
        made = guided.jobs
        guided.run(f"a cat {tag(**settings)}")
        assert guided.jobs == made + 1 + new

    def test_another_checkpoint_lora_file_clip_skip_or_encoder_makes_them_anew(self, guided, loras, tmp_path, encoders_folder):
        guided.files["moving"] = shutil.copy(loras["dog"], tmp_path / "moving.safetensors")
        prompt = "a cat <dynfuse:moving:watercolor:guidance=true>"
        guided.run(prompt)
        made = guided.jobs
        guided.networks.available_networks["moving"].shorthash = "other contents"
        guided.run(prompt)
        assert guided.jobs == made + 2
        guided.shared.opts.CLIP_stop_at_last_layers = 2
        guided.run(prompt)
        assert guided.jobs == made + 5
        guided.shared.opts.dynfuse_dino_model = str(write_dino(tmp_path / "dino", seed=9))
        guided.run(prompt)
        assert guided.jobs == made + 8
        guided.shared.sd_model = guided.checkpoint("another", seed=4)
        guided.run(prompt)
        assert guided.jobs == made + 11

    def test_other_loras_are_part_of_the_base(self, guided):
        _, done = job(guided, f"a cat {tag()} <lora:sharp:0.5>", steps=4)
        alone = guided.run("a cat <dynfuse:dog:watercolor:1:0:method=direct><lora:sharp:0.5>", steps=4)
        assert done.guidance.references[0].picture.tobytes() == guided.picture(alone[0]).tobytes()
        made = guided.jobs
        guided.run(f"a cat {tag()} <lora:sharp:0.6>", steps=4)
        assert guided.jobs == made + 3

    def test_the_pairs_own_lora_tags_are_no_part_of_it(self, guided):
        guided.run(f"a cat {tag()} <lora:watercolor:0.5>")
        made = guided.jobs
        guided.run(f"a cat {tag()} <lora:doggo:0.5>")
        assert guided.jobs == made + 1

    def test_the_activation_text_is_the_default_prompt(self, guided, loras, tmp_path):
        guided.files["named"] = shutil.copy(loras["dog"], tmp_path / "named.safetensors")
        (tmp_path / "named.json").write_text(json.dumps({"activation text": "sks dog", "preferred weight": 1}), "utf-8")
        _, done = job(guided, "a cat <dynfuse:named:watercolor:guidance=true>")
        assert [reference.prompt for reference in done.guidance.references] == ["sks dog", "a cat"]

    def test_a_term_without_weight_needs_no_reference(self, guided):
        _, done = job(guided, f"a cat {tag(content_weight=0)}")
        assert [reference.side for reference in done.guidance.references] == ["style"]
        assert done.guidance.record.wanted == (False, True, True)

    def test_a_hires_pass_is_guided_towards_the_same(self, guided):
        done = guided.process(Processing(f"a cat {TAG}", enable_hr=True)).p
        first, second = guided.host.passes(done)
        assert guided.jobs == 3
        assert second.guidance.references == first.guidance.references
        assert len(second.guidance.record.steps) == len(first.guidance.record.steps) == 3

    def test_the_batches_of_a_job_share_them(self, guided):
        guided.run(f"a cat {TAG}", n_iter=3)
        assert guided.jobs == 3

    def test_they_do_not_disturb_the_random_numbers_of_the_job(self, guided):
        def draws(prompt):
            seen = []
            torch.manual_seed(0)
            guided.process(Processing(prompt, callbacks={"process_batch": lambda p: seen.append(torch.rand(1).item())}))
            return seen

        assert draws(f"a dog {TAG}") == draws(f"a dog {TAG}")

    def test_progress_counts_them_as_images_and_says_what_is_made(self, guided, capsys):
        seen = []
        original = guided.sample

        def sample(p, x):
            seen.append((guided.state.job_count, guided.state.textinfo))
            return original(p, x)

        guided.sample = sample
        guided.run(f"a cat {TAG}")
        assert [count for count, _ in seen] == [3, 3, 3]
        assert [text for _, text in seen] == [
            "DynFuse: reference picture of the subject LoRA (1 of 2)",
            "DynFuse: reference picture of the style LoRA (2 of 2)",
            None,
        ]
        assert "reference picture of the subject LoRA" in capsys.readouterr().out

    @pytest.mark.parametrize("number", [2, 3])
    def test_an_interrupt_while_they_are_made_stops_the_job_and_keeps_no_half_reference(self, guided, number):
        guided.interrupt_at, guided.interrupt_job = 1, number
        _, done = job(guided, f"a cat {TAG}")
        assert done.guidance is None
        assert done.error is None
        assert guided.jobs == number
        guided.interrupt_at = None
        made = guided.jobs
        _, done = job(guided, f"a cat {TAG}")
        assert guided.jobs == made + 1 + (4 - number)
        assert len(done.guidance.references) == 2

    def test_an_interrupt_in_a_guided_step_keeps_what_was_done(self, guided):
        guided.interrupt_at = 2
        _, done = job(guided, f"a cat {TAG}")
        assert done.guidance.record.steps == [0, 1]

    def test_one_that_cannot_be_made_stops_the_job_with_the_reason(self, guided):
        original = guided.sample

        def sample(p, x):
            if p.number > 1:
                raise RuntimeError("the GPU is on fire")
            return original(p, x)

        guided.sample = sample
        with pytest.raises(RuntimeError, match="DynFuse: the reference picture of the subject LoRA could not be made: the GPU is on fire"):
            guided.run(f"a cat {TAG}")


class TestGivenPictures:
    def test_a_picture_of_the_users_replaces_a_generated_one(self, guided):
        picture = Image.new("RGB", (50, 40), (200, 30, 60))
        name = guided.host.reference_cache.keep_picture(picture)
        _, done = job(guided, f"a cat {tag(subject_image=name)}")
        subject, style = done.guidance.references
        assert subject.given
        assert not style.given
        assert subject.picture.tobytes() == picture.tobytes()
        assert guided.jobs == 2

    def test_base64_is_taken_and_a_path_is_not(self, guided, tmp_path):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
        (tmp_path / "a.png").write_bytes(buffer.getvalue())
        _, done = job(guided, f"a cat {tag(style_image=escape(base64.b64encode(buffer.getvalue()).decode()))}")
        assert done.guidance.references[1].given
        with pytest.raises(RuntimeError, match="DynFuse: style_image: this is no picture in base64"):
            guided.run(f"a cat {tag(style_image=escape(str(tmp_path / 'a.png')))}")

    def test_one_that_is_gone_stops_the_job(self, guided):
        with pytest.raises(RuntimeError, match="DynFuse: subject_image: the reference picture 0123456789abcdef is not"):
            guided.run(f"a cat {tag(subject_image='0123456789abcdef')}")


class TestEncoders:
    def test_without_them_the_job_stops_before_any_step(self, guided, tmp_path):
        guided.shared.opts.dynfuse_clip_model = "ViT-B-32/openai"
        guided.shared.opts.dynfuse_download_encoders = False
        steps = []
        with pytest.raises(RuntimeError, match="DynFuse: .*ViT-B-32"):
            guided.process(Processing(f"a cat {TAG}", callbacks={"cfg_denoiser": lambda p: steps.append(1)}))
        assert steps == []
        assert guided.jobs == 1

    def test_or_goes_on_unguided_and_says_so(self, guided):
        plain = guided.run(f"a cat {PLAIN}")
        guided.shared.opts.dynfuse_clip_model = "ViT-B-32/openai"
        guided.shared.opts.dynfuse_download_encoders = False
        guided.shared.opts.dynfuse_without_encoders = "go on"
        images, done = job(guided, f"a cat {TAG}")
        assert torch.equal(images, plain)
        assert done.notes[0].startswith("The picture was not guided.")

    def test_they_leave_the_device_with_the_job(self, guided):
        done = guided.process(Processing(f"a cat {TAG}")).p
        assert last(guided, done).guidance.encoders is None
        assert guided.host.passes(done)[-1].guidance.record is not None


class TestMemory:
    @staticmethod
    def fail_when_larger(monkeypatch, pixels):
        """Decoding runs out of memory for pictures wider than this."""
        from lib_dynfuse.guidance import decode

        original = decode.VaeDecoder.__call__

        def call(self, latent):
            pictures = original(self, latent)
            if pictures.shape[-1] > pixels:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return pictures

        monkeypatch.setattr(decode.VaeDecoder, "__call__", call)

    def test_a_decode_that_is_too_large_falls_back_to_a_smaller_one_and_says_so(self, guided, monkeypatch):
        from lib_dynfuse.hosts.webui import guided as module

        monkeypatch.setattr(module, "SMALL_PIXELS", 16)
        monkeypatch.setattr(module, "_SMALLEST_PIXELS", 8)
        self.fail_when_larger(monkeypatch, 16)
        _, done = job(guided, f"a cat {tag(decoder='vae')}")
        assert done.guidance.record.steps == [0, 1, 2]
        assert [note for note in done.notes if "Memory ran out" in note and "vae-small" in note]

    def test_without_memory_for_any_the_image_is_made_unguided(self, guided, monkeypatch):
        plain = guided.run(f"a cat {PLAIN}")
        guided.run(f"a cat {TAG}", steps=1)  # the references exist
        self.fail_when_larger(monkeypatch, 1)
        images, done = job(guided, f"a cat {TAG}")
        assert torch.equal(images, plain)
        assert any("without it" in note for note in done.notes)

    @pytest.mark.parametrize("where", ["private_copy", "encoders"])
    def test_without_room_for_decoder_or_encoders_the_image_is_made_unguided(self, guided, monkeypatch, where):
        from lib_dynfuse.guidance.encoders import Encoders
        from lib_dynfuse.hosts.webui import guided as module

        plain = guided.run(f"a cat {PLAIN}")
        guided.run(f"a cat {TAG}", steps=1)  # the references exist

        def short(*args, **kwargs):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        if where == "private_copy":
            monkeypatch.setattr(module, "private_copy", short)
        else:
            original = Encoders.to
            monkeypatch.setattr(Encoders, "to", lambda self, device: original(self, device) if device == "cpu" else short())
        images, done = job(guided, f"a cat {TAG}")
        assert torch.equal(images, plain)
        assert any("there was no room for the decoder and the encoders" in note for note in done.notes)

    def test_a_reference_is_looked_at_on_the_cpu_where_the_device_is_full(self, guided, monkeypatch):
        from lib_dynfuse.guidance.encoders import Encoders

        expected = guided.run(f"a cat {TAG}")
        guided.host.reference_cache.clear()
        events = []
        embed, to = Encoders.embed, Encoders.to

        def full_at_first(self, pictures):
            events.append("try")
            if events.count("try") % 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return embed(self, pictures)

        monkeypatch.setattr(Encoders, "embed", full_at_first)
        monkeypatch.setattr(Encoders, "to", lambda self, device: (events.append(str(device)), to(self, device))[1])
        assert torch.equal(guided.run(f"a cat {TAG}"), expected)
        assert events[:6] == ["try", "cpu", "try"] * 2
        assert events.count("try") == 4

    def test_exact_falls_back_to_fast_when_the_denoiser_runs_out_of_memory(self, guided, monkeypatch):
        fast, _ = job(guided, f"a cat {tag()}")
        unet = type(guided.host.roles.denoisers.denoiser(stand_in(guided)))
        original = unet.forward

        def forward(self, *args, **kwargs):
            if torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(unet, "forward", forward)
        images, done = job(guided, f"a cat {tag(gradient='exact')}")
        assert torch.allclose(images, fast, atol=1e-5)
        assert any("exact gradient was given up" in note for note in done.notes)
        assert done.trace.winners.shape[0] == 3

    def test_an_exact_step_leaves_the_models_parameters_as_they_were(self, guided):
        model = guided.host.roles.denoisers.denoiser(stand_in(guided))
        if "A1111" in guided.host.name:
            model.requires_grad_(True)
        before = [parameter.requires_grad for parameter in model.parameters()]
        guided.run(f"a cat {tag(gradient='exact')}")
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_exact_falls_back_to_fast_when_another_extension_cannot_be_differentiated(self, guided):
        unet = guided.host.roles.denoisers.denoiser(stand_in(guided))
        original = unet.forward

        def forward(x, *args, **kwargs):
            if torch.is_grad_enabled() and x.requires_grad:
                x.requires_grad_().numpy()
            return original(x, *args, **kwargs)

        unet.forward = forward
        fast, _ = job(guided, f"a cat {tag()}")
        images, done = job(guided, f"a cat {tag(gradient='exact')}")
        assert unet.forward is forward
        assert torch.allclose(images, fast, atol=1e-5)
        assert any("another extension" in note for note in done.notes)
        assert done.guidance.record.steps == [0, 1, 2]

    def test_any_other_error_in_an_exact_step_stops_the_job(self, guided):
        unet = guided.host.roles.denoisers.denoiser(stand_in(guided))
        original = unet.forward

        def forward(x, *args, **kwargs):
            if torch.is_grad_enabled():
                raise RuntimeError("shapes cannot be multiplied")
            return original(x, *args, **kwargs)

        unet.forward = forward
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            guided.run(f"a cat {tag(gradient='exact')}")
        assert unet.forward is forward

    def test_a_missing_taesd_is_replaced_and_said(self, guided):
        small, _ = job(guided, f"a cat {tag()}")
        images, done = job(guided, f"a cat {tag(decoder='taesd')}")
        assert torch.equal(images, small)
        assert any("taesd" in note for note in done.notes)


def stand_in(webui):
    """A CFGDenoiser of this WebUI, to ask for its model."""
    p = Processing("")
    p.cond = p.uncond = None
    return webui.modules["modules.sd_samplers_cfg_denoiser"].CFGDenoiser(webui, None, p)


class TestComparedPictures:
    """EST-LoRA goes by how unlike the pictures of each LoRA alone are; it needs the encoders, and no guidance."""

    TAG = "<dynfuse:dog:watercolor:method=est-lora>"

    def test_the_session_knows_their_similarity(self, guided):
        _, done = job(guided, f"a cat {self.TAG}", seed=6)
        assert guided.jobs == 3
        assert done.guidance is None
        # The same two pictures by hand, of the picture's own prompt and seed.
        encoders = load_encoders(guided.host.storage.encoder_sources())
        embeddings = [encoders.embed_picture(Image.open(entry.path).convert("RGB")) for entry in references_of(guided)]
        assert done.similarity == pytest.approx(float((embeddings[0].dino * embeddings[1].dino).sum()), abs=1e-6)
        assert done.similarity != 0

    def test_they_are_kept_and_a_hires_pass_has_its_first_passs(self, guided):
        first, _ = job(guided, f"a cat {self.TAG}", seed=6)
        again = guided.process(Processing(f"a cat {self.TAG}", seed=6, enable_hr=True))
        assert guided.jobs == 4
        known = [done.similarity for done in guided.host.passes(again.p)]
        assert len(known) == 2
        assert known[0] == known[1]

    def test_without_encoders_a_sentence_stops_the_job(self, guided):
        guided.shared.opts.dynfuse_download_encoders = False
        guided.shared.opts.dynfuse_encoders_folder = "/nowhere"
        guided.shared.opts.dynfuse_dino_model = ""
        with pytest.raises(RuntimeError, match=r"DynFuse: .*DINO|DynFuse: .*encoder"):
            guided.run(f"a cat {self.TAG}")


class TestSidesShown:
    """SSR goes by what the layers are given with each side alone, under its own prompt; no encoder is needed."""

    TAG = "<dynfuse:dog:watercolor:method=ssr:subject_prompt=a dog:style_prompt=a house>"

    def test_two_jobs_of_one_step_go_before_the_picture(self, webui):
        calls = []
        unet = webui.host.roles.denoisers.denoiser(stand_in(webui))
        original = unet.forward
        unet.forward = lambda x, *args, **kwargs: calls.append(1) or original(x, *args, **kwargs)
        webui.run(f"a cat {PLAIN[:-1]}:method=direct>", steps=3)
        plain = len(calls)
        calls.clear()
        images, done = job(webui, f"a cat {self.TAG}", steps=3)
        assert webui.jobs == 4
        assert len(calls) == plain + 2 * plain // 3
        assert not done.notes
        subject, style = done.seen
        assert subject
        assert set(subject) == set(style) == set(done.trace.learned)
        again, _ = job(webui, f"a cat {self.TAG}", steps=3)
        assert torch.equal(images, again)
        summed = webui.run(f"a cat {PLAIN[:-1]}:method=direct>", steps=3)
        assert (images - summed).abs().max() > 1e-3 * summed.abs().max()

    def test_a_hires_pass_has_its_first_passs(self, webui):
        done = webui.process(Processing(f"a cat {self.TAG}", enable_hr=True))
        assert webui.jobs == 3
        one, two = webui.host.passes(done.p)
        assert one.seen is two.seen

    def test_sides_without_words_of_their_own_are_told(self, webui):
        _, done = job(webui, "a cat <dynfuse:dog:watercolor:method=ssr>")
        assert any("subject_prompt and style_prompt" in note for note in done.notes)

    def test_an_interrupted_job_stops(self, webui):
        webui.interrupt_at, webui.interrupt_job = 0, 2
        job(webui, f"a cat {self.TAG}")
        assert webui.jobs <= 3


def references_of(webui):
    """The kept pictures, the subject's first."""
    return sorted(webui.host.reference_cache.entries(), key=lambda entry: entry.side != "subject")
