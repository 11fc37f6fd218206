"""Base models: the layers they have, and which of them a LoRA was made for.

The layer tables are generated from the models' published configurations (Stable Diffusion v1-inference.yaml and
v2-inference-v.yaml, SDXL's sd_xl_base.yaml, FLUX.1's configs in `flux/util.py`). They serve reports and recognition. Whether a
LoRA fits a model at hand is decided by that model's own layers, which may differ (pruned models, small test models).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from .naming import Alias, denoiser_aliases

SD1, SD2, SDXL, FLUX = "SD 1.x", "SD 2.x", "SDXL", "Flux"
FAMILIES = (SD1, SD2, SDXL, FLUX)

# Width of the text embedding, the input of attn2.to_k and attn2.to_v.
_CONTEXT = {768: SD1, 1024: SD2, 2048: SDXL}
_FLUX_WIDTH = 3072

Shape = tuple[int, ...]


@cache
def reference_layers(family: str) -> Mapping[str, Shape]:
    """Dotted layer names (LDM or BFL scheme) of a base model's denoiser, with the shapes of their weights."""
    if family == FLUX:
        return dict(_flux(_FLUX_WIDTH, double=19, single=38))
    if family == SDXL:
        return dict(_unet((1, 2, 4), depth=(0, 2, 10), middle_depth=10, context=2048, vector=2816, linear=True))
    context = {SD1: 768, SD2: 1024}[family]
    return dict(_unet((1, 2, 4, 4), depth=(1, 1, 1, 0), middle_depth=1, context=context, vector=None, linear=family == SD2))


@cache
def reference_aliases(family: str) -> Mapping[str, list[Alias]]:
    """Every flat name that a dialect may use for a layer of this base model."""
    return denoiser_aliases(reference_layers(family))


def _unet(
    multipliers: tuple[int, ...], depth: tuple[int, ...], middle_depth: int, context: int, vector: int | None, linear: bool
) -> Iterator[tuple[str, Shape]]:
    """The U-Net of LDM's openaimodel.py: two residual blocks per level, 320 channels at the first.

    depth: transformer blocks per attention block, by level; vector: width of SDXL's size and pooled-text embedding;
    linear: whether proj_in and proj_out are linear layers or 1 x 1 convolutions.
    """
    width, residuals = 320, 2
    embedding = 4 * width

    def residual(path: str, old: int, new: int) -> Iterator[tuple[str, Shape]]:
        yield f"{path}.in_layers.0", (old,)
        yield f"{path}.in_layers.2", (new, old, 3, 3)
        yield f"{path}.emb_layers.1", (new, embedding)
        yield f"{path}.out_layers.0", (new,)
        yield f"{path}.out_layers.3", (new, new, 3, 3)
        if old != new:
            yield f"{path}.skip_connection", (new, old, 1, 1)

    def attention(path: str, channels: int, blocks: int) -> Iterator[tuple[str, Shape]]:
        projection = (channels, channels) if linear else (channels, channels, 1, 1)
        yield f"{path}.norm", (channels,)
        yield f"{path}.proj_in", projection
        for index in range(blocks):
            block = f"{path}.transformer_blocks.{index}"
            for number, source in ((1, channels), (2, context)):
                yield f"{block}.attn{number}.to_q", (channels, channels)
                yield f"{block}.attn{number}.to_k", (channels, source)
                yield f"{block}.attn{number}.to_v", (channels, source)
                yield f"{block}.attn{number}.to_out.0", (channels, channels)
            yield f"{block}.ff.net.0.proj", (8 * channels, channels)
            yield f"{block}.ff.net.2", (channels, 4 * channels)
            for number in (1, 2, 3):
                yield f"{block}.norm{number}", (channels,)
        yield f"{path}.proj_out", projection

    yield "time_embed.0", (embedding, width)
    yield "time_embed.2", (embedding, embedding)
    if vector is not None:
        yield "label_emb.0.0", (embedding, vector)
        yield "label_emb.0.2", (embedding, embedding)
    yield "input_blocks.0.0", (width, 4, 3, 3)
    skips, channels, block = [width], width, 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(residuals):
            yield from residual(f"input_blocks.{block}.0", channels, multiplier * width)
            channels = multiplier * width
            if depth[level]:
                yield from attention(f"input_blocks.{block}.1", channels, depth[level])
            skips.append(channels)
            block += 1
        if level < len(multipliers) - 1:
            yield f"input_blocks.{block}.0.op", (channels, channels, 3, 3)
            skips.append(channels)
            block += 1
    yield from residual("middle_block.0", channels, channels)
    yield from attention("middle_block.1", channels, middle_depth)
    yield from residual("middle_block.2", channels, channels)
    block = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for index in range(residuals + 1):
            yield from residual(f"output_blocks.{block}.0", channels + skips.pop(), multiplier * width)
            channels = multiplier * width
            if depth[level]:
                yield from attention(f"output_blocks.{block}.1", channels, depth[level])
            if level and index == residuals:
                yield f"output_blocks.{block}.{2 if depth[level] else 1}.conv", (channels, channels, 3, 3)
            block += 1
    yield "out.0", (width,)
    yield "out.2", (4, width, 3, 3)


def _flux(width: int, double: int, single: int) -> Iterator[tuple[str, Shape]]:
    """FLUX.1 [dev], the guidance embedding included; heads of 128."""
    yield "img_in", (width, 64)
    yield "txt_in", (width, 4096)
    for name, source in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        yield f"{name}.in_layer", (width, source)
        yield f"{name}.out_layer", (width, width)
    for index in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            yield f"{block}_mod.lin", (6 * width, width)
            yield f"{block}_attn.qkv", (3 * width, width)
            yield f"{block}_attn.norm.query_norm", (128,)
            yield f"{block}_attn.norm.key_norm", (128,)
            yield f"{block}_attn.proj", (width, width)
            yield f"{block}_mlp.0", (4 * width, width)
            yield f"{block}_mlp.2", (width, 4 * width)
    for index in range(single):
        block = f"single_blocks.{index}"
        yield f"{block}.modulation.lin", (3 * width, width)
        yield f"{block}.linear1", (7 * width, width)
        yield f"{block}.linear2", (width, 5 * width)
        yield f"{block}.norm.query_norm", (128,)
        yield f"{block}.norm.key_norm", (128,)
    yield "final_layer.adaLN_modulation.1", (2 * width, width)
    yield "final_layer.linear", (64, width)


def recognise(layouts: Iterable[str], shapes: Mapping[str, Shape], text: Mapping[str, int | None]) -> str | None:
    """The base model that a LoRA was made for, or None if its layers do not tell.

    layouts: the schemes its denoiser layers are named in; shapes: flat layer name -> shape of the weight, where known;
    text: its text encoders ("te1", "te2", "t5") and their widths, None where unknown. Metadata is not asked: A1111's rule takes
    any file with metadata that is not marked SDXL or SD 2.x for SD 1.x.
    """
    layouts = set(layouts)
    if any(layout.startswith("Flux") for layout in layouts):
        # SD3's names in diffusers begin as Flux's do; its widths are 1536 and 2432.
        inputs = {shape[1] for name, shape in shapes.items() if name.endswith(("attn_to_q", "attn_to_k", "attn_to_v")) and len(shape) > 1}
        return None if inputs & {1536, 2432} else FLUX
    if layouts:
        context = Counter(shape[1] for name, shape in shapes.items() if name.endswith(("attn2_to_k", "attn2_to_v")) and len(shape) > 1)
        if context:
            known = _CONTEXT.get(context.most_common(1)[0][0])
            if known is not None:
                return known
        return _by_layout(shapes.keys(), text)
    if "t5" in text:
        return FLUX
    if "te2" in text:
        return SDXL
    return {768: None, 1024: SD2}.get(text.get("te1") or 0)


def _by_layout(names: Iterable[str], text: Mapping[str, int | None]) -> str | None:
    """What the names of a U-Net's layers tell by themselves: SDXL's second encoder, deep transformers and missing fourth level."""
    names = list(names)
    if "te2" in text or any(name.startswith(("label_emb", "add_embedding")) for name in names):
        return SDXL
    deep = any("_transformer_blocks_" in name and not name.split("_transformer_blocks_")[1].startswith("0_") for name in names)
    if deep:
        return SDXL
    if text.get("te1") == 1024:
        return SD2
    return None


__all__ = ["FAMILIES", "FLUX", "SD1", "SD2", "SDXL", "recognise", "reference_aliases", "reference_layers"]
