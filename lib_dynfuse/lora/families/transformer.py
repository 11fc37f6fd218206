"""Diffusion transformers: blocks in stacks, named in the authors' scheme and in diffusers'.

A layer that is fused in one scheme and split in the other (query, key and value) is several sites in both, so that the same LoRA gives
the same image in every dialect and layout. How a fused layer is divided follows from the shapes of the model at hand, where they are
known, and else from the published model.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..naming import Alias, Part, Site, flat
from .family import Evidence, Family, Layers, Shape, either, part_label

AUTHORS, DIFFUSERS = "authors", "diffusers"
_SD3_WIDTHS = {1536, 2432}


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind. name, other: of their list in the authors' scheme and in diffusers'. kind: what they are called ("double").

    layers: the authors' name of a layer inside a block -> diffusers'. fused: layers that consist of parts -> the parts' names and sizes, in
    units of any size. split: such a layer -> diffusers' layers, one for each part; one that stands in `layers` is fused there too.
    """

    name: str
    other: str
    kind: str
    layers: Mapping[str, str]
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def inner(self, scheme: str) -> list[str]:
        """Names of all layers inside a block."""
        if scheme == AUTHORS:
            return [*self.layers, *(name for name in self.fused if name not in self.layers)]
        return [*self.layers.values(), *(name for names in self.split.values() for name in names)]


class Transformer(Family):
    """A family whose denoiser is a transformer.

    width: of its features. ends: layers outside of the blocks, the authors' name -> diffusers'. halves: the authors' and diffusers' name
    of a last modulation that is (shift, scale) in the one and (scale, shift) in the other. attention: query, key, value and output
    projections, by the authors' names; of a fused layer with other parts, q, k and v. marks: what trainers' metadata calls the family.
    """

    width: int
    stacks: tuple[Stack, ...]
    ends: Mapping[str, str]
    halves: tuple[str, str] | None = None
    attention: frozenset[str]
    marks: re.Pattern[str]

    @abstractmethod
    def scheme(self, layers: Layers) -> str | None:
        """AUTHORS or DIFFUSERS; None if the model's layers are not this family's."""

    def sizes(self, fused: Mapping[str, int], shape: Shape | None) -> Mapping[str, int]:
        """Sizes of a fused layer's parts, in units of any size. shape: of its weight, None where unknown."""
        return fused

    def rules_out(self, evidence: Evidence) -> bool:
        """Whether a file that fits by its layers is for another family nevertheless."""
        return False

    def certainty_by_text(self, text: Mapping[str, int | None]) -> int:
        """`certainty` of a file that changes text encoders only."""
        return 0

    def certainty(self, evidence: Evidence) -> int:
        """4 all layers have the published sizes, 3 nearly all have (the file is damaged), 2 its proportions (a model of another size).

        0 for a file with a layer that the published model has not, by number or by name.
        """
        if not evidence.shapes:
            return self.certainty_by_text(evidence.text)
        if not evidence.shapes.keys() <= self.published.keys() or self.rules_out(evidence):
            return 0
        told = {
            layer: (shape[0], math.prod(shape[1:]))
            for layer, shape in evidence.shapes.items()
            if shape is not None and len(self.published[layer]) == 2 and not self._varies(layer)
        }
        exact = sum(shape == self.published[layer] for layer, shape in told.items())
        if exact * 10 >= len(told) * 9 and exact:
            return 4 if exact == len(told) else 3
        return 2 if all(self._proportional(layer, shape) for layer, shape in told.items()) else 0

    def named_in(self, metadata: Mapping[str, str]) -> bool:
        keys = ("ss_base_model_version", "modelspec.architecture")
        return any(self.marks.match(metadata.get(key, "").lower()) is not None for key in keys)

    @cached_property
    def published(self) -> Mapping[str, Shape]:
        """Every flat name of the published model's layers, in any dialect, with the shape of the weight that it names."""
        layers = dict(self.layers())
        return {name: _named_shape(targets, layers) for name, targets in self.aliases(layers) or ()}

    def aliases(self, layers: Layers) -> Iterator[tuple[str, list[Alias]]] | None:
        scheme = self.scheme(layers)
        return None if scheme is None else self._of_authors(layers) if scheme == AUTHORS else self._of_diffusers(layers)

    def is_attention(self, site: Site) -> bool:
        inside, part = self._inside(site)
        return inside in self.attention and (part in (None, "q", "k", "v") if inside in self._only_attention else part in ("q", "k", "v"))

    def layer_label(self, site: Site) -> str | None:
        """ "layer 3 attention.q": diffusers' layers under the labels that the authors' have, so that pictures of both read alike."""
        block = self.block_label(site)
        if block is None:
            return None
        inside, part = self._inside(site)
        return f"{block} {self.inner_label(inside, part)}"

    def inner_label(self, inside: str, part: str | None) -> str:
        """Label of a layer inside a block, or outside of all, and of its part."""
        if inside.endswith(".qkv") and part:
            return f"{inside.removesuffix('qkv')}{part}"
        return f"{inside}.{part}" if part else inside

    @cached_property
    def _only_attention(self) -> frozenset[str]:
        """Layers of the attention that hold nothing else."""
        mixed = {name for stack in self.stacks for name, parts in stack.fused.items() if not parts.keys() <= {"q", "k", "v"}}
        return self.attention - mixed

    def _varies(self, layer: str) -> bool:
        return layer in {flat(name) for name in self.variable_inputs}

    def _proportional(self, layer: str, shape: Shape) -> bool:
        """Whether a layer inside a block is the published one of another width. Inputs of other widths do not grow with the model."""
        rows, columns = self.published[layer]
        inside = any(layer.startswith((f"{flat(stack.name)}_", f"{flat(stack.other)}_")) for stack in self.stacks)
        return not inside or columns < self.width or shape[0] * columns == shape[1] * rows

    def _found(self, name: str, scheme: str) -> tuple[Stack, str, str] | None:
        """(stack, number of the block, name inside the block) of a layer."""
        for stack in self.stacks:
            if found := re.fullmatch(rf"{re.escape(stack.name if scheme == AUTHORS else stack.other)}\.(\d+)\.(.+)", name):
                return stack, found[1], found[2]
        return None

    def _inside(self, site: Site) -> tuple[str, str | None]:
        """(the authors' name of a layer inside its block, or outside of all; name of the part), whichever scheme names the site."""
        for scheme in (AUTHORS, DIFFUSERS):
            if (found := self._found(site.layer, scheme)) is None:
                continue
            stack, _, inside = found
            names = {new: old for old, new in stack.layers.items()} if scheme == DIFFUSERS else {}
            for fused, layers in stack.split.items() if scheme == DIFFUSERS else ():
                if inside in layers:
                    return fused, list(stack.fused[fused])[layers.index(inside)]
            if scheme == AUTHORS and inside not in stack.inner(AUTHORS) and inside in stack.inner(DIFFUSERS):
                continue  # both schemes give the stack the same name
            inside = names.get(inside, inside)
            return inside, _part_name(stack.fused.get(inside, {}), site.part)
        if self.halves is not None and site.part is not None and site.layer in self.halves:
            order = ("shift", "scale") if site.layer == self.halves[0] else ("scale", "shift")
            return site.layer, order[site.part.start]
        return site.layer, _part_name({}, site.part)

    def _of_authors(self, layers: Layers) -> Iterator[tuple[str, list[Alias]]]:
        """A fused name denotes all of the layer's parts, a split name one of them."""
        for name, shape in layers.items():
            if self.halves is not None and name == self.halves[0]:
                yield from _swapped(name, self.halves[1])
                continue
            found = self._found(name, AUTHORS)
            if found is None:
                yield flat(name), [Alias(Site(name))]
                if name in self.ends:
                    yield flat(self.ends[name]), [Alias(Site(name))]
                continue
            stack, number, inside = found
            block = f"{stack.other}.{number}"
            if inside not in stack.fused:
                yield flat(name), [Alias(Site(name))]
            else:
                parts = parts_of(self.sizes(stack.fused[inside], shape))
                yield from _fused(name, parts, name, f"{block}.{stack.layers[inside]}" if inside in stack.layers else None)
                for new, part in zip(stack.split.get(inside, ()), parts.values()):
                    yield flat(f"{block}.{new}"), [Alias(Site(name, part))]
            if inside in stack.layers and inside not in stack.fused:
                yield flat(f"{block}.{stack.layers[inside]}"), [Alias(Site(name))]

    def _of_diffusers(self, layers: Layers) -> Iterator[tuple[str, list[Alias]]]:
        """Where a fused layer is split, its name denotes several layers, each with its part of the file's tensors."""
        ends = {new: old for old, new in self.ends.items()}
        blocks: dict[tuple[int, str], Stack] = {}
        for name, shape in layers.items():
            if self.halves is not None and name == self.halves[1]:
                yield from _swapped(name, self.halves[0])
                continue
            found = self._found(name, DIFFUSERS)
            if found is None:
                yield flat(name), [Alias(Site(name))]
                if name in ends:
                    yield flat(ends[name]), [Alias(Site(name))]
                continue
            stack, number, inside = found
            blocks[self.stacks.index(stack), number] = stack
            old = next((old for old, new in stack.layers.items() if new == inside), None)
            if old is not None and old in stack.fused:
                yield from _fused(name, parts_of(self.sizes(stack.fused[old], shape)), f"{stack.name}.{number}.{old}", name)
                continue
            yield flat(name), [Alias(Site(name))]
            if old is not None:
                yield flat(f"{stack.name}.{number}.{old}"), [Alias(Site(name))]
        for (_, number), stack in blocks.items():
            for fused, split in stack.split.items():
                paths = [f"{stack.other}.{number}.{new}" for new in split]
                parts = parts_of(self._split_sizes(stack.fused[fused], [layers.get(path) for path in paths]))
                present = {key: Site(path) for key, path in zip(parts, paths) if path in layers}
                path = flat(f"{stack.name}.{number}.{fused}")
                yield path, [Alias(site, parts[key]) for key, site in present.items()]
                if parts.keys() > {"q", "k", "v"}:
                    alone = parts_of({key: parts[key].length for key in "qkv"})
                    yield f"{path}_qkv", [Alias(site, alone[key]) for key, site in present.items() if key in alone]

    def _split_sizes(self, fused: Mapping[str, int], shapes: list[Shape | None]) -> Mapping[str, int]:
        known = [shape[0] for shape in shapes if shape is not None]
        return dict(zip(fused, known, strict=True)) if len(known) == len(fused) else fused


def parts_of(sizes: Mapping[str, int]) -> dict[str, Part]:
    """Parts that follow each other, by name. {"q": 24, "k": 8, "v": 8} is three fifths, a fifth and a fifth of the rows."""
    unit = math.gcd(*sizes.values())
    parts: dict[str, Part] = {}
    start, total = 0, sum(sizes.values()) // unit
    for name, size in sizes.items():
        parts[name] = Part(start, size // unit, total)
        start += size // unit
    return parts


def layouts_of(
    authors: str, diffusers: str, stacks: Iterable[Stack], ends: Mapping[str, str], halves: tuple[str, ...] = ()
) -> dict[str, re.Pattern[str]]:
    """The layouts of a family (Family.layouts). authors, diffusers: what the two schemes are called."""
    patterns: dict[str, re.Pattern[str]] = {}
    for position, (scheme, name) in enumerate(((AUTHORS, authors), (DIFFUSERS, diffusers))):
        outside = [*(ends if scheme == AUTHORS else ends.values()), *halves[position : position + 1]]
        inside = []
        for stack in stacks:
            partial = [f"{fused}.qkv" for fused, parts in stack.fused.items() if parts.keys() > {"q", "k", "v"}]
            names = [*stack.inner(scheme), *(partial if scheme == AUTHORS else [])]
            inside.append(rf"{flat(stack.name if scheme == AUTHORS else stack.other)}_\d+_{either(names)}")
        patterns[name] = re.compile("|".join([*inside, either(outside)]))
    return patterns


def within_of(stacks: Iterable[Stack], ends: Mapping[str, str]) -> re.Pattern[str]:
    """Flat names of everything that lies in a module of a family, whether the family has such a layer or not."""
    tops = {name for stack in stacks for name in (stack.name, stack.other)}
    tops |= {name.split(".", 1)[0] for pair in ends.items() for name in pair}
    return re.compile(rf"{either(sorted(tops, key=len, reverse=True))}(?:_.+)?")


def named_as_sd3(evidence: Evidence) -> bool:
    """SD 3's layers in diffusers have names and proportions that Flux's have; its widths are others."""
    return bool(_SD3_WIDTHS.intersection(evidence.input_widths(("attn_to_q", "attn_to_k", "attn_to_v", "attn_add_q_proj"))))


def _named_shape(targets: list[Alias], layers: Mapping[str, Shape]) -> Shape:
    """Shape of the weight that a flat name stands for: the rows of all sites that it denotes."""
    whole = [layers[alias.site.layer] for alias in targets]
    rows = [shape[0] if alias.site.part is None else alias.site.part.rows(shape[0])[1] for alias, shape in zip(targets, whole)]
    return (sum(rows), *whole[0][1:])


def _swapped(name: str, other: str) -> Iterator[tuple[str, list[Alias]]]:
    halves = Part(0, 1, 2), Part(1, 1, 2)
    yield flat(name), [Alias(Site(name, half), half) for half in halves]
    yield flat(other), [Alias(Site(name, half), source) for half, source in zip(halves, reversed(halves))]


def _fused(name: str, parts: Mapping[str, Part], authors: str, other: str | None) -> Iterator[tuple[str, list[Alias]]]:
    """A layer that is fused in the model, under its names; XLabs names q, k and v of a layer that holds more."""
    for one in dict.fromkeys((authors, other or authors)):
        yield flat(one), [Alias(Site(name, part), part) for part in parts.values()]
    if parts.keys() > {"q", "k", "v"}:
        alone = parts_of({key: parts[key].length for key in "qkv"})
        yield f"{flat(authors)}_qkv", [Alias(Site(name, parts[key]), alone[key]) for key in alone]


def _part_name(names: Mapping[str, int], part: Part | None) -> str | None:
    """A part's name, whatever its size: what follows from the order of the parts."""
    if part is None:
        return None
    order = list(names)
    if not order:
        return part_label(part)
    if part.start == 0:
        return order[0]
    if part.start + part.length == part.units:
        return order[-1]
    return order[min(part.start // part.length, len(order) - 2)]


__all__ = ["AUTHORS", "DIFFUSERS", "Stack", "Transformer", "layouts_of", "named_as_sd3", "parts_of", "within_of"]
