"""DynFuse inside a WebUI, on fakes of A1111 and of Forge."""

from __future__ import annotations

import os
import shutil
import time
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from lib_dynfuse.hosts.webui.a1111 import A1111
from lib_dynfuse.hosts.webui.catalogue import UnknownLora
from lib_dynfuse.hosts.webui.host import WebUIHost
from lib_dynfuse.text.tag import parse_tags
from lib_dynfuse.webui import results, saving
from tests.fakes.models import UNet, write_lora
from tests.fakes.webui import HOOKS, Processing

TAG = "<dynfuse:dog:watercolor>"
CHOOSING = "<dynfuse:dog:watercolor:method=dynfuse>"


@pytest.fixture
def plain(pristine):
    """The image of a WebUI without DynFuse: plain(prompt, **settings)."""

    def run(prompt, **settings):
        with pristine() as webui:
            return webui.run(prompt, **settings)

    return run


def close(one, other):
    """Equal but for the rounding of another order of sums, which the steps amplify."""
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-3 * other.abs().max())


class TestSaving:
    """What is kept of a job writes one file, which makes the job's picture again."""

    @pytest.fixture
    def saved(self, webui, tmp_path):
        def save(prompt, **settings):
            # The script's hook comes while the job still has its session.
            name = str(tmp_path)  # of a job that no other test has

            def keep(p, processed):
                results.remember("txt2img", name, [results.batch_of(webui.host.passes(p), p.all_seeds)])

            p = webui.process(Processing(prompt, callbacks={"postprocess": keep}, **settings)).p
            webui.shared.cmd_opts = types.SimpleNamespace(lora_dir=str(tmp_path))
            shown = results.pictures_of("txt2img", name)
            said = saving.save(results.recipe(shown[-1]) if shown else None, "both", 0, webui.host.catalogue)
            assert "Saved as" in said, said
            webui.files["both"] = str(tmp_path / "both.safetensors")
            webui.networks.list_available_networks()
            return p

        return save

    def test_a_sum(self, webui, saved):
        direct = webui.run("a cat <dynfuse:dog:watercolor:0.7:0.6:te_weight=0.5:method=direct>")
        saved("a cat <dynfuse:dog:watercolor:0.7:0.6:te_weight=0.5:method=direct>")
        assert near(webui.run("a cat <dynfuse:both:sharp:1:0:method=direct>"), direct)
        assert not near(webui.run("a cat"), direct)

    def test_the_weights_of_the_hires_pass_are_the_hires_passs(self, webui, saved):
        p = saved("a cat <dynfuse:dog:watercolor:0.7:0.6:hr=0.2/0.3:method=direct>", enable_hr=True)
        first, second = (done.recipe.settings for done in webui.host.passes(p))
        assert (first.subject_weight, first.style_weight) == (0.7, 0.6)
        assert (second.subject_weight, second.style_weight) == (0.2, 0.3)
        assert near(
            webui.run("a cat <dynfuse:both:sharp:1:0:method=direct>"), webui.run("a cat <dynfuse:dog:watercolor:0.2:0.3:method=direct>")
        )

    def test_a_selection_is_its_mean(self, webui, saved):
        p = saved(f"a cat {CHOOSING}", batch_size=2)
        with open(webui.files["both"], "rb") as file:
            head = file.read(1 << 20)
        assert b"means over 3 steps" in head
        assert b"2 images" not in head, "of the picture that was chosen"
        assert webui.host.last_pass(p).request is None, "the LoRAs are let go"

    def test_a_plain_job_leaves_nothing_to_save(self, webui):
        assert webui.host.last_pass(webui.process(Processing("a cat")).p) is None

    def test_a_job_stopped_before_its_first_step_leaves_nothing_to_save(self, webui):
        webui.interrupt_at = 0
        last = webui.host.last_pass(webui.process(Processing(f"a cat {TAG}")).p)
        assert last is None or last.recipe is None


def near(one, other):
    """Equal but for float16, in which the file is written."""
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-2 * other.abs().max())


class TestFusion:
    def test_a_tag_changes_the_image_and_not_as_two_lora_tags_do(self, webui, plain):
        fused = webui.run(f"a cat {TAG}")
        assert not close(fused, plain("a cat"))
        assert not close(fused, plain("a cat <lora:dog:1><lora:watercolor:1>"))

    def test_direct_equals_the_hosts_own_merge_of_both(self, webui, plain):
        direct = webui.run("a cat <dynfuse:dog:watercolor:0.7:0.6:method=direct>")
        assert close(direct, plain("a cat <lora:dog:0.7><lora:watercolor:0.6>"))

    def test_a_style_without_weight_leaves_the_subject_merged_alone(self, webui, plain):
        assert close(webui.run("a cat <dynfuse:dog:watercolor:1:0:contrast=0>"), plain("a cat <lora:dog:1>"))

    def test_the_pair_is_not_merged_when_a_lora_tag_names_it_too(self, webui):
        fused = webui.run(f"a cat {TAG}")
        assert torch.equal(webui.run(f"a cat {TAG}<lora:dog:1>"), fused)
        assert torch.equal(webui.run(f"a cat <lora:doggo:0.3>{TAG}<lora:watercolor:0.2>"), fused)

    def test_an_alias_names_the_same_file(self, webui):
        assert torch.equal(webui.run("a cat <dynfuse:doggo:watercolor>"), webui.run(f"a cat {TAG}"))

    def test_any_other_lora_is_part_of_the_base(self, webui, plain):
        with_other = webui.run("a cat <dynfuse:dog:watercolor:method=direct><lora:sharp:0.5>")
        assert close(with_other, plain("a cat <lora:dog:1><lora:watercolor:1><lora:sharp:0.5>"))

    def test_the_text_encoder_is_left_alone_without_a_weight(self, webui, plain):
        webui.run("a cat <dynfuse:dog:watercolor:te_weight=0>")
        without = webui.encode(["a cat"])
        assert torch.equal(without, plain_encoding(plain, webui))

    def test_an_image_does_not_depend_on_its_batch_mates(self, webui):
        batch = webui.run(f"a cat {TAG}", batch_size=4, seed=10)
        for i in range(4):
            assert close(batch[i : i + 1], webui.run(f"a cat {TAG}", seed=10 + i))

    def test_each_batch_of_a_job_is_fused_as_if_alone(self, webui):
        tag = "<dynfuse:dog:watercolor:balance=gamma>"
        three = webui.run(f"a cat {tag}", n_iter=3, seed=5)
        for i in range(3):
            assert close(three[i : i + 1], webui.run(f"a cat {tag}", seed=5 + i))

    def test_contrast_moves_away_from_the_plain_picture(self, webui):
        """With one step and without CFG a picture is its prediction."""
        one = {"steps": 1, "cfg_scale": 1.0}
        plain, fused = (webui.run(prompt, **one) for prompt in ("a cat", "a cat <dynfuse:dog:watercolor:te_weight=0:method=direct>"))
        moved = webui.run("a cat <dynfuse:dog:watercolor:te_weight=0:method=direct:contrast=1.5>", **one)
        assert close(moved, fused + 1.5 * (fused - plain))
        assert not close(moved, fused)

    @pytest.mark.parametrize("way", ["hook", "forward"])
    def test_contrast_leaves_the_rows_of_a_call_to_whoever_watches_them(self, webui, way):
        """Incantations' hooks halve what a layer gives; Regional Prompter's forwards count calls of the prompts' rows alone."""
        tag = "<dynfuse:dog:watercolor:contrast=1:contrast_every=1>"
        alone = webui.run(f"a cat {tag}", batch_size=2)
        model = unets(webui.shared.sd_model)
        layer = next(module for name, module in model.named_modules() if name.endswith("to_q"))
        rows = []
        if way == "hook":
            layer.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
        else:
            own = layer.forward
            layer.forward = lambda x, *args: (rows.append(x.shape[0]), own(x, *args))[1]
        watched = webui.run(f"a cat {tag}", batch_size=2)
        assert set(rows) == {4}
        assert close(watched, alone)

    def test_contrast_counts_the_same_under_the_hires_passs_own_cfg_scale(self, webui, host_name):
        if host_name in ("a1111", "classic"):
            pytest.skip("the hires pass has the first pass's")

        def second_pass(tag, scale):
            return webui.run("a cat", steps=1, enable_hr=True, hr_prompt=f"a cat {tag}", hr_cfg=scale)

        tag = "<dynfuse:dog:watercolor:te_weight=0:method=direct:contrast={}>"
        away = second_pass(tag.format(0), 1.0) - second_pass("", 1.0)
        assert close(second_pass(tag.format(1.5), 2.0), second_pass(tag.format(0), 2.0) + 1.5 * away)

    def test_contrast_counts_the_same_in_a_step_without_the_negative_prompt(self, webui):
        webui.shared.opts.s_min_uncond_all = True
        settings = {"steps": 1, "s_min_uncond": 99.0}
        tag = "<dynfuse:dog:watercolor:te_weight=0:method=direct:contrast={}>"
        plain, fused, moved = (webui.run(f"a cat {tag}", **settings) for tag in ("", tag.format(0), tag.format(1.5)))
        assert close(moved, fused + 1.5 * (fused - plain))

    @pytest.mark.parametrize("more", ["contrast_every=2", "method=composite", "negative_weight=0", "subject_contrast=0.5:method=direct"])
    def test_other_predictions_are_the_same_in_every_cut_of_the_rows(self, webui, more):
        prompt = f"a cat AND a dog <dynfuse:dog:watercolor:contrast=1:{more}>"
        together = webui.run(prompt, batch_size=2)
        webui.shared.opts.batch_cond_uncond = False
        assert close(webui.run(prompt, batch_size=2), together)
        assert not close(webui.run(f"a cat AND a dog {TAG}", batch_size=2), together)
        first = webui.run(prompt, batch_size=1)
        assert close(together[:1], first)

    @pytest.mark.parametrize("prompt", ["a cat AND a dog", "a cat that sits on a mat and looks at me", "a cat"])
    @pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.0}, {"batch_size": 2}])
    def test_direct_equals_the_merge_in_every_cut_of_the_rows(self, webui, plain, prompt, settings):
        two = plain(f"{prompt} <lora:dog:1><lora:watercolor:1>", **settings)
        assert close(webui.run(f"{prompt} <dynfuse:dog:watercolor:method=direct>", **settings), two)

    @pytest.mark.parametrize("inner_prompt", ["a cat", "a face", f"a face {TAG}"])
    @pytest.mark.parametrize("guidance", ["", ":guidance=true"])
    def test_a_job_inside_a_fused_job_has_its_fusion(self, webui, inner_prompt, guidance):
        """ADetailer repaints a face in a job of its own, with scripts and prompts of its own (here none)."""
        made = []

        def repaint(p, *args):
            if not made:
                made.append(None)
                made.append(webui.process(Processing(inner_prompt, seed=5)).images)

        outer = webui.process(
            Processing(f"a cat <dynfuse:dog:watercolor{guidance.replace('true', 'false')}>", callbacks={"postprocess_batch": repaint})
        )
        fused = webui.run(f"{inner_prompt.replace(TAG, '').strip()} {TAG}", seed=5)
        assert close(made[1], fused)
        assert not close(made[1], webui.run(inner_prompt.replace(TAG, "").strip(), seed=5))
        assert close(outer.images, webui.run(f"a cat {TAG}"))

    @pytest.mark.parametrize(
        ("prompts", "words"),
        [
            (("a face <dynfus:dog:watercolor>",), "<dynfus:dog:watercolor> is no tag that is known"),
            (("a face <dynfuse:dgo:watercolor>",), "no LoRA named 'dgo'"),
            (("a face", TAG), "stands in the negative prompt"),
        ],
    )
    @pytest.mark.parametrize("outer_prompt", ["a cat", f"a cat {TAG}"])
    @pytest.mark.parametrize("unseen", [False, True])
    def test_a_mistake_in_the_prompts_of_a_job_inside_is_told_with_the_outer_picture(self, webui, outer_prompt, prompts, words, unseen):
        """ADetailer's prompts: DynFuse's script is not run for its jobs, and the WebUI prints what a hook raises and goes on."""

        def repaint(p, *args):
            with unwrapped(webui) if unseen else nullcontext(), pytest.raises(RuntimeError, match=words):
                webui.process(Processing(*prompts, seed=5))

        outer = webui.process(Processing(outer_prompt, callbacks={"postprocess_batch": repaint}))
        assert words in " ".join(outer.p.comments)
        note = outer.p.extra_generation_params["DynFuse note"]
        assert words in (note() if callable(note) else note)
        assert close(outer.images, webui.run(outer_prompt))

    def test_a_job_inside_that_begins_past_our_wrapper_has_the_fusion_and_leaves_nothing(self, webui):
        """Beside ControlNet, ADetailer puts the function back that ControlNet found (controlnet_ext/restore.py)."""
        made = []

        def repaint(p, *args):
            with unwrapped(webui):
                made.extend(webui.process(Processing(prompt, seed=5)) for prompt in ("a face", "a nose"))

        webui.process(Processing(f"a cat {TAG}", callbacks={"postprocess_batch": repaint}))
        for job, prompt in zip(made, ("a face", "a nose")):
            assert close(job.images, webui.run(f"{prompt} {TAG}", seed=5))
            assert job.p.dynfuse.over

    def test_a_tag_of_a_job_inside_is_understood_in_any_case_and_with_spaces(self, webui):
        made = []

        def repaint(p, *args):
            made.append(webui.process(Processing("a face < DynFuse : dog:watercolor >", seed=5)).images)

        webui.process(Processing("a cat", callbacks={"postprocess_batch": repaint}))
        assert close(made[0], webui.run(f"a face {TAG}", seed=5))

    def test_a_job_after_it_or_inside_a_plain_one_is_plain(self, webui, plain):
        made = []
        webui.process(Processing(f"a cat {TAG}"))
        inside = {"postprocess_batch": lambda p, *args: made or made.append(webui.process(Processing("a face")).images)}
        webui.process(Processing("a cat", callbacks=inside))
        assert torch.equal(made[0], plain("a face"))

    def test_split_calls_give_the_image_of_one_call(self, webui):
        prompt = f"a cat AND a dog {TAG}"
        together = webui.run(prompt, batch_size=2)
        webui.shared.opts.batch_cond_uncond = False
        assert close(webui.run(prompt, batch_size=2), together)

    def test_a_hires_pass_has_its_own_tags(self, webui):
        plain_second = webui.process(Processing(f"a cat {TAG}", enable_hr=True, hr_prompt="a cat"))
        assert [p.hires for p in webui.host.passes(plain_second.p)] == [False]
        fused_second = webui.process(Processing("a cat", enable_hr=True, hr_prompt=f"a cat {TAG}"))
        assert [p.hires for p in webui.host.passes(fused_second.p)] == [True]
        both = webui.process(Processing(f"a cat {TAG}", enable_hr=True, hr_prompt="a cat <dynfuse:watercolor:dog>"))
        assert [p.settings.subject for p in webui.host.passes(both.p)] == ["dog", "watercolor"]
        assert not close(plain_second.images, fused_second.images)
        assert not close(plain_second.images, both.images)

    def test_a_hires_pass_without_a_tag_is_plain(self, webui, plain):
        fused_first = webui.run(f"a cat {TAG}", enable_hr=True, hr_prompt="a cat", steps=0)
        assert torch.equal(fused_first, plain("a cat", enable_hr=True, hr_prompt="a cat", steps=0))

    def test_a_changed_file_is_read_again(self, webui, tmp_path, loras):
        webui.files["moving"] = shutil.copy(loras["dog"], tmp_path / "moving.safetensors")
        prompt = "a cat <dynfuse:moving:watercolor>"
        p = Processing(prompt)
        first = webui.process(p).images
        shutil.copy(loras["sharp"], tmp_path / "moving.safetensors")
        os.utime(tmp_path / "moving.safetensors", (time.time() + 5,) * 2)
        again = Processing(prompt, cached_c=p.cached_c, cached_uc=p.cached_uc)
        assert close(webui.process(again).images, webui.run("a cat <dynfuse:sharp:watercolor>"))
        assert not close(first, webui.run(prompt))


def plain_encoding(plain, webui):
    with type(webui)(webui.files) as untouched:
        return untouched.encode(["a cat"])


class TestRefiner:
    def test_the_refiner_is_fused_too(self, webui):
        base = webui.shared.sd_model
        fused = run_with_refiner(webui, f"a cat {TAG}", base, webui.checkpoint("refiner", seed=3))
        direct = run_with_refiner(webui, "a cat <lora:dog:1><lora:watercolor:1>", base, webui.checkpoint("refiner", seed=3))
        assert not close(fused.images, direct.images)
        assert fused.infotext.get("DynFuse note") is None

    def test_direct_equals_the_merge_on_both_models(self, webui):
        base = webui.shared.sd_model
        direct = run_with_refiner(webui, "a cat <dynfuse:dog:watercolor:method=direct>", base, webui.checkpoint("refiner", seed=3))
        webui.shared.sd_model = base
        two = run_with_refiner(webui, "a cat <lora:dog:1><lora:watercolor:1>", base, webui.checkpoint("refiner", seed=3))
        assert close(direct.images, two.images)

    def test_a_refiner_with_other_layers_runs_unfused_and_says_so(self, webui):
        refiner = webui.checkpoint("other", seed=3)
        rename_layers(unets(refiner))
        result = run_with_refiner(webui, f"a cat {TAG}", webui.shared.sd_model, refiner)
        assert "refiner's steps were not fused" in result.infotext["DynFuse note"]
        assert webui.host.last_pass(result.p).trace.winners.shape[0] == 1

    def test_nothing_stays_on_either_model(self, webui):
        base, refiner = webui.shared.sd_model, webui.checkpoint("refiner", seed=3)
        run_with_refiner(webui, f"a cat {TAG}", base, refiner)
        for model in (base, refiner):
            assert own_forwards(model) == []

    @pytest.mark.parametrize("host_name", ["forge", "neo", "reforge", "classic"])  # A1111 does not ask for its LoRAs again
    def test_a_refiner_that_is_loaded_now_is_fused_as_one_that_was(self, webui):
        base = webui.shared.sd_model
        expected = run_with_refiner(webui, f"a cat {TAG}", base, webui.checkpoint("refiner", seed=3))
        webui.refiner_from_disk = True
        loaded = run_with_refiner(webui, f"a cat {TAG}", base, webui.checkpoint("refiner", seed=3))
        assert torch.equal(loaded.images, expected.images)

    def test_the_empty_prompt_of_a_model_that_is_loaded_in_a_job_has_no_loras(self, webui):
        webui.refiner_from_disk = True
        base = webui.shared.sd_model
        run_with_refiner(webui, "a cat", base, webui.checkpoint("refiner", seed=3))
        plain = webui.empty_prompt
        run_with_refiner(webui, f"a cat {TAG}", base, webui.checkpoint("refiner", seed=3))
        assert torch.equal(webui.empty_prompt, plain)

    def test_models_that_stay_loaded_are_as_they_were(self, webui):
        models = base, refiner = webui.shared.sd_model, webui.checkpoint("refiner", seed=3)
        prompts = ("a dog", f"a dog {TAG}")

        def pictures():
            made = []
            for webui.shared.sd_model in models:
                made += [webui.run(prompt) for prompt in prompts]
            return made

        before = pictures()
        run_with_refiner(webui, f"a cat {TAG}", base, refiner)
        assert all(torch.equal(after, picture) for after, picture in zip(pictures(), before))


def rename_layers(unet):
    """A model whose layers no LoRA names."""
    unet.names = torch.nn.ModuleList([unet.input_blocks, unet.middle_block, unet.out])
    for name in ("input_blocks", "middle_block", "out"):
        child = unet._modules.pop(name)
        object.__setattr__(unet, name, child)


@contextmanager
def unwrapped(webui):
    """The WebUI's function that runs a job, without our wrapper."""
    processing = webui.modules["modules.processing"]
    ours, processing.process_images_inner = processing.process_images_inner, webui.process_images_inner
    try:
        yield
    finally:
        processing.process_images_inner = ours


def run_with_refiner(webui, prompt, base, refiner):
    webui.shared.sd_model = base
    return webui.process(Processing(prompt, refiner=refiner))


def unets(model):
    return model.forge_objects.unet.model.diffusion_model if hasattr(model, "forge_objects") else model.model.diffusion_model


def own_forwards(model):
    return [name for name, module in unets(model).named_modules() if "forward" in module.__dict__]


class TestErrors:
    @pytest.mark.parametrize(
        ("tag", "words"),
        [
            ("<dynfuse:dgo:watercolor>", ["no LoRA named 'dgo'", "did you mean dog"]),
            ("<dynfuse:people/dog.safetensors:watercolor>", ["no LoRA named 'people/dog.safetensors'", "did you mean dog"]),
            ("<dynfuse:dog:doggo>", ["same LoRA"]),
            ("<dynfuse:dog:dog>", ["same LoRA"]),
            ("<dynfuse:dog>", ["no style LoRA"]),
            ("<dynfuse:dog:watercolor:criterion=mse>", ["criterion", "kl, js, cosine, dot"]),
            ("<dynfuse:dog:watercolor:loud>", ["subject_weight must be a number"]),
            (f"{TAG}{TAG}", ["more than one"]),
        ],
    )
    def test_a_mistake_in_the_tag_stops_the_image_with_a_sentence(self, webui, tag, words):
        with pytest.raises(RuntimeError) as refusal:
            webui.run(f"a cat {tag}")
        assert all(word in str(refusal.value) for word in words)

    def test_a_damaged_file_is_named(self, webui, tmp_path, loras):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(Path(loras["dog"]).read_bytes()[:2000])
        webui.files["broken"] = str(broken)
        with pytest.raises(RuntimeError, match="broken"):
            webui.run("a cat <dynfuse:broken:watercolor>")

    def test_a_file_that_vanished_is_named(self, webui, tmp_path, loras):
        webui.files["gone"] = shutil.copy(loras["dog"], tmp_path / "gone.safetensors")
        webui.list_available_networks()
        os.remove(tmp_path / "gone.safetensors")
        with pytest.raises(RuntimeError, match="gone"):
            webui.run("a cat <dynfuse:gone:watercolor>")

    def test_loras_of_another_model_are_refused(self, webui, tmp_path):
        other = UNet()
        rename_layers(other)
        for seed, name in enumerate(("far", "away")):
            webui.files[name] = write_lora(tmp_path / f"{name}.safetensors", seed, other)
        with pytest.raises(RuntimeError, match=r"far|away"):
            webui.run("a cat <dynfuse:far:away>")

    def test_the_refusal_does_not_outlive_its_job(self, webui, plain):
        with pytest.raises(RuntimeError):
            webui.run("a cat <dynfuse:dgo:watercolor>")
        assert torch.equal(webui.run("a cat"), plain("a cat"))

    def test_a_lora_that_appears_after_the_refusal_is_used_in_the_text_encoder_too(self, webui, loras):
        p = Processing("a cat <dynfuse:new:watercolor:method=direct>")
        with pytest.raises(RuntimeError):
            webui.process(p)
        webui.files["new"] = loras["dog"]
        again = Processing(p.prompt, cached_c=p.cached_c, cached_uc=p.cached_uc)
        assert close(webui.process(again).images, webui.run("a cat <dynfuse:dog:watercolor:method=direct>"))

    def test_a_program_in_place_of_the_layers_is_refused(self, webui):
        webui.modules["modules.sd_unet"].current_unet = object()
        with pytest.raises(RuntimeError, match="SD Unet"):
            webui.run(f"a cat {TAG}")


class TestRecord:
    def test_a_pass_has_its_trace_settings_and_report_after_the_job(self, webui):
        result = webui.process(Processing(f"a cat {CHOOSING}", steps=4, batch_size=2))
        record = webui.host.last_pass(result.p)
        assert record.settings.subject == "dog"
        assert record.trace.winners.shape == (4, len(record.trace.sites), 2)
        assert record.trace.measured[:, record.trace.decided].all()
        assert len(record.report.matched) == int(record.trace.decided.sum())

    def test_the_layers_of_the_checkpoint_are_known_once_it_is_loaded(self, webui):
        host, data = webui.host, webui.modules["modules.sd_models"].model_data
        assert host.loaded_layers() is None
        data.sd_model = webui.shared.sd_model
        (report,) = {len(webui.host.last_pass(webui.process(Processing(f"a cat {TAG}")).p).report.matched)}
        layers = host.loaded_layers()
        assert len(layers) >= report
        assert all(shape is None or len(shape) in (2, 4) for shape in layers.values())
        assert any(shape is not None for shape in layers.values())
        if hasattr(data, "forge_loading_parameters"):
            data.forge_hash = str(data.forge_loading_parameters)
            assert host.loaded_layers() == layers
            data.forge_hash = "another checkpoint's, in whose place the chosen one comes with the next picture"
            assert host.loaded_layers() is None
            del data.forge_hash
        del data.sd_model
        assert host.loaded_layers() is None

    def test_only_the_last_batch_is_kept(self, webui):
        result = webui.process(Processing(f"a cat {TAG}", n_iter=3, enable_hr=True))
        assert [(p.batch, p.hires) for p in webui.host.passes(result.p)] == [(2, False), (2, True)]

    def test_a_processing_object_that_is_run_again_has_the_record_of_its_last_run(self, webui):
        p = Processing(f"a cat {TAG}")
        for _ in range(3):
            webui.process(p)
        assert len(webui.host.passes(p)) == 1
        p.prompt = "a cat"
        webui.process(p)
        assert webui.host.passes(p) == []

    def test_a_plain_job_has_no_record(self, webui):
        assert webui.host.last_pass(webui.process(Processing("a cat")).p) is None

    def test_the_record_keeps_neither_the_files_nor_the_model(self, webui):
        record = webui.host.last_pass(webui.process(Processing(f"a cat {TAG}")).p)
        assert record.settings.subject == "dog"
        assert record.request is None
        assert record._session is None

    def test_a_note_reaches_the_user_and_the_infotext(self, webui):
        result = webui.process(Processing(f"a cat {TAG}<lora:dog:1>"))
        assert "<lora:dog> was left out" in result.infotext["DynFuse note"]
        assert "<lora:dog> was left out" in result.comments
        assert "<lora:dog> was left out" in result.p.extra_generation_params["DynFuse note"]

    def test_without_notes_there_is_no_entry(self, webui):
        result = webui.process(Processing(f"a cat {TAG}"))
        assert result.infotext.get("DynFuse note") is None
        assert "DynFuse note" not in result.p.extra_generation_params
        assert result.comments == ""


class TestSteps:
    """Every pass knows its steps, guided or not."""

    @pytest.fixture
    def begun(self, monkeypatch):
        from lib_dynfuse.hosts.webui.passes import FusionSession

        steps = []
        begin = FusionSession.begin
        monkeypatch.setattr(FusionSession, "begin", lambda self, step=None: steps.append(step) or begin(self, step))
        return steps

    def test_of_both_passes(self, webui, begun):
        webui.run(f"a cat {TAG}", steps=4, enable_hr=True)
        assert [(step.index, step.count, step.sigma) for step in begun] == [(i, 4, 4.0 - i) for i in range(4)] * 2

    def test_a_plain_job_has_none(self, webui, begun):
        webui.run("a cat <lora:dog:1>", steps=4, enable_hr=True)
        assert begun == []

    def test_a_weight_over_the_steps_follows_them(self, webui):
        tag = "<dynfuse:dog:watercolor:{}:1:method=direct:te_weight=0>"
        assert close(webui.run(f"a cat {tag.format('0.3@0,0.9@1')}", steps=1), webui.run(f"a cat {tag.format(0.3)}", steps=1))
        ramp = webui.run(f"a cat {tag.format('0.3@0,0.9@1')}", steps=3)
        assert not close(ramp, webui.run(f"a cat {tag.format(0.3)}", steps=3))

    def test_the_hires_pass_has_its_own_weights(self, webui):
        own = webui.run("a cat <dynfuse:dog:watercolor:0.7:0.6:method=direct:hr=0.2/0.3>", enable_hr=True)
        first, second = ("a cat <dynfuse:dog:watercolor:{}:{}:method=direct>".format(*weights) for weights in ((0.7, 0.6), (0.2, 0.3)))
        assert close(own, webui.run(first, enable_hr=True, hr_prompt=second))


class TestSeveralLoras:
    def test_direct_equals_the_hosts_own_merge_of_all(self, webui, plain):
        direct = webui.run("a cat <dynfuse:dog+sharp:watercolor:0.7+0.4:0.6:method=direct>")
        assert close(direct, plain("a cat <lora:dog:0.7><lora:sharp:0.4><lora:watercolor:0.6>"))

    def test_none_of_them_is_merged_when_a_lora_tag_names_it_too(self, webui):
        tag = "<dynfuse:dog+sharp:watercolor>"
        assert torch.equal(webui.run(f"a cat {tag}<lora:sharp:0.5>"), webui.run(f"a cat {tag}"))

    def test_naming_one_twice_is_refused(self, webui):
        with pytest.raises(RuntimeError, match="the same LoRA"):
            webui.run("a cat <dynfuse:dog+doggo:watercolor>")

    def test_the_trace_names_them(self, webui):
        record = webui.host.last_pass(webui.process(Processing("a cat <dynfuse:dog+sharp:watercolor>")).p)
        assert [(member.name, member.subject) for member in record.trace.members] == [
            ("dog", True),
            ("sharp", True),
            ("watercolor", False),
        ]


@pytest.mark.parametrize("host_name", ["forge"])  # A1111 runs the prompt first
class TestNegativePromptAloneAndFirst:
    """Forge, when memory is short: the step's calls are made once more, with the choice that the prompt brought."""

    @pytest.fixture
    def short(self, webui):
        webui.memory_is_short = True
        return webui

    def test_the_picture_is_that_of_one_call(self, short):
        apart = short.process(Processing(f"a cat {TAG}", batch_size=2))
        short.memory_is_short = False
        assert close(apart.images, short.run(f"a cat {TAG}", batch_size=2))
        assert "negative prompt" not in apart.comments

    @pytest.mark.parametrize(("decide", "chosen_in_the_layers"), [("now", 3), ("next", 1)])
    def test_calls_are_made_twice_where_the_layers_choose_and_no_more(self, short, decide, chosen_in_the_layers):
        calls = []
        handle = unets(short.shared.sd_model).register_forward_pre_hook(lambda *args: calls.append(1))
        short.run(f"a cat <dynfuse:dog:watercolor:method=dynfuse:decide={decide}>", steps=3)
        assert len(calls) == 3 * 2 + chosen_in_the_layers * 2
        calls.clear()
        short.run("a cat", steps=3)
        handle.remove()
        assert len(calls) == 3 * 2

    def test_the_name_is_the_hosts_own_again(self, short):
        module = short.modules["modules.sd_samplers_cfg_denoiser"]
        before = dict(vars(module))
        short.run(f"a cat {TAG}")
        assert dict(vars(module)) == before

    def test_a_webui_without_such_a_place_decides_on_the_negative_prompt_and_says_so(self, short, monkeypatch):
        from lib_dynfuse.hosts.webui.forge import ForgeDenoisers
        from lib_dynfuse.hosts.webui.roles import Denoisers

        monkeypatch.setattr(ForgeDenoisers, "model_calls", Denoisers.model_calls)
        assert "made on the negative prompt" in short.process(Processing(f"a cat {CHOOSING}")).comments


class TestSessions:
    """What is prepared for one batch serves the next, and is gone with the job."""

    @pytest.fixture
    def made(self, monkeypatch):
        from lib_dynfuse.hosts.webui import passes

        sessions = []

        class Counted(passes.FusionSession):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                sessions.append(self)

        monkeypatch.setattr(passes, "FusionSession", Counted)
        return sessions

    def test_one_serves_all_batches_and_the_hires_pass(self, webui, made):
        webui.run(f"a cat {TAG}", n_iter=3, enable_hr=True)
        assert len(made) == 1

    def test_other_tags_make_another(self, webui, made):
        webui.run(f"a cat {TAG}", enable_hr=True, hr_prompt="a cat <dynfuse:watercolor:dog>")
        webui.run(f"a cat {TAG}", enable_hr=True, hr_prompt=f"a cat {TAG}<lora:sharp:0.5>")
        assert len(made) == 4

    def test_the_devices_memory_is_free_after_the_job(self, webui, made):
        webui.run(f"a cat {TAG}", n_iter=2)
        sites = [site for session in made for layer in session.layers for site in getattr(layer, "sites", ())]
        assert sites
        assert all(site.operators is None for site in sites)

    def test_each_batch_has_its_own_record(self, webui):
        records = []

        def remember(p, *args):
            records.append(webui.host.last_pass(p).trace)

        webui.process(Processing(f"a cat {CHOOSING}", n_iter=2, steps=4, callbacks={"postprocess_batch": remember}))
        assert [record.winners.shape[0] for record in records] == [4, 4]
        assert not torch.equal(records[0].divergences, records[1].divergences)


class TestNoTrace:
    """Whatever happened in the last job, the next plain image is that of a WebUI without DynFuse."""

    def after(self, webui, plain):
        model = webui.shared.sd_model
        assert own_forwards(model) == []
        assert torch.equal(webui.run("a cat"), plain("a cat"))
        assert torch.equal(webui.run("a cat <lora:sharp:0.8>"), plain("a cat <lora:sharp:0.8>"))
        assert torch.equal(webui.run("a cat"), plain("a cat"))

    def test_after_a_fused_job(self, webui, plain):
        webui.run(f"a cat {TAG}")
        self.after(webui, plain)

    @pytest.mark.parametrize("step", range(4))
    def test_after_an_interrupt_at_each_step(self, webui, plain, step):
        webui.interrupt_at = step
        webui.run(f"a cat {TAG}")
        webui.interrupt_at = None
        self.after(webui, plain)

    @pytest.mark.parametrize("layer", ["input_blocks.0.0", "input_blocks.1.1.transformer_blocks.0.attn2.to_k", "out.2"])
    def test_after_an_exception_inside_a_layer(self, webui, plain, layer):
        def fail(*args):
            raise ArithmeticError("a layer failed")

        handle = unets(webui.shared.sd_model).get_submodule(layer).register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            webui.run(f"a cat {TAG}")
        handle.remove()
        self.after(webui, plain)

    def test_after_an_exception_in_the_denoiser_call(self, webui, plain):
        def fail(*args):
            raise ArithmeticError("the model failed")

        handle = unets(webui.shared.sd_model).register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            webui.run(f"a cat {TAG}")
        handle.remove()
        self.after(webui, plain)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("hook", HOOKS)
    def test_after_an_exception_in_each_hook(self, webui, plain, hook, error):
        def fail(*args):
            raise error("a hook failed")

        try:
            webui.process(Processing(f"a cat {TAG}", callbacks={hook: fail}))
        except KeyboardInterrupt:
            assert error is KeyboardInterrupt
        self.after(webui, plain)

    def test_after_a_job_that_died_while_its_prompt_was_encoded(self, webui, plain):
        def fail(*args):
            raise MemoryError

        encode, webui.encode = webui.encode, fail
        with pytest.raises(MemoryError):
            webui.run(f"a cat {TAG}")
        webui.encode = encode
        self.after(webui, plain)

    def test_after_a_job_whose_end_was_not_seen(self, webui, plain):
        """Even if nothing told us that the job died: activation replaces everything."""
        webui.modules["modules.extra_networks"].activate(Processing(""), webui.parse_prompt(TAG)[1])
        assert webui.host.jobs._active is not None
        self.after(webui, plain)

    def test_a_malformed_lora_tag_in_the_next_job_does_not_bring_the_text_parts_back(self, webui, plain):
        webui.modules["modules.extra_networks"].activate(Processing(""), webui.parse_prompt(TAG)[1])
        assert torch.equal(webui.run("a cat <lora:sharp:loud>"), plain("a cat <lora:sharp:loud>"))

    def test_a_job_without_extra_networks_is_plain(self, webui, plain):
        webui.run(f"a cat {TAG}")
        assert torch.equal(webui.run(f"a cat {TAG}", disable_extra_networks=True), plain("a cat"))

    def test_a_copied_processing_object_does_not_carry_the_fusion_along(self, webui, plain):
        import copy

        p = Processing("a cat <dynfuse:dog:watercolor:te_weight=0>")
        webui.process(p)
        second = copy.copy(p)
        second.disable_extra_networks, second.extra_generation_params = True, {}
        assert torch.equal(webui.process(second).images, plain("a cat"))
        assert webui.host.last_pass(second) is None

    def test_the_same_processing_object_run_again_without_extra_networks_is_plain(self, webui, plain):
        p = Processing("a cat <dynfuse:dog:watercolor:te_weight=0>")
        webui.process(p)
        p.disable_extra_networks = True
        assert torch.equal(webui.process(p).images, plain("a cat"))

    def test_a_job_inside_a_job_does_not_end_the_outer_ones_fusion(self, webui):
        alone = webui.run("a cat <dynfuse:dog:watercolor:te_weight=0>")

        def nested(p, *args):
            webui.run("another <dynfuse:watercolor:dog:te_weight=0>")

        outer = Processing("a cat <dynfuse:dog:watercolor:te_weight=0>", callbacks={"process_before_every_sampling": nested})
        assert torch.equal(webui.process(outer).images, alone)

    def test_a_model_switch_between_jobs(self, webui, plain):
        webui.run(f"a cat {TAG}")
        webui.shared.sd_model = webui.checkpoint("second", seed=9)
        second = webui.run("a cat")
        webui.run(f"a cat {TAG}")
        assert torch.equal(webui.run("a cat"), second)

    def test_a_hundred_jobs_leave_hooks_and_attributes_as_before(self, webui, plain):
        seams = ["modules.extra_networks.activate", "networks.load_networks", "modules.processing.process_images_inner"]
        before = [getattr(webui.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in seams]
        webui.run("a cat", steps=1)
        webui.run(f"a cat {TAG}", steps=1)
        attributes = attribute_count(webui.shared.sd_model)
        alive = tensors_alive()
        for _ in range(50):
            webui.run(f"a cat {TAG}", steps=1)
            webui.run("a cat", steps=1)
        webui.run(f"a cat {TAG}", steps=1)
        assert attribute_count(webui.shared.sd_model) == attributes
        assert tensors_alive() <= alive
        assert [getattr(webui.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in seams] == before
        webui.host.install(lambda tags: None)
        self.after(webui, plain)


def attribute_count(model):
    return sum(len(module.__dict__) + len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unets(model).modules())


def tensors_alive():
    import gc

    gc.collect()
    return sum(1 for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


class TestA1111:
    """Its two ways with LoRAs: merged into the weights, and (the option lora_functional) added in each forward."""

    FUSED = "a cat <dynfuse:dog:watercolor:method=direct{}>"

    @pytest.fixture
    def host_name(self):
        return "a1111"

    def test_the_text_parts_make_no_copies_of_the_unet(self, webui):
        webui.run(self.FUSED.format(""))
        layers = list(webui.shared.sd_model.model.diffusion_model.modules())
        assert not any(getattr(layer, "network_weights_backup", None) is not None for layer in layers)
        assert not any(getattr(layer, "network_current_names", ()) for layer in layers)

    def test_they_are_the_hosts_again_after_each_call(self, webui):
        seen = []
        p = Processing(self.FUSED.format(""), callbacks={"post_sample": lambda p: seen.append([n.name for n in networks()])})

        def networks():
            return [net for net in webui.networks.loaded_networks if getattr(net, "is_dynfuse", False)]

        webui.process(p)
        assert [len(names) for names in seen] == [1]
        assert not networks()

    @pytest.mark.parametrize("settings", ["", ":te_weight=0"])
    def test_a_merge_before_the_functional_option_was_set_is_no_part_of_a_fused_picture(self, webui, pristine, settings):
        with pristine() as fresh:
            fresh.host = WebUIHost(A1111)
            fresh.host.install(parse_tags)
            fresh.shared.opts.lora_functional = True
            expected = fresh.run(self.FUSED.format(settings))
            fresh.host.uninstall()
        with webui:
            webui.run("a cat <lora:sharp:1>")
            webui.shared.opts.lora_functional = True
            assert close(webui.run(self.FUSED.format(settings)), expected)

    def test_our_text_parts_are_no_part_of_a_plain_picture_after_the_option_was_set(self, webui, plain):
        webui.run(self.FUSED.format(""))
        webui.shared.opts.lora_functional = True
        assert torch.equal(webui.run("a cat"), plain("a cat"))


class TestInstalling:
    def test_installing_twice_wraps_once(self, webui):
        from lib_dynfuse.text.tag import parse_tags

        denoiser = webui.modules["modules.sd_samplers_cfg_denoiser"].CFGDenoiser
        once = denoiser.forward
        webui.host.install(parse_tags)
        assert denoiser.forward is once

    def test_uninstalling_puts_the_originals_back(self, pristine, webui):
        webui.host.uninstall()
        assert webui.networks.load_networks == webui.load_networks
        assert webui.modules["modules.extra_networks"].activate == webui.activate
        assert webui.modules["modules.processing"].process_images_inner == webui.process_images_inner
        assert "wrapper" not in webui.modules["modules.sd_samplers_cfg_denoiser"].CFGDenoiser.forward.__qualname__

    def test_a_wrapper_that_somebody_wrapped_sleeps_and_wakes(self, webui, plain):
        from lib_dynfuse.text.tag import parse_tags

        ours = webui.networks.load_networks
        webui.networks.load_networks = lambda *args, **kwargs: ours(*args, **kwargs)
        fused = webui.run(f"a cat {TAG}")
        webui.host.uninstall()
        assert torch.equal(webui.run(f"a cat {TAG}"), plain("a cat"))
        webui.host.install(parse_tags)
        assert torch.equal(webui.run(f"a cat {TAG}"), fused)
        webui.networks.load_networks = ours


class TestLoraList:
    def test_names_paths_and_hashes_are_the_hosts(self, webui, loras):
        catalogue = webui.host.catalogue
        assert catalogue.names() == ["dog", "sharp", "watercolor"]
        assert catalogue.path("dog") == catalogue.path("doggo") == loras["dog"]
        assert catalogue.path("../dog") is None
        assert catalogue.hash("dog") == "hash-dog"
        assert catalogue.name_by_hash("hash-dog") == "dog"
        assert catalogue.name_by_hash("nothing") is None

    def test_an_alias_of_two_files_stands_for_neither(self, webui):
        webui.networks.forbidden_network_aliases["doggo"] = 1
        assert webui.host.catalogue.path("doggo") is None
        assert webui.host.catalogue.path("dog") is not None
        webui.networks.forbidden_network_aliases.clear()

    def test_a_name_that_a_tag_would_read_otherwise_is_told_as_it_is_written(self, webui, loras):
        webui.files["100%3Adog"] = loras["dog"]
        webui.host.catalogue.refresh()
        with pytest.raises(UnknownLora, match=r"'100:dog'; did you mean 100%3Adog \(in a tag 100%253Adog\)"):
            webui.host.catalogue.known_path("100:dog")

    def test_a_preview_beside_the_file_is_found(self, webui, tmp_path, loras):
        webui.files["pictured"] = shutil.copy(loras["dog"], tmp_path / "pictured.safetensors")
        webui.host.catalogue.refresh()
        assert webui.host.catalogue.preview("pictured") is None
        (tmp_path / "pictured.preview.png").write_bytes(b"")
        assert webui.host.catalogue.preview("pictured") == str(tmp_path / "pictured.preview.png")

    def test_a_file_is_read_once_for_many_jobs(self, webui, monkeypatch):
        from lib_dynfuse.hosts.webui import lora_files

        reads = []
        original = lora_files.read_lora
        monkeypatch.setattr(lora_files, "read_lora", lambda path: reads.append(path) or original(path))
        for _ in range(3):
            webui.run(f"a cat {TAG}", n_iter=2)
        assert len(reads) == 2
