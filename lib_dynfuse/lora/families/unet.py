"""U-Nets of Stable Diffusion: what SD 1.x, SD 2.x and SDXL share.

Two schemes name their layers: LDM's and SGM's ("input_blocks.4.1...") and diffusers' ("down_blocks.1.attentions.0..."). Both are
read from the structure that the names show, so a U-Net may have any number of levels, residual blocks and transformer blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..naming import Alias, Site, flat
from .family import Evidence, Family, Layers, Shape, either

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

_BLOCK_OF_TRANSFORMER = r"transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_0_proj|ff_net_2|norm[123])"
_ATTENTION = rf"(?:norm|proj_in|proj_out|{_BLOCK_OF_TRANSFORMER})"
_LAYOUTS = {
    "LDM names": re.compile(
        rf"(?:(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_(?:{_ATTENTION}|{either(_RESIDUAL)}|op|conv)|{either(_UNET_ENDS)}"
    ),
    "diffusers names": re.compile(
        rf"(?:(?:down|up)_blocks_\d+|mid_block)_(?:attentions_\d+_{_ATTENTION}|resnets_\d+_{either(_RESIDUAL.values())}|"
        rf"(?:down|up)samplers_0_conv)|{either(_UNET_ENDS.values())}"
    ),
}

_SYNONYMS = {"m": "mid", "middle": "mid"}


class UNet(Family):
    """A family whose denoiser is LDM's U-Net (openaimodel.py): two residual blocks per level, 320 channels at the first.

    multipliers: of the channels, by level; depth: transformer blocks per attention block, by level; context: width of the text
    embedding, the input of attn2.to_k and attn2.to_v; linear: whether proj_in and proj_out are linear layers or 1 x 1 convolutions;
    vector: width of SDXL's size and pooled-text embedding.
    """

    multipliers: tuple[int, ...]
    depth: tuple[int, ...]
    middle_depth: int
    context: int
    linear: bool
    vector: int | None = None

    kind = "a U-Net (SD 1.x, SD 2.x or SDXL)"
    unrecognised = "a U-Net; neither its names nor its sizes tell which"
    layouts = _LAYOUTS
    kernels = re.compile(
        r"(?:(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_(?:in_layers_2|out_layers_3|op|conv)|input_blocks_0_0|out_2|"
        r"(?:(?:down|up)_blocks_\d+|mid_block)_(?:resnets_\d+_conv[12]|(?:down|up)samplers_0_conv)|conv_in|conv_out"
    )
    norms = re.compile(r"(?:.*_)?(?:norm\d?|in_layers_0|out_layers_0|conv_norm_out|out_0)")
    variable_inputs = frozenset({"input_blocks.0.0", "conv_in"})
    labels = (
        (re.compile(r"input_blocks\.(\d+)(?:\.|$)"), "in {}"),
        (re.compile(r"output_blocks\.(\d+)(?:\.|$)"), "out {}"),
        (re.compile(r"(?:middle_block|mid_block)(?:\.|$)"), "mid"),
        (re.compile(r"down_blocks\.(\d+)(?:\.|$)"), "down {}"),
        (re.compile(r"up_blocks\.(\d+)(?:\.|$)"), "up {}"),
        (re.compile(r"(?:time_embed|time_embedding|label_emb|add_embedding)(?:\.|$)"), "embed"),
        (re.compile(r"conv_in(?:\.|$)"), "first"),
        (re.compile(r"(?:out|conv_norm_out|conv_out)(?:\.|$)"), "last"),
    )
    flow = ("embed", "in", "mid", "out", "last")
    block_synonyms = _SYNONYMS

    def certainty(self, evidence: Evidence) -> int:
        width = Counter(evidence.input_widths(("attn2_to_k", "attn2_to_v"))).most_common(1)
        return 3 if width and width[0][0] == self.context else self.hint(evidence)

    def hint(self, evidence: Evidence) -> int:
        """`certainty` of a file whose cross-attention does not have this family's width."""
        return 0

    def aliases(self, layers: Layers) -> Iterator[tuple[str, list[Alias]]] | None:
        names = list(layers)
        scheme = _scheme(names)
        return None if scheme is None else _renamed(names, ldm_to_diffusers(names) if scheme == "LDM" else diffusers_to_ldm(names))

    def authors_names(self, names: Sequence[str]) -> Mapping[str, str]:
        return diffusers_to_ldm(names) if _scheme(names) == "diffusers" else super().authors_names(names)

    def is_attention(self, site: Site) -> bool:
        return re.search(r"\.attn[12]\.to_(?:q|k|v|out\.0)$", site.layer) is not None

    def layer_label(self, site: Site) -> str | None:
        """ "in 4.1 attn2.k", "down 1 attentions.0 attn2.k"; transformer blocks but the first are counted: "in 7.1 #3 attn2.k"."""
        block = self.block_label(site)
        found = re.match(
            r"(?:input|output)_blocks\.\d+\.(\d+)(?:\.(.+))?$|(?:down|up)_blocks\.\d+\.(.+)$|(?:middle|mid)_block\.(.+)$", site.layer
        )
        if found is None:
            return super().layer_label(site)
        if found[1] is not None:
            return f"{block}.{found[1]} {_inner_label(found[2] or '')}".rstrip()
        return f"{block} {_inner_label(found[3] or found[4])}"

    def layers(self) -> Iterator[tuple[str, Shape]]:
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
            projection = (channels, channels) if self.linear else (channels, channels, 1, 1)
            yield f"{path}.norm", (channels,)
            yield f"{path}.proj_in", projection
            for index in range(blocks):
                block = f"{path}.transformer_blocks.{index}"
                for number, source in ((1, channels), (2, self.context)):
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
        if self.vector is not None:
            yield "label_emb.0.0", (embedding, self.vector)
            yield "label_emb.0.2", (embedding, embedding)
        yield "input_blocks.0.0", (width, 4, 3, 3)
        skips, channels, block = [width], width, 1
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(residuals):
                yield from residual(f"input_blocks.{block}.0", channels, multiplier * width)
                channels = multiplier * width
                if self.depth[level]:
                    yield from attention(f"input_blocks.{block}.1", channels, self.depth[level])
                skips.append(channels)
                block += 1
            if level < len(self.multipliers) - 1:
                yield f"input_blocks.{block}.0.op", (channels, channels, 3, 3)
                skips.append(channels)
                block += 1
        yield from residual("middle_block.0", channels, channels)
        yield from attention("middle_block.1", channels, self.middle_depth)
        yield from residual("middle_block.2", channels, channels)
        block = 0
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for index in range(residuals + 1):
                yield from residual(f"output_blocks.{block}.0", channels + skips.pop(), multiplier * width)
                channels = multiplier * width
                if self.depth[level]:
                    yield from attention(f"output_blocks.{block}.1", channels, self.depth[level])
                if level and index == residuals:
                    yield f"output_blocks.{block}.{2 if self.depth[level] else 1}.conv", (channels, channels, 3, 3)
                block += 1
        yield "out.0", (width,)
        yield "out.2", (4, width, 3, 3)


def _scheme(names: Sequence[str]) -> str | None:
    first = {name.split(".", 1)[0] for name in names}
    return "LDM" if "input_blocks" in first else "diffusers" if "down_blocks" in first else None


def _inner_label(rest: str) -> str:
    rest = rest.replace(".to_out.0", ".out").replace(".to_", ".")
    if found := re.fullmatch(r"(?:(.+)\.)?transformer_blocks\.(\d+)\.(.+)", rest):
        number = "" if found[2] == "0" else f"#{found[2]}"
        return " ".join(word for word in (found[1], number, found[3]) if word)
    return rest


def _renamed(names: Sequence[str], other: Mapping[str, str]) -> Iterator[tuple[str, list[Alias]]]:
    """Each layer under its own name and under its name in the other scheme."""
    for name in names:
        target = [Alias(Site(name))]
        yield flat(name), target
        if name in other:
            yield flat(other[name]), target


def ldm_to_diffusers(names: Sequence[str]) -> dict[str, str]:
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


def _middle(names: Sequence[str], stack: str) -> dict[str, str]:
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


def diffusers_to_ldm(names: Sequence[str]) -> dict[str, str]:
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


__all__ = ["UNet", "diffusers_to_ldm", "ldm_to_diffusers"]
