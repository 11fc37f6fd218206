"""What a LoRA file holds, in lines for a person."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from .families import knowing, layout_of, reference_aliases, text_encoder
from .matching import branches_by_site, norms_by_layer
from .naming import Alias, Site
from .reader import LoraFile

_NAMED = 3  # unmatched keys that are named; the rest is counted
_TAGS = 8

# Metadata that says what a file is and how it is called up; trainers write dozens of other entries.
_METADATA = {
    "ss_output_name": "Trained as",
    "modelspec.title": "Title",
    "modelspec.trigger_phrase": "Trigger words",
    "ss_sd_model_name": "Trained on",
    "modelspec.author": "Author",
    "modelspec.license": "Licence",
}


def describe(file: LoraFile) -> list[str]:
    """The report of one file: its name, then one line per property."""
    rows: list[tuple[str, str]] = [
        ("Format", "; ".join(file.dialects) or "unknown"),
        ("Base model", file.family or _unknown_family(file)),
        ("Kinds", ", ".join(f"{kind} ({_count(number, 'layer')})" for kind, number in file.kinds.items())),
        ("Ranks", _ranks(file.ranks)),
        ("Denoiser", _denoiser(file)),
        ("Text encoders", ", ".join(_encoder(file, name) for name in file.text) or "none"),
    ]
    if file.embeddings:
        rows.append(("Embeddings", ", ".join(file.embeddings) + " (bundled; the WebUI loads them, DynFuse does not)"))
    rows.append(("Unmatched", _unmatched(file.unmatched)))
    rows += [(label, " ".join(file.metadata[key].split())) for key, label in _METADATA.items() if file.metadata.get(key, "").strip()]
    if tags := _frequent_tags(file.metadata):
        rows.append(("Frequent tags", tags))
    width = max(len(label) for label, _ in rows)
    return [file.path.name, *(f"  {label:<{width}}  {text}" for label, text in rows)]


def describe_pair(a: LoraFile, b: LoraFile) -> str:
    """What two files that go together change together, in one sentence."""
    named = a.family or b.family
    base = named or next((name for name in a.possible if name in b.possible), None)
    first, second = (_sites(file, base) for file in (a, b))
    together = f"{a.path.name} and {b.path.name} go together{f' on {named}' if named else ''}"
    return (
        f"{together}: both change {_count(len(first & second), 'layer')}, "
        f"only the first {len(first - second)}, only the second {len(second - first)}."
    )


def _base(file: LoraFile) -> str | None:
    """The family whose published model stands for the file's; where several may, all have its layers."""
    return file.family or next(iter(file.possible), None)


def _is_foreign(file: LoraFile) -> bool:
    return not knowing((*file.denoiser, *file.norms)) and bool(file.denoiser or file.norms)


def _aliases(file: LoraFile, family: str | None) -> Mapping[str, list[Alias]]:
    """Of the family's published model; of the file's own layers where the family is unknown."""
    if family is not None:
        return reference_aliases(family)
    foreign = _is_foreign(file)
    return {layer: [Alias(Site(layer))] for layer in (*file.denoiser, *file.norms) if foreign or layout_of(layer) is not None}


def _sites(file: LoraFile, family: str | None) -> set[Site]:
    return set(branches_by_site(file, _aliases(file, family))[0])


def _encoder(file: LoraFile, name: str) -> str:
    return f"{text_encoder(name, file.family).name} ({_count(len(file.text[name]), 'layer')})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _denoiser(file: LoraFile) -> str:
    if _is_foreign(file):
        return _count(len(file.denoiser) + len(file.norms), "layer")
    aliases = _aliases(file, _base(file))
    matched = sum(layer in aliases for layer in file.denoiser)
    text = f"{matched} of {len(file.denoiser)} layers matched"
    if file.norms:
        text += f", {len(norms_by_layer(file, aliases))} of {len(file.norms)} normalisation layers (these are summed, not chosen)"
    return text


def _unknown_family(file: LoraFile) -> str:
    layers = (*file.denoiser, *file.norms)
    if file.possible:
        return f"unknown ({', '.join(file.possible[:-1])} or {file.possible[-1]}: its layers do not tell which)"
    if not layers:
        return "unknown (it changes only text encoders)"
    if known := knowing(layers):
        return f"unknown ({known[0].unrecognised})"
    return f"unknown (it fits a model with layers of its own names, such as {layers[0]})"


def _ranks(ranks: Mapping[int, int]) -> str:
    if not ranks:
        return "none"
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _unmatched(keys: list[str]) -> str:
    if not keys:
        return "none"
    rest = len(keys) - _NAMED
    return f"{_count(len(keys), 'key')}: {', '.join(keys[:_NAMED])}{f' and {rest} more' if rest > 0 else ''}"


def _frequent_tags(metadata: Mapping[str, str]) -> str:
    """The commonest captions of the training images, from sd-scripts' ss_tag_frequency: {folder: {tag: count}} as JSON."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", ""))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError):
        return ""
    return ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(_TAGS))


__all__ = ["describe", "describe_pair"]
