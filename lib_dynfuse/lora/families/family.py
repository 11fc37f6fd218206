"""What is known of a family of base models, in one object: everything that depends on the model which a LoRA was made for.

A new family is one file with one object, added to FAMILIES in __init__.py.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..naming import Alias, Part, Site, flat

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """A kind of text encoder. name: for reports. layers, norms: flat names of its layers, whatever its size."""

    name: str
    layers: re.Pattern[str]
    norms: re.Pattern[str]


@dataclass(frozen=True)
class Evidence:
    """What a LoRA file shows of the base model that it was made for.

    layouts: the schemes its denoiser layers are named in; shapes: flat layer name -> shape of the weight, where known;
    text: its text encoders ("te1", "te2", "t5") and their widths, None where unknown. Metadata is no evidence: A1111's rule takes
    any file with metadata that is not marked SDXL or SD 2.x for SD 1.x.
    """

    layouts: frozenset[str]
    shapes: Mapping[str, Shape]
    text: Mapping[str, int | None]

    def input_widths(self, endings: tuple[str, ...]) -> list[int]:
        """Input widths of the layers whose flat names end so."""
        return [shape[1] for name, shape in self.shapes.items() if name.endswith(endings) and len(shape) > 1]


class Family(ABC):
    """A family of base models.

    name: "SDXL"; it is LoraFile.family. kind, unrecognised: for sentences about files of one of the families that share its layouts.
    layouts: scheme -> the flat names that it may give to the denoiser's layers, whatever the model's size. The published model
    (`layers`) serves reports and recognition; whether a LoRA fits a model at hand is decided by that model's own layers.
    kernels, norms: flat names of its 3 x 3 convolutions and of its normalisation layers.
    variable_inputs: dotted names of layers whose input widths differ between variants of one base model (inpainting, control).
    encoders: its text encoders, under "te1" (CLIP-L, or the only CLIP), "te2" (CLIP-G), "t5".
    labels: beginning of a dotted layer name -> label of its block.
    """

    name: str
    kind: str
    unrecognised: str
    layouts: Mapping[str, re.Pattern[str]]
    kernels: re.Pattern[str]
    norms: re.Pattern[str]
    variable_inputs: frozenset[str]
    encoders: Mapping[str, Encoder]
    labels: tuple[tuple[re.Pattern[str], str], ...]

    @abstractmethod
    def layers(self) -> Iterator[tuple[str, Shape]]:
        """Dotted names of the published denoiser's layers, in the scheme of its authors, with the shapes of their weights."""

    @abstractmethod
    def certainty(self, evidence: Evidence) -> int:
        """How surely a file was made for this family: 0 no sign of it, 1 a hint, 2 by names, 3 by widths, 4 no other is possible.

        Asked only if the file's denoiser layers, where it has any, are named in a scheme of this family.
        """

    @abstractmethod
    def aliases(self, names: Sequence[str]) -> Iterator[tuple[str, list[Alias]]] | None:
        """Every flat name under which a dialect may name a layer of a model, with the sites it denotes.

        names: the model's dotted layer names; None if they are not in a scheme of this family. Works from the structure that the
        names show, so that a model of another size is served too.
        """

    @abstractmethod
    def is_attention(self, site: Site) -> bool:
        """Whether the site is a query, key, value or output projection of an attention, in any scheme of the family."""

    @abstractmethod
    def layer_label(self, site: Site) -> str | None:
        """Name of a site for reports and pictures; it begins with `block_label`. None for a layer that is not this family's."""

    def block_label(self, site: Site) -> str | None:
        """Short name of the block a site lies in, for pictures; None for a layer that is not this family's."""
        for pattern, label in self.labels:
            if found := pattern.match(site.layer):
                return label.format(*found.groups())
        return None


def either(paths: Iterable[str]) -> str:
    """A pattern of these paths as flat names."""
    return "(?:" + "|".join(flat(path) for path in paths) + ")"


def part_label(part: Part | None) -> str:
    """ "" for a whole layer, "0:1/3" for a part without a name of its own."""
    return "" if part is None else f"{part.start}:{part.start + part.length}/{part.units}"


__all__ = ["Encoder", "Evidence", "Family", "Shape", "either", "part_label"]
