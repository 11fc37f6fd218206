"""The reference cache: hits, misses, bounds, damage, killed and concurrent writers."""

import base64
import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.references import KEY_FIELDS, ReferenceCache, ReferenceKey
from lib_dynfuse.settings import SettingsError

KEY = ReferenceKey(
    side="subject",
    checkpoint="c",
    vae="v",
    lora="l",
    strength=1.0,
    te_strength=1.0,
    others="",
    prompt="a dog",
    negative_prompt="",
    seed=1,
    sampler="Euler",
    scheduler="Karras",
    steps=20,
    cfg_scale=7.0,
    width=512,
    height=512,
    clip_skip=1,
    encoders="e",
)


def noise(size=(40, 24), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def embeddings(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(clip=torch.randn(1, 12, generator=generator), dino=torch.randn(1, 5, generator=generator))


def base64_of(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "references")


def test_what_was_put_is_got_again_by_another_process_to_the_bit(cache):
    cache.put(KEY, noise(), embeddings(), 'a dog, <lora:x:1>\n"quoted" é 犬')
    found = ReferenceCache(cache.folder).get(dataclasses.replace(KEY))
    assert found.picture.tobytes() == noise().tobytes()
    assert torch.equal(found.embeddings.clip, embeddings().clip)
    assert torch.equal(found.embeddings.dino, embeddings().dino)
    assert (found.side, found.prompt, found.given) == ("subject", 'a dog, <lora:x:1>\n"quoted" é 犬', False)


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_each_item_of_the_key_misses(cache, name):
    cache.put(KEY, noise(), embeddings(), "")
    value = getattr(KEY, name)
    other = (("eta", "1"),) if name == "more" else value + "x" if isinstance(value, str) else value + 1
    assert cache.get(dataclasses.replace(KEY, **{name: other})) is None
    assert cache.get(KEY) is not None


def test_embeddings_got_under_inference_mode_can_be_used_with_gradients(cache):
    cache.put(KEY, noise(), embeddings(), "")
    with torch.inference_mode():
        found = cache.get(KEY)
    assert not found.embeddings.clip.is_inference()


def test_a_damaged_entry_is_not_trusted_and_is_rebuilt(cache):
    cache.put(KEY, noise(), embeddings(), "")
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        found = cache.get(KEY)
        # Bytes that mean nothing to a reader of PNGs may change; whatever is returned is what was put.
        assert found is None or (found.picture.tobytes() == noise().tobytes() and torch.equal(found.embeddings.clip, embeddings().clip))
        cache.put(KEY, noise(), embeddings(), "")
        assert cache.get(KEY) is not None


@pytest.mark.parametrize("length", [0, 1, 100, 1000])
def test_a_cut_entry_is_not_trusted(cache, length):
    cache.put(KEY, noise(), embeddings(), "")
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get(KEY) is None
    assert not path.exists()


def test_embeddings_changed_by_hand_are_not_trusted(cache):
    cache.put(KEY, noise(), embeddings(), "")
    (path,) = cache.folder.iterdir()
    with Image.open(path) as image:
        text = image.text["dynfuse reference"]
        information = PngImagePlugin.PngInfo()
        information.add_text("dynfuse reference", text.replace('"dino": "', '"dino": "AAAA', 1))
        image.load()
        image.save(path, pnginfo=information)
    assert cache.get(KEY) is None


WRITER = """
import sys, numpy as np, torch
from PIL import Image
from pathlib import Path
from lib_dynfuse.guidance.encoders import Embeddings
from lib_dynfuse.guidance.references import ReferenceCache
from tests.guidance.test_references import KEY
cache = ReferenceCache(Path(sys.argv[1]))
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
print("ready", flush=True)
while True:
    cache.put(KEY, picture, Embeddings(torch.ones(1, 4), torch.ones(1, 3)), "")
"""


def test_a_kill_during_writing_leaves_a_usable_cache(cache):
    for delay in (0.0, 0.05, 0.13):
        cache.clear()
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(cache.folder)], stdout=subprocess.PIPE, cwd=os.getcwd())
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = cache.get(KEY)
        assert found is None or found.picture.size == (900, 900)
        cache.put(KEY, noise(), embeddings(), "")
        assert cache.get(KEY).picture.tobytes() == noise().tobytes()
    cache.clear()
    assert list(cache.folder.iterdir()) == []


def hammer(folder, seed, failures):
    cache = ReferenceCache(folder, limit_bytes=60_000)
    for turn in range(40):
        key = dataclasses.replace(KEY, seed=turn % 5)
        found = cache.get(key)
        if found is not None and found.picture.tobytes() != noise(seed=key.seed).tobytes():
            failures.put((seed, turn))
        cache.put(key, noise(seed=key.seed), embeddings(key.seed), "")
        cache.keep_picture(noise(seed=100 + turn % 3))
        cache.entries()
        if turn % 17 == 16:
            cache.clear()


def test_two_webuis_sharing_a_folder_do_no_harm(cache):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [context.Process(target=hammer, args=(cache.folder, seed, failures)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert failures.empty()


def test_the_least_recently_used_go_first(cache):
    cache.put(KEY, noise(), embeddings(), "")
    one = cache.size()
    cache.limit_bytes = int(3.5 * one)
    keys = [dataclasses.replace(KEY, seed=seed) for seed in range(4)]
    cache.clear()
    for age, key in enumerate(keys[:3]):
        cache.put(key, noise(), embeddings(), "")
        os.utime(cache.folder / f"{key.digest}.png", (1000 + age, 1000 + age))
    assert cache.get(keys[0]) is not None  # used now: no longer the oldest
    cache.put(keys[3], noise(), embeddings(), "")
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    assert cache.size() <= cache.limit_bytes


def test_the_newest_stays_even_if_it_is_larger_than_the_bound(cache):
    cache.limit_bytes = 10
    cache.put(KEY, noise(), embeddings(), "")
    assert cache.get(KEY) is not None


def test_entries_are_shown_most_recent_first_and_clear_empties(cache):
    for age, side in enumerate(("subject", "style")):
        key = dataclasses.replace(KEY, side=side)
        cache.put(key, noise(), embeddings(), f"prompt {side}")
        os.utime(cache.folder / f"{key.digest}.png", (1000 + age, 1000 + age))
    (cache.folder / "junk.png").write_bytes(b"no picture")
    noise().save(cache.folder / "photo.png", "JPEG")
    assert [(entry.side, entry.prompt) for entry in cache.entries()] == [("style", "prompt style"), ("subject", "prompt subject")]
    assert cache.size() == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert cache.clear() == 4
    assert cache.entries() == []
    assert cache.size() == 0


def test_an_empty_cache_can_be_asked_everything(cache):
    assert (cache.get(KEY), cache.entries(), cache.size(), cache.clear()) == (None, [], 0, 0)


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ReferenceCache(tmp_path / "file" / "below")
    kept = cache.put(KEY, noise(), embeddings(), "p")
    assert kept.picture.tobytes() == noise().tobytes()
    assert cache.get(KEY) is None


def test_a_given_picture_is_found_by_its_digits_and_the_same_picture_has_the_same(cache):
    name = cache.keep_picture(noise())
    assert cache.picture(name).tobytes() == noise().tobytes()
    assert cache.keep_picture(cache.picture(base64_of(noise()))) == name
    assert cache.keep_picture(noise(seed=1)) != name


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:image/jpeg;base64,"])
def test_a_picture_may_be_base64_with_or_without_a_data_address(cache, prefix):
    assert cache.picture(prefix + base64_of(noise())).tobytes() == noise().tobytes()


def test_transparent_ground_becomes_white_and_large_pictures_smaller(cache):
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert cache.picture(cache.keep_picture(clear)).getpixel((5, 5)) == (255, 255, 255)
    assert cache.picture(cache.keep_picture(Image.new("L", (3000, 1500), 7))).size == (2048, 1024)


@pytest.mark.parametrize(
    "text",
    ["/etc/passwd", "given-0.png", "http://127.0.0.1/a.png", "file:///etc/hostname", "!", "", base64.b64encode(b"no picture").decode()],
)
def test_anything_else_is_refused_with_a_sentence(cache, tmp_path, text):
    (tmp_path / "references").mkdir()
    noise().save(tmp_path / "references" / "given-0.png")
    with pytest.raises(SettingsError, match="no picture in base64"):
        cache.picture(text)


def test_a_picture_that_is_no_longer_kept_is_refused_with_a_sentence(cache):
    name = cache.keep_picture(noise())
    cache.clear()
    with pytest.raises(SettingsError, match=f"{name} is not .* kept on this machine"):
        cache.picture(name)


def test_what_is_kept_is_listed_without_decoding_a_picture(cache, monkeypatch):
    """The list is made anew after every job: 0.04 s for each picture were seconds."""
    cache.keep_picture(Image.new("RGB", (20, 10), "red"))

    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    assert [entry.side for entry in cache.entries()] == ["given"]
    assert cache.size() > 0
