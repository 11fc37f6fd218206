"""Base-model families, and the questions that are asked of whichever family a layer or a file belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from ..naming import Alias, Site, flat
from .family import Encoder, Evidence, Family, Shape, part_label
from .flux import FLUX
from .sd import SD1, SD2
from .sdxl import SDXL

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL, FLUX)
"""Every known family, in the order in which they are asked."""


def family(name: str) -> Family:
    """The family of this name (LoraFile.family)."""
    return next(known for known in FAMILIES if known.name == name)


@cache
def reference_layers(name: str) -> Mapping[str, Shape]:
    """Dotted layer names of a family's published denoiser, in the scheme of its authors, with the shapes of their weights."""
    return dict(family(name).layers())


@cache
def reference_aliases(name: str) -> Mapping[str, list[Alias]]:
    """Every flat name that a dialect may use for a layer of this family's published denoiser."""
    return denoiser_aliases(reference_layers(name))


def recognise(layouts: Iterable[str], shapes: Mapping[str, Shape], text: Mapping[str, int | None]) -> str | None:
    """Name of the family that a LoRA was made for, or None if its layers do not tell. Arguments: see Evidence."""
    known_layouts = frozenset(layouts)
    # Layers of no known scheme say nothing, whatever their names end in.
    evidence = Evidence(known_layouts, shapes if known_layouts else {}, text)
    asked = [known for known in FAMILIES if not evidence.layouts or evidence.layouts & known.layouts.keys()]
    surest = max(asked, key=lambda known: known.certainty(evidence), default=None)
    return surest.name if surest is not None and surest.certainty(evidence) else None


def denoiser_aliases(layers: Iterable[str]) -> dict[str, list[Alias]]:
    """Every flat name under which some dialect may name a layer of this model, with the sites it denotes.

    layers: dotted module paths relative to the denoiser, of one of the known schemes; modules without weights do no harm.
    A model of an unknown scheme gets its own names only.
    """
    names = list(dict.fromkeys(layers))
    found = next((pairs for known in FAMILIES if (pairs := known.aliases(names)) is not None), None)
    aliases: dict[str, list[Alias]] = {}
    for name, targets in found if found is not None else ((flat(name), [Alias(Site(name))]) for name in names):
        aliases.setdefault(name, targets)
    return aliases


def layout_of(layer: str) -> str | None:
    """The scheme a denoiser's flat name belongs to, whatever the model's size; None for a name of no known scheme."""
    return next((layout for known in FAMILIES for layout, pattern in known.layouts.items() if pattern.fullmatch(layer)), None)


def sharing(layouts: Iterable[str]) -> list[Family]:
    """The families whose layers may be named in one of these schemes."""
    wanted = set(layouts)
    return [known for known in FAMILIES if wanted & known.layouts.keys()]


def is_kernel(layer: str) -> bool:
    """Whether a denoiser's layer of this flat name is a 3 x 3 convolution."""
    return any(known.kernels.fullmatch(layer) for known in FAMILIES)


def is_norm(layer: str) -> bool:
    """Whether a layer of this flat name, of a denoiser or a text encoder, is a normalisation layer."""
    return any(known.norms.fullmatch(layer) or any(e.norms.fullmatch(layer) for e in known.encoders.values()) for known in FAMILIES)


def has_variable_input(layer: str) -> bool:
    """Whether the input width of this layer (dotted) differs between variants of one base model, such as inpainting models."""
    return any(layer in known.variable_inputs for known in FAMILIES)


def text_encoder(component: str, name: str | None = None) -> Encoder:
    """The text encoder that a component ("te1", "te2", "t5") is in the family of this name; in the first that has it without one."""
    families = FAMILIES if name is None else (family(name), *FAMILIES)
    return next(known.encoders[component] for known in families if component in known.encoders)


def known_text_layer(component: str, layer: str) -> bool:
    """Whether a text encoder of this kind has such a layer, whatever its size."""
    return any(encoder.layers.fullmatch(layer) for known in FAMILIES if (encoder := known.encoders.get(component)) is not None)


def is_attention(site: Site) -> bool:
    """Whether the site is a query, key, value or output projection of an attention, in any scheme."""
    return any(known.is_attention(site) for known in FAMILIES)


def block_label(site: Site) -> str:
    """Short name of the block a site lies in, for pictures: "in 4", "mid", "out 5", "down 1", "up 2", "double 0", "single 3"."""
    return next((label for known in FAMILIES if (label := known.block_label(site))), site.layer.split(".", 1)[0])


def layer_label(site: Site) -> str:
    """Name of a site for reports and pictures: "in 4.1 attn2.k", "down 1 attentions.0 attn2.k", "double 0 img.q", "single 3 mlp"."""
    if label := next((label for known in FAMILIES if (label := known.layer_label(site))), None):
        return label
    part = part_label(site.part)
    return f"{block_label(site)} {site.layer}{'.' + part if part else ''}"


__all__ = [
    "FAMILIES",
    "FLUX",
    "SD1",
    "SD2",
    "SDXL",
    "Encoder",
    "Evidence",
    "Family",
    "Shape",
    "block_label",
    "denoiser_aliases",
    "family",
    "has_variable_input",
    "is_attention",
    "is_kernel",
    "is_norm",
    "known_text_layer",
    "layer_label",
    "layout_of",
    "recognise",
    "reference_aliases",
    "reference_layers",
    "sharing",
    "text_encoder",
]
