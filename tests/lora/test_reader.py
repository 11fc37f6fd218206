"""Files as users have them: what is recognised, what is listed, what is refused and in which words."""

from __future__ import annotations

import pickle
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib_dynfuse.lora import LoraError, LowRank, branches_by_site, contents, denoiser_aliases, norms_by_layer, read_lora
from lib_dynfuse.lora.branch import NormShift
from lib_dynfuse.lora.families import FAMILIES, reference_layers

from .writing import kohya, pair, peft, random, saved

SD1, SD2, SDXL, FLUX = (family.name for family in FAMILIES[:4])
ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def refusal(path) -> str:
    with pytest.raises(LoraError) as error:
        read_lora(path)
    message = str(error.value)
    assert message.startswith(path.name)
    assert message.endswith(".")
    assert message.count("\n") == 0
    return message


def whole_file(family: str, rank: int = 1) -> dict[str, torch.Tensor]:
    """A LoRA with every matrix of a base model, in kohya's names; all from one small stock of numbers, as they do not matter."""
    tensors = {}
    for name, shape in reference_layers(family).items():
        if len(shape) == 2:
            tensors |= kohya("lora_unet_" + name.replace(".", "_"), torch.ones(rank, shape[1]), torch.ones(shape[0], rank))
    return tensors


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_file_for_a_base_model_is_recognised_and_all_its_layers_match(tmp_path, family):
    file = read_lora(saved(tmp_path, whole_file(family)))
    assert file.family == family
    assert file.unmatched == []
    assert file.dialects[0] == "kohya, Flux BFL names" if family == FLUX else "kohya, LDM names"
    assert file.ranks == {1: len(file.denoiser)}
    assert file.kinds == {"LoRA": len(file.denoiser)}


def test_tensors_stay_as_they_are_stored(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        down, up = (tensor.to(dtype) for tensor in pair(6, 768))
        (branch,) = read_lora(saved(tmp_path, kohya(ATTENTION, down, up, 1.0))).denoiser.values()
        assert isinstance(branch, LowRank)
        assert branch.down.dtype == branch.up.dtype == dtype
        assert torch.equal(branch.down, down)
        assert branch.scale == 0.5


def test_a_file_may_be_overwritten_after_it_was_read(tmp_path):
    path = saved(tmp_path, kohya(ATTENTION, *pair(6, 768)))
    (branch,) = read_lora(path).denoiser.values()
    before = branch.down.clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(branch.down, before)


@pytest.mark.parametrize("ending", ["pt", "ckpt", "bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files_are_read_as_tensors_only(tmp_path, ending, wrapped):
    tensors = kohya(ATTENTION, *pair(6, 768))
    path = tmp_path / f"dog.{ending}"
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, path)
    file = read_lora(path)
    assert (file.name, file.family, len(file.denoiser)) == ("dog", SD1, 1)


def test_a_torch_file_with_code_is_not_opened(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "written by code"), "w"))

    path = tmp_path / "bad.pt"
    torch.save({"x": Code()}, path)
    assert "might be code" in refusal(path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"x": Code()}))
    refusal(tmp_path / "plain.pt")
    assert not (tmp_path / "written by code").exists()


def test_metadata_is_kept_and_not_believed(tmp_path):
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_output_name": "dog"}
    file = read_lora(saved(tmp_path, kohya(ATTENTION, *pair(6, 768)), metadata=metadata))
    assert file.metadata == metadata
    assert file.family == SD1


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (kohya(ATTENTION, *pair(6, 1024)), SD2),
        (kohya("lora_unet_output_blocks_4_1_transformer_blocks_1_attn2_to_v", *pair(6, 2048)), SDXL),
        (kohya(TEXT, *pair(6, 1024)), SD2),
        (kohya("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", *pair(6, 1280)), SDXL),
        (kohya(TEXT, *pair(6, 768)), None),  # SD 1.x and SDXL have this encoder
        (kohya(ATTENTION, *pair(6, 64)), None),  # a model of no published size: SD 1.x or 2.x
        (kohya("lora_unet_input_blocks_7_1_transformer_blocks_1_attn1_to_q", *pair(6, 64)), SDXL),  # only SDXL goes deeper than one
        (kohya("lora_unet_down_blocks_1_resnets_0_conv1", *pair(6, 4, kernel=3)), None),
        (peft("transformer.single_transformer_blocks.0.norm.linear", *pair(48, 16)), FLUX),
        (peft("transformer.transformer_blocks.0.attn.to_q", *pair(1536, 1536)), None),  # SD3
        (
            {f"{ATTENTION}.hada_{k}": random(*s) for k, s in (("w1_a", (6, 2)), ("w1_b", (2, 768)), ("w2_a", (6, 2)), ("w2_b", (2, 768)))},
            SD1,
        ),
        ({f"{ATTENTION}.lokr_w1": random(2, 2), f"{ATTENTION}.lokr_w2": random(3, 384)}, SD1),
        (kohya(ATTENTION, *pair(6, 768)) | {f"{ATTENTION}.dora_scale": random(1, 768)}, SD1),
    ],
)
def test_the_base_model_is_told_by_keys_and_shapes(tmp_path, tensors, family):
    assert read_lora(saved(tmp_path, tensors)).family == family


def test_exotic_kinds_are_counted_by_name(tmp_path):
    names = [f"lora_unet_down_blocks_{level}_attentions_0_transformer_blocks_0_attn1_to_q" for level in range(3)]
    names += [f"lora_unet_up_blocks_{level}_attentions_0_transformer_blocks_0_attn1_to_q" for level in (1, 2, 3)]
    down, up = pair(8, 8)
    tensors = kohya(names[0], down, up)
    tensors |= kohya(names[1], down, up) | {f"{names[1]}.dora_scale": random(8, 1)}
    tensors |= {f"{names[2]}.weight": random(8), f"{names[2]}.on_input": torch.tensor(1)}
    tensors |= {
        f"{names[3].replace('lora', 'oft')}.oft_blocks": random(2, 4, 4),
        f"{names[3].replace('lora', 'oft')}.alpha": torch.tensor(0.0),
    }
    tensors |= {f"{names[4]}.oft_blocks": random(2, 4, 2, 2)}
    tensors |= {f"{names[5]}.{half}.weight": random(2, 8) if half[1] == "2" else random(8, 2) for half in ("a1", "a2", "b1", "b2")}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": random(2, 8, 3, 3)}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": random(8, 2, 1, 1)}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": random(8), "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": random(8)}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_conv2.diff": random(8, 8, 3, 3)}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_norm2.diff_b": random(8)}
    file = read_lora(saved(tmp_path, tensors))
    kinds = {"LoRA": 1, "DoRA (LoRA)": 1, "IA3": 1, "OFT": 1, "BOFT": 1, "GLoRA": 1, "LoCon": 1, "norm": 2, "full": 1}
    assert file.kinds == kinds
    assert file.unmatched == []
    aliases = denoiser_aliases(["input_blocks.1.0.in_layers.0", "input_blocks.1.0.out_layers.0", "input_blocks.1.0.in_layers.2"])
    shifts = norms_by_layer(file, aliases)
    assert shifts.keys() == {"input_blocks.1.0.in_layers.0", "input_blocks.1.0.out_layers.0"}
    assert isinstance(shifts["input_blocks.1.0.out_layers.0"], NormShift)
    found, unmatched = branches_by_site(file, aliases)
    assert [site.layer for site in found] == ["input_blocks.1.0.in_layers.2"]
    assert f"{names[2]}.on_input" in unmatched


def test_keys_that_match_nothing_are_listed(tmp_path):
    tensors = kohya(ATTENTION, *pair(6, 768))
    strange = {
        "lora_unet_down_blocks_0_attentions_7_nonsense.lora_down.weight": random(2, 4),  # half a pair of no layer at all
        "lora_unet_down_blocks_1_attentions_5_proj_in.lora_down.weight": random(2, 4),  # SD 1.x has two attention blocks there
        "lora_unet_down_blocks_1_attentions_5_proj_in.lora_up.weight": random(6, 2),
        f"{ATTENTION}.bias_values": random(3),
        "lora_te_text_model_encoder_nonsense.diff": random(3, 3),
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": random(3),  # a text encoder's: nothing takes it
        "note": random(1),
    }
    file = read_lora(saved(tmp_path, tensors | strange))
    assert sorted(file.unmatched) == sorted(strange)


def test_a_key_for_a_model_of_another_structure_is_listed_but_kept(tmp_path):
    """One residual block per level: its second level starts where SD 1.x has a downsampler."""
    tensors = kohya("lora_unet_input_blocks_3_1_proj_in", *pair(6, 4)) | kohya(ATTENTION, *pair(6, 768))
    file = read_lora(saved(tmp_path, tensors))
    assert len(file.unmatched) == 2
    found, unmatched = branches_by_site(
        file, denoiser_aliases(["input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "input_blocks.3.1.proj_in"])
    )
    assert [site.layer for site in found] == ["input_blocks.3.1.proj_in"]
    assert [key for key in unmatched if "input_blocks" in key] == []


def test_files_that_are_no_lora_say_what_they_are(tmp_path):
    checkpoint = {
        "model.diffusion_model.input_blocks.0.0.weight": random(4, 4, 3, 3),
        "model.diffusion_model.input_blocks.0.0.bias": random(4),
    }
    assert "whole model" in refusal(saved(tmp_path, checkpoint, "model.safetensors"))
    assert "textual inversion" in refusal(saved(tmp_path, {"emb_params": random(2, 8)}, "embedding.safetensors"))
    assert "none of its 2 tensors, such as" in refusal(saved(tmp_path, {"a": random(2), "b": random(2)}, "other.safetensors"))
    assert "no tensors" in refusal(saved(tmp_path, {}, "nothing.safetensors"))
    torch.save([random(2)], tmp_path / "list.pt")
    assert "no named tensors" in refusal(tmp_path / "list.pt")
    language = peft("base_model.model.model.layers.0.self_attn.q_proj", *pair(8, 8))
    message = refusal(saved(tmp_path, language, "language.safetensors"))
    assert "another kind of model" in message
    assert "model_layers_0_self_attn_q_proj" in message


def test_unreadable_files_say_why(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "folder" in refusal(tmp_path / "folder.safetensors")
    (tmp_path / "empty.safetensors").touch()
    assert "empty" in refusal(tmp_path / "empty.safetensors")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>You must log in</html>")
    assert "no safetensors file" in refusal(tmp_path / "page.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + b"\0" * 100)
    assert "damaged" in refusal(tmp_path / "broken.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 but no archive")
    refusal(tmp_path / "broken.pt")


@pytest.mark.parametrize("words", ["MetadataIncompleteBuffer", "incomplete metadata, file not fully covered", "invalid JSON in header"])
def test_a_damaged_file_is_called_so_in_every_version_of_safetensors(tmp_path, monkeypatch, words):
    """0.4 has the first words, 0.7 the others."""

    def safe_open(*args):
        raise SafetensorError(f"Error while deserializing header: {words}")

    path = saved(tmp_path, kohya(ATTENTION, *pair(6, 768)))
    monkeypatch.setattr(contents, "safe_open", safe_open)
    assert "cut off or damaged" in refusal(path)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, ending):
    tensors = kohya(ATTENTION, *pair(6, 768), 1.0) | kohya(TEXT, *pair(6, 768))
    path = tmp_path / f"whole.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    content = path.read_bytes()
    for length in (3, 8, 100, len(content) // 2, len(content) - 1):
        cut = tmp_path / f"cut{length}.{ending}"
        cut.write_bytes(content[:length])
        message = refusal(cut)
        if ending == "safetensors" and length >= 8:
            assert "cut off" in message


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(tmp_path, length):
    """0x80 begins a pickle and "PK" a zip archive; both are also lengths of headers."""
    path = saved(tmp_path, kohya(ATTENTION, *pair(6, 768)))
    content = path.read_bytes()
    old = struct.unpack("<Q", content[:8])[0]
    wanted = length if length > old else length + 0x100 * (1 + (old - length) // 0x100)
    path.write_bytes(struct.pack("<Q", wanted) + content[8 : 8 + old].ljust(wanted) + content[8 + old :])
    assert len(read_lora(path).denoiser) == 1


def test_damaged_tensors_refuse_the_whole_file_and_name_the_layer(tmp_path):
    good = kohya("lora_unet_mid_block_attentions_0_proj_in", *pair(6, 4))
    layer = ATTENTION.removeprefix("lora_unet_")
    cases = {
        "but no lora_up": {f"{ATTENTION}.lora_down.weight": random(2, 768)},
        "but no lora_down": {f"{ATTENTION}.lora_up.weight": random(6, 2), f"{ATTENTION}.alpha": torch.tensor(1.0)},
        "differ in rank": kohya(ATTENTION, random(2, 768), random(6, 3)),
        "mixes the tensors": kohya(ATTENTION, *pair(6, 768)) | {f"{ATTENTION}.diff": random(6, 768)},
        "holds an infinite number": kohya(ATTENTION, *pair(6, 768), float("inf")),
    }
    for reason, tensors in cases.items():
        message = refusal(saved(tmp_path, good | tensors))
        assert reason in message
        assert layer in message
    twice = kohya(ATTENTION, *pair(6, 768)) | peft("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", *pair(6, 768))
    assert "twice" in refusal(saved(tmp_path, twice))


KINDS = {
    "LoRA": {"lora_down.weight": (2, 768), "lora_up.weight": (6, 2), "alpha": ()},
    "LoRA with mid": {"lora_down.weight": (2, 768, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (6, 2, 1, 1)},
    "PEFT": {"lora_A.weight": (2, 768), "lora_B.weight": (6, 2), "lora_B.bias": (6,), "lora_magnitude_vector": (6,)},
    "LoHa": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 768), "hada_w2_a": (6, 2), "hada_w2_b": (2, 768)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 384)},
    "full": {"diff": (6, 768), "diff_b": (6,)},
    "norm": {"w_norm": (6,), "b_norm": (6,)},
    "DoRA": {"lora_down.weight": (2, 768), "lora_up.weight": (6, 2), "dora_scale": (6, 1)},
    "IA3": {"weight": (768,), "on_input": ()},
    "OFT": {"oft_blocks": (2, 3, 3), "rescale": (6, 1)},
    "old OFT": {"oft_diag": (2, 3, 3)},
    "BOFT": {"oft_blocks": (1, 3, 2, 2)},
    "GLoRA": {"a1.weight": (768, 2), "a2.weight": (2, 768), "b1.weight": (6, 2), "b2.weight": (2, 768)},
}


@pytest.mark.parametrize(("kind", "role"), [(kind, role) for kind, roles in KINDS.items() for role in roles])
def test_numbers_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path, kind, role):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k" if kind == "PEFT" else ATTENTION
    tensors = {f"{name}.{key}": torch.ones(()) if shape == () else random(*shape) for key, shape in KINDS[kind].items()}
    read_lora(saved(tmp_path, tensors))
    for bad, what in ((float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            broken = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            broken[f"{name}.{role}"].reshape(-1)[-1] = bad
            message = refusal(saved(tmp_path, broken))
            assert f"its tensor {name}.{role} holds" in message
            assert what in message


def test_a_text_encoders_numbers_must_be_finite_too(tmp_path):
    down, up = pair(6, 4)
    up[3, 1] = float("nan")
    assert f"{TEXT}.lora_up.weight" in refusal(saved(tmp_path, kohya(ATTENTION, *pair(6, 768)) | kohya(TEXT, down, up)))
    torch.save(kohya(TEXT, down, up), tmp_path / "dog.pt")
    assert f"{TEXT}.lora_up.weight" in refusal(tmp_path / "dog.pt")


def test_large_finite_numbers_are_read(tmp_path):
    """Their sum is beyond the largest number of the type."""
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        down, up = (torch.full(shape, torch.finfo(dtype).max, dtype=dtype) for shape in ((2, 768), (6, 2)))
        assert len(read_lora(saved(tmp_path, kohya(ATTENTION, down, up))).denoiser) == 1


def test_one_wrong_shape_among_a_base_models_own_is_a_damaged_file(tmp_path):
    tensors = whole_file(SD1)
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors |= kohya(name, torch.ones(1, 320), torch.ones(640, 1))
    message = refusal(saved(tmp_path, tensors))
    assert "input_blocks_4_1_transformer_blocks_0_attn1_to_q" in message
    assert "640 × 320, where SD 1.x has 640 × 640" in message


def test_a_model_of_other_widths_is_not_refused_for_them(tmp_path):
    layers = [f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn2_to_{x}" for block in (1, 2, 4, 5) for x in "kv"]
    tensors = {key: tensor for layer in layers for key, tensor in kohya(layer, *pair(32, 768)).items()}
    file = read_lora(saved(tmp_path, tensors))
    assert file.family == SD1
    assert len(file.denoiser) == 8
