"""What the panel says of the chosen LoRAs."""

from __future__ import annotations

import gradio as gr
import pytest

from lib_dynfuse.webui import panel
from lib_dynfuse.webui.inspector import chosen_html

from ..lora.writing import kohya, pair, saved
from .test_panel import wired as events_of

K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
LAYER = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def folder(host):
    saved(host.lora_folder, kohya(K, *pair(640, 768)), "dog.safetensors")
    saved(host.lora_folder, kohya(K, *pair(640, 768, 8, seed=5)), "watercolor.safetensors")
    saved(host.lora_folder, kohya(K, *pair(640, 2048)), "xl.safetensors")
    host.loras["xl"] = "cc33"
    return host.lora_folder


@pytest.mark.usefixtures("folder")
class TestChosen:
    def test_nothing_is_said_of_nothing(self, host):
        assert chosen_html(host, "txt2img", [], None) == ""

    def test_a_pair_is_told_with_base_ranks_and_what_both_change(self, host):
        said = chosen_html(host, "txt2img", ["dog"], ["watercolor"])
        assert "<b>dog</b> · SD 1.x · rank 2" in said
        assert "<b>watercolor</b> · SD 1.x · rank 8" in said
        assert "go together on SD 1.x: both change 1 layer and no others." in said
        assert "dynfuse-warning" not in said

    def test_a_lora_for_another_base_model_is_a_warning(self, host):
        said = chosen_html(host, "txt2img", ["dog"], ["xl"])
        assert said.count("dynfuse-warning") == 1
        assert "SDXL" in said

    @pytest.mark.parametrize(("shape", "fits"), [((640, 768), True), ((640, 1024), False), (None, True)])
    def test_a_checkpoint_that_they_do_not_fit_is_a_warning(self, host, shape, fits):
        host.layers = {LAYER: shape}
        said = chosen_html(host, "txt2img", ["dog"], ["watercolor"])
        assert said.count("does not fit the checkpoint that is loaded: it was made for SD 1.x") == (0 if fits else 2)
        assert ("go together" in said) == fits

    def test_a_checkpoint_without_their_layers_is_a_warning(self, host):
        host.layers = {"double_blocks.0.img_attn.qkv": (9216, 3072)}
        assert "does not fit" in chosen_html(host, "txt2img", ["dog"], [])

    def test_trigger_words_are_shown_and_can_be_put_into_the_prompt(self, host):
        host.words = 'sks dog, "red" <b>'
        said = chosen_html(host, "img2img", ["dog"], [])
        assert 'data-tab="img2img" data-words="sks dog, &quot;red&quot; &lt;b&gt;"' in said
        assert "<b>" not in said.replace("<b>dog</b>", "")

    def test_what_is_not_there_or_damaged_is_a_sentence(self, host, folder):
        assert "There is no LoRA named &#x27;fox&#x27; here." in chosen_html(host, "txt2img", ["fox"], [])
        (folder / "dog.safetensors").write_bytes(b"no tensors")
        said = chosen_html(host, "txt2img", ["dog"], ["watercolor"])
        assert "dynfuse-warning" in said
        assert "dog.safetensors" in said
        (folder / "dog.safetensors").unlink()
        assert "dynfuse-warning" in chosen_html(host, "txt2img", ["dog"], ["watercolor"])


@pytest.mark.usefixtures("folder")
def test_choosing_on_either_side_tells_of_both(webui, host):
    with gr.Blocks() as demo:
        made = panel.build("txt2img", host)
    sides = [made.fields[side]._id for side in ("subject", "style")]
    (place,) = (block._id for block in demo.blocks.values() if block.elem_id == "dynfuse_txt2img_chosen")
    wired = [event for event in demo.get_config_file()["dependencies"] if event["outputs"] == [place]]
    assert [event["inputs"] for event in wired] == [sides, sides]
    (function,) = {function.func for function, _, outputs in events_of(demo) if outputs == ["dynfuse_txt2img_chosen"]}
    assert function is chosen_html
