"""Layer names: the keys of LoRA files and the layers of models, brought together.

Files name layers in many dialects, and a kohya name ("lora_unet_down_blocks_1_...") cannot be split into a module path without
the model. So both sides meet in flat names: the layer's path in the file's or the model's own scheme, with "." replaced by "_".
A model's layer has one flat name per scheme that may name it; each is an alias of one or more sites. Which schemes there are, and how
they name each other's layers, is known to the families (families/).
"""

from __future__ import annotations

import re
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
    path: the layer as the file writes it, without the prefixes: dotted in the dialects that have dots.
    """

    component: str
    layer: str
    role: str
    style: str
    path: str = ""


def flat(path: str) -> str:
    """The flat name of a dotted path."""
    return path.replace(".", "_")


# The adapter's name, which PEFT leaves out of the files that it writes itself.
_ADAPTER = r"(?:\.(?!weight|bias)[^.]+)?"
# Names of tensors within a layer, as they end a key. "down" and "lora_A" are one thing, and so are "up" and "lora_B".
_ROLES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?P<layer>.+)\.lora_(?P<role>down|up|mid)\.weight"), "kohya"),
    (re.compile(rf"(?P<layer>.+)\.lora_(?P<role>A|B){_ADAPTER}\.weight"), "PEFT"),
    (re.compile(rf"(?P<layer>.+)\.lora_(?:B|up){_ADAPTER}\.(?P<role>bias)"), "PEFT"),
    (re.compile(r"(?P<layer>.+)\.(?P<role>lora_magnitude_vector)(?:\.[^.]+)*"), "PEFT"),
    (re.compile(rf"(?P<layer>.+)\.(?P<role>oft_r|oft_s|boft_R|boft_s|ia3_l){_ADAPTER}"), "PEFT"),
    (re.compile(rf"(?P<layer>.+)\.(?P<role>oft_R){_ADAPTER}\.weight"), "PEFT"),
    (re.compile(r"(?P<layer>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight"), "diffusers (old)"),
    (re.compile(r"(?P<layer>.+)[._]lora(?P<stream>[12]?)\.(?P<role>down|up)\.weight"), "diffusers (old)"),
    (re.compile(r"(?P<layer>.+?)(?:[._]lora(?P<stream>[12]?))?\.(?P<role>alpha|scale|dora_scale)"), ""),
    (re.compile(r"(?P<layer>.+)\.(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?"), "LyCORIS"),
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
    "model.": "",
    "module.": "",
    "pipe.": "",
    "dit.": "",
    "diffusion_model.": "",
    "unet.": "",
    "transformer.": "",
    "lora_unet_": "kohya",
    "oft_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
# What torch.compile and FSDP put into a layer's path, wherever they wrapped a module; kohya names have underscores there.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
_LONGEST = 1000
# What is put before the keys of every model.
_OF_ANY_MODEL = {"base_model.model.", "model.", "module.", "pipe."}
# A language model's layers begin with "model." as well, and keep it.
_LANGUAGE_MODEL = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.")
# Old diffusers files name a text encoder's attention layers as the U-Net's.
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out_0": "out_proj"}


def parse_key(key: str) -> KeyName | None:
    """What a key of a LoRA file says, or None for a key that no LoRA dialect has."""
    if len(key) > _LONGEST:
        return None
    if key.startswith("bundle_emb."):
        return KeyName("embedding", key.split(".")[1], "", "")
    matches = ((found, style) for pattern, style in _ROLES if (found := pattern.fullmatch(key)))
    found, style = next(matches, (None, ""))
    if found is None:
        return None
    groups = found.groupdict()
    role = _ROLE_NAMES.get(groups["role"], groups["role"])
    component, path, prefix_style = _without_prefix(_WRAPPERS.sub("", groups["layer"]))
    if component != "denoiser":
        return KeyName(component, _text_layer(path), role, prefix_style or style, path)
    layer, layer_style = _denoiser_layer(path, groups.get("stream") or "")
    return KeyName(component, layer, role, layer_style or prefix_style or style, path)


def names_denoiser(key: str) -> bool:
    """Whether a key of a LoRA file begins as only a denoiser's does. What PEFT puts before the keys of every model is not enough."""
    return key.removeprefix("base_model.model.").startswith(tuple(_DENOISER_PREFIXES.keys() - _OF_ANY_MODEL))


def _without_prefix(path: str) -> tuple[str, str, str]:
    """(component, path without its prefixes, style that a prefix shows). Prefixes may be doubled ("unet.unet.")."""
    style = ""
    while True:
        for prefix, component in _TEXT_PREFIXES.items():
            if path.startswith(prefix):
                rest = path[len(prefix) :].removeprefix("module.").removeprefix("base_model.model.")
                # In files for Flux the second encoder is T5; its layers cannot be mistaken for CLIP's.
                if rest.startswith(("encoder.block.", "encoder_block_", "shared")):
                    component = "t5"
                return component, rest, "kohya" if prefix.endswith("_") else style
        for prefix, prefix_style in _DENOISER_PREFIXES.items():
            if path.startswith(prefix) and not _LANGUAGE_MODEL.match(path):
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
    # sd-scripts ends the name of a layer that was wrapped with an underscore.
    name = flat(path.replace(".processor.", ".")).rstrip("_")
    # diffusers' old attention processors name the output layer without its place in the Sequential. Flux.2's single blocks have none.
    if name.endswith(("attn1_to_out", "attn2_to_out", "attn_to_out")) and not name.startswith("single_transformer_blocks_"):
        name += "_0"
    return name, "diffusers (old)" if old else ""


__all__ = ["Alias", "KeyName", "Part", "Site", "flat", "names_denoiser", "parse_key"]
