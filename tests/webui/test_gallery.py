import os

import pytest
import torch
from PIL import Image

from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.references import KEY_FIELDS, ReferenceCache, ReferenceKey
from lib_dynfuse.webui.gallery import MOST_SHOWN, cleared_html, gallery_html


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "references", 32 << 20)


def keep(cache, prompt, side="subject", used=None):
    """Put a reference with this prompt into the cache. used: seconds."""
    values = {name: 0 for name in KEY_FIELDS} | {"side": side, "prompt": prompt, "more": ()}
    key = ReferenceKey(**values)
    cache.put(key, Image.new("RGB", (30, 20), "red"), Embeddings(torch.ones(1, 2), torch.ones(1, 2)), prompt)
    if used is not None:
        os.utime(cache.folder / f"{key.digest}.png", (used, used))


def test_an_empty_cache_says_so(cache):
    assert "No picture is kept yet" in gallery_html(cache)


def test_references_are_shown_with_side_and_prompt_the_last_used_first(cache):
    keep(cache, "an old dog", used=1000)
    keep(cache, "new ink", "style", used=2000)
    page = gallery_html(cache)
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.index("new ink") < page.index("an old dog")
    assert "<b>Style</b>" in page
    assert "2 pictures kept, 0.0 of 32 MB" in page


def test_a_prompt_is_text_and_no_page(cache):
    keep(cache, '"><script>alert(1)</script><img src=x onerror=alert(2)>')
    page = gallery_html(cache)
    assert "<script" not in page
    assert page.count("<img") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert 'title="&quot;&gt;' in page


def test_of_many_only_the_last_used_are_shown(cache):
    for number in range(MOST_SHOWN + 3):
        keep(cache, f"dog {number};", used=1000 + number)
    page = gallery_html(cache)
    assert page.count("<img") == MOST_SHOWN
    assert "dog 2;" not in page
    assert f"{MOST_SHOWN + 3} pictures kept" in page
    assert f"the {MOST_SHOWN} used last" in page


def test_a_damaged_file_is_left_out(cache):
    keep(cache, "a dog")
    (cache.folder / "0.png").write_bytes(b"no picture")
    assert gallery_html(cache).count("<img") == 1


def test_clearing_says_what_was_removed(cache):
    keep(cache, "a dog")
    keep(cache, "ink", "style")
    page = cleared_html(cache)
    assert "2 pictures removed" in page
    assert "No picture is kept yet" in page
    assert cache.size() == 0


def test_it_is_made_anew_only_where_something_was_kept_used_or_removed(cache, monkeypatch):
    made = []
    entries = ReferenceCache.entries
    monkeypatch.setattr(ReferenceCache, "entries", lambda self: made.append(self) or entries(self))
    name = cache.keep_picture(Image.new("RGB", (8, 8), "red"))
    first = gallery_html(cache)
    assert gallery_html(cache) == first
    assert len(made) == 1
    os.utime(cache.folder / f"given-{name}.png", (1, 1))
    cache.picture(name)
    gallery_html(cache)
    assert len(made) == 2
    cache.keep_picture(Image.new("RGB", (8, 8), "blue"))
    assert "2 pictures kept" in gallery_html(cache)
    (cache.folder / f"given-{name}.png").unlink()
    assert "1 picture kept" in gallery_html(cache)
    assert len(made) == 4
