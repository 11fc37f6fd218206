"""The checks on a running WebUI that A1111 and Forge share. The test modules import the classes and say what `case` is."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from .live import Refused, WebUI, difference, encoded

# Another order of sums, seen through a sampler and eight bits.
ROUNDING = 2

HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.95, "hr_second_pass_steps": 3}

HOOKS = (
    "setup",
    "before_process",
    "process",
    "before_process_batch",
    "after_extra_networks_activate",
    "process_batch",
    "process_before_every_sampling",
    "post_sample",
    "postprocess_batch",
    "postprocess_batch_list",
    "postprocess_image",
    "postprocess",
)


def panel(case, **settings):
    return {"alwayson_scripts": {"dynfuse": {"args": [True, {"subject": case.subject, "style": case.style, **settings}]}}}


@pytest.fixture(scope="module")
def plain(case):
    return case.pixels("a cat")


@pytest.fixture(scope="module")
def fused(case):
    return case.pixels(f"a cat {case.tag}")


@pytest.fixture(scope="module")
def merged(case):
    """Both LoRAs, merged by the WebUI itself."""
    return case.pixels(f"a cat {case.two_tags}")


def needs_exact_merge(case):
    if case.requantises:
        pytest.skip("the WebUI rounds a merge on this base, so there is nothing exact to compare with")


@pytest.fixture
def rows_apart(case):
    """Settings under which the model is called for a part of a step's rows at a time, as where memory is short."""
    return nullcontext(fault(case, "short"))


class TestRowsApart:
    """One image, one answer: whether the WebUI runs a step's rows in one call or in several."""

    @pytest.mark.parametrize("decide", ["next", "now"])
    @pytest.mark.parametrize("images", [1, 2, 3])
    @pytest.mark.parametrize("prompt", ["a cat", "a cat AND a dog", "a cat AND a dog AND a house"])
    def test_the_picture_is_the_same(self, case, rows_apart, prompt, images, decide):
        job = {"prompt": f"{prompt} {case.tag_with(f'decide={decide}')}", "batch_size": images}
        together = case.pixels(**job)
        with rows_apart as settings:
            apart = case.pixels(**job, **settings)
        assert difference(apart, together) <= ROUNDING


class TestFusion:
    def test_fused_differs_from_plain_and_from_the_sum(self, plain, fused, merged):
        assert difference(fused, plain) > 20
        assert difference(fused, merged) > 20

    def test_the_same_job_gives_the_same_pixels(self, case, fused):
        assert difference(case.pixels(f"a cat {case.tag}"), fused) == 0

    def test_direct_equals_the_webuis_own_merge(self, case, merged):
        needs_exact_merge(case)
        assert difference(case.pixels(f"a cat {case.tag_with('method=direct')}"), merged) <= ROUNDING

    def test_direct_with_other_weights_equals_the_merge(self, case):
        needs_exact_merge(case)
        direct = case.pixels(f"a cat {case.tag_with('0.6', '0.35', 'method=direct')}")
        assert difference(direct, case.pixels(f"a cat <lora:{case.subject}:0.6><lora:{case.style}:0.35>")) <= ROUNDING

    def test_a_style_without_weight_leaves_the_subject_merged_alone(self, case):
        needs_exact_merge(case)
        assert (
            difference(case.pixels(f"a cat {case.tag_with('1', '0', 'contrast=0')}"), case.pixels(f"a cat <lora:{case.subject}:1>"))
            <= ROUNDING
        )

    def test_a_lora_tag_beside_ours_does_not_merge_the_pair(self, case, fused):
        beside = case.image(f"a cat <lora:{case.subject}:0.7>{case.tag}<lora:{case.style}:1>")
        assert difference(beside.pixels, fused) == 0
        assert "was left out" in beside.info["extra_generation_params"]["DynFuse note"]
        assert "was left out" in beside.infotext

    def test_another_lora_is_part_of_the_base(self, case, fused):
        if case.other is None:
            pytest.skip("no third LoRA for this model")
        needs_exact_merge(case)
        other = f"<lora:{case.other}:0.5>"
        assert difference(case.pixels(f"a cat {case.tag}{other}"), fused) > 5
        direct = case.pixels(f"a cat {case.tag_with('method=direct')}{other}")
        assert difference(direct, case.pixels(f"a cat {case.two_tags}{other}")) <= ROUNDING

    def test_a_batch_of_four_is_four_single_images(self, case):
        batch = case.pixels(f"a cat {case.tag}", batch_size=4, seed=20)
        singles = [case.pixels(f"a cat {case.tag}", seed=20 + i)[0] for i in range(4)]
        assert [difference(one, single) for one, single in zip(batch, singles)] <= [ROUNDING] * 4

    def test_three_batches_are_three_single_images(self, case):
        tag = case.tag_with("balance=gamma")
        batches = case.pixels(f"a cat {tag}", n_iter=3, seed=20)
        singles = [case.pixels(f"a cat {tag}", seed=20 + i)[0] for i in range(3)]
        assert [difference(one, single) for one, single in zip(batches, singles)] == [0, 0, 0]

    @pytest.mark.parametrize("prompt", ["a cat AND a dog", " ".join(["a cat on a mat"] * 20)], ids=["and", "long"])
    def test_other_cuts_of_the_batch(self, case, prompt):
        needs_exact_merge(case)
        two = case.pixels(f"{prompt} {case.two_tags}", batch_size=2)
        assert difference(case.pixels(f"{prompt} {case.tag_with('method=direct')}", batch_size=2), two) <= ROUNDING
        batch = case.pixels(f"{prompt} {case.tag}", batch_size=2)
        singles = [case.pixels(f"{prompt} {case.tag}", seed=1 + i)[0] for i in range(2)]
        assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING

    def test_without_guidance(self, case):
        needs_exact_merge(case)
        two = case.pixels(f"a cat {case.two_tags}", cfg_scale=1)
        assert difference(case.pixels(f"a cat {case.tag_with('method=direct')}", cfg_scale=1), two) <= ROUNDING
        assert difference(case.pixels(f"a cat {case.tag}", cfg_scale=1), two) > 5

    @pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "UniPC", "Heun", "DPM++ 2M", "DPM++ SDE", "Euler a"])
    def test_samplers(self, case, sampler):
        if sampler not in {known["name"] for known in case.webui.call("/sdapi/v1/samplers")}:
            pytest.skip(f"this WebUI has no {sampler}")
        if case.flow and sampler in ("DDIM", "PLMS", "UniPC"):
            pytest.skip("not a sampler for flow models")
        needs_exact_merge(case)
        settings = {"sampler_name": sampler, "steps": 5}
        # At full weight these random LoRAs are so loud that DDIM blows the order of two sums up to 8 of 255, in the WebUI's own merge.
        two = case.pixels(f"a cat <lora:{case.subject}:0.4><lora:{case.style}:0.4>", **settings)
        assert difference(case.pixels(f"a cat {case.tag_with('0.4', '0.4', 'method=direct')}", **settings), two) <= ROUNDING
        assert difference(case.pixels(f"a cat {case.tag_with('0.4', '0.4')}", **settings), two) > ROUNDING

    @pytest.mark.parametrize(
        "setting", ["criterion=js", "criterion=cosine", "granularity=row", "scope=attention", "temperature=rms", "balance=gamma"]
    )
    def test_settings_reach_the_fusion(self, case, plain, setting):
        image = case.pixels(f"a cat {case.tag_with(setting)}")
        assert difference(image, plain) > 20

    def test_img2img(self, case, plain):
        needs_exact_merge(case)
        settings = {"init_images": [encoded(plain[0])], "denoising_strength": 0.8, "steps": 5}
        two = case.pixels(f"a cat {case.two_tags}", **settings)
        assert difference(case.pixels(f"a cat {case.tag_with('method=direct')}", **settings), two) <= ROUNDING
        assert difference(case.pixels(f"a cat {case.tag}", **settings), two) > 5

    def test_hires_has_its_own_tags(self, case):
        needs_exact_merge(case)
        settings = HIRES | case.hires
        two, direct = case.two_tags, case.tag_with("method=direct")
        both = case.pixels(f"a cat {two}", hr_prompt=f"a cat {two}", **settings)
        for first, second in ((direct, direct), (direct, two), (two, direct)):
            mixed = case.pixels(f"a cat {first}", hr_prompt=f"a cat {second}", **settings)
            assert difference(mixed, both) <= ROUNDING
        second_plain = case.pixels(f"a cat {case.tag}", hr_prompt="a cat", **settings)
        second_fused = case.pixels(f"a cat {case.tag}", **settings)
        assert difference(second_plain, second_fused) > ROUNDING


class TestRefusals:
    @pytest.mark.parametrize(
        ("items", "words"),
        [
            (("no such thing", "{style}"), ["no LoRA named 'no such thing'"]),
            (("{subject}x", "{style}"), ["no LoRA named '{subject}x'", "did you mean {subject}"]),
            (("{subject}", "{subject}"), ["the same LoRA"]),
            (("{subject}",), ["no style LoRA"]),
            (("{subject}", "{style}", "loud"), ["subject_weight must be a number"]),
            (("{subject}", "{style}", "criterion=mse"), ["criterion must be one of"]),
            (("{subject}", "{style}", "colour=red"), ["unknown setting 'colour'"]),
            (("{subject}", "{style}", "bias=-1"), ["bias must be at least 0"]),
        ],
    )
    def test_a_mistake_in_the_tag(self, case, plain, items, words):
        def named(text):
            return text.replace("{subject}", case.subject).replace("{style}", case.style)

        refusal = case.refusal(f"a cat <dynfuse:{':'.join(map(named, items))}>")
        assert all(named(word) in refusal for word in words), refusal
        assert difference(case.pixels("a cat"), plain) == 0

    def test_two_tags(self, case):
        assert "more than one" in case.refusal(f"a cat {case.tag}{case.tag}")

    def test_loras_of_another_model(self, case):
        if case.foreign is None:
            pytest.skip("no LoRA of another model")
        assert case.foreign in case.refusal(f"a cat <dynfuse:{case.subject}:{case.foreign}>")

    def test_mistakes_of_an_api_client(self, case, plain):
        assert "colour" in case.refusal("a cat", **panel(case, colour="red"))
        assert "subject_weight must be a number" in case.refusal("a cat", **panel(case, subject_weight="loud"))
        assert "no such thing" in case.refusal("a cat", **panel(case, style="no such thing"))
        assert difference(case.pixels("a cat"), plain) == 0


class TestPanel:
    def test_the_apis_arguments_do_what_the_tag_does(self, case, fused):
        assert difference(case.pixels("a cat", **panel(case)), fused) == 0
        tagged = case.pixels(f"a cat {case.tag_with('0.8', '0.7', 'criterion=js')}")
        assert difference(case.pixels("a cat", **panel(case, subject_weight=0.8, style_weight=0.7, criterion="js")), tagged) == 0

    def test_a_tag_goes_before_the_panel(self, case, fused):
        assert difference(case.pixels(f"a cat {case.tag}", **panel(case, method="direct")), fused) == 0

    def test_the_panel_is_in_the_hires_pass_too(self, case):
        settings = HIRES | case.hires
        tagged = case.pixels(f"a cat {case.tag}", **settings)
        assert difference(case.pixels("a cat", **settings, **panel(case)), tagged) == 0


@pytest.fixture(scope="module")
def untouched(case, plain):
    """The plain image, and the number of hooks that the WebUI itself has on the model (with --lowvram it has some)."""
    return plain, hooks_of(case)


def hooks_of(case):
    state = state_of(case)
    return state and (state["own_forwards"], state["hooks"])


class TestNoTrace:
    def after(self, case, untouched):
        image, hooks = untouched
        assert difference(case.pixels("a cat"), image) == 0
        assert hooks_of(case) == hooks

    def test_the_plain_image_is_that_of_a_webui_without_the_extension(self, case):
        if case.pristine is None:
            pytest.skip("no address of a second WebUI, without the extension")
        case.image(f"a cat {case.tag}")
        elsewhere = replace(case, webui=case.pristine)
        elsewhere.load()
        for prompt in ("a cat", f"a cat {case.two_tags}"):
            assert difference(case.pixels(prompt), elsewhere.pixels(prompt)) == 0

    def test_after_a_fused_job(self, case, untouched):
        case.image(f"a cat {case.tag}")
        self.after(case, untouched)

    @pytest.mark.parametrize("stop", [WebUI.interrupt, WebUI.skip], ids=["interrupt", "skip"])
    def test_after_the_buttons(self, case, untouched, stop):
        case.stopped_at(3, lambda: stop(case.webui), f"a cat {case.tag}", steps=40)
        self.after(case, untouched)

    @pytest.mark.parametrize("step", range(4))
    @pytest.mark.parametrize("button", ["interrupt", "skip"])
    def test_after_a_stop_at_each_step(self, case, untouched, button, step):
        case.image(f"a cat {case.tag}", steps=4, **fault(case, f"{button}:{step}"))
        self.after(case, untouched)

    @pytest.mark.parametrize("place", ["layer:0", "layer:0.3", "layer:0.6", "layer:1", "denoiser"])
    def test_after_an_exception_inside_the_model(self, case, untouched, place):
        assert "failed as wanted" in case.refusal(f"a cat {case.tag}", **fault(case, place))
        self.after(case, untouched)

    @pytest.mark.parametrize("hook", HOOKS)
    def test_after_an_exception_in_each_script_hook(self, case, untouched, hook):
        attempt(case, f"a cat {case.tag}", **fault(case, f"hook:{hook}"))
        self.after(case, untouched)

    @pytest.mark.parametrize("hook", ["cfg_denoiser", "cfg_denoised", "cfg_after_cfg"])
    def test_after_an_exception_in_each_callback(self, case, untouched, hook):
        attempt(case, f"a cat {case.tag}", **fault(case, f"callback:{hook}"))
        self.after(case, untouched)

    def test_between_jobs_with_loras_of_the_webui(self, case, untouched, merged):
        attempt(case, f"a cat {case.tag}", **fault(case, "layer:0.5"))
        assert difference(case.pixels(f"a cat {case.two_tags}"), merged) == 0
        self.after(case, untouched)

    def test_after_a_model_switch(self, case, untouched):
        case.image(f"a cat {case.tag}")
        elsewhere = next((other for other in case.neighbours if other.options != case.options), None)
        if elsewhere is None:
            pytest.skip("only one model")
        elsewhere.load()
        before = elsewhere.pixels("a cat")
        elsewhere.image(f"a cat {elsewhere.tag}")
        assert difference(elsewhere.pixels("a cat"), before) == 0
        case.load()
        self.after(case, untouched)

    def test_after_many_jobs(self, case, untouched):
        """A hundred jobs (ten on the other models), half of them fused, leave the hooks, the attributes and the memory as they were."""
        fault(case, "")
        small = {"steps": 1}
        pairs = 50 if case is case.neighbours[0] else 5
        for _ in range(13):  # the panel keeps what is shown of the last twelve
            case.image(f"a cat {case.tag}", **small)
            case.image("a cat", **small)
        before = state_of(case)
        for _ in range(pairs):
            case.image(f"a cat {case.tag}", **small)
            case.image("a cat", **small)
        after = state_of(case)
        for number in ("own_forwards", "hooks", "attributes"):
            assert after[number] == before[number]
        assert after["tensors"] <= before["tensors"] + 10
        assert after["resident"] <= before["resident"] * 1.05 + 50e6, (before, after)
        self.after(case, untouched)


class TestReloadUI:
    def test_it_leaves_one_wrapper_and_the_same_images(self, case, plain, fused):
        fault(case, "")
        for _ in range(2):
            case.webui.restart_ui()
            assert set(state_of(case)["wrappers"].values()) == {1}
        assert difference(case.pixels(f"a cat {case.tag}"), fused) == 0
        assert difference(case.pixels("a cat"), plain) == 0

    def test_the_settings_are_known_after_it(self, case):
        fault(case, "")
        case.webui.restart_ui()
        case.webui.options(dynfuse_without_encoders="stop")


class TestRefiner:
    def test_a_refiner_from_the_first_step_is_fused_as_if_it_were_the_model(self, case):
        """Not compared with the WebUI's merge: A1111 itself merges LoRAs differently into a refiner and into a model."""
        settings = with_refiner(case, case.refiner, switch_at=0.0)
        switched = case.image(f"a cat {case.tag}", **settings)
        case.webui.options(**case.options | {"sd_model_checkpoint": case.refiner})
        alone = case.pixels(f"a cat {case.tag}", steps=6)
        case.load()
        assert difference(switched.pixels, alone) <= ROUNDING
        assert "not fused" not in switched.infotext

    def test_the_steps_before_it_are_fused_on_the_model(self, case):
        fused = case.image(f"a cat {case.tag}", **with_refiner(case, case.refiner))
        case.load()
        assert difference(fused.pixels, case.pixels(f"a cat {case.tag}", steps=6)) > ROUNDING
        assert "not fused" not in fused.infotext

    def test_the_model_is_as_before_when_it_returns(self, case, plain):
        case.image(f"a cat {case.tag}", **with_refiner(case, case.refiner))
        case.load()
        assert difference(case.pixels("a cat"), plain) == 0


def with_refiner(case, checkpoint, switch_at=0.5):
    if checkpoint is None or not any(checkpoint in model["title"] for model in case.webui.call("/sdapi/v1/sd-models")):
        pytest.skip("no checkpoint to serve as a refiner")
    return {"refiner_checkpoint": checkpoint, "refiner_switch_at": switch_at, "steps": 6}


def fault(case, where):
    if "dynfuse faults" not in case.webui.script_names():
        pytest.skip("the WebUI has no extension tests/hosts/webui/faults")
    return {"alwayson_scripts": {"dynfuse faults": {"args": [where]}}}


def attempt(case, prompt, **settings):
    """A job that the WebUI may refuse, or go on with as if nothing had happened: its own business."""
    try:
        case.image(prompt, **settings)
    except Refused as refused:
        if "failed as wanted" not in str(refused):
            raise


def state_of(case):
    if "dynfuse faults" not in case.webui.script_names():
        return None
    return case.webui.call("/dynfuse-faults/state")
