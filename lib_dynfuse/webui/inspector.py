"""What the panel says of the chosen LoRAs as soon as they are chosen: what they are, whether they go together, their trigger words."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence

from ..hosts.webui.host import WebUIHost
from ..lora import LoraError, LoraFile, branches_by_site, compatible, denoiser_aliases, misfit
from ..lora.families import Shape
from ..lora.naming import Alias
from ..lora.report import describe_pair, ranks
from ..printable import printable

_LONGEST = 300  # of trigger words


def chosen_html(host: WebUIHost, tab: str, subjects: Sequence[str] | None, styles: Sequence[str] | None) -> str:
    """tab: "txt2img" or "img2img", whose prompt the trigger words go into. Never raises: it is only a note."""
    names = [*(subjects or ()), *(styles or ())]
    if not names:
        return ""
    read: dict[str, LoraFile] = {}
    lines = []
    for name in dict.fromkeys(names):
        try:
            path = host.catalogue.path(name)
            if path is None:
                lines.append(_warning(f"There is no LoRA named {printable(name)!r} here."))
                continue
            read[name] = host.read_lora(path)
        except (LoraError, OSError) as error:
            lines.append(_warning(str(error)))
            continue
        lines.append(_about(read[name], host.catalogue.activation_text(name), tab))
    misfits = _misfits(host.loaded_layers(), list(read.values()))
    lines += map(_warning, misfits)
    for one, other in itertools.combinations(read.values(), 2):
        if reason := compatible(one, other):
            lines.append(_warning(reason))
        elif len(names) == 2 and not misfits:
            lines += [f"<p>{html.escape(line)}</p>" for line in describe_pair(one, other)]
    return f'<div class="dynfuse-chosen">{"".join(lines)}</div>'


def _about(file: LoraFile, words: str | None, tab: str) -> str:
    said = [f"<b>{html.escape(printable(file.name))}</b>", html.escape(file.family or "unknown base model")]
    if told := ranks(file):
        said.append(f"rank {html.escape(told)}")
    text = printable(words.strip(), _LONGEST) if words else ""
    if text:
        safe = html.escape(text, quote=True)
        said.append(
            f'<span title="Trigger words, as kept with the LoRA">{safe}</span> <button type="button" class="dynfuse-words" '
            f'data-tab="{tab}" data-words="{safe}" title="Put these words into the prompt">to the prompt</button>'
        )
    return f"<p>{' · '.join(said)}</p>"


def _misfits(layers: Mapping[str, Shape | None] | None, files: Sequence[LoraFile]) -> list[str]:
    """Sentences on LoRAs that the loaded checkpoint has no place for. layers: its denoiser's, None where that is not known."""
    if layers is None:
        return []
    aliases = denoiser_aliases(dict(layers))
    return [
        f"{printable(file.name)} does not fit the checkpoint that is loaded: it was made for {file.family or 'another base model'}."
        for file in files
        if file.denoiser and (misfit(file, layers) or not _fits(file, aliases, layers))
    ]


def _fits(file: LoraFile, aliases: Mapping[str, list[Alias]], layers: Mapping[str, Shape | None]) -> bool:
    found, _ = branches_by_site(file, aliases)
    try:
        for site, binding in itertools.islice(found.items(), 200):
            if (shape := layers[site.layer]) is not None:
                binding.fitted(site, shape)
    except LoraError:
        return False
    return bool(found)


def _warning(sentence: str) -> str:
    return f'<p class="dynfuse-warning">{html.escape(sentence)}</p>'


__all__ = ["chosen_html"]
