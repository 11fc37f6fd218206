"""Which options of a WebUI stand for themselves in what is kept: all but those that no picture can depend on."""

import types

import pytest

from lib_dynfuse.hosts.webui.picture_options import digest_of_options, picture_options
from tests.fakes.webui import Options


@pytest.fixture
def opts():
    return Options()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("skip_early_cond", 0.2), ("uni_pc_variant", "bh2"), ("uni_pc_order", 2), ("sigma_min", 0.1), ("sigma_max", 10.0)],
        *[("rho", 5.0), ("eta_noise_seed_delta", 31337), ("always_discard_next_to_last_sigma", True)],
        *[("sgm_noise_multiplier", True), ("s_min_uncond", 1.0), ("s_min_uncond_all", True), ("token_merging_ratio", 0.5)],
        *[("pad_cond_uncond", True), ("emphasis", "No norm"), ("randn_source", "CPU"), ("CLIP_stop_at_last_layers", 2)],
        *[("sdxl_crop_top", 8), ("sd_vae_decode_method", "TAESD"), ("sd_hypernetwork", "another")],
        *[("lora_functional", True), ("hypertile_enable_unet", True)],  # extensions' pages have no category
    ],
)
def test_an_option_that_pictures_depend_on_counts(opts, option, value):
    before = digest_of_options(opts)
    setattr(opts, option, value)
    assert digest_of_options(opts) != before


def test_an_option_that_no_version_has_yet_counts(opts):
    before = digest_of_options(opts)
    opts.data_labels["a_new_one"] = types.SimpleNamespace(section=("sampler-params", "Sampler parameters"), category_id="sd")
    opts.a_new_one = "second"
    assert digest_of_options(opts) != before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("samples_format", "jpg"), ("show_progress_every_n_steps", 1), ("multiple_tqdm", False), ("img2img_extra_noise", 0.1)],
        # A1111 completes the name by the hash that it finds in the first job; Forge has the other on a slider.
        *[("sd_model_checkpoint", "model.ckpt [0123456789]"), ("sd_checkpoint_hash", "0123"), ("forge_inference_memory", 2048)],
        *[("dynfuse_save_map", True)],
    ],
)
def test_any_other_option_does_not(opts, option, value):
    opts.data_labels["dynfuse_save_map"] = types.SimpleNamespace(section=("dynfuse", "DynFuse"), category_id="sd")
    opts.dynfuse_save_map = False
    before = digest_of_options(opts)
    setattr(opts, option, value)
    assert digest_of_options(opts) == before


def test_a_slider_at_the_same_place_is_the_same_whatever_its_type(opts):
    before = digest_of_options(opts)
    opts.rho, opts.uni_pc_order = 0, 3.0
    assert digest_of_options(opts) == before
    opts.pad_cond_uncond = 0.0  # a box that is ticked or not is no number
    assert digest_of_options(opts) != before


def test_values_of_any_type_and_explanations_between_the_options_do_no_harm(opts):
    opts.data_labels["explained"] = types.SimpleNamespace(section=("vae", "VAE"), category_id="sd", do_not_save=True)
    opts.data_labels["nowhere"] = types.SimpleNamespace(section=None, category_id=None)
    opts.nowhere = [("a", 1), {"b": None}]
    assert picture_options(opts)["nowhere"] == opts.nowhere
    assert "explained" not in picture_options(opts)
    assert len(digest_of_options(opts)) == 64
