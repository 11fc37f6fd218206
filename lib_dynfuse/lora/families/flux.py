"""Flux (FLUX.1 by Black Forest Labs), in two schemes: as its authors published it ("double_blocks.0.img_attn.qkv", BFL here) and
in diffusers ("transformer_blocks.0.attn.to_q").

A fused layer (qkv, linear1) is several sites in both, so that the same LoRA gives the same image in every dialect and layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..naming import Alias, Part, Site, flat
from .encoders import CLIP_L, T5
from .family import Evidence, Family, Shape, either, part_label

# BFL -> diffusers. A fused layer has one name per part.
_DOUBLE = {
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
_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_ENDS = {
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
_QKV = {
    "img_attn.qkv": {"attn.to_q": _Q, "attn.to_k": _K, "attn.to_v": _V},
    "txt_attn.qkv": {"attn.add_q_proj": _Q, "attn.add_k_proj": _K, "attn.add_v_proj": _V},
}
# linear1 holds q, k, v and the MLP's first layer, which is four times as wide as the model.
_LINEAR1 = {"attn.to_q": Part(0, 1, 7), "attn.to_k": Part(1, 1, 7), "attn.to_v": Part(2, 1, 7), "proj_mlp": Part(3, 4, 7)}
# The last modulation: (shift, scale) in BFL's layer, (scale, shift) in diffusers'.
_SHIFT, _SCALE = "final_layer.adaLN_modulation.1", "norm_out.linear"
_HALVES = (Part(0, 1, 2), Part(1, 1, 2))

_PART_NAMES = {
    "linear1": {part: new.removeprefix("attn.").removeprefix("to_").removeprefix("proj_") for new, part in _LINEAR1.items()},
    "qkv": {_Q: "q", _K: "k", _V: "v"},
    _SHIFT: dict(zip(_HALVES, ("shift", "scale"), strict=True)),
    _SCALE: dict(zip(_HALVES, ("scale", "shift"), strict=True)),
}
_SD3_WIDTHS = {1536, 2432}
_LAYOUTS = {
    "Flux BFL names": re.compile(
        rf"double_blocks_\d+_{either([*_DOUBLE, *_QKV])}|single_blocks_\d+_{either([*_SINGLE, 'linear1.qkv', 'linear1'])}|"
        rf"{either([*_ENDS, _SHIFT])}"
    ),
    "Flux diffusers names": re.compile(
        rf"transformer_blocks_\d+_{either([*_DOUBLE.values(), *(new for parts in _QKV.values() for new in parts)])}|"
        rf"single_transformer_blocks_\d+_{either([*_SINGLE.values(), *_LINEAR1])}|{either([*_ENDS.values(), _SCALE])}"
    ),
}
_ENCODERS = {"te1": CLIP_L, "t5": T5}

# sd-webui-lora-block-weight's 61 numbers: CLIP, T5, IN, D00 to D18, S00 to S37, OUT.
_FORMS = {
    61: ("base", "t5", "embed-first", *(f"double{n}" for n in range(19)), *(f"single{n}" for n in range(38)), "last"),
}
_PRESETS = {"DOUBLE": ("base", "t5", "double0-double18"), "SINGLE": ("base", "t5", "single0-single37")}
_KOHYA_TEXT = {"te1": "lora_te1_", "t5": "lora_te3_"}
_METADATA = {"ss_base_model_version": "flux1", "ss_v2": "False", "modelspec.architecture": "flux-1-dev/lora"}
_SYNONYMS = {"clip": "base", "d": "double", "s": "single"}


class Flux(Family):
    """A family whose denoiser has Flux's double and single blocks. width: of its features; double, single: numbers of blocks."""

    width: int
    double: int
    single: int

    kind = "a Flux model"
    unrecognised = "a transformer whose layers are named as Flux's"
    layouts = _LAYOUTS
    norms = re.compile(r"(?:.*_)?(?:(?:query|key)_norm|norm_(?:added_)?[qk])")
    variable_inputs = frozenset({"img_in", "x_embedder"})
    encoders = _ENCODERS
    labels = (
        (re.compile(r"(?:double_blocks|transformer_blocks)\.(\d+)(?:\.|$)"), "double {}"),
        (re.compile(r"(?:single_blocks|single_transformer_blocks)\.(\d+)(?:\.|$)"), "single {}"),
        (re.compile(r"(?:time_in|time_text_embed|vector_in|guidance_in)(?:\.|$)"), "embed"),
        (re.compile(r"(?:img_in|txt_in|x_embedder|context_embedder)(?:\.|$)"), "first"),
        (re.compile(r"(?:final_layer|norm_out|proj_out)(?:\.|$)"), "last"),
    )
    flow = ("embed", "first", "double", "single", "last")
    block_synonyms = _SYNONYMS
    text_blocks = ("t5",)
    kohya_layout = "Flux BFL names"
    kohya_text = _KOHYA_TEXT

    def layers(self) -> Iterator[tuple[str, Shape]]:
        """As of FLUX.1 [dev], the guidance embedding included; heads of 128."""
        width = self.width
        yield "img_in", (width, 64)
        yield "txt_in", (width, 4096)
        for name, source in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
            yield f"{name}.in_layer", (width, source)
            yield f"{name}.out_layer", (width, width)
        for index in range(self.double):
            for stream in ("img", "txt"):
                block = f"double_blocks.{index}.{stream}"
                yield f"{block}_mod.lin", (6 * width, width)
                yield f"{block}_attn.qkv", (3 * width, width)
                yield f"{block}_attn.norm.query_norm", (128,)
                yield f"{block}_attn.norm.key_norm", (128,)
                yield f"{block}_attn.proj", (width, width)
                yield f"{block}_mlp.0", (4 * width, width)
                yield f"{block}_mlp.2", (width, 4 * width)
        for index in range(self.single):
            block = f"single_blocks.{index}"
            yield f"{block}.modulation.lin", (3 * width, width)
            yield f"{block}.linear1", (7 * width, width)
            yield f"{block}.linear2", (width, 5 * width)
            yield f"{block}.norm.query_norm", (128,)
            yield f"{block}.norm.key_norm", (128,)
        yield "final_layer.adaLN_modulation.1", (2 * width, width)
        yield "final_layer.linear", (64, width)

    def certainty(self, evidence: Evidence) -> int:
        if not evidence.layouts:
            return 4 if "t5" in evidence.text else 0
        # SD3's names in diffusers begin as Flux's do.
        return 0 if _SD3_WIDTHS.intersection(evidence.input_widths(("attn_to_q", "attn_to_k", "attn_to_v"))) else 4

    def aliases(self, names: Sequence[str]) -> Iterator[tuple[str, list[Alias]]] | None:
        scheme = _scheme(names)
        return None if scheme is None else _bfl_aliases(names) if scheme == "BFL" else _diffusers_aliases(names)

    def is_attention(self, site: Site) -> bool:
        name = site.layer
        if re.search(r"\.(?:img|txt)_attn\.(?:qkv|proj)$", name):
            return True
        if name.startswith("single_blocks.") and name.endswith(".linear1"):
            return site.part is not None and site.part.start < 3
        return re.search(r"(?:^|\.)attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)$", name) is not None

    def layer_label(self, site: Site) -> str | None:
        """ "double 0 img.q", "single 3 mlp": diffusers' layers under the labels that BFL's have, so that pictures of both read alike."""
        block, name, part = self.block_label(site), site.layer, _part_name(site)
        if block is None:
            return None
        if found := re.match(r"(?:double|single)_blocks\.\d+\.(.+)", name):
            rest = found[1].replace("_attn.qkv", "").replace("_attn.", ".").replace("_", ".")
            if rest == "linear1" and part:
                return f"{block} {part}"
            return f"{block} {rest}{'.' + part if part else ''}"
        if found := re.match(r"(?:single_)?transformer_blocks\.\d+\.(.+)", name):
            return f"{block} {_bfl_label(found[1], name.startswith('single'))}"
        return f"{block} {name}{'.' + part if part else ''}"


class _Flux1(Flux):
    name = "Flux"
    width, double, single = 3072, 19, 38
    forms = _FORMS
    presets = _PRESETS
    metadata = _METADATA


FLUX = _Flux1()


def _scheme(names: Sequence[str]) -> str | None:
    first = {name.split(".", 1)[0] for name in names}
    if first & {"double_blocks", "single_blocks"}:
        return "BFL"
    return "diffusers" if "single_transformer_blocks" in first or any(".attn.add_q_proj" in name for name in names) else None


def _part_name(site: Site) -> str:
    for ending, names in _PART_NAMES.items():
        if site.layer.endswith(ending) and site.part in names:
            return names[site.part]
    return part_label(site.part)


def _bfl_label(rest: str, single: bool) -> str:
    """A diffusers layer under the label that BFL's layer has."""
    table = _SINGLE if single else _DOUBLE
    parts = {"linear1": _LINEAR1} if single else _QKV
    for old, new in table.items():
        if new == rest:
            return old.replace("_attn.", ".").replace("_", ".")
    for fused, names in parts.items():
        if rest in names:
            part = _PART_NAMES["linear1" if single else "qkv"][names[rest]]
            return part if single else f"{fused.split('_')[0]}.{part}"
    return rest


def _bfl_aliases(names: Sequence[str]) -> Iterator[tuple[str, list[Alias]]]:
    """Flux with fused layers: a fused name denotes all of the layer's parts, a split name one of them."""
    pattern = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
    for name in names:
        found = pattern.fullmatch(name)
        if name == _SHIFT:
            first, second = (Site(name, half) for half in _HALVES)
            yield flat(name), [Alias(first, _HALVES[0]), Alias(second, _HALVES[1])]
            yield flat(_SCALE), [Alias(first, _HALVES[1]), Alias(second, _HALVES[0])]
        elif found is None:
            yield flat(name), [Alias(Site(name))]
            if name in _ENDS:
                yield flat(_ENDS[name]), [Alias(Site(name))]
        elif found[3] in _QKV or found[3] == "linear1":
            parts = _LINEAR1 if found[3] == "linear1" else _QKV[found[3]]
            yield flat(name), [Alias(Site(name, part), part) for part in parts.values()]
            block = f"{'single_' if found[1] == 'single' else ''}transformer_blocks.{found[2]}"
            for new, part in parts.items():
                yield flat(f"{block}.{new}"), [Alias(Site(name, part))]
            if found[3] == "linear1":
                yield f"{flat(name)}_qkv", [Alias(Site(name, parts[new]), _QKV["img_attn.qkv"][new]) for new in list(parts)[:3]]
        else:
            yield flat(name), [Alias(Site(name))]
            new_name = (_DOUBLE if found[1] == "double" else _SINGLE).get(found[3])
            if new_name is not None:
                block = f"{'single_' if found[1] == 'single' else ''}transformer_blocks.{found[2]}"
                yield flat(f"{block}.{new_name}"), [Alias(Site(name))]


def _diffusers_aliases(names: Sequence[str]) -> Iterator[tuple[str, list[Alias]]]:
    """Flux with split layers: a fused name denotes several layers, each with its part of the file's tensors."""
    present = set(names)
    blocks: set[tuple[str, str]] = set()
    ends = {new: old for old, new in _ENDS.items()}
    double, single = ({new: old for old, new in table.items()} for table in (_DOUBLE, _SINGLE))
    pattern = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
    for name in names:
        if name == _SCALE:
            first, second = (Site(name, half) for half in _HALVES)
            yield flat(name), [Alias(first, _HALVES[0]), Alias(second, _HALVES[1])]
            yield flat(_SHIFT), [Alias(first, _HALVES[1]), Alias(second, _HALVES[0])]
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
        for fused, parts in ({"linear1": _LINEAR1} if prefix else _QKV).items():
            path = f"{'single' if prefix else 'double'}_blocks.{index}.{fused}"
            sites = {new: Site(f"{block}.{new}") for new in parts if f"{block}.{new}" in present}
            yield flat(path), [Alias(site, parts[new]) for new, site in sites.items()]
            if prefix:
                qkv = _QKV["img_attn.qkv"]
                yield f"{flat(path)}_qkv", [Alias(site, qkv[new]) for new, site in sites.items() if new in qkv]


__all__ = ["FLUX", "Flux"]
