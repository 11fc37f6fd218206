"""Base-model families, and the questions that are asked of whichever family a layer or a file belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from ..naming import Alias, Site, flat
from .chroma import CHROMA
from .family import Encoder, Evidence, Family, Layers, Shape, part_label
from .flux import FLUX
from .flux2 import FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from .krea2 import KREA2
from .next_dit import LUMINA2, Z_IMAGE
from .qwen_image import QWEN_IMAGE
from .sd import SD1, SD2
from .sdxl import SDXL

FAMILIES: tuple[Family, ...] = (
    SD1,
    SD2,
    SDXL,
    FLUX,
    CHROMA,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_DEV,
    QWEN_IMAGE,
    Z_IMAGE,
    LUMINA2,
    KREA2,
)
"""Every known family, in the order in which they are asked."""

# Of models of no known scheme: Wan's self_attn.q, Anima's cross_attn.q_proj, ERNIE-Image's self_attention.to_out.0.
_PROJECTION = re.compile(
    r"(?:^|\.)(?:\w+_)?(?:attn\d?|attention)\.(?:(?:to_)?w?[qkvo](?:_proj|_img)?|qkv|proj|(?:to_)?out(?:put)?(?:_proj)?(?:\.0)?)$"
)


def family(name: str) -> Family:
    """The family of this name (LoraFile.family)."""
    return next(known for known in FAMILIES if known.name == name)


def smallest_side(name: str | None) -> int:
    """Family.smallest of the family of this name; the usual one where it is not known (None)."""
    return Family.smallest if name is None else family(name).smallest


@cache
def reference_layers(name: str) -> Mapping[str, Shape]:
    """Dotted layer names of a family's published denoiser, in the scheme of its authors, with the shapes of their weights."""
    return dict(family(name).layers())


@cache
def reference_aliases(name: str) -> Mapping[str, list[Alias]]:
    """Every flat name that a dialect may use for a layer of this family's published denoiser."""
    return _first_named(family(name).aliases(reference_layers(name)) or ())


def recognise(
    shapes: Mapping[str, Shape | None], text: Mapping[str, int | None], metadata: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Names of the families that a LoRA may have been made for: one where its layers tell, several where these fit them alike.

    shapes: the flat names of its denoiser's layers, with the shapes of the weights where known; text: see Evidence.
    """
    layouts = frozenset(
        layout for known in FAMILIES for layout, pattern in known.layouts.items() if any(pattern.fullmatch(layer) for layer in shapes)
    )
    # Layers of no known scheme say nothing, whatever their names end in.
    told = {
        layer: shape for layer, shape in shapes.items() if any(known.names(layer) or known.within.fullmatch(layer) for known in FAMILIES)
    }
    evidence = Evidence(layouts, told if layouts else {}, text)
    certainties = {
        known: known.certainty(evidence) for known in FAMILIES if not evidence.layouts or evidence.layouts & known.layouts.keys()
    }
    highest = max(certainties.values(), default=0)
    surest = [known for known, certainty in certainties.items() if certainty == highest > 0]
    named = [known for known in surest if known.named_in(metadata or {})]
    return tuple(known.name for known in named or surest)


def denoiser_aliases(layers: Iterable[str] | Layers) -> dict[str, list[Alias]]:
    """Every flat name under which some dialect may name a layer of this model, with the sites it denotes.

    layers: dotted module paths relative to the denoiser, of one of the known schemes; modules without weights do no harm. With the
    shapes of the weights, where they are known, a fused layer is divided as in this model, else as in the published one.
    A model of an unknown scheme gets its own names only.
    """
    shapes: Layers = layers if isinstance(layers, Mapping) else dict.fromkeys(layers)
    found = next((pairs for known in FAMILIES if (pairs := known.aliases(shapes)) is not None), None)
    return _first_named(found if found is not None else ((flat(name), [Alias(Site(name))]) for name in shapes))


def families_of_model(layers: Layers) -> list[Family]:
    """The families whose scheme a model's layers are in: those of U-Nets have one scheme; none for a model of another kind."""
    return [known for known in FAMILIES if known.aliases(layers) is not None]


def _first_named(pairs: Iterable[tuple[str, list[Alias]]]) -> dict[str, list[Alias]]:
    aliases: dict[str, list[Alias]] = {}
    for name, targets in pairs:
        aliases.setdefault(name, targets)
    return aliases


def layout_of(layer: str, name: str | None = None) -> str | None:
    """The scheme a denoiser's flat name belongs to, whatever the model's size; None for a name of no known scheme.

    name: of the family whose scheme it is if several have the same.
    """
    asked = FAMILIES if name is None else (family(name), *FAMILIES)
    return next((layout for known in asked for layout, pattern in known.layouts.items() if pattern.fullmatch(layer)), None)


def knowing(layers: Iterable[str]) -> list[Family]:
    """The families in whose schemes any of these flat names is."""
    names = list(layers)
    return [known for known in FAMILIES if any(known.names(layer) for layer in names)]


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
    """Whether the site is a query, key, value or output projection of an attention, in any scheme; else, by what it is usually called."""
    if any(known.is_attention(site) for known in FAMILIES):
        return True
    return not any(known.names(flat(site.layer)) for known in FAMILIES) and _PROJECTION.search(site.layer) is not None


def block_label(site: Site) -> str:
    """Short name of the block a site lies in, for pictures: "in 4", "mid", "out 5", "down 1", "up 2", "double 0", "single 3"."""
    return next((label for known in FAMILIES if (label := known.block_label(site))), site.layer.split(".", 1)[0])


def layer_label(site: Site) -> str:
    """Name of a site for reports and pictures: "in 4.1 attn2.k", "down 1 attentions.0 attn2.k", "double 0 img.q", "single 3 mlp"."""
    own = [known for known in FAMILIES if known.names(flat(site.layer))]
    if label := next((label for known in (*own, *FAMILIES) if (label := known.layer_label(site))), None):
        return label
    part = part_label(site.part)
    return f"{block_label(site)} {site.layer}{'.' + part if part else ''}"


__all__ = [
    "FAMILIES",
    "CHROMA",
    "FLUX",
    "FLUX2_DEV",
    "FLUX2_KLEIN_4B",
    "FLUX2_KLEIN_9B",
    "KREA2",
    "LUMINA2",
    "QWEN_IMAGE",
    "Z_IMAGE",
    "SD1",
    "SD2",
    "SDXL",
    "Encoder",
    "Evidence",
    "Family",
    "Layers",
    "Shape",
    "block_label",
    "denoiser_aliases",
    "families_of_model",
    "family",
    "has_variable_input",
    "is_attention",
    "is_kernel",
    "is_norm",
    "known_text_layer",
    "knowing",
    "layer_label",
    "layout_of",
    "recognise",
    "reference_aliases",
    "reference_layers",
    "smallest_side",
    "text_encoder",
]
