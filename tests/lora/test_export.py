"""The merged file: read back, it changes the model by the sum of what went into it; and what is refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lib_dynfuse.errors import SettingsError
from lib_dynfuse.lora import (
    Blocks,
    LoraError,
    LoraFile,
    Share,
    Site,
    branches_by_site,
    denoiser_aliases,
    export,
    merged,
    norms_by_layer,
    read_lora,
    write_merged,
)
from lib_dynfuse.lora.families import FAMILIES, layout_of, reference_layers

from .test_dialects import FLUX as FLUX_LAYERS
from .test_dialects import LDM_TO_DIFFUSERS, WIDTH, flux_layers, in_bfl_names, in_diffusers_names, unet_layers, unet_pairs
from .writing import kohya, pair, peft, random, saved

SD1, SD2, SDXL, FLUX = (family.name for family in FAMILIES[:4])
SDXL_K = "input_blocks.7.1.transformer_blocks.3.attn2.to_k"
Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KERNEL = "input_blocks.4.0.in_layers.2"
NORM = "input_blocks.1.0.in_layers.0"
SMALL = dict.fromkeys((Q, KERNEL, NORM))


def number(site: Site) -> float:
    """A factor that differs from site to site, also between the parts of a layer, and is 0 now and then."""
    digest = hashlib.sha256(str(site).encode()).digest()
    return 0.0 if digest[0] < 40 else (digest[0] - 128) / 64


def changes(file: LoraFile, layers, factor=lambda site: 1.0, weight_of=None) -> dict[str, torch.Tensor]:
    """Change of every layer's weight, float64, from the branches at its sites; parts that nothing touches are 0."""
    found, _ = branches_by_site(file, denoiser_aliases(layers))
    total: dict[str, torch.Tensor] = {}
    for site, binding in found.items():
        made = binding.bind(site, lambda site=site: weight_of(site.layer)).delta_weight().double()
        rows = made.shape[0] if site.part is None else made.shape[0] // site.part.length * site.part.units
        start = 0 if site.part is None else site.part.rows(rows)[0]
        whole = total.setdefault(site.layer, torch.zeros(rows, *made.shape[1:], dtype=torch.float64))
        whole[start : start + made.shape[0]] += factor(site) * made
    return total


def assert_is_the_sum(path, shares: list[tuple[LoraFile, object]], layers, weight_of=None, tolerance=1e-5) -> LoraFile:
    """The file at `path` changes the layers as the shares do, each with its factor."""
    file = read_lora(path)
    ours = changes(file, layers)
    expected: dict[str, torch.Tensor] = {}
    for share, factor in shares:
        for layer, change in changes(share, layers, factor, weight_of).items():
            expected[layer] = expected[layer] + change.reshape(expected[layer].shape) if layer in expected else change
    assert ours.keys() == {layer for layer, change in expected.items() if change.any()}
    for layer, change in ours.items():
        torch.testing.assert_close(change.reshape(expected[layer].shape), expected[layer], rtol=tolerance, atol=tolerance)
    return file


def unet_file(tmp_path, dialect: str, name: str, seed: int = 0) -> LoraFile:
    tensors = {}
    for ldm, (down, up) in unet_pairs().items():
        down, up = (tensor + 0.1 * seed * random(*tensor.shape, seed=seed + 50) for tensor in (down, up))
        if dialect == "kohya":
            tensors |= kohya("lora_unet_" + ldm.replace(".", "_"), down, up, 1.5)
        else:
            tensors |= peft("unet." + LDM_TO_DIFFUSERS[ldm], down, up)
    return read_lora(saved(tmp_path, tensors, f"{name}.safetensors"))


@pytest.mark.parametrize("model", ["LDM", "diffusers"])
def test_a_unets_file_is_the_sum_in_either_layout(tmp_path, model):
    dog, ink = unet_file(tmp_path, "kohya", "dog", 1), unet_file(tmp_path, "PEFT", "ink", 2)
    layers = unet_layers(model)
    blocks = Blocks.of_model(layers)

    def factor(scale):
        return lambda site: scale * (blocks.names.index(blocks.of(site)) % 5) / 2

    report = write_merged(
        tmp_path / "both.safetensors",
        [Share(dog, factor(0.7)), Share(ink, factor(-1.1))],
        layers=dict.fromkeys(layers),
        dtype=torch.float32,
    )
    file = assert_is_the_sum(tmp_path / "both.safetensors", [(dog, factor(0.7)), (ink, factor(-1.1))], layers)
    assert {layout_of(layer) for layer in file.denoiser} == {"diffusers names"}, "as sd-scripts names SD 1.x"
    assert file.ranks == report.ranks == {4: len(file.denoiser)}
    other = unet_layers("LDM" if model == "diffusers" else "diffusers")
    assert len(changes(file, other)) == len(file.denoiser)


def test_a_sites_factor_is_asked_for_by_the_models_own_names(tmp_path):
    dog = unet_file(tmp_path, "kohya", "dog")
    for layers in (unet_layers("LDM"), unet_layers("diffusers")):
        asked: set[str] = set()
        export.merged_tensors([Share(dog, lambda site, asked=asked: asked.add(site.layer) or 1.0)], layers=dict.fromkeys(layers))
        assert asked <= set(layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sdxl_is_written_under_the_names_of_its_authors_with_both_text_encoders(tmp_path, dtype):
    names = [SDXL_K, "input_blocks.4.1.proj_in", "output_blocks.0.1.transformer_blocks.9.ff.net.2", "input_blocks.3.0.op"]
    shapes = reference_layers(SDXL)
    files = []
    for seed, name in enumerate(("dog", "ink")):
        tensors = {}
        for layer in names:
            rank, width = 4 + 4 * seed, shapes[layer][1]
            down = random(rank, *shapes[layer][1:], seed=seed) / width**0.5
            up = 0.02 * random(shapes[layer][0], rank, *(1 for _ in shapes[layer][2:]), seed=seed)
            tensors |= kohya("lora_unet_" + layer.replace(".", "_"), down, up, 2.0)
        for encoder, width in (("te1", 768), ("te2", 1280)):
            down, up = pair(width, width, 4, seed=seed)
            tensors |= kohya(f"lora_{encoder}_text_model_encoder_layers_3_self_attn_q_proj", down, 0.01 * up)
        files.append(read_lora(saved(tmp_path, {key: tensor.half() for key, tensor in tensors.items()}, f"{name}.safetensors")))
    factors = [lambda site: 0.8, lambda site: 0.25]
    shares = [Share(file, factor, lambda encoder, n=n: n + 0.5) for n, (file, factor) in enumerate(zip(files, factors))]
    write_merged(tmp_path / "both.safetensors", shares, dtype=dtype)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    file = assert_is_the_sum(tmp_path / "both.safetensors", list(zip(files, factors)), shapes, tolerance=tolerance)
    tensors = load_file(tmp_path / "both.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert {key for key in tensors if key.endswith("alpha")} == {
        *(f"lora_unet_{name.replace('.', '_')}.alpha" for name in names),
        *(f"lora_{encoder}_text_model_encoder_layers_3_self_attn_q_proj.alpha" for encoder in ("te1", "te2")),
    }
    assert file.family == SDXL
    assert file.ranks == {8: 2, 12: 4}
    for encoder in ("te1", "te2"):
        layer = "text_model_encoder_layers_3_self_attn_q_proj"
        expected = sum((n + 0.5) * f.text[encoder][layer].delta_weight().double() for n, f in enumerate(files))
        torch.testing.assert_close(file.text[encoder][layer].delta_weight().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", ["BFL", "diffusers"])
@pytest.mark.parametrize("rank", [None, 3 * WIDTH])
def test_fused_layers_of_flux_are_exact_part_by_part(tmp_path, model, rank):
    """One file names the layers fused and one split, and each part has a factor of its own."""
    fused = read_lora(saved(tmp_path, in_bfl_names(lambda n, d, u: kohya("lora_unet_" + n.replace(".", "_"), d, u)), "fused.safetensors"))
    split = read_lora(saved(tmp_path, in_diffusers_names(lambda n, d, u: peft("transformer." + n, d, 0.3 * u)), "split.safetensors"))
    layers = flux_layers(model)
    factors = [number, lambda site: number(Site(site.layer + "!", site.part))]
    shares = [Share(file, factor) for file, factor in zip((fused, split), factors)]
    report = write_merged(tmp_path / "both.safetensors", shares, layers=dict.fromkeys(layers), dtype=torch.float32, rank=rank)
    file = assert_is_the_sum(tmp_path / "both.safetensors", list(zip((fused, split), factors)), layers)
    assert {layout_of(layer) for layer in file.denoiser} == {"Flux BFL names"}
    assert file.denoiser.keys() <= {name.replace(".", "_") for name in FLUX_LAYERS}
    assert report.error == 0
    assert max(file.ranks) <= 2 + 4 * 2, "one block for the fused file, one for each part of the split one"


def test_xlabs_attention_is_written_as_a_part_of_linear1(tmp_path):
    down, up = pair(3 * WIDTH, WIDTH)
    tensors = {"single_blocks.2.processor.qkv_lora.down.weight": down, "single_blocks.2.processor.qkv_lora.up.weight": up}
    file = read_lora(saved(tmp_path, tensors, "xlabs.safetensors"))
    write_merged(tmp_path / "one.safetensors", [Share(file)], layers=dict.fromkeys(flux_layers("BFL")), dtype=torch.float32)
    change = changes(read_lora(tmp_path / "one.safetensors"), flux_layers("BFL"))["single_blocks.2.linear1"]
    torch.testing.assert_close(change[: 3 * WIDTH], up.double() @ down.double(), rtol=1e-5, atol=1e-5)
    assert change.shape[0] == 7 * WIDTH
    assert not change[3 * WIDTH :].any()


def test_files_of_the_published_flux_need_no_model(tmp_path):
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 4), "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4, 4)}
    tensors = {key: tensor for name, size in {layer: (3072, 3072), **text}.items() for key, tensor in kohya(name, *pair(*size)).items()}
    write_merged(tmp_path / "one.safetensors", [Share(read_lora(saved(tmp_path, tensors)))])
    assert {key.split(".")[0] for key in load_file(tmp_path / "one.safetensors")} == {layer, *text}


def small(tmp_path, name: str, seed: int = 0, **layers: dict[str, torch.Tensor]) -> LoraFile:
    """A file of kohya's keys; q, kernel, norm: role -> tensor of that layer."""
    paths = {"q": Q, "kernel": KERNEL, "norm": NORM}
    tensors = {
        f"lora_unet_{paths[layer].replace('.', '_')}.{role}": tensor for layer, roles in layers.items() for role, tensor in roles.items()
    }
    return read_lora(saved(tmp_path, tensors, f"{name}.safetensors"))


def low_rank(out: int, into: int, rank: int = 2, kernel: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    down, up = pair(out, into, rank, kernel=kernel, seed=seed)
    return {"lora_down.weight": down, "lora_up.weight": up}


def test_kinds_that_are_no_product_are_written_whole(tmp_path):
    """LoKr with a whole second factor, a full difference, and a LoRA on a layer that another file changes in full."""
    lokr = {"lokr_w1": random(2, 2), "lokr_w2": random(6, 8)}
    dog = small(tmp_path, "dog", q=low_rank(12, 16), kernel=low_rank(12, 8, kernel=3))
    ink = small(tmp_path, "ink", q=lokr, kernel={"diff": random(12, 8, 3, 3), "diff_b": random(12)})
    factors = [lambda site: 0.5, lambda site: -2.0]
    path = tmp_path / "both.safetensors"
    report = write_merged(path, [Share(f, factor) for f, factor in zip((dog, ink), factors)], layers=SMALL, dtype=torch.float32)
    assert_is_the_sum(path, list(zip((dog, ink), factors)), SMALL)
    keys = load_file(path)
    assert {key.rsplit(".", 1)[1] for key in keys} == {"diff", "diff_b"}
    assert len(report.whole) == 2
    assert report.ranks == {}
    (bias,) = (tensor for key, tensor in keys.items() if key.endswith("diff_b"))
    torch.testing.assert_close(bias, -2 * random(12))


def test_with_a_rank_they_become_low_rank(tmp_path):
    dog = small(tmp_path, "dog", q={"diff": random(12, 16)}, kernel={"diff": random(12, 8, 3, 3)})
    path = tmp_path / "one.safetensors"
    report = write_merged(path, [Share(dog)], layers=SMALL, dtype=torch.float32, rank=12)
    assert_is_the_sum(path, [(dog, lambda site: 1.0)], SMALL, tolerance=1e-4)
    assert report.whole == ()
    assert report.ranks == {12: 2}


def test_small_loha_and_lokr_stay_thin(tmp_path):
    loha = {f"hada_w{n}_{x}": random(*size, seed=n) for n in (1, 2) for x, size in (("a", (64, 2)), ("b", (2, 48)))}
    dog = small(tmp_path, "dog", q=loha)
    report = write_merged(tmp_path / "one.safetensors", [Share(dog)], layers=SMALL, dtype=torch.float32)
    assert_is_the_sum(tmp_path / "one.safetensors", [(dog, lambda site: 1.0)], SMALL)
    assert report.ranks == {4: 1}


def test_normalisation_layers_and_biases_are_summed(tmp_path):
    dog = small(tmp_path, "dog", q={**low_rank(6, 4), "diff_b": random(6, seed=3)}, norm={"w_norm": random(5), "b_norm": random(5, seed=1)})
    ink = small(tmp_path, "ink", q={"diff_b": random(6, seed=4)}, norm={"w_norm": random(5, seed=2)})
    shares = [Share(dog, lambda site: 0.5), Share(ink, lambda site: 3.0)]
    report = write_merged(tmp_path / "both.safetensors", shares, layers=SMALL, dtype=torch.float32)
    file = read_lora(tmp_path / "both.safetensors")
    shift = norms_by_layer(file, denoiser_aliases(SMALL))[NORM]
    torch.testing.assert_close(shift.weight, 0.5 * random(5) + 3 * random(5, seed=2))
    torch.testing.assert_close(shift.bias, 0.5 * random(5, seed=1))
    (branch,) = file.denoiser.values()
    torch.testing.assert_close(branch.bias, 0.5 * random(6, seed=3) + 3 * random(6, seed=4))
    assert report.norms == 1


def test_kinds_that_depend_on_the_models_weights_need_them(tmp_path):
    weight = random(6, 4, seed=9)
    dora = {**low_rank(6, 4), "dora_scale": random(6, 1, seed=2).abs()}
    dog, ink = small(tmp_path, "dog", q=dora, kernel=low_rank(12, 8, kernel=3)), small(tmp_path, "ink", q=low_rank(6, 4, seed=5))
    path = tmp_path / "both.safetensors"
    with pytest.raises(LoraError) as error:
        write_merged(path, [Share(ink), Share(dog)], layers=SMALL)
    assert str(error.value) == (
        "dog.safetensors cannot be merged into one file: 1 of its layers (DoRA (LoRA)) depend on the base model's own weights; "
        "generate --save-lora, which loads the model, can merge it."
    )
    factors = [lambda site: 0.5, lambda site: 2.0]
    shares = [Share(file, factor) for file, factor in zip((dog, ink), factors)]
    write_merged(path, shares, layers=SMALL, dtype=torch.float32, weight_of=lambda name: weight)
    file = assert_is_the_sum(path, list(zip((dog, ink), factors)), SMALL, lambda name: weight)
    (q,) = (branch for name, branch in file.denoiser.items() if name.endswith("attn1_to_q"))
    base = branches_by_site(dog, denoiser_aliases(SMALL))[0][Site(Q)].branch
    expected = merged(weight, base, 0.5).double() + merged(weight, branches_by_site(ink, denoiser_aliases(SMALL))[0][Site(Q)].branch, 2.0)
    torch.testing.assert_close(merged(weight, q, 1.0).double(), expected - weight, rtol=1e-5, atol=1e-5)
    unused = Share(dog, lambda site: 0.0 if site.layer == Q else 1.0)
    assert export.merged_tensors([unused, Share(ink)], layers=SMALL)[1].ranks == {2: 2}


def test_a_branch_at_factor_0_is_left_out(tmp_path):
    dog, ink = small(tmp_path, "dog", q=low_rank(6, 4, 2)), small(tmp_path, "ink", q=low_rank(6, 4, 3))
    report = write_merged(tmp_path / "both.safetensors", [Share(dog), Share(ink, lambda site: 0.0)], layers=SMALL)
    assert report.ranks == {2: 1}
    with pytest.raises(LoraError, match=r"Nothing is left of dog\.safetensors and ink\.safetensors to write"):
        write_merged(tmp_path / "none.safetensors", [Share(dog, lambda site: 0.0), Share(ink, lambda site: 0.0)], layers=SMALL)


@pytest.mark.parametrize("rank", [1, 3, 5, 8, 20])
def test_a_reduced_rank_is_the_nearest_and_its_error_is_told(tmp_path, rank):
    dog = small(tmp_path, "dog", q=low_rank(24, 16, 4), kernel=low_rank(12, 8, 4, kernel=3))
    ink = small(tmp_path, "ink", q=low_rank(24, 16, 4, seed=3), kernel={"diff": random(12, 8, 3, 3)})
    factors = [lambda site: 0.7, lambda site: 1.5]
    path = tmp_path / "both.safetensors"
    report = write_merged(path, [Share(f, x) for f, x in zip((dog, ink), factors)], layers=SMALL, dtype=torch.float32, rank=rank)
    parts = [changes(file, SMALL, factor) for file, factor in zip((dog, ink), factors)]
    got = changes(read_lora(path), SMALL)
    lost = size = 0.0
    for layer in (Q, KERNEL):
        matrix = (parts[0][layer] + parts[1][layer]).flatten(1).numpy()
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(got[layer].flatten(1).numpy(), nearest, rtol=1e-4, atol=1e-4)
        lost, size = lost + np.square(matrix - nearest).sum(), size + np.square(matrix).sum()
        key = next((key for key in report.errors if key.endswith("attn1_to_q" if layer == Q else "conv1")), None)
        if key is not None:
            assert report.errors[key] == pytest.approx(np.linalg.norm(matrix - nearest) / np.linalg.norm(matrix), abs=1e-6)
        else:
            assert layer == Q
            assert rank >= 8, "two LoRAs of rank 4 need no reduction"
    assert report.error == pytest.approx((lost / size) ** 0.5, abs=1e-6)
    assert max(report.ranks) == min(rank, 12)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_float16_keeps_branches_whose_halves_differ_much_in_size(tmp_path, scale):
    """As they are, 1e-6 would be far below float16's normal numbers, and 1e4 times the factor above its largest."""
    tensors = low_rank(6, 4)
    tensors["lora_up.weight"] = tensors["lora_up.weight"] * scale
    dog = small(tmp_path, "dog", q=tensors)
    write_merged(tmp_path / "one.safetensors", [Share(dog, lambda site: 20.0)], layers=SMALL)
    got, expected = changes(read_lora(tmp_path / "one.safetensors"), SMALL)[Q], 20 * changes(dog, SMALL)[Q]
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_numbers_beyond_the_files_type_are_refused(tmp_path):
    dog = small(tmp_path, "dog", q={"diff": 1e5 * torch.ones(6, 4)})
    with pytest.raises(LoraError, match=r"cannot be written as float16: lora_unet_.*attn1_to_q\.diff has too large numbers"):
        write_merged(tmp_path / "one.safetensors", [Share(dog)], layers=SMALL)
    assert list(tmp_path.iterdir()) == [dog.path]


def test_the_metadata_say_what_the_file_is_and_what_it_was_made_of(tmp_path):
    k = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    trigger = {"modelspec.trigger_phrase": "my dog", "ss_sd_model_name": "v1-5.safetensors"}
    dog = read_lora(saved(tmp_path, kohya(k, *pair(640, 768)), "dog.safetensors", trigger))
    ink = read_lora(saved(tmp_path, kohya(k, *pair(640, 768)), "ink.safetensors", {"modelspec.trigger_phrase": "ink style"}))
    path = tmp_path / "dog and ink.safetensors"
    write_merged(path, [Share(dog), Share(ink)], metadata={"method": "direct", "weights": "1 1"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "dog and ink"
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v1", "False")
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("networks.lora", "4", "4")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "my dog, ink style"
    assert metadata["ss_sd_model_name"] == "v1-5.safetensors"
    assert (metadata["dynfuse_method"], metadata["dynfuse_weights"]) == ("direct", "1 1")
    hashes = {entry["name"]: entry["sha256"] for entry in json.loads(metadata["dynfuse_loras"])}
    assert hashes == {file.name: hashlib.sha256(file.path.read_bytes()).hexdigest() for file in (dog, ink)}


def test_what_fits_no_layer_is_left_out_and_told(tmp_path):
    dog = small(tmp_path, "dog", q=low_rank(6, 4), kernel=low_rank(12, 8, kernel=3))
    report = write_merged(tmp_path / "one.safetensors", [Share(dog)], layers={Q: None})
    (keys,) = report.unmatched.values()
    assert all("input_blocks_4_0_in_layers_2" in key for key in keys)
    assert report.ranks == {2: 1}


def test_files_that_do_not_go_together_are_refused(tmp_path):
    k = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    sd, xl = (read_lora(saved(tmp_path, kohya(k, *pair(640, width)), f"{width}.safetensors")) for width in (768, 2048))
    with pytest.raises(LoraError, match=r"768\.safetensors was made for SD 1\.x and 2048\.safetensors for SDXL"):
        write_merged(tmp_path / "both.safetensors", [Share(sd), Share(xl)])
    dog = small(tmp_path, "dog", q=low_rank(6, 4))
    other = read_lora(saved(tmp_path, peft("unet." + LDM_TO_DIFFUSERS[Q], *pair(6, 8))))
    with pytest.raises(LoraError, match="different base models: at lora_unet_.*attn1_to_q one has 6 × 4 weights and another 6 × 8"):
        write_merged(tmp_path / "both.safetensors", [Share(dog), Share(other)], layers=SMALL)
    with pytest.raises(LoraError, match=r"dog\.safetensors cannot be merged without a model"):
        write_merged(tmp_path / "both.safetensors", [Share(dog)])
    with pytest.raises(SettingsError, match="rank must be at least 1, not 0"):
        write_merged(tmp_path / "both.safetensors", [Share(dog)], layers=SMALL, rank=0)
    flux = read_lora(saved(tmp_path, kohya("lora_unet_double_blocks_0_img_attn_qkv", *pair(3 * WIDTH, WIDTH)), "flux.safetensors"))
    with pytest.raises(LoraError, match="a Flux model"):
        write_merged(tmp_path / "both.safetensors", [Share(dog), Share(flux)], layers=SMALL)
    assert not (tmp_path / "both.safetensors").exists()


def test_a_name_that_exists_is_never_overwritten(tmp_path, monkeypatch):
    dog = small(tmp_path, "dog", q=low_rank(6, 4))
    before = dog.path.read_bytes()
    with pytest.raises(LoraError) as error:
        write_merged(dog.path, [Share(dog)], layers=SMALL)
    assert str(error.value) == "dog.safetensors cannot be written: there is a file of this name, which is never overwritten."
    assert dog.path.read_bytes() == before
    late, save = tmp_path / "late.safetensors", export.save_file

    def somebody_is_quicker(*arguments):
        save(*arguments)
        late.write_bytes(b"theirs")

    monkeypatch.setattr(export, "save_file", somebody_is_quicker)
    with pytest.raises(LoraError, match="never overwritten"):
        write_merged(late, [Share(dog)], layers=SMALL)
    assert late.read_bytes() == b"theirs"
    assert sorted(tmp_path.iterdir()) == [dog.path, late]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
            "No space left on device",
        ),
        (SafetensorError("Error while serializing: InvalidHeader"), "Error while serializing: InvalidHeader"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, failure, reason):
    dog = small(tmp_path, "dog", q=low_rank(6, 4))

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if reason is None else LoraError) as error:
        write_merged(tmp_path / "one.safetensors", [Share(dog)], layers=SMALL)
    if reason is not None:
        assert str(error.value) == f"one.safetensors cannot be written: {reason}."
    assert list(tmp_path.iterdir()) == [dog.path]


def test_places_where_nothing_can_be_written_are_named(tmp_path):
    dog = small(tmp_path, "dog", q=low_rank(6, 4))
    with pytest.raises(LoraError, match=r"one\.safetensors cannot be written: there is no folder .*missing\."):
        write_merged(tmp_path / "missing" / "one.safetensors", [Share(dog)], layers=SMALL)
    with pytest.raises(LoraError, match="there is no folder"):
        write_merged(dog.path / "one.safetensors", [Share(dog)], layers=SMALL)
    with pytest.raises(LoraError, match=r"its name must end in \.safetensors"):
        write_merged(tmp_path / "one.pt", [Share(dog)], layers=SMALL)
    with pytest.raises(LoraError, match="[Nn]ame too long"):
        write_merged(tmp_path / f"{'x' * 280}.safetensors", [Share(dog)], layers=SMALL)
    dog.path.unlink()
    with pytest.raises(LoraError, match=r"dog\.safetensors cannot be read: No such file"):
        write_merged(tmp_path / "one.safetensors", [Share(dog)], layers=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_diffusers_knows_every_key(tmp_path, base):
    pytest.importorskip("diffusers")
    from tests.hosts.diffusers import tiny_pipelines

    pipeline = getattr(tiny_pipelines, base)()
    networks = [("unet", "lora_unet"), ("text_encoder", "lora_te1"), *([("text_encoder_2", "lora_te2")] if base == "sdxl" else [])]
    file = read_lora(tiny_pipelines.write_lora(tmp_path / "dog.safetensors", pipeline, networks))
    layers = {name: None for name, module in pipeline.unet.named_modules() if getattr(module, "weight", None) is not None}
    report = write_merged(tmp_path / "one.safetensors", [Share(file)], layers=layers)
    state, alphas = pipeline.lora_state_dict(str(tmp_path / "one.safetensors"), unet_config=pipeline.unet.config)
    assert len(state) == 2 * len(alphas) == 2 * sum(report.ranks.values())
    blocks = {name.split(".attentions")[0] for name, _ in pipeline.unet.named_modules() if name.endswith("attn1")}
    assert {key.removeprefix("unet.").split(".attentions")[0] for key in state if key.startswith("unet.")} == blocks


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_diffusers_loads_the_file_and_makes_the_same_prediction(tmp_path, base):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tests.hosts.diffusers import tiny_pipelines

    pipeline = getattr(tiny_pipelines, base)()
    prefixes = {"sd": (("text_encoder", "lora_te"),), "sdxl": (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2"))}[base]
    files = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.safetensors"
        files.append(read_lora(tiny_pipelines.write_lora(path, pipeline, [("unet", "lora_unet"), *prefixes], seed=seed)))
    layers = {n: tuple(m.weight.shape) for n, m in pipeline.unet.named_modules() if getattr(m, "weight", None) is not None}
    path = tmp_path / "both.safetensors"
    shares = [Share(file, lambda site, s=s: s, lambda encoder, s=s: s) for file, s in zip(files, (0.8, -0.4))]
    write_merged(path, shares, layers=layers, dtype=torch.float32)
    assert any("input_blocks" in key for key in load_file(path)) == (base == "sdxl")

    def predictions():
        generator = torch.Generator().manual_seed(3)
        width = pipeline.unet.config.cross_attention_dim
        extra = {"text_embeds": torch.randn(1, 32, generator=generator), "time_ids": torch.ones(1, 6)} if base == "sdxl" else None
        with torch.no_grad():
            latent, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 7, width, generator=generator)
            texts = [getattr(pipeline, name)(torch.tensor([[5, 9, 3]])).last_hidden_state for name, _ in prefixes]
            return [pipeline.unet(latent, 500, context, added_cond_kwargs=extra).sample, *texts]

    plain = predictions()
    pipeline.load_lora_weights(str(path))
    loaded = predictions()
    pipeline.unload_lora_weights()
    for change, scale in zip(files, (0.8, -0.4)):
        for component, layers_of in [("unet", change.denoiser), *((n, change.text[f"te{i + 1}"]) for i, (n, _) in enumerate(prefixes))]:
            modules = {name.replace(".", "_"): module for name, module in getattr(pipeline, component).named_modules()}
            for name, branch in layers_of.items():
                weight = modules[name].weight
                weight.data = merged(weight.data, branch, scale)
    for before, ours, expected in zip(plain, loaded, predictions()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert (before - expected).abs().max() > 1e-2
