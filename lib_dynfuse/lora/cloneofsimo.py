"""cloneofsimo's LoRAs, the first there were: their tensors are numbered, "unet:0:down", in the order in which the program met the layers.

Which layers those are follows from the classes in the metadata and the structure of Stable Diffusion 1.x and 2.x; the shapes must agree.
The strength is in the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from ..printable import printable
from .families import SD1, SD2, reference_aliases, reference_layers
from .naming import KeyName, flat

_KEY = re.compile(r"(unet|text_encoder):(\d{1,5}):(up|down)")
# What its trainers take by default; "ResnetBlock2D" is its extended form.
_CLASSES = {"unet": ({"CrossAttention", "Attention", "GEGLU"}, {"CrossAttention", "Attention"}), "text_encoder": ({"CLIPAttention"},)}
_EMBEDDING = "<embed>"


def is_numbered(keys: Sequence[str]) -> bool:
    """Whether a file is of this kind."""
    return any(_KEY.fullmatch(key) for key in keys)


def names(keys: Sequence[str], metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, KeyName]:
    """What the keys say. shapes: of their tensors. Raises ValueError, with a reason, for another order than the usual one."""
    found: dict[str, KeyName] = {}
    numbers: dict[str, set[int]] = {"unet": set(), "text_encoder": set()}
    for key in keys:
        if match := _KEY.fullmatch(key):
            numbers[match[1]].add(int(match[2]))
        elif metadata.get(key) == _EMBEDDING:
            found[key] = KeyName("embedding", key, "", "")
    for part, used in numbers.items():
        if not used:
            continue
        _check_classes(part, metadata)
        layers = list(_unet(len(used)) if part == "unet" else _text_encoder(len(used)))
        if used != set(range(len(layers))):
            raise ValueError(
                f"it has {len(used)} layers of {_PARTS[part]}, which is no number that is known of Stable Diffusion 1.x or 2.x"
            )
        if part == "unet" and not any(_fit(layers, shapes, family.name) for family in (SD1, SD2)):
            raise ValueError("its layers have not the shapes of those of Stable Diffusion 1.x or 2.x in the usual order")
        component = "denoiser" if part == "unet" else "te1"
        for number, layer in enumerate(layers):
            for half in ("up", "down"):
                found[f"{part}:{number}:{half}"] = KeyName(component, flat(layer), half, "cloneofsimo", layer)
    return found


_PARTS = {"unet": "the U-Net", "text_encoder": "the text encoder"}


def _check_classes(part: str, metadata: Mapping[str, str]) -> None:
    text = metadata.get(part)
    if text is None:
        return
    try:
        classes = json.loads(text[:1000])
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or set(classes) not in _CLASSES[part]:
        raise ValueError(f"it changes other layers of {_PARTS[part]} than the usual ones: {printable(text, 80)}")


def _unet(count: int) -> Iterator[str]:
    """Layers in the order of diffusers before 0.12: the middle comes last, and a block's feed-forward between its attentions."""
    blocks = [f"down_blocks.{level}.attentions.{n}" for level in range(3) for n in range(2)]
    blocks += [f"up_blocks.{level}.attentions.{n}" for level in range(1, 4) for n in range(3)]
    blocks += ["mid_block.attentions.0"]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [f"attn1.{layer}" for layer in attention] + ["ff.net.0.proj"] + [f"attn2.{layer}" for layer in attention]
    if count == len(blocks) * 8:
        layers.remove("ff.net.0.proj")
    for block in blocks:
        yield from (f"{block}.transformer_blocks.0.{layer}" for layer in layers)


def _text_encoder(count: int) -> Iterator[str]:
    """CLIP's attention layers, in transformers' order; 12 blocks in Stable Diffusion 1.x, 23 in 2.x."""
    for block in range(23 if count == 23 * 4 else 12):
        yield from (f"text_model.encoder.layers.{block}.self_attn.{layer}_proj" for layer in ("k", "v", "q", "out"))


def _fit(layers: Sequence[str], shapes: Mapping[str, tuple[int, ...]], family: str) -> bool:
    weights, aliases = reference_layers(family), reference_aliases(family)
    for number, layer in enumerate(layers):
        rows, columns = weights[aliases[flat(layer)][0].site.layer][:2]
        up, down = (shapes.get(f"unet:{number}:{half}", ()) for half in ("up", "down"))
        if len(up) != 2 or len(down) != 2 or (up[0], down[1]) != (rows, columns):
            return False
    return True


__all__ = ["is_numbered", "names"]
