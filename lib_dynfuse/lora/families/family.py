"""What is known of a family of base models, in one object: everything that depends on the model which a LoRA was made for.

A new family is one file with one object, added to FAMILIES in __init__.py.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..naming import Alias, Part, Site, flat

Shape = tuple[int, ...]
Layers = Mapping[str, Shape | None]
"""A model's dotted layer names, with the shapes of their weights where known."""


@dataclass(frozen=True)
class Encoder:
    """A kind of text encoder. name: for reports. layers, norms: flat names of its layers, whatever its size."""

    name: str
    layers: re.Pattern[str]
    norms: re.Pattern[str]


@dataclass(frozen=True)
class Evidence:
    """What a LoRA file shows of the base model that it was made for.

    layouts: the schemes its denoiser layers are named in; shapes: flat layer name -> shape of the weight, None where unknown, of all
    layers that lie in a module of a known family; text: its text encoders ("te1", "te2", "t5") and their widths, None where unknown.
    Metadata is no evidence, as A1111's rule takes any file with metadata that is not marked SDXL or SD 2.x for SD 1.x: it only decides
    between families that fit alike.
    """

    layouts: frozenset[str]
    shapes: Mapping[str, Shape | None]
    text: Mapping[str, int | None]

    def input_widths(self, endings: tuple[str, ...]) -> list[int]:
        """Input widths of the layers whose flat names end so."""
        return [shape[1] for name, shape in self.shapes.items() if shape is not None and name.endswith(endings) and len(shape) > 1]


_NOTHING = re.compile(r"(?!)")
_NONE: Mapping[Any, Any] = {}


class Family(ABC):
    """A family of base models. What has a default here need not be given by a family that has no such thing.

    name: "SDXL"; it is LoraFile.family. kind, unrecognised: for sentences about files of one of the families that share its layouts.
    layouts: scheme -> the flat names that it may give to the denoiser's layers, whatever the model's size. The published model
    (`layers`) serves reports and recognition; whether a LoRA fits a model at hand is decided by that model's own layers.
    within: flat names of all that lies in a module of this family, layers that it does not have included.
    relatives: names of families whose LoRAs are used on this one's models as well.
    labels: beginning of a dotted layer name -> label of its block: "in 4", "mid".
    flow: the kinds of its blocks ("in", "mid") in the order in which data meets them; blocks of one kind are numbered in that order.
    kohya_layout: the layout in which sd-scripts names the layers. kernels, norms: flat names of the 3 x 3 convolutions and of the
    normalisation layers.
    variable_inputs: dotted names of layers whose input widths differ between variants of one base model (inpainting, control).
    encoders: the text encoders, under "te1" (CLIP-L, or the only CLIP), "te2" (CLIP-G), "t5"; kohya_text: how sd-scripts' keys of each
    begin. metadata: what sd-scripts' metadata says of the base model.
    smallest: side in pixels of the smallest square picture that the published model still draws well.
    forms, presets, block_synonyms, text_blocks: see Blocks; the names are those of the published model's blocks.
    """

    name: str
    kind: str
    unrecognised: str
    layouts: Mapping[str, re.Pattern[str]]
    labels: tuple[tuple[re.Pattern[str], str], ...]
    flow: tuple[str, ...]
    kohya_layout: str
    within: re.Pattern[str] = _NOTHING
    relatives: frozenset[str] = frozenset()
    kernels: re.Pattern[str] = _NOTHING
    norms: re.Pattern[str] = _NOTHING
    variable_inputs: frozenset[str] = frozenset()
    encoders: Mapping[str, Encoder] = _NONE
    kohya_text: Mapping[str, str] = _NONE
    metadata: Mapping[str, str] = _NONE
    forms: Mapping[int, tuple[str, ...]] = _NONE
    presets: Mapping[str, tuple[str, ...]] = _NONE
    block_synonyms: Mapping[str, str] = _NONE
    text_blocks: tuple[str, ...] = ()
    smallest: int = 512

    @abstractmethod
    def layers(self) -> Iterator[tuple[str, Shape]]:
        """Dotted names of the published denoiser's layers, in the scheme of its authors, with the shapes of their weights."""

    @abstractmethod
    def certainty(self, evidence: Evidence) -> int:
        """How surely a file was made for this family: 0 no sign of it, 1 a hint, 2 by names, 3 by widths, 4 no other is possible.

        Asked only if the file's denoiser layers, where it has any, are named in a scheme of this family.
        """

    @abstractmethod
    def aliases(self, layers: Layers) -> Iterator[tuple[str, list[Alias]]] | None:
        """Every flat name under which a dialect may name a layer of a model, with the sites it denotes.

        None if the layers are not in a scheme of this family. Works from the structure that the names show, so that a model of another
        size is served too.
        """

    @abstractmethod
    def is_attention(self, site: Site) -> bool:
        """Whether the site is a query, key, value or output projection of an attention, in any scheme of the family."""

    def named_in(self, metadata: Mapping[str, str]) -> bool:
        """Whether a file's metadata names this family."""
        return False

    def names(self, layer: str) -> bool:
        """Whether a scheme of this family may give a layer this flat name."""
        return any(pattern.fullmatch(layer) for pattern in self.layouts.values())

    def authors_names(self, names: Sequence[str]) -> Mapping[str, str]:
        """A model's dotted layer names -> the same in the scheme whose blocks are counted; containers of layers may be left out."""
        return {name: name for name in names}

    def blocks(self, names: Sequence[str]) -> dict[str, str] | None:
        """Layer -> its block as the authors' scheme numbers it ("in4", "mid", "double0"), whichever scheme names the layers.

        names: the model's dotted layer names; None if they are not in a scheme of this family. Layers outside of all blocks are left out.
        """
        if self.aliases(dict.fromkeys(names)) is None:
            return None
        labels = {name: self.block_label(Site(author)) for name, author in self.authors_names(names).items()}
        return {name: label.replace(" ", "") for name, label in labels.items() if label is not None}

    def layer_label(self, site: Site) -> str | None:
        """Name of a site for reports and pictures; it begins with `block_label`. None for a layer that is not this family's."""
        block, part = self.block_label(site), part_label(site.part)
        return None if block is None else f"{block} {site.layer}{'.' + part if part else ''}"

    def block_label(self, site: Site) -> str | None:
        """Short name of the block a site lies in, for pictures; None for a layer that is not this family's."""
        for pattern, label in self.labels:
            if found := pattern.match(site.layer):
                return label.format(*found.groups())
        return None

    def place(self, block: str) -> tuple[int, int]:
        """Sorts blocks into the order in which data meets them."""
        kind = block.rstrip("0123456789")
        return self.flow.index(kind), int(block[len(kind) :] or 0)


def either(paths: Iterable[str]) -> str:
    """A pattern of these paths as flat names."""
    return "(?:" + "|".join(re.escape(flat(path)) for path in paths) + ")"


def part_label(part: Part | None) -> str:
    """ "" for a whole layer, "0:1/3" for a part without a name of its own."""
    return "" if part is None else f"{part.start}:{part.start + part.length}/{part.units}"


__all__ = ["Encoder", "Evidence", "Family", "Layers", "Shape", "either", "part_label"]
