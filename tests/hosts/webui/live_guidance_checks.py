"""The checks of the guidance on a running WebUI that A1111 and Forge share. Imported as live_checks is.

The encoders are small ones with random weights, written to a folder of this machine: the WebUI must run on it.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.fakes.encoders import write_clip, write_dino

from .live import WebUI, difference, encoded
from .live_checks import HIRES, ROUNDING, attempt, fault, panel, state_of

GRADIENTS = ("fast", "exact")
WEIGHTS = np.full(3, 1 / 3)

# A correction of a twentieth of the picture's own strength in each of a few steps.
SMALLEST_EFFECT = 2


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """The options that name small encoders. The WebUIs do not hand out the options of extensions, so what they were cannot be kept."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "dynfuse_clip_model": str(write_clip(folder / "clip")),
        "dynfuse_dino_model": str(write_dino(folder / "dino")),
        "dynfuse_encoders_folder": "",
        "dynfuse_download_encoders": False,
        "dynfuse_without_encoders": "stop",
    }


@pytest.fixture(scope="module")
def guided(case, encoders):
    """The case, on a WebUI whose user has local encoders."""
    fault(case, "")
    case.webui.options(**encoders)
    case.webui.call("/dynfuse-faults/clear-references", {})
    yield case
    case.webui.options(dynfuse_clip_model="", dynfuse_dino_model="", dynfuse_download_encoders=True)


def tag(case, **settings):
    """m: so large that the limit decides, because small random encoders hardly have an opinion."""
    return case.tag_with("guidance=true", *(f"{name}={value}" for name, value in {"m": 300, **settings}.items()))


def told(case):
    """What the WebUI tells of the last job: its passes, and how many references are kept."""
    return case.webui.call("/dynfuse-faults/guidance")


def score(record):
    """R of the guided steps, mean over the images (Eq. 19); what each step saw before its correction."""
    return 1 - np.einsum("skb,k->s", np.array(record["similarities"]), WEIGHTS) / np.array(record["similarities"]).shape[2]


def picture_of(reference):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reference["picture"])))).astype(int)


class TestGuidance:
    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_a_guided_picture_differs_and_repeats_to_the_pixel(self, guided, fused, gradient):
        first = guided.image(f"a cat {tag(guided, gradient=gradient)}")
        assert difference(first.pixels, fused) >= SMALLEST_EFFECT
        assert difference(guided.pixels(f"a cat {tag(guided, gradient=gradient)}"), first.pixels) == 0
        (done,) = told(guided)["passes"]
        assert done["steps"] == [0, 1, 2]
        assert np.isfinite(done["similarities"]).all()
        assert not [note for note in done["notes"] if "given up" in note or "not guided" in note]

    def test_the_two_gradients_are_not_the_same(self, guided):
        fast, exact = (guided.pixels(f"a cat {tag(guided, gradient=gradient)}") for gradient in GRADIENTS)
        assert difference(fast, exact) > 0

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_the_score_falls_with_the_strength(self, guided, gradient):
        settings = {"steps": 8, "seed": 5}
        last = []
        for m in (1e-6, 3, 30):
            guided.image(f"a cat {tag(guided, gradient=gradient, m=m, limit=0.1)}", **settings)
            last.append(score(told(guided)["passes"][0])[-1])
        # A random denoiser is no smooth map: what the exact rule does to it at the noisiest step is only outweighed by a strong pull.
        assert gradient == "exact" or last[0] > last[1]
        assert last[0] > last[2]

    def test_without_strength_it_is_the_unguided_picture_to_the_pixel(self, guided, fused):
        assert difference(guided.pixels(f"a cat {tag(guided, m=0)}"), fused) == 0
        assert difference(guided.pixels(f"a cat {tag(guided, start=1, end=1)}", steps=3), fused) == 0

    def test_only_the_steps_that_were_asked_for(self, guided):
        guided.image(f"a cat {tag(guided, every=2, start=0.2, end=0.9)}", steps=10)
        assert told(guided)["passes"][0]["steps"] == [2, 4, 6, 8]

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_a_batch_of_two_is_two_single_pictures(self, guided, gradient):
        prompt = f"a cat {tag(guided, gradient=gradient, reference_seed=3)}"
        batch = guided.pixels(prompt, batch_size=2, seed=20)
        singles = [guided.pixels(prompt, seed=20 + i)[0] for i in range(2)]
        assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING

    def test_two_batches_are_two_single_pictures(self, guided):
        prompt = f"a cat {tag(guided, reference_seed=3)}"
        batches = guided.pixels(prompt, n_iter=2, seed=20)
        singles = [guided.pixels(prompt, seed=20 + i)[0] for i in range(2)]
        assert [difference(one, single) for one, single in zip(batches, singles)] == [0, 0]

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_without_guidance_by_the_prompt(self, guided, gradient):
        plain = guided.pixels(f"a cat {guided.tag}", cfg_scale=1)
        assert difference(guided.pixels(f"a cat {tag(guided, gradient=gradient)}", cfg_scale=1), plain) >= SMALLEST_EFFECT

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_prompts_in_parts_and_long_ones(self, guided, gradient):
        for prompt in ("a cat AND a dog", " ".join(["a cat on a mat"] * 20)):
            batch = guided.pixels(f"{prompt} {tag(guided, gradient=gradient, reference_seed=3)}", batch_size=2)
            singles = [guided.pixels(f"{prompt} {tag(guided, gradient=gradient, reference_seed=3)}", seed=1 + i)[0] for i in range(2)]
            assert max(difference(one, single) for one, single in zip(batch, singles)) <= ROUNDING

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize(
        "sampler",
        [
            *("Euler a", "Heun", "DPM2 a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM fast", "LCM", "Restart", "DDPM"),
            *("DDIM", "DDIM CFG++", "PLMS", "UniPC"),
        ],
    )
    def test_samplers(self, guided, sampler, gradient):
        if sampler not in {known["name"] for known in guided.webui.call("/sdapi/v1/samplers")}:
            pytest.skip(f"this WebUI has no {sampler}")
        if guided.flow and sampler in ("DDIM", "PLMS", "UniPC", "DDIM CFG++", "DDPM"):
            pytest.skip("not a sampler for flow models")
        settings = {"sampler_name": sampler, "steps": 5}
        plain = guided.pixels(f"a cat {guided.tag}", **settings)
        assert plain.std() > 5
        moved = guided.pixels(f"a cat {tag(guided, gradient=gradient)}", **settings)
        assert difference(moved, plain) >= SMALLEST_EFFECT
        assert moved.std() > plain.std() / 2
        (done,) = told(guided)["passes"]
        # DPM fast has levels of its own, several of them in one step of the schedule.
        assert len(done["steps"]) >= (2 if sampler == "DPM fast" else 4)
        assert not [note for note in done["notes"] if "given up" in note or "not guided" in note]

    @pytest.mark.parametrize("decoder", ["vae", "taesd"])
    def test_decoders(self, guided, fused, decoder):
        moved = guided.image(f"a cat {tag(guided, decoder=decoder)}")
        assert difference(moved.pixels, fused) >= SMALLEST_EFFECT
        notes = " ".join(told(guided)["passes"][0]["notes"])
        assert decoder != "vae" or decoder not in notes

    def test_a_small_decode_of_a_larger_picture(self, guided):
        size = {"width": 384, "height": 320, "steps": 2}
        plain = guided.pixels(f"a cat {guided.tag}", **size)
        assert difference(guided.pixels(f"a cat {tag(guided)}", **size), plain) >= SMALLEST_EFFECT

    def test_beside_another_lora(self, guided):
        if guided.other is None:
            pytest.skip("no third LoRA for this model")
        other = f"<lora:{guided.other}:0.5>"
        plain = guided.pixels(f"a cat {guided.tag}{other}")
        moved = guided.pixels(f"a cat {tag(guided)}{other}")
        assert difference(moved, plain) >= SMALLEST_EFFECT
        subject, _ = told(guided)["passes"][0]["references"]
        alone = guided.pixels(f"a cat {guided.tag_with('1', '0', 'method=direct')}{other}")
        assert difference(picture_of(subject), alone[0]) == 0


class TestReferences:
    def test_each_is_the_picture_of_one_lora_alone(self, guided):
        guided.image(f"a cat {tag(guided, style_prompt='a field')}")
        subject, style = told(guided)["passes"][0]["references"]
        assert (subject["side"], subject["prompt"], style["prompt"]) == ("subject", "a cat", "a field")
        alone = guided.pixels(f"a cat {guided.tag_with('1', '0', 'method=direct')}")
        assert difference(picture_of(subject), alone[0]) == 0
        alone = guided.pixels(f"a field {guided.tag_with('0', '1', 'method=direct')}")
        assert difference(picture_of(style), alone[0]) == 0

    def test_the_next_job_finds_them(self, guided):
        guided.image(f"a cat {tag(guided)}", seed=77)
        kept = told(guided)["kept"]
        guided.image(f"a cat {tag(guided, m=3, gradient='exact')}", seed=77)
        assert told(guided)["kept"] == kept
        guided.image(f"a cat {tag(guided)}", seed=78)
        assert told(guided)["kept"] == kept + 2

    def test_found_or_made_the_picture_is_the_same(self, guided):
        guided.webui.call("/dynfuse-faults/clear-references", {})
        assert told(guided)["kept"] == 0
        made = guided.pixels(f"a cat {tag(guided)}", sampler_name="Euler a")
        assert difference(guided.pixels(f"a cat {tag(guided)}", sampler_name="Euler a"), made) == 0

    def test_a_given_picture_in_base64(self, guided, plain, fused):
        picture = encoded(255 - plain[0])
        moved = guided.pixels("a cat", **panel(guided, guidance=True, subject_image=picture, style_image=picture))
        assert difference(moved, fused) >= SMALLEST_EFFECT
        references = told(guided)["passes"][0]["references"]
        assert [reference["given"] for reference in references] == [True, True]
        assert difference(picture_of(references[0]), 255 - plain[0]) == 0
        assert "picture" in guided.refusal("a cat", **panel(guided, guidance=True, subject_image="/etc/hostname"))

    def test_the_apis_arguments_do_what_the_tag_does(self, guided):
        tagged = guided.pixels(f"a cat {tag(guided, m=5, gradient='exact')}")
        assert difference(guided.pixels("a cat", **panel(guided, guidance=True, m=5, gradient="exact")), tagged) == 0


class TestGuidedPasses:
    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_hires(self, guided, gradient):
        settings = HIRES | guided.hires
        plain = guided.pixels(f"a cat {guided.tag}", **settings)
        moved = guided.pixels(f"a cat {tag(guided, gradient=gradient)}", **settings)
        assert difference(moved, plain) >= SMALLEST_EFFECT
        first, second = told(guided)["passes"]
        assert [first["hires"], second["hires"]] == [False, True]
        assert [len(first["steps"]), len(second["steps"])] == [3, 3]
        assert first["references"] == second["references"]

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
    def test_img2img_and_inpainting(self, guided, plain, sampler, gradient):
        if guided.flow and sampler == "DDIM":
            pytest.skip("not a sampler for flow models")
        settings = {"init_images": [encoded(plain[0])], "denoising_strength": 0.8, "steps": 5, "sampler_name": sampler}
        unguided = guided.pixels(f"a cat {guided.tag}", **settings)
        assert difference(guided.pixels(f"a cat {tag(guided, gradient=gradient)}", **settings), unguided) >= SMALLEST_EFFECT
        assert told(guided)["passes"][0]["steps"][0] == 0
        side = plain.shape[1]
        mask = np.zeros((side, side, 3))
        mask[:, : side // 2] = 255
        settings |= {"mask": encoded(mask), "inpainting_fill": 1, "mask_blur": 0, "inpaint_full_res": False}
        unguided = guided.pixels(f"a cat {guided.tag}", **settings)
        moved = guided.pixels(f"a cat {tag(guided, gradient=gradient)}", **settings)
        assert difference(moved[:, :, : side // 2], unguided[:, :, : side // 2]) >= SMALLEST_EFFECT
        assert difference(moved[:, :, side // 2 + 8 :], unguided[:, :, side // 2 + 8 :]) <= ROUNDING


class TestMissingEncoders:
    @pytest.fixture
    def without(self, guided, encoders):
        guided.webui.options(dynfuse_clip_model="ViT-B-32/openai", dynfuse_encoders_folder="/nowhere")
        yield guided
        guided.webui.options(**encoders)

    def test_the_job_stops_with_one_sentence(self, without, plain):
        refusal = without.refusal(f"a cat {tag(without)}")
        assert "ViT-B-32" in refusal
        assert "/nowhere" in refusal
        assert difference(without.pixels("a cat"), plain) == 0

    def test_or_goes_on_unguided_and_says_so(self, without, fused):
        without.webui.options(dynfuse_without_encoders="go on")
        image = without.image(f"a cat {tag(without)}")
        assert difference(image.pixels, fused) == 0
        assert "not guided" in image.infotext


class TestNoTraceOfGuidance:
    @pytest.fixture(scope="class")
    def untouched(self, guided, plain):
        state = state_of(guided)
        return plain, (state["own_forwards"], state["hooks"])

    def after(self, case, untouched):
        image, hooks = untouched
        assert difference(case.pixels("a cat"), image) == 0
        state = state_of(case)
        assert (state["own_forwards"], state["hooks"]) == hooks

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_after_a_guided_job(self, guided, untouched, gradient):
        guided.image(f"a cat {tag(guided, gradient=gradient)}")
        self.after(guided, untouched)

    @pytest.mark.parametrize("button", ["interrupt", "skip"])
    def test_after_a_stop_while_references_are_made(self, guided, untouched, button):
        guided.webui.call("/dynfuse-faults/clear-references", {})
        guided.image(f"a cat {tag(guided)}", **fault(guided, f"{button}:1"))
        assert told(guided)["kept"] == 0
        self.after(guided, untouched)
        guided.image(f"a cat {tag(guided)}")
        assert told(guided)["kept"] == 2

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("button", ["interrupt", "skip"])
    def test_after_a_stop_at_a_guided_step(self, guided, untouched, button, gradient):
        guided.image(f"a cat {tag(guided)}", steps=4)
        for step in range(4):
            guided.image(f"a cat {tag(guided, gradient=gradient)}", steps=4, **fault(guided, f"{button}:{step}"))
            self.after(guided, untouched)

    def test_after_the_buttons(self, guided, untouched):
        guided.stopped_at(3, lambda: WebUI.interrupt(guided.webui), f"a cat {tag(guided)}", steps=30)
        self.after(guided, untouched)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("place", ["layer:0", "layer:0.5", "layer:1", "denoiser"])
    def test_after_an_exception_inside_the_model(self, guided, untouched, place, gradient):
        guided.image(f"a cat {tag(guided)}")
        assert "failed as wanted" in guided.refusal(f"a cat {tag(guided, gradient=gradient)}", **fault(guided, place))
        self.after(guided, untouched)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("hook", ["cfg_denoiser", "cfg_after_cfg"])
    def test_after_an_exception_in_each_callback(self, guided, untouched, hook, gradient):
        attempt(guided, f"a cat {tag(guided, gradient=gradient)}", **fault(guided, f"callback:{hook}"))
        self.after(guided, untouched)

    def test_after_many_jobs(self, guided, untouched):
        """Guided jobs leave the hooks, the attributes and the memory as they were."""
        prompts = [f"a cat {tag(guided, gradient=gradient, decoder='vae')}" for gradient in GRADIENTS]
        small = {"steps": 2}
        for prompt in prompts * 2:
            guided.image(prompt, **small)
        before = state_of(guided)
        for prompt in prompts * 5:
            guided.image(prompt, **small)
        after = state_of(guided)
        for number in ("own_forwards", "hooks", "attributes"):
            assert after[number] == before[number]
        assert after["tensors"] <= before["tensors"] + 10
        assert after["resident"] <= before["resident"] * 1.02 + 30e6, (before, after)
        self.after(guided, untouched)
