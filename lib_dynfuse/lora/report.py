"""What a LoRA file holds, in lines for a person."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import itemgetter

from ..printable import printable
from .adapter_config import SIDECAR
from .families import knowing, layout_of, reference_aliases, text_encoder
from .matching import branches_by_site, norms_by_layer
from .naming import Alias, Site
from .pair import loudness, overlap
from .reader import LoraFile

_NAMED = 3  # keys and embeddings that are named; the rest is counted
_TAGS = 8
_TEXT = 200
_EVEN = 1.25  # times as loud: less is not worth a word
_EVENED = "; the method balanced evens out what is beyond twice"
_LONGEST = 2_000_000  # of a text that is taken apart

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
        ("Ranks", ranks(file) or "none"),
        *([("Alpha", alphas)] if (alphas := _alphas(file)) else []),
        ("Denoiser", _denoiser(file)),
        ("Text encoders", ", ".join(_encoder(file, name) for name in file.text) or "none"),
    ]
    if file.embeddings:
        rows.append(("Embeddings", _few(file.embeddings) + " (bundled; the WebUI loads them, DynFuse does not)"))
    rows.append(("Unmatched", _unmatched(file.unmatched)))
    said = ((label, _line(file.metadata.get(key, ""))) for key, label in _METADATA.items())
    rows += [(label, text) for label, text in said if text]
    if tags := _frequent_tags(file.metadata):
        rows.append(("Frequent tags", tags))
    width = max(len(label) for label, _ in rows)
    return [printable(file.path.name), *(f"  {label:<{width}}  {text}" for label, text in rows)]


def ranks(file: LoraFile) -> str:
    """ "4", "4 to 8", "" where there is none."""
    return _span(file.ranks)


def describe_pair(a: LoraFile, b: LoraFile) -> list[str]:
    """What two files that go together change together, in a sentence each."""
    named = a.family or b.family
    base = named or next((name for name in a.possible if name in b.possible), None)
    first, second = (branches_by_site(file, _aliases(file, base))[0] for file in (a, b))
    names = f"{printable(a.path.name)} and {printable(b.path.name)}"
    both = len(first.keys() & second.keys())
    alone = (len(first) - both, len(second) - both)
    rest = f", only the first {alone[0]}, only the second {alone[1]}" if any(alone) else " and no others"
    lines = [f"{names} go together{f' on {named}' if named else ''}: both change {_count(both, 'layer')}{rest}."]
    loud = [loudness(file) for file in (a, b)]
    if loud[0] and loud[1]:
        quiet, strong = sorted(((value, printable(file.path.name)) for value, file in zip(loud, (a, b)) if value), key=itemgetter(0))
        told = f"{strong[0]:.3g} and {quiet[0]:.3g}"
        if strong[0] < _EVEN * quiet[0]:
            lines.append(f"They are about equally loud ({told}).")
        else:
            times = strong[0] / quiet[0]
            evened = _EVENED if times > 2 else ""
            lines.append(f"{strong[1]} is {times:.1f} times as loud as {quiet[1]} ({told}){evened}.")
    shared = overlap(first, second)
    if shared is not None and shared[0] > 0.5 > 2 * shared[1]:
        lines.append(
            f"They listen to the same directions ({shared[0]:.0%}; strangers' files have {shared[1]:.0%} in common): both were trained "
            "from the same random numbers, and get into each other's way more than others."
        )
    return lines


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
    return f"unknown (it fits a model with layers of its own names, such as {printable(layers[0])})"


def _span(numbers: Iterable[float]) -> str:
    """ "4", "4 to 8", "" for none."""
    low, high = min(numbers, default=None), max(numbers, default=None)
    if low is None or high is None:
        return ""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _alphas(file: LoraFile) -> str:
    """What the strengths are made from and where that stands; with numbers of layers where it is not the same for all."""
    lost = any(dialect.startswith("PEFT") for dialect in file.dialects)
    if not lost and file.alphas.keys() <= {None}:
        return ""
    nothing = f"none, so that the strength is 1{f' (PEFT keeps it in {SIDECAR}, which is not here)' if lost else ''}"
    groups: dict[str, list[float]] = {}
    layers: Counter[str] = Counter()
    for alpha, count in file.alphas.items():
        source = nothing if alpha is None else f"{'with rslora, ' if alpha.rslora else ''}from {alpha.source}"
        groups.setdefault(source, []).extend([] if alpha is None else [alpha.value])
        layers[source] += count
    texts = {source: f"{_span(values)} {source}".strip() for source, values in groups.items()}
    if len(texts) == 1:
        return texts.popitem()[1]
    return "; ".join(f"{text} ({_count(layers[source], 'layer')})" for source, text in texts.items())


def _unmatched(keys: list[str]) -> str:
    return f"{_count(len(keys), 'key')}: {_few(keys)}" if keys else "none"


def _few(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return f"{', '.join(map(printable, names[:_NAMED]))}{f' and {rest} more' if rest > 0 else ''}"


def _line(text: str) -> str:
    """A text of the file's author, which may be anything."""
    return " ".join(printable(text, _TEXT).split())


def _frequent_tags(metadata: Mapping[str, str]) -> str:
    """The commonest captions of the training images, from sd-scripts' ss_tag_frequency: {folder: {tag: count}} as JSON."""
    text = metadata.get("ss_tag_frequency", "")
    if len(text) > _LONGEST:
        return ""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(text).values():
            counts.update({tag: count for tag, count in tags.items() if type(count) is int and 0 < count < 10**9})
    except (ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return ""
    named = Counter({printable(tag.strip(), 40): count for tag, count in counts.most_common(_TAGS)})
    return ", ".join(f"{tag} ({count})" for tag, count in named.most_common())


__all__ = ["describe", "describe_pair", "ranks"]
