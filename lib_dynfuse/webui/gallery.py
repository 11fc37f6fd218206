"""The cache of reference pictures, as the panel shows it."""

from __future__ import annotations

import html

from ..guidance.references import Entry, ReferenceCache
from . import pictures

MOST_SHOWN = 12


_last: dict[str, tuple[object, str]] = {}
"""By folder: its state, and the page that was made of it. Asked for after every job, most of which make no reference."""


def gallery_html(cache: ReferenceCache) -> str:
    """The pictures used last with their prompts, and how much is kept."""
    folder, state = str(cache.folder), cache.state()
    if folder not in _last or _last[folder][0] != state:
        _last[folder] = state, _made(cache)
    return _last[folder][1]


def _made(cache: ReferenceCache) -> str:
    entries = cache.entries()
    if not entries:
        return '<p class="dynfuse-kept">No picture is kept yet.</p>'
    cards = "".join(_card(entry, address) for entry in entries[:MOST_SHOWN] if (address := pictures.thumbnail_address(entry.path)))
    kept = f"{_count(len(entries))} kept, {_megabytes(cache.size())} of {cache.limit_bytes >> 20} MB"
    if len(entries) > MOST_SHOWN:
        kept += f"; shown are the {MOST_SHOWN} used last"
    return f'<p class="dynfuse-kept">{kept}.</p><div class="dynfuse-gallery">{cards}</div>'


def cleared_html(cache: ReferenceCache) -> str:
    """Empty the cache; what was removed, and what is left (of files that another program holds open)."""
    removed = cache.clear()
    return f'<p class="dynfuse-kept">{_count(removed)} removed.</p>{gallery_html(cache)}'


def _card(entry: Entry, address: str) -> str:
    prompt = html.escape(entry.prompt)
    return (
        f'<figure title="{prompt}"><img src="{address}" alt="">'
        f"<figcaption><b>{html.escape(entry.side.capitalize())}</b><span>{prompt}</span></figcaption></figure>"
    )


def _count(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f}" if size < 10 << 20 else str(size >> 20)
