"""Layer names: the keys of LoRA files and the layers of models, brought together.

Files name layers in many dialects, and a kohya name ("lora_unet_down_blocks_1_...") cannot be split into a module path without
the model. So both sides meet in flat names: the layer's path in the file's or the model's own scheme, with "." replaced by "_".
A model's layer has one flat name per scheme that may name it; each is an alias of one or more sites.

Four schemes are known: LDM and SGM U-Nets ("input_blocks.4.1..."), diffusers' U-Nets ("down_blocks.1.attentions.0..."), Flux as
its authors published it ("double_blocks.0.img_attn.qkv", BFL here) and Flux in diffusers ("transformer_blocks.0.attn.to_q").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Output rows [start, start + length) of a layer, counted in units of total/units rows: q of a fused qkv is Part(0, 1, 3)."""

    start: int
    length: int
    units: int

    def rows(self, total: int) -> tuple[int, int]:
        """(first row, number of rows) in a layer of `total` output rows. Raises ValueError if they do not divide."""
        unit, rest = divmod(total, self.units)
        if rest:
            raise ValueError(f"{total} rows cannot be divided into {self.units} equal units")
        return self.start * unit, self.length * unit


@dataclass(frozen=True)
class Site:
    """A place where one decision is made: a layer of the model (dotted path), or a part of a fused layer.

    A fused layer (Flux's qkv and linear1) is always several sites, whichever dialect names it, so that the same LoRA gives
    the same image in every dialect and layout.
    """

    layer: str
    part: Part | None = None


@dataclass(frozen=True)
class Alias:
    """One site that a flat name denotes, and the part of the file's tensors that belongs to it (None: all)."""

    site: Site
    source: Part | None = None


@dataclass(frozen=True)
class KeyName:
    """What a key of a LoRA file says.

    component: "denoiser", "te1" (CLIP-L, and the only encoder of SD 1.x and 2.x), "te2" (CLIP-G), "t5" or "embedding".
    layer: flat name in the file's own scheme; the embedding's name for a bundled embedding.
    role: which tensor of the layer it is: "down", "up", "mid", "alpha", "hada_w1_a", ... ; "" for an embedding.
    style: how the dialect writes keys, for reports: "kohya", "PEFT", "diffusers (old)", "OneTrainer", "XLabs", "LyCORIS".
    """

    component: str
    layer: str
    role: str
    style: str


# The two halves of a U-Net's names that differ between the schemes; everything inside an attention block is the same in both.
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# Flux, BFL -> diffusers. A fused layer has one name per part; "^" stands for the block.
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_Q, _K, _V = (Part(i, 1, 3) for i in range(3))
_FLUX_QKV = {
    "img_attn.qkv": {"attn.to_q": _Q, "attn.to_k": _K, "attn.to_v": _V},
    "txt_attn.qkv": {"attn.add_q_proj": _Q, "attn.add_k_proj": _K, "attn.add_v_proj": _V},
}
# linear1 holds q, k, v and the MLP's first layer, which is four times as wide as the model.
_FLUX_LINEAR1 = {"attn.to_q": Part(0, 1, 7), "attn.to_k": Part(1, 1, 7), "attn.to_v": Part(2, 1, 7), "proj_mlp": Part(3, 4, 7)}
# The last modulation: (shift, scale) in BFL's layer, (scale, shift) in diffusers'.
_FLUX_SHIFT, _FLUX_SCALE = "final_layer.adaLN_modulation.1", "norm_out.linear"
_HALVES = (Part(0, 1, 2), Part(1, 1, 2))


def flat(path: str) -> str:
    """The flat name of a dotted path."""
    return path.replace(".", "_")


def denoiser_aliases(layers: Iterable[str]) -> dict[str, list[Alias]]:
    """Every flat name under which some dialect may name a layer of this model, with the sites it denotes.

    layers: dotted module paths relative to the denoiser, of one of the known schemes; modules without weights do no harm.
    Works from the structure that the names show, so a U-Net may have any number of levels, residual blocks and transformer
    blocks. A model of an unknown scheme gets its own names only.
    """
    names = list(dict.fromkeys(layers))
    first = {name.split(".", 1)[0] for name in names}
    aliases: dict[str, list[Alias]] = {}
    if first & {"double_blocks", "single_blocks"}:
        pairs = _flux_bfl(names)
    elif "single_transformer_blocks" in first or any(".attn.add_q_proj" in name for name in names):
        pairs = _flux_diffusers(names)
    elif "input_blocks" in first:
        pairs = _renamed(names, _ldm_to_diffusers(names))
    elif "down_blocks" in first:
        pairs = _renamed(names, _diffusers_to_ldm(names))
    else:
        pairs = _renamed(names, {})
    for name, targets in pairs:
        aliases.setdefault(name, targets)
    return aliases


def _renamed(names: list[str], other: dict[str, str]) -> Iterator[tuple[str, list[Alias]]]:
    """Each layer under its own name and under its name in the other scheme."""
    for name in names:
        target = [Alias(Site(name))]
        yield flat(name), target
        if name in other:
            yield flat(other[name]), target


def _ldm_to_diffusers(names: list[str]) -> dict[str, str]:
    """LDM path -> diffusers path. A level of the U-Net ends where its names show a resampling layer."""
    modules: dict[tuple[str, int, int], set[str]] = {}  # (stack, block, position in the block) -> what is inside
    pattern = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
    for name in names:
        if found := pattern.fullmatch(name):
            modules.setdefault((found[1], int(found[2]), int(found[3])), set()).add(found[4])
    renamed: dict[str, str] = {}
    for stack, prefix, resampling in (("input_blocks", "down_blocks", "op"), ("output_blocks", "up_blocks", "conv")):
        level = residual = 0
        for block in sorted({key[1] for key in modules if key[0] == stack}):
            ends_level = has_residual = False
            for (_, _, position), inside in sorted(item for item in modules.items() if item[0][:2] == (stack, block)):
                path = f"{stack}.{block}.{position}"
                if resampling in inside:
                    resampler = "downsamplers" if stack == "input_blocks" else "upsamplers"
                    renamed[f"{path}.{resampling}"] = f"{prefix}.{level}.{resampler}.0.conv"
                    ends_level = True
                elif any(name.startswith("in_layers.") for name in inside):
                    has_residual = True
                    for old, new in _RESIDUAL.items():
                        renamed[f"{path}.{old}"] = f"{prefix}.{level}.resnets.{residual}.{new}"
                else:
                    renamed.update({f"{path}.{name}": f"{prefix}.{level}.attentions.{residual}.{name}" for name in inside})
            if has_residual:
                residual += 1
            if ends_level:
                level, residual = level + 1, 0
    renamed.update(_middle(names, "middle_block"))
    renamed.update(_UNET_ENDS)
    return renamed


def _middle(names: list[str], stack: str) -> dict[str, str]:
    """Names of the middle block, which alternates residual and attention blocks, in the other scheme."""
    renamed: dict[str, str] = {}
    if stack == "middle_block":
        inside: dict[int, list[str]] = {}
        for name in names:
            if found := re.fullmatch(r"middle_block\.(\d+)\.(.+)", name):
                inside.setdefault(int(found[1]), []).append(found[2])
        counts = {"resnets": 0, "attentions": 0}
        for position, rest in sorted(inside.items()):
            kind = "resnets" if any(name.startswith("in_layers.") for name in rest) else "attentions"
            for name in rest:
                renamed[f"middle_block.{position}.{name}"] = f"mid_block.{kind}.{counts[kind]}.{_RESIDUAL.get(name, name)}"
            counts[kind] += 1
        return renamed
    back = {new: old for old, new in _RESIDUAL.items()}
    for name in names:
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            position = 2 * int(found[2]) + (found[1] == "attentions")
            renamed[name] = f"middle_block.{position}.{back.get(found[3], found[3])}"
    return renamed


def _diffusers_to_ldm(names: list[str]) -> dict[str, str]:
    """diffusers path -> LDM path, counting the blocks level by level."""
    resnets: dict[tuple[str, int], int] = {}
    attentions: set[tuple[str, int]] = set()
    resampled: set[tuple[str, int]] = set()
    pattern = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
    found = [(name, match) for name in names if (match := pattern.fullmatch(name))]
    for _, match in found:
        level = (match[1], int(match[2]))
        if match[3] == "resnets":
            resnets[level] = max(resnets.get(level, 0), int(match[4]) + 1)
        elif match[3] == "attentions":
            attentions.add(level)
        else:
            resampled.add(level)
    start: dict[tuple[str, int], int] = {}
    for side, block in (("down", 1), ("up", 0)):
        for level in sorted(key for key in resnets if key[0] == side):
            start[level] = block
            block += resnets[level] + (side == "down" and level in resampled)
    back = {new: old for old, new in _RESIDUAL.items()}
    renamed: dict[str, str] = {}
    for name, match in found:
        level = (match[1], int(match[2]))
        if level not in start:
            continue
        stack = "input_blocks" if match[1] == "down" else "output_blocks"
        last = start[level] + resnets[level]
        if match[3] == "resnets":
            renamed[name] = f"{stack}.{start[level] + int(match[4])}.0.{back.get(match[5], match[5])}"
        elif match[3] == "attentions":
            renamed[name] = f"{stack}.{start[level] + int(match[4])}.1.{match[5]}"
        elif match[1] == "down":
            renamed[name] = f"{stack}.{last}.0.op"
        else:
            renamed[name] = f"{stack}.{last - 1}.{2 if level in attentions else 1}.conv"
    renamed.update(_middle(names, "mid_block"))
    renamed.update({new: old for old, new in _UNET_ENDS.items()})
    return renamed


def _flux_bfl(names: list[str]) -> Iterator[tuple[str, list[Alias]]]:
    """Flux with fused layers: a fused name denotes all of the layer's parts, a split name one of them."""
    pattern = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
    for name in names:
        found = pattern.fullmatch(name)
        if name == _FLUX_SHIFT:
            first, second = (Site(name, half) for half in _HALVES)
            yield flat(name), [Alias(first, _HALVES[0]), Alias(second, _HALVES[1])]
            yield flat(_FLUX_SCALE), [Alias(first, _HALVES[1]), Alias(second, _HALVES[0])]
        elif found is None:
            yield flat(name), [Alias(Site(name))]
            if name in _FLUX_ENDS:
                yield flat(_FLUX_ENDS[name]), [Alias(Site(name))]
        elif found[3] in _FLUX_QKV or found[3] == "linear1":
            parts = _FLUX_LINEAR1 if found[3] == "linear1" else _FLUX_QKV[found[3]]
            yield flat(name), [Alias(Site(name, part), part) for part in parts.values()]
            block = f"{'single_' if found[1] == 'single' else ''}transformer_blocks.{found[2]}"
            for new, part in parts.items():
                yield flat(f"{block}.{new}"), [Alias(Site(name, part))]
            if found[3] == "linear1":
                yield f"{flat(name)}_qkv", [Alias(Site(name, parts[new]), _FLUX_QKV["img_attn.qkv"][new]) for new in list(parts)[:3]]
        else:
            yield flat(name), [Alias(Site(name))]
            new_name = (_FLUX_DOUBLE if found[1] == "double" else _FLUX_SINGLE).get(found[3])
            if new_name is not None:
                block = f"{'single_' if found[1] == 'single' else ''}transformer_blocks.{found[2]}"
                yield flat(f"{block}.{new_name}"), [Alias(Site(name))]


def _flux_diffusers(names: list[str]) -> Iterator[tuple[str, list[Alias]]]:
    """Flux with split layers: a fused name denotes several layers, each with its part of the file's tensors."""
    present = set(names)
    blocks: set[tuple[str, str]] = set()
    ends = {new: old for old, new in _FLUX_ENDS.items()}
    double, single = ({new: old for old, new in table.items()} for table in (_FLUX_DOUBLE, _FLUX_SINGLE))
    pattern = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
    for name in names:
        if name == _FLUX_SCALE:
            first, second = (Site(name, half) for half in _HALVES)
            yield flat(name), [Alias(first, _HALVES[0]), Alias(second, _HALVES[1])]
            yield flat(_FLUX_SHIFT), [Alias(first, _HALVES[1]), Alias(second, _HALVES[0])]
            continue
        yield flat(name), [Alias(Site(name))]
        if found := pattern.fullmatch(name):
            blocks.add((found[1] or "", found[2]))
            old = (single if found[1] else double).get(found[3])
            if old is not None:
                yield flat(f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{old}"), [Alias(Site(name))]
        elif name in ends:
            yield flat(ends[name]), [Alias(Site(name))]
    for prefix, index in sorted(blocks):
        block = f"{prefix}transformer_blocks.{index}"
        for fused, parts in ({"linear1": _FLUX_LINEAR1} if prefix else _FLUX_QKV).items():
            path = f"{'single' if prefix else 'double'}_blocks.{index}.{fused}"
            sites = {new: Site(f"{block}.{new}") for new in parts if f"{block}.{new}" in present}
            yield flat(path), [Alias(site, parts[new]) for new, site in sites.items()]
            if prefix:
                qkv = _FLUX_QKV["img_attn.qkv"]
                yield f"{flat(path)}_qkv", [Alias(site, qkv[new]) for new, site in sites.items() if new in qkv]


# Names of tensors within a layer, as they end a key. "down" and "lora_A" are one thing, and so are "up" and "lora_B".
_ROLES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?P<layer>.+)\.lora_(?P<role>down|up|mid)\.weight"), "kohya"),
    (re.compile(r"(?P<layer>.+)\.lora_(?P<role>A|B)(?:\.(?!weight|bias)[^.]+)?\.weight"), "PEFT"),
    (re.compile(r"(?P<layer>.+)\.lora_(?:B|up)(?:\.(?!weight|bias)[^.]+)?\.(?P<role>bias)"), "PEFT"),
    (re.compile(r"(?P<layer>.+)\.(?P<role>lora_magnitude_vector)(?:\.[^.]+)*"), "PEFT"),
    (re.compile(r"(?P<layer>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight"), "diffusers (old)"),
    (re.compile(r"(?P<layer>.+)[._]lora(?P<stream>[12]?)\.(?P<role>down|up)\.weight"), "diffusers (old)"),
    (re.compile(r"(?P<layer>.+?)(?:[._]lora(?P<stream>[12]?))?\.(?P<role>alpha|scale|dora_scale)"), ""),
    (re.compile(r"(?P<layer>.+)\.(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"), "LyCORIS"),
    (re.compile(r"(?P<layer>.+)\.(?P<role>diff|diff_b|w_norm|b_norm|on_input|oft_blocks|oft_diag|rescale)"), "LyCORIS"),
    (re.compile(r"(?P<layer>.+)\.(?P<role>a1|a2|b1|b2|bm)\.weight"), "LyCORIS"),
    # IA3 writes its vector as "weight". A checkpoint does so too: the reader takes it only beside an "on_input".
    (re.compile(r"(?P<layer>.+)\.(?P<role>weight)"), "LyCORIS"),
)
_ROLE_NAMES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude"}

# Beginnings of keys, with the part of the model they stand for. Longer ones first.
_TEXT_PREFIXES = {
    "lora_te_": "te1",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "t5",
    "oft_te_": "te1",
    "oft_te1_": "te1",
    "oft_te2_": "te2",
    "lycoris_te_": "te1",
    "lycoris_te1_": "te1",
    "lycoris_te2_": "te2",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "t5",
    "clip_l.transformer.": "te1",
    "clip_l.": "te1",
    "clip_g.transformer.": "te2",
    "clip_g.": "te2",
    "t5xxl.transformer.": "t5",
    "t5xxl.": "t5",
}
_DENOISER_PREFIXES = {
    "base_model.model.": "",
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    "unet.": "",
    "transformer.": "",
    "lora_unet_": "kohya",
    "oft_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
# Old diffusers files name a text encoder's attention layers as the U-Net's.
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out_0": "out_proj"}


def parse_key(key: str) -> KeyName | None:
    """What a key of a LoRA file says, or None for a key that no LoRA dialect has."""
    if key.startswith("bundle_emb."):
        return KeyName("embedding", key.split(".")[1], "", "")
    matches = ((found, style) for pattern, style in _ROLES if (found := pattern.fullmatch(key)))
    found, style = next(matches, (None, ""))
    if found is None:
        return None
    groups = found.groupdict()
    role = _ROLE_NAMES.get(groups["role"], groups["role"])
    component, path, prefix_style = _without_prefix(groups["layer"])
    if component != "denoiser":
        return KeyName(component, _text_layer(path), role, prefix_style or style)
    layer, layer_style = _denoiser_layer(path, groups.get("stream") or "")
    return KeyName(component, layer, role, layer_style or prefix_style or style)


def _without_prefix(path: str) -> tuple[str, str, str]:
    """(component, path without its prefixes, style that a prefix shows). Prefixes may be doubled ("unet.unet.")."""
    style = ""
    while True:
        for prefix, component in _TEXT_PREFIXES.items():
            if path.startswith(prefix):
                rest = path[len(prefix) :].removeprefix("base_model.model.")
                # In files for Flux the second encoder is T5; its layers cannot be mistaken for CLIP's.
                if rest.startswith(("encoder.block.", "encoder_block_", "shared")):
                    component = "t5"
                return component, rest, "kohya" if prefix.endswith("_") else style
        for prefix, prefix_style in _DENOISER_PREFIXES.items():
            if path.startswith(prefix):
                path, style = path[len(prefix) :], prefix_style or style
                break
        else:
            break
    if path.startswith("text_model."):
        return "te1", path, style
    return "denoiser", path, style


def _text_layer(path: str) -> str:
    name = flat(path)
    if found := re.fullmatch(r"(.+_self_attn_)(to_(?:q|k|v|out|out_0))", name):
        return found[1] + _TEXT_ATTENTION[found[2]]
    return name


def _denoiser_layer(path: str, stream: str) -> tuple[str, str]:
    """(flat name, style). stream: XLabs' "1" for the image's and "2" for the text's half of a double block."""
    if found := re.fullmatch(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)", path):
        if found[1] == "double":
            return f"double_blocks_{found[2]}_{'txt' if stream == '2' else 'img'}_attn_{found[3]}", "XLabs"
        return f"single_blocks_{found[2]}_{'linear1_qkv' if found[3] == 'qkv' else 'linear2'}", "XLabs"
    old = ".processor." in path
    name = flat(path.replace(".processor.", "."))
    # diffusers' old attention processors name the output layer without its place in the Sequential.
    if name.endswith(("attn1_to_out", "attn2_to_out", "attn_to_out")):
        name += "_0"
    return name, "diffusers (old)" if old else ""


_BLOCK_OF_TRANSFORMER = r"transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_0_proj|ff_net_2|norm[123])"
_ATTENTION = rf"(?:norm|proj_in|proj_out|{_BLOCK_OF_TRANSFORMER})"


def _either(paths: Iterable[str]) -> str:
    return "(?:" + "|".join(flat(path) for path in paths) + ")"


_LAYOUTS = {
    "LDM names": re.compile(
        rf"(?:(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_(?:{_ATTENTION}|{_either(_RESIDUAL)}|op|conv)|{_either(_UNET_ENDS)}"
    ),
    "diffusers names": re.compile(
        rf"(?:(?:down|up)_blocks_\d+|mid_block)_(?:attentions_\d+_{_ATTENTION}|resnets_\d+_{_either(_RESIDUAL.values())}|"
        rf"(?:down|up)samplers_0_conv)|{_either(_UNET_ENDS.values())}"
    ),
    "Flux BFL names": re.compile(
        rf"double_blocks_\d+_{_either([*_FLUX_DOUBLE, *_FLUX_QKV])}|single_blocks_\d+_{_either([*_FLUX_SINGLE, 'linear1.qkv', 'linear1'])}|"
        rf"{_either([*_FLUX_ENDS, _FLUX_SHIFT])}"
    ),
    "Flux diffusers names": re.compile(
        rf"transformer_blocks_\d+_{_either([*_FLUX_DOUBLE.values(), *(new for parts in _FLUX_QKV.values() for new in parts)])}|"
        rf"single_transformer_blocks_\d+_{_either([*_FLUX_SINGLE.values(), *_FLUX_LINEAR1])}|{_either([*_FLUX_ENDS.values(), _FLUX_SCALE])}"
    ),
}
_TEXT_LAYOUTS = {
    "clip": re.compile(
        r"text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12]|layer_norm[12])|text_projection|"
        r"text_model_(?:final_layer_norm|embeddings_(?:token|position)_embedding)"
    ),
    "t5": re.compile(
        r"encoder_block_\d+_layer_[01]_(?:SelfAttention_(?:q|k|v|o|relative_attention_bias)|DenseReluDense_(?:wi|wi_0|wi_1|wo)|layer_norm)|"
        r"encoder_final_layer_norm|shared"
    ),
}


def layout_of(layer: str) -> str | None:
    """The scheme a denoiser's flat name belongs to, whatever the model's size; None for a name of no known scheme."""
    return next((layout for layout, pattern in _LAYOUTS.items() if pattern.fullmatch(layer)), None)


_KERNELS = re.compile(
    r"(?:(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_(?:in_layers_2|out_layers_3|op|conv)|input_blocks_0_0|out_2|"
    r"(?:(?:down|up)_blocks_\d+|mid_block)_(?:resnets_\d+_conv[12]|(?:down|up)samplers_0_conv)|conv_in|conv_out"
)


def is_kernel(layer: str) -> bool:
    """Whether a U-Net's layer of this flat name is a 3 × 3 convolution, as it is in every U-Net of the known schemes."""
    return _KERNELS.fullmatch(layer) is not None


def known_text_layer(component: str, layer: str) -> bool:
    """Whether a text encoder of this kind has such a layer, whatever its size."""
    return _TEXT_LAYOUTS["t5" if component == "t5" else "clip"].fullmatch(layer) is not None


def is_attention(site: Site) -> bool:
    """Whether the site is a query, key, value or output projection of an attention, in any scheme."""
    name = site.layer
    if re.search(r"\.attn[12]\.to_(?:q|k|v|out\.0)$", name):
        return True
    if re.search(r"\.(?:img|txt)_attn\.(?:qkv|proj)$", name):
        return True
    if name.startswith("single_blocks.") and name.endswith(".linear1"):
        return site.part is not None and site.part.start < 3
    return re.search(r"(?:^|\.)attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)$", name) is not None


_BLOCK_LABELS = (
    (re.compile(r"input_blocks\.(\d+)(?:\.|$)"), "in {}"),
    (re.compile(r"output_blocks\.(\d+)(?:\.|$)"), "out {}"),
    (re.compile(r"(?:middle_block|mid_block)(?:\.|$)"), "mid"),
    (re.compile(r"down_blocks\.(\d+)(?:\.|$)"), "down {}"),
    (re.compile(r"up_blocks\.(\d+)(?:\.|$)"), "up {}"),
    (re.compile(r"(?:single_blocks|single_transformer_blocks)\.(\d+)(?:\.|$)"), "single {}"),
    (re.compile(r"(?:double_blocks|transformer_blocks)\.(\d+)(?:\.|$)"), "double {}"),
    (re.compile(r"(?:time_embed|time_embedding|time_in|time_text_embed|vector_in|guidance_in|label_emb|add_embedding)(?:\.|$)"), "embed"),
    (re.compile(r"(?:conv_in|img_in|txt_in|x_embedder|context_embedder)(?:\.|$)"), "first"),
    (re.compile(r"(?:out|conv_norm_out|conv_out|final_layer|norm_out|proj_out)(?:\.|$)"), "last"),
)


def block_label(site: Site) -> str:
    """Short name of the block a site lies in, for pictures: "in 4", "mid", "out 5", "down 1", "up 2", "double 0", "single 3"."""
    for pattern, label in _BLOCK_LABELS:
        if found := pattern.match(site.layer):
            return label.format(*found.groups())
    return site.layer.split(".", 1)[0]


_PART_NAMES = {
    "linear1": {part: new.removeprefix("attn.").removeprefix("to_").removeprefix("proj_") for new, part in _FLUX_LINEAR1.items()},
    "qkv": {_Q: "q", _K: "k", _V: "v"},
    _FLUX_SHIFT: dict(zip(_HALVES, ("shift", "scale"), strict=True)),
    _FLUX_SCALE: dict(zip(_HALVES, ("scale", "shift"), strict=True)),
}


def layer_label(site: Site) -> str:
    """Name of a site for reports and pictures: "in 4.1 attn2.k", "down 1 attentions.0 attn2.k", "double 0 img.q", "single 3 mlp".

    A transformer block but the first of its attention block is counted: "in 7.1 #3 attn2.k".
    """
    block = block_label(site)
    part = _part_name(site)
    name = site.layer
    if found := re.match(r"(?:double|single)_blocks\.\d+\.(.+)", name):
        rest = found[1].replace("_attn.qkv", "").replace("_attn.", ".").replace("_", ".")
        if rest == "linear1" and part:
            return f"{block} {part}"
        return f"{block} {rest}{'.' + part if part else ''}"
    if found := re.match(r"(?:single_)?transformer_blocks\.\d+\.(.+)", name):
        return f"{block} {_flux_label(found[1], name.startswith('single'))}"
    if found := re.match(
        r"(?:input|output)_blocks\.\d+\.(\d+)(?:\.(.+))?$|(?:down|up)_blocks\.\d+\.(.+)$|(?:middle|mid)_block\.(.+)$", name
    ):
        if found[1] is not None:
            return f"{block}.{found[1]} {_inner_label(found[2] or '')}".rstrip()
        return f"{block} {_inner_label(found[3] or found[4])}"
    return f"{block} {name}{'.' + part if part else ''}"


def _part_name(site: Site) -> str:
    if site.part is None:
        return ""
    for ending, names in _PART_NAMES.items():
        if site.layer.endswith(ending) and site.part in names:
            return names[site.part]
    return f"{site.part.start}:{site.part.start + site.part.length}/{site.part.units}"


def _inner_label(rest: str) -> str:
    rest = rest.replace(".to_out.0", ".out").replace(".to_", ".")
    if found := re.fullmatch(r"(?:(.+)\.)?transformer_blocks\.(\d+)\.(.+)", rest):
        number = "" if found[2] == "0" else f"#{found[2]}"
        return " ".join(word for word in (found[1], number, found[3]) if word)
    return rest


def _flux_label(rest: str, single: bool) -> str:
    """A diffusers layer of Flux under the label that BFL's layer has, so that pictures of both layouts read alike."""
    table = _FLUX_SINGLE if single else _FLUX_DOUBLE
    parts = {"linear1": _FLUX_LINEAR1} if single else _FLUX_QKV
    for old, new in table.items():
        if new == rest:
            return old.replace("_attn.", ".").replace("_", ".")
    for fused, names in parts.items():
        if rest in names:
            part = _PART_NAMES["linear1" if single else "qkv"][names[rest]]
            return part if single else f"{fused.split('_')[0]}.{part}"
    return rest


__all__ = [
    "Alias",
    "KeyName",
    "Part",
    "Site",
    "block_label",
    "denoiser_aliases",
    "flat",
    "is_attention",
    "is_kernel",
    "known_text_layer",
    "layer_label",
    "layout_of",
    "parse_key",
]
