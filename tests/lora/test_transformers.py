"""Chroma, Flux.2, Qwen-Image, Z-Image, Lumina 2 and Krea 2: every dialect on small models of both layouts, and which file is whose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_dynfuse import FuseSettings
from lib_dynfuse.fusion.merging import merge_files
from lib_dynfuse.fusion.session import fuse
from lib_dynfuse.lora import (
    Blocks,
    LoraError,
    Share,
    branches_by_site,
    compatible,
    denoiser_aliases,
    is_attention,
    layer_label,
    misfit,
    read_lora,
    write_merged,
)
from lib_dynfuse.lora.families import FAMILIES, reference_aliases, reference_layers
from lib_dynfuse.lora.families import family as family_named
from lib_dynfuse.lora.naming import Part, Site, flat
from lib_dynfuse.lora.report import describe
from tests.fakes.transformers import CHANNELS, SMALL, TEXT, TOKENS, WORDS, Small, split
from tests.fusion.models import Nested, kl

from .writing import kohya, pair, peft, random, saved

PREFIXES = {
    "kohya": lambda name, down, up: kohya(f"lora_unet_{flat(name)}", down, up, 1.0),
    "ComfyUI and ai-toolkit": lambda name, down, up: peft(f"diffusion_model.{name}", down, up * 0.5),
    "diffusers": lambda name, down, up: peft(f"transformer.{name}", down, up * 0.5),
    "LyCORIS": lambda name, down, up: kohya(f"lycoris_{flat(name)}", down, up, 1.0),
    "OneTrainer": lambda name, down, up: kohya(f"lora_transformer_{flat(name)}", down, up, 1.0),
    "PEFT": lambda name, down, up: peft(f"base_model.model.{name}", down, up * 0.5),
    "bare": lambda name, down, up: peft(name, down, up * 0.5),
}
POSSIBLE = {
    "Flux": ["Flux"],
    "Chroma": ["Chroma"],
    "Flux.2": ["Flux.2 Klein 4B", "Flux.2 Klein 9B", "Flux.2 dev"],
    "Qwen-Image": ["Qwen-Image"],
    "Z-Image": ["Z-Image"],
    "Lumina 2": ["Lumina 2"],
    "Lumina of equal heads": [],
    "Krea 2": ["Krea 2"],
}


def pairs(small: Small, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA of rank 2 for every linear layer, by the authors' names; dW is up @ down / 2."""
    shapes = {name: layer.shape for name, layer in small.table.items() if len(layer.shape) == 2}
    return {name: (d * 0.3, u * 0.3) for n, (name, s) in enumerate(shapes.items()) for d, u in [pair(*s, seed=7 * n + seed)]}


def written(folder, small: Small, dialect: str, names: str, seed: int = 0):
    """names: "authors" or "diffusers"."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs(small, seed).items():
        shares = {name: up} if names == "authors" else split(small.table[name], up)
        for layer, rows in shares.items():
            tensors |= PREFIXES[dialect](layer, down, rows)
    return read_lora(saved(folder, tensors, f"{names} {seed}.safetensors"))


def inputs(dtype: torch.dtype = torch.float64):
    return random(1, TOKENS, CHANNELS, dtype=dtype), torch.tensor([0.3], dtype=dtype), random(1, WORDS, TEXT, dtype=dtype)


def merged_output(small: Small, layout: str, seeds: tuple[int, ...]) -> Tensor:
    """What a host that merges would compute, in float64."""
    model = small.model(layout).double()
    for seed in seeds:
        for name, (down, up) in pairs(small, seed).items():
            for path, rows in model.shares(name, up.double()).items():
                model.get_submodule(path).weight += rows @ down.double() / 2
    return model(*inputs())


@pytest.mark.parametrize("family", SMALL)
def test_both_layouts_are_one_model(family):
    """Of the tests' own models, without which the rest would say little."""
    one, other = (SMALL[family].model(layout).double()(*inputs()) for layout in ("authors", "diffusers"))
    torch.testing.assert_close(one, other)
    assert one.std() > 0.1


@pytest.mark.parametrize("layout", ["authors", "diffusers"])
@pytest.mark.parametrize("names", ["authors", "diffusers"])
@pytest.mark.parametrize("dialect", PREFIXES)
@pytest.mark.parametrize("family", SMALL)
def test_a_lora_does_what_its_merge_does_in_every_dialect_and_layout(tmp_path, family, dialect, names, layout):
    small = SMALL[family]
    files = [written(tmp_path, small, dialect, names, seed) for seed in (0, 1)]
    assert all((list(file.possible) if file.family is None else [file.family]) == POSSIBLE[family] for file in files)
    model = small.model(layout).double()
    with fuse(model, *files, FuseSettings(method="direct")) as session:
        output = model(*inputs())
    assert session.report.unmatched == {file.name: [] for file in files}
    torch.testing.assert_close(output, merged_output(small, layout, (0, 1)), rtol=1e-6, atol=1e-6)
    assert (output - small.model(layout).double()(*inputs())).abs().max() > 0.01


@pytest.mark.parametrize("family", SMALL)
def test_sites_and_choices_are_the_same_in_both_layouts_and_dialects(tmp_path, family):
    small, chosen = SMALL[family], []
    # The family's own labels: diffusers names many layers of Krea 2 as Flux's.
    label_of = family_named(POSSIBLE[family][0]).layer_label if POSSIBLE[family] else layer_label
    for layout in ("authors", "diffusers"):
        for names in ("authors", "diffusers"):
            model = small.model(layout)
            with fuse(
                model, *(written(tmp_path, small, "diffusers", names, seed) for seed in (0, 1)), FuseSettings(method="dynfuse")
            ) as session:
                model(*inputs(torch.float32))
            labels = map(label_of, session.trace.sites)
            choices = dict(zip(labels, session.trace.winners[0, :, 0].tolist(), strict=True))
            # Outside of the blocks, labels are the layers' own names.
            chosen.append({label: choice for label, choice in choices.items() if label.split()[1].isdigit()})
    assert chosen == chosen[:1] * 4
    assert set(chosen[0].values()) == {False, True}


# A fused layer -> rows of its parts, diffusers' layers, and a layer that tells the family.
FUSED = {
    "Chroma": (
        "single_blocks.0.linear1",
        (8, 8, 8, 32),
        [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "Z-Image": ("layers.0.attention.qkv", (8, 8, 8), [f"layers.0.attention.to_{x}" for x in "qkv"]),
    "Lumina 2": ("layers.0.attention.qkv", (12, 4, 4), [f"layers.0.attn.to_{x}" for x in "qkv"]),
    "Lumina with two heads of keys to three": ("layers.0.attention.qkv", (12, 8, 8), [f"layers.0.attn.to_{x}" for x in "qkv"]),
    "Flux with a gated MLP, as Ovis-Image": (
        "single_blocks.0.linear1",
        (8, 8, 8, 64),
        [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "Flux.2": ("single_blocks.0.linear1", (8, 8, 8, 48), ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"]),
    "Flux.2 with a wider MLP": ("single_blocks.0.linear1", (8, 8, 8, 64), ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"]),
}
TELLING = {
    "Flux with": "single_blocks.0.modulation.lin",
    "Chroma": "distilled_guidance_layer.in_proj",
    "Flux.2": "single_stream_modulation.lin",
    "Lumina": "layers.0.adaLN_modulation.1",
    "Z-Image": "layers.0.adaLN_modulation.0",
}


@pytest.mark.parametrize("family", FUSED)
def test_the_parts_of_a_fused_layer_choose_apart_whatever_their_sizes(tmp_path, family):
    name, sizes, others = FUSED[family]
    width = sizes[0]
    torch.manual_seed(0)
    telling = next(layer for start, layer in TELLING.items() if family.startswith(start))
    model = Nested({name: nn.Linear(width, sum(sizes)), telling: nn.Linear(width, width)}).eval().requires_grad_(False)
    deltas, fused, divided = [], [], []
    for seed in (1, 2):
        down, up = pair(sum(sizes), width, rank=4, seed=seed)
        down, up = down / width**0.5, up * 0.5
        deltas.append(up.double() @ down.double())
        fused.append(read_lora(saved(tmp_path, kohya(f"lora_unet_{flat(name)}", down, up), f"fused{seed}.safetensors")))
        rows = up.split(list(sizes)) if len(others) > 1 else [up]
        tensors = {key: value for other, part in zip(others, rows) for key, value in peft(f"transformer.{other}", down, part).items()}
        divided.append(read_lora(saved(tmp_path, tensors, f"divided{seed}.safetensors")))
    x, layer, expected, start = random(1, 6, width), model.get_submodule(name), [], 0
    for size in sizes:
        rows = slice(start, start + size)
        y0 = x.double() @ layer.weight[rows].double().t() + layer.bias[rows].double()
        first, second = (x.double() @ delta[rows].t() for delta in deltas)
        expected.append(y0 + (first if kl(y0, first) >= kl(y0, second) else second))
        start += size
    for files in (fused, divided, (fused[0], divided[1])):
        with fuse(model, *files, FuseSettings(method="dynfuse")) as session:
            output = model(x)[name]
        torch.testing.assert_close(output.double(), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)
        assert session.trace.winners.shape == (1, len(sizes), 1)


FAMILY_NAMES = [family.name for family in FAMILIES[3:]]


def layers_of(family: str, *endings: str, blocks: int = 1000) -> dict[str, tuple[int, ...]]:
    """Linear layers of the published model in the authors' names; blocks: of each kind."""
    layers = {name: shape for name, shape in reference_layers(family).items() if len(shape) == 2}
    number = {name: int(next((step for step in name.split(".") if step.isdigit()), 0)) for name in layers}
    return {name: shape for name, shape in layers.items() if name.endswith(endings or ("",)) and number[name] < blocks}


def file_of(folder, layers: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None, name: str = "test.safetensors"):
    tensors: dict[str, Tensor] = {}
    for layer, (rows, columns) in layers.items():
        tensors |= peft(f"diffusion_model.{layer}", torch.ones(1, columns), torch.ones(rows, 1))
    return read_lora(saved(folder, tensors, name, metadata))


def possible(file) -> set[str]:
    return set(file.possible) if file.family is None else {file.family}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_whole_file_is_recognised_counted_and_named(tmp_path, family):
    layers = layers_of(family)
    file = file_of(tmp_path, layers)
    assert (file.family, file.unmatched) == (family, [])
    lines = [" ".join(line.split()) for line in describe(file)]
    assert f"Base model {family}" in lines
    assert f"Denoiser {len(layers)} of {len(layers)} layers matched" in lines


@pytest.mark.parametrize(
    ("family", "endings", "blocks", "expected"),
    [
        ("Flux", (".img_attn.qkv", ".proj", ".linear1"), 1000, {"Flux", "Chroma"}),
        ("Flux", (".img_attn.qkv", ".img_mod.lin"), 2, {"Flux"}),
        ("Flux", (".img_attn.qkv",), 1000, {"Flux", "Chroma"}),
        ("Flux", (".img_attn.qkv",), 5, {"Flux", "Chroma", "Flux.2 Klein 4B"}),
        ("Chroma", (".linear1", ".linear2"), 1000, {"Flux", "Chroma"}),
        ("Flux.2 Klein 4B", (".qkv", ".proj"), 1000, {"Flux", "Chroma", "Flux.2 Klein 4B"}),
        ("Flux.2 Klein 4B", (".qkv", ".img_mlp.0"), 1000, {"Flux.2 Klein 4B"}),
        ("Flux.2 Klein 4B", (".linear1",), 1000, {"Flux.2 Klein 4B"}),
        ("Flux.2 Klein 4B", (".linear2",), 1, {"Flux.2 Klein 4B"}),
        ("Flux.2 Klein 9B", (".qkv",), 1, {"Flux.2 Klein 9B"}),
        ("Flux.2 dev", (".proj",), 1, {"Flux.2 dev"}),
        ("Qwen-Image", (".to_q", ".to_k"), 1000, {"Qwen-Image"}),
        ("Qwen-Image", (".to_q", ".to_k"), 19, {"Flux", "Chroma", "Qwen-Image"}),
        ("Z-Image", (".feed_forward.w1",), 1, {"Z-Image"}),
        ("Z-Image", (".attention.out",), 1, {"Z-Image"}),
        ("Lumina 2", (".attention.qkv",), 1, {"Lumina 2"}),
        ("Krea 2", (".attn.wq", ".attn.wk"), 1, {"Krea 2"}),
        ("Krea 2", (".mlp.down",), 1000, {"Krea 2"}),
    ],
)
def test_a_part_of_a_file_is_taken_for_no_other_family(tmp_path, family, endings, blocks, expected):
    assert possible(file_of(tmp_path, layers_of(family, *endings, blocks=blocks))) == expected


def hunyuan_video(depth: int, inner: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"double_blocks.{n}.{name}": (rows * 3072, columns * 3072) for n in range(depth) for name, (rows, columns) in inner.items()}


@pytest.mark.parametrize(
    "layers",
    [
        hunyuan_video(20, {"img_attn_qkv": (3, 1), "img_mod.linear": (6, 1), "img_mlp.fc1": (4, 1), "img_mlp.fc2": (1, 4)}),
        hunyuan_video(20, {"img_attn.qkv": (3, 1), "img_mlp.0": (4, 1)}),  # ComfyUI's names
        {f"single_blocks.{n}.linear1": (7 * 3072, 3072) for n in range(40)},
        {f"transformer_blocks.{n}.attn.to_q": (1536, 1536) for n in range(24)},  # Stable Diffusion 3
        {"double_blocks.0.img_attn.qkv": (3 * 3072, 3072), "double_blocks.0.img_mlp.gate_proj": (4 * 3072, 3072)},  # Ovis-Image
    ],
)
def test_files_of_other_models_with_fluxs_names_are_taken_for_none(tmp_path, layers):
    file = file_of(tmp_path, layers)
    assert possible(file) == set()
    assert "Base model unknown" in " ".join(" ".join(describe(file)).split())


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "chroma"}, "Chroma"),
        ({"ss_base_model_version": "flux2_klein_4b"}, "Flux.2 Klein 4B"),
        ({"modelspec.architecture": "Flux.2-klein-4b/lora"}, "Flux.2 Klein 4B"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None),
        ({"ss_base_model_version": "hunyuan_video"}, None),
    ],
)
def test_metadata_decides_only_between_families_that_fit_alike(tmp_path, metadata, family):
    assert file_of(tmp_path, layers_of("Flux.2 Klein 4B", ".qkv"), metadata).family == family
    assert file_of(tmp_path, layers_of("Flux.2 Klein 4B", ".linear1"), metadata, "sure.safetensors").family == "Flux.2 Klein 4B"


def test_which_files_go_together(tmp_path):
    flux, chroma = (file_of(tmp_path, layers_of(name, blocks=2), name=f"{name}.safetensors") for name in ("Flux", "Chroma"))
    klein = file_of(tmp_path, layers_of("Flux.2 Klein 4B", blocks=2), name="klein.safetensors")
    attention = file_of(tmp_path, layers_of("Flux", ".img_attn.qkv", blocks=2), name="attention.safetensors")
    qwen = file_of(tmp_path, layers_of("Qwen-Image", blocks=2), name="qwen.safetensors")
    for one, other in ((flux, chroma), (attention, flux), (attention, chroma), (attention, klein)):
        assert compatible(one, other) is compatible(other, one) is None
    assert compatible(flux, klein) == (
        "Flux.safetensors was made for Flux and klein.safetensors for Flux.2 Klein 4B: both must be for the same base model."
    )
    assert "attention.safetensors was made for Chroma or Flux or Flux.2 Klein 4B" in compatible(attention, qwen)


@pytest.mark.parametrize(
    ("made_for", "endings", "model", "said"),
    [
        ("Qwen-Image", (), "Flux", "was made for Qwen-Image, and the model is Flux"),
        ("Flux", (), "Qwen-Image", "was made for Flux, and the model is Qwen-Image"),
        ("Flux.2 Klein 4B", (".linear1",), "Flux", "was made for Flux.2 Klein 4B, and the model is Flux"),
        ("Flux", (), "Flux.2 Klein 4B", "was made for Flux, and the model is Flux.2 "),
        ("Flux", (), "Chroma", None),
        ("Chroma", (), "Flux", None),
        ("Flux.2 Klein 4B", (".img_attn.qkv",), "Flux", None),  # the same names and sizes, and no word of another model
        ("Lumina 2", (), "Z-Image", "was made for Lumina 2, and the model is Z-Image"),
        ("Krea 2", (), "Flux", "was made for Krea 2, and the model is Flux"),
        ("Flux", (), "Krea 2", "was made for Flux, and the model is Krea 2"),
        ("Qwen-Image", (), "SDXL", "was made for Qwen-Image, and the model is SD 1.x or SD 2.x or SDXL"),
    ],
)
def test_a_file_is_refused_on_a_model_of_another_family_even_where_names_and_sizes_agree(tmp_path, made_for, endings, model, said):
    file = file_of(tmp_path, layers_of(made_for, *endings, blocks=2))
    reason = misfit(file, reference_layers(model))
    assert reason is None if said is None else said in reason


def test_a_file_of_an_unknown_family_and_a_model_of_one_are_left_to_their_layers(tmp_path):
    file = file_of(tmp_path, {"blocks.0.self_attn.q": (8, 8)})
    assert misfit(file, reference_layers("Flux")) is None
    assert misfit(file_of(tmp_path, layers_of("Flux", blocks=2)), {"blocks.0.self_attn.q": (8, 8)}) is None


def test_what_several_families_may_have_is_merged_under_the_names_that_they_share(tmp_path):
    """And is no more Flux' than it was."""
    files = [file_of(tmp_path, layers_of("Flux", ".img_attn.qkv", blocks=2), name=f"{n}.safetensors") for n in range(2)]
    report = write_merged(tmp_path / "one.safetensors", [Share(file, lambda site: 1.0) for file in files])
    merged = read_lora(tmp_path / "one.safetensors")
    assert merged.denoiser.keys() == {f"double_blocks_{n}_img_attn_qkv" for n in range(2)}
    assert (report.family, merged.family, merged.possible) == (None, None, files[0].possible)
    made = merge_files(tmp_path / "two.safetensors", files[:1], files[1:], FuseSettings(method="direct"))
    assert read_lora(made.path).denoiser.keys() == merged.denoiser.keys()


def test_files_whose_names_may_be_two_models_are_not_merged_without_one(tmp_path):
    files = [file_of(tmp_path, layers_of("Qwen-Image", ".to_q", blocks=2), name=f"{n}.safetensors") for n in range(2)]
    with pytest.raises(LoraError, match="its layers do not tell the base model"):
        write_merged(tmp_path / "one.safetensors", [Share(file, lambda site: 1.0) for file in files])
    with pytest.raises(LoraError, match="its layers do not tell the base model"):
        merge_files(tmp_path / "two.safetensors", files[:1], files[1:], FuseSettings(method="direct"))


@pytest.mark.parametrize("family", ["Chroma", "Flux.2 Klein 4B", "Qwen-Image", "Z-Image", "Lumina 2", "Krea 2"])
def test_merged_files_are_kohyas_in_the_authors_names(tmp_path, family):
    layers = layers_of(family, blocks=1)
    files = [file_of(tmp_path, layers, name=f"{n}.safetensors") for n in range(2)]
    write_merged(tmp_path / "one.safetensors", [Share(file, lambda site: 1.0) for file in files])
    merged = read_lora(tmp_path / "one.safetensors")
    assert (merged.family, merged.denoiser.keys()) == (family, {flat(name) for name in layers})


def test_blocks_are_named_in_the_order_in_which_data_meets_them():
    def names(family):
        return Blocks.of_model(reference_layers(family)).names

    def numbered(kind, count):
        return tuple(f"{kind}{n}" for n in range(count))

    assert names("Chroma") == ("embed", "first", *numbered("double", 19), *numbered("single", 38), "last")
    assert names("Flux.2 Klein 4B") == ("embed", "first", *numbered("double", 5), *numbered("single", 20), "last")
    assert names("Qwen-Image") == ("embed", "first", *numbered("double", 60), "last")
    refined = ("embed", "first", *numbered("context", 2), *numbered("noise", 2))
    assert names("Z-Image") == (*refined, *numbered("layer", 30), "last")
    assert names("Lumina 2") == (*refined, *numbered("layer", 26), "last")
    assert names("Krea 2") == ("embed", "first", *numbered("mix", 2), *numbered("refine", 2), *numbered("block", 28), "last")


@pytest.mark.parametrize(
    ("family", "count"),
    [
        # Query, key, value and output of both streams of a double block; a single block's output layer is not the attention's alone.
        ("Chroma", 19 * 8 + 38 * 3),
        ("Flux.2 Klein 4B", 5 * 8 + 20 * 3),
        ("Qwen-Image", 60 * 8),
        ("Z-Image", 34 * 4),
        ("Lumina 2", 30 * 4),
        ("Krea 2", 32 * 4),
    ],
)
def test_attention_is_known_in_every_family(family, count):
    sites = {alias.site for targets in reference_aliases(family).values() for alias in targets}
    assert sum(is_attention(site) for site in sites) == count


@pytest.mark.parametrize(
    ("site", "label"),
    [
        (Site("single_blocks.3.linear1", Part(2, 1, 9)), "single 3 v"),
        (Site("single_blocks.3.linear1", Part(3, 6, 9)), "single 3 mlp"),
        (Site("single_transformer_blocks.3.attn.to_qkv_mlp_proj", Part(1, 1, 9)), "single 3 k"),
        (Site("single_transformer_blocks.3.attn.to_out"), "single 3 linear2"),
        (Site("transformer_blocks.3.ff.linear_in"), "double 3 img.mlp.0"),
        (Site("double_stream_modulation_img.lin"), "embed double_stream_modulation_img.lin"),
        (Site("distilled_guidance_layer.layers.2.in_layer"), "embed distilled_guidance_layer.layers.2.in_layer"),
        (Site("transformer_blocks.3.img_mlp.net.2"), "double 3 img_mlp.net.2"),
        (Site("layers.3.attention.qkv", Part(3, 1, 5)), "layer 3 attention.k"),
        (Site("layers.3.attention.qkv", Part(4, 1, 5)), "layer 3 attention.v"),
        (Site("layers.3.attention.to_k"), "layer 3 attention.k"),
        (Site("layers.3.attn.to_k"), "layer 3 attention.k"),
        (Site("noise_refiner.1.attn.to_out.0"), "noise 1 attention.out"),
        (Site("context_refiner.1.feed_forward.linear_2"), "context 1 feed_forward.w2"),
        (Site("blocks.3.attn.gate"), "block 3 attn.gate"),
        (Site("text_fusion.refiner_blocks.1.ff.down"), "refine 1 mlp.down"),
    ],
)
def test_sites_have_the_same_labels_in_both_layouts(site, label):
    assert layer_label(site) == label


def test_lumina_has_a_text_encoder_of_its_own(tmp_path):
    """sd-scripts' lora_lumina.py trains Gemma 2."""
    layers = {flat(name): shape for name, shape in layers_of("Lumina 2", ".qkv", blocks=1).items()}
    tensors = {key: t for name, shape in layers.items() for key, t in kohya(f"lora_unet_{name}", *pair(*shape)).items()}
    tensors |= kohya("lora_te_model_layers_0_self_attn_q_proj", *pair(2048, 2304))
    file = read_lora(saved(tmp_path, tensors))
    assert (file.family, file.unmatched) == ("Lumina 2", [])
    assert "Text encoders Gemma 2 (1 layer)" in [" ".join(line.split()) for line in describe(file)]


def test_a_chroma_file_on_a_flux_model_changes_what_they_share():
    """Chroma has no modulations of its own, and its small network has no place in Flux."""
    aliases = denoiser_aliases(reference_layers("Flux"))
    missing = {name for name in reference_aliases("Chroma") if name not in aliases}
    assert missing
    assert all(name.startswith("distilled_guidance_layer") for name in missing)


def test_a_file_of_one_scheme_is_matched_whole_on_the_other(tmp_path):
    """Parts of the published sizes, not the small ones: 2304 rows of queries, 768 of keys."""
    layers = layers_of("Lumina 2", ".attention.qkv", blocks=1)
    file = file_of(tmp_path, layers)
    split_model = {f"layers.0.attn.to_{x}": (rows, 2304) for x, rows in (("q", 2304), ("k", 768), ("v", 768))}
    found, unmatched = branches_by_site(file, denoiser_aliases(split_model))
    assert {site.layer: binding.bind(site, torch.Tensor).shape for site, binding in found.items()} == split_model
    assert len(unmatched) == 2 * (len(layers) - 1)


KREA2_NAMES = {
    "transformer_blocks.27.attn.to_q": "blocks.27.attn.wq",
    "transformer_blocks.27.attn.to_gate": "blocks.27.attn.gate",
    "transformer_blocks.0.attn.to_out.0": "blocks.0.attn.wo",
    "transformer_blocks.0.ff.up": "blocks.0.mlp.up",
    "text_fusion.layerwise_blocks.1.attn.to_k": "txtfusion.layerwise_blocks.1.attn.wk",
    "text_fusion.refiner_blocks.0.ff.gate": "txtfusion.refiner_blocks.0.mlp.gate",
    "text_fusion.projector": "txtfusion.projector",
    "img_in": "first",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "final_layer.linear": "last.linear",
}


def test_krea2s_diffusers_names_are_those_that_forge_neo_maps():
    """modules_forge/packages/comfy/utils.py, krea2_to_diffusers; diffusers' own model is in no version that is pinned here."""
    aliases = reference_aliases("Krea 2")
    assert {name: aliases[flat(name)][0].site.layer for name in KREA2_NAMES} == KREA2_NAMES
    # Every layer of Krea 2 has two names.
    assert len(aliases) == 2 * len(reference_layers("Krea 2"))


@pytest.mark.parametrize("name", ["transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_out"])
def test_a_krea2_file_in_diffusers_names_is_taken_for_no_other(tmp_path, name):
    """Flux and Qwen-Image have the same names, and Flux.2 dev the same width, in fewer blocks."""
    assert possible(file_of(tmp_path, {name.format(n): (6144, 6144) for n in range(28)})) == {"Krea 2"}
    assert possible(file_of(tmp_path, {name.format(n): (3072, 3072) for n in range(19)}, name="flux.safetensors")) >= {"Flux"}
    assert "Krea 2" not in possible(file_of(tmp_path, {name.format(n): (3072, 3072) for n in range(28)}, name="qwen.safetensors"))
