"""Which image, and which kind, each row of a model call is: as the WebUIs order them."""

from __future__ import annotations

import torch

from lib_dynfuse.hosts.webui.a1111 import CondFirst
from lib_dynfuse.hosts.webui.forge import rows_of_call


def calls(layout, *sizes):
    """(image and kind of every row) of each call: "0c" image 0, conditional; "1u" image 1, unconditional."""
    return [text(layout(torch.zeros(size, 4, 1, 1), {})) for size in sizes]


def text(rows):
    return " ".join(f"{image}{'c' if conditional else 'u'}" for image, conditional in zip(rows.images, rows.conditional))


class TestA1111:
    """sd_samplers_cfg_denoiser.py: conditional rows first."""

    def test_one_call(self):
        assert calls(CondFirst([1]), 2) == ["0c 0u"]
        assert calls(CondFirst([1, 1]), 4) == ["0c 1c 0u 1u"]

    def test_and_prompts(self):
        assert calls(CondFirst([2]), 3) == ["0c 0c 0u"]
        assert calls(CondFirst([2, 1]), 5) == ["0c 0c 1c 0u 1u"]

    def test_calls_of_one_batch_each(self):
        assert calls(CondFirst([1, 1]), 2, 2) == ["0c 1c", "0u 1u"]
        assert calls(CondFirst([2, 1]), 2, 2, 1) == ["0c 0c", "1c 0u", "1u"]

    def test_a_long_prompt_runs_apart_from_the_negative_one(self):
        assert calls(CondFirst([1, 1]), 2, 2) == ["0c 1c", "0u 1u"]

    def test_skipped_negative_prompt(self):
        assert calls(CondFirst([1, 2]), 3) == ["0c 1c 1c"]

    def test_tiles_repeat_the_whole_batch(self):
        assert calls(CondFirst([1]), 4, 2) == ["0c 0u 0c 0u", "0c 0u"]
        assert calls(CondFirst([2, 1]), 5, 5) == ["0c 0c 1c 0u 1u"] * 2

    def test_edit_models_have_two_unconditional_rows_per_image(self):
        assert calls(CondFirst([1, 1]), 6) == ["0c 1c 0u 1u 0u 1u"]


class TestForge:
    """sampling_function.py: stretches of one row per image, their kinds in cond_or_uncond (0 conditional)."""

    def test_one_call(self):
        assert text(rows_of_call(2, 1, {"cond_or_uncond": [1, 0]})) == "0u 0c"
        assert text(rows_of_call(4, 2, {"cond_or_uncond": [1, 0]})) == "0u 1u 0c 1c"

    def test_and_prompts(self):
        assert text(rows_of_call(6, 2, {"cond_or_uncond": [1, 0, 0]})) == "0u 1u 0c 1c 0c 1c"

    def test_without_negative_prompt(self):
        assert text(rows_of_call(2, 2, {"cond_or_uncond": [0]})) == "0c 1c"

    def test_split_batches(self):
        assert text(rows_of_call(2, 2, {"cond_or_uncond": [1]})) == "0u 1u"

    def test_tiles_repeat_the_whole_batch(self):
        assert text(rows_of_call(8, 2, {"cond_or_uncond": [1, 0]})) == "0u 1u 0c 1c 0u 1u 0c 1c"

    def test_rows_that_an_extension_cut_in_its_own_way_all_count_as_conditional(self):
        assert text(rows_of_call(6, 2, {"cond_or_uncond": [1, 0]})) == "0c 1c 0c 1c 0c 1c"
        assert text(rows_of_call(3, 2, {})) == "0c 1c 0c"
