"""Lumina 2 and Z-Image: one stack of layers behind two small ones, which refine the noise and the caption.

Query, key and value are fused in the authors' scheme and split in diffusers'. Lumina shares keys and values among three heads each, so
that its parts are unequal. The two name their modulations differently, and diffusers has another scheme for each. Layers and sizes:
Forge Neo's backend/nn/lumina.py and huggingface_guess/detection.py, sd-scripts' library/lumina_models.py, diffusers'
transformer_lumina2.py, transformer_z_image.py and loaders/single_file_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .encoders import GEMMA2
from .family import Layers, Shape
from .transformer import AUTHORS, DIFFUSERS, Stack, Transformer, layouts_of, within_of

_INSIDE = re.compile(r"(?:layers|noise_refiner|context_refiner)\.\d+\.(.+)")


def _stacks(
    layers: Mapping[str, str], modulated: Mapping[str, str], unmodulated: Mapping[str, str], fused: Mapping[str, int], attention: str
) -> tuple[Stack, ...]:
    """layers: in every block; modulated, unmodulated: in blocks with a modulation and without. fused: the parts of the fused layer."""
    split = {"attention.qkv": tuple(f"{attention}.to_{letter}" for letter in "qkv")}
    kinds = (("context_refiner", "context", unmodulated), ("noise_refiner", "noise", modulated), ("layers", "layer", modulated))
    return tuple(Stack(name, name, kind, {**layers, **own}, {"attention.qkv": fused}, split) for name, kind, own in kinds)


_FEED_FORWARD = ("w1", "w2", "w3")
_Z_STACKS = _stacks(
    {
        "attention.out": "attention.to_out.0",
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
        **{f"feed_forward.{name}": f"feed_forward.{name}" for name in _FEED_FORWARD},
        **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
    },
    {"adaLN_modulation.0": "adaLN_modulation.0"},
    {},
    {"q": 1, "k": 1, "v": 1},
    "attention",
)
_Z_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "cap_embedder.0": "cap_embedder.0",
    "cap_embedder.1": "cap_embedder.1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_LUMINA_STACKS = _stacks(
    {
        "attention.out": "attn.to_out.0",
        "attention.q_norm": "attn.norm_q",
        "attention.k_norm": "attn.norm_k",
        **{f"feed_forward.{name}": f"feed_forward.{name.replace('w', 'linear_')}" for name in _FEED_FORWARD},
        "attention_norm2": "norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
    },
    {"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"},
    {"attention_norm1": "norm1"},
    {"q": 3, "k": 1, "v": 1},
    "attn",
)
_LUMINA_ENDS = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.linear": "norm_out.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
}
_Z_LAYOUTS = layouts_of("Lumina names", "Z-Image diffusers names", _Z_STACKS, _Z_ENDS)
_LUMINA_LAYOUTS = layouts_of("Lumina names", "Lumina diffusers names", _LUMINA_STACKS, _LUMINA_ENDS)
_ENCODERS = {"te1": GEMMA2}
_KOHYA_TEXT = {"te1": "lora_te_"}
_Z_METADATA = {"ss_base_model_version": "zimage", "modelspec.architecture": "z-image/lora"}
_LUMINA_METADATA = {"ss_base_model_version": "lumina2", "modelspec.architecture": "lumina-2/lora"}
_SYNONYMS = {"clip": "base", "c": "context", "n": "noise", "l": "layer"}


class NextDiT(Transformer):
    """A family of Lumina's kind.

    depth: of the main stack; two refining blocks of each kind. head: width of an attention's head. keys: rows of the keys, and of the
    values. feed_forward: width of the feed-forward's middle. modulation: its layer's place in the block, "adaLN_modulation.0". embedding:
    width of what the modulations are made from. text: width of what the text encoder gives.
    """

    depth: int
    head: int
    keys: int
    feed_forward: int
    modulation: str
    embedding: int
    text: int

    kind = "a Lumina 2 or Z-Image model"
    unrecognised = "a transformer whose layers are named as Lumina's"
    attention = frozenset({"attention.qkv", "attention.out"})
    norms = re.compile(r"(?:.*_)?(?:norm\d?|norm_[qk]|norm1_norm)|cap_embedder_0|time_caption_embed_caption_embedder_0")
    labels = (
        (re.compile(r"layers\.(\d+)(?:\.|$)"), "layer {}"),
        (re.compile(r"noise_refiner\.(\d+)(?:\.|$)"), "noise {}"),
        (re.compile(r"context_refiner\.(\d+)(?:\.|$)"), "context {}"),
        (re.compile(r"(?:t_embedder|time_caption_embed\.timestep_embedder)(?:\.|$)"), "embed"),
        (re.compile(r"(?:x_embedder|all_x_embedder|cap_embedder|time_caption_embed\.caption_embedder)(?:\.|$)"), "first"),
        (re.compile(r"(?:final_layer|all_final_layer|norm_out)(?:\.|$)"), "last"),
    )
    flow = ("embed", "first", "context", "noise", "layer", "last")
    block_synonyms = _SYNONYMS
    kohya_layout = "Lumina names"

    def layers(self) -> Iterator[tuple[str, Shape]]:
        width = self.width
        yield "t_embedder.mlp.0", (1024, 256)
        yield "t_embedder.mlp.2", (self.embedding, 1024)
        yield "x_embedder", (width, 64)
        yield "cap_embedder.0", (self.text,)
        yield "cap_embedder.1", (width, self.text)
        for stack, depth in (("context_refiner", 2), ("noise_refiner", 2), ("layers", self.depth)):
            for index in range(depth):
                block = f"{stack}.{index}"
                yield f"{block}.attention.qkv", (width + 2 * self.keys, width)
                yield f"{block}.attention.out", (width, width)
                yield f"{block}.attention.q_norm", (self.head,)
                yield f"{block}.attention.k_norm", (self.head,)
                yield f"{block}.feed_forward.w1", (self.feed_forward, width)
                yield f"{block}.feed_forward.w2", (width, self.feed_forward)
                yield f"{block}.feed_forward.w3", (self.feed_forward, width)
                for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                    yield f"{block}.{name}", (width,)
                if stack != "context_refiner":
                    yield f"{block}.{self.modulation}", (4 * width, self.embedding)
        yield "final_layer.adaLN_modulation.1", (width, self.embedding)
        yield "final_layer.linear", (64, width)

    def sizes(self, fused: Mapping[str, int], shape: Shape | None) -> Mapping[str, int]:
        """The queries are as wide as the model; keys and values share the other rows."""
        if shape is None or shape[0] <= shape[1] or (shape[0] - shape[1]) % 2:
            return fused
        rest = (shape[0] - shape[1]) // 2
        return {"q": shape[1], "k": rest, "v": rest}


class _Lumina2(NextDiT):
    name = "Lumina 2"
    width, depth, head, keys, feed_forward = 2304, 26, 96, 768, 9216
    modulation, embedding, text = "adaLN_modulation.1", 1024, 2304
    stacks = _LUMINA_STACKS
    ends = _LUMINA_ENDS
    layouts = _LUMINA_LAYOUTS
    within = within_of(_LUMINA_STACKS, _LUMINA_ENDS)
    encoders = _ENCODERS
    kohya_text = _KOHYA_TEXT
    metadata = _LUMINA_METADATA
    marks = re.compile(r"(?:neta[-_ ]?)?lumina")

    def scheme(self, layers: Layers) -> str | None:
        inside = _inside(layers)
        if inside.keys() & {"attn.to_q", "attn.to_k", "attn.to_v", "feed_forward.linear_1"}:
            return DIFFUSERS
        fused = inside.get("attention.qkv")
        unequal = fused is not None and fused[0] != 3 * fused[1]
        return AUTHORS if "attention.qkv" in inside and ("adaLN_modulation.1" in inside or unequal) else None


class _ZImage(NextDiT):
    name = "Z-Image"
    width, depth, head, keys, feed_forward = 3840, 30, 128, 3840, 10240
    modulation, embedding, text = "adaLN_modulation.0", 256, 2560
    stacks = _Z_STACKS
    ends = _Z_ENDS
    layouts = _Z_LAYOUTS
    within = within_of(_Z_STACKS, _Z_ENDS)
    metadata = _Z_METADATA
    marks = re.compile(r"z[-_ ]?image")

    def scheme(self, layers: Layers) -> str | None:
        inside = _inside(layers)
        if inside.keys() & {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"}:
            return DIFFUSERS
        return AUTHORS if "attention.qkv" in inside and LUMINA2.scheme(layers) is None else None


def _inside(layers: Layers) -> dict[str, Shape | None]:
    """Names inside the blocks, with a shape of each where one is known."""
    found: dict[str, Shape | None] = {}
    for name, shape in layers.items():
        if match := _INSIDE.fullmatch(name):
            found[match[1]] = found.get(match[1]) or shape
    return found


LUMINA2, Z_IMAGE = _Lumina2(), _ZImage()

__all__ = ["LUMINA2", "Z_IMAGE", "NextDiT"]
