"""Finding and fetching the encoders' weights, with a small hub on this machine."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch

from lib_dynfuse.guidance import weights
from lib_dynfuse.guidance.encoders import load_encoders
from lib_dynfuse.guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderError, EncoderSources, clip_files, dino_files
from tests.fakes.encoders import clip_model, write_clip, write_dino

CLIP_REPOSITORY = "timm/vit_base_patch32_clip_224.openai"
CLIP_FOLDER, DINO_FOLDER = "ViT-B-32--openai", "facebook--dino-vits16"
CONTENT = bytes(range(256)) * 10_000


@dataclass
class Hub:
    """A hub as the real one answers: small files at once, named by git's checksum; large ones by a redirect that carries their SHA-256."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # repository/file -> content
    stored: dict[str, bytes] = field(default_factory=dict)  # what is handed out instead
    breaks: list[int] = field(default_factory=list)  # bytes after which the next answers of a large file end
    errors: list[int] = field(default_factory=list)  # statuses of the next answers of a large file
    ranges: bool = True
    checksums: bool = True
    asked: list[str] = field(default_factory=list)
    gathered: threading.Barrier | None = None

    def clip(self, content: bytes = CONTENT, file: str = "open_clip_model.safetensors") -> None:
        self.files[f"{CLIP_REPOSITORY}/{file}"] = content

    def dino(self, content: bytes = CONTENT, file: str = "model.safetensors") -> None:
        self.files[f"{DINO_DEFAULT}/config.json"] = b'{"model_type": "vit"}'
        self.files[f"{DINO_DEFAULT}/{file}"] = content


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            hub.asked.append(self.path + (f" {self.headers['Range']}" if self.headers["Range"] else ""))
            if self.path.startswith("/stored/"):
                return self.store(self.path.removeprefix("/stored/"))
            if self.path.startswith("/renamed/"):
                return self.answer(307, {"Location": self.path.replace("/renamed/", "/")})
            name = self.path[1:].replace("/resolve/main/", "/")
            if name not in hub.files:
                return self.answer(404)
            content = hub.files[name]
            if name.endswith(".json"):
                digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                return self.answer(200, {"ETag": f'"{digest}"'}, content)
            headers = {"Location": f"{hub.address}/stored/{name}"}
            if hub.checksums:
                headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            return self.answer(302, headers)

        def store(self, name):
            if hub.gathered is not None:
                hub.gathered.wait(60)
            if hub.errors:
                return self.answer(hub.errors.pop(0))
            content = hub.stored.get(name, hub.files.get(name))
            first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] and hub.ranges else 0
            ends = hub.breaks.pop(0) if hub.breaks else None
            return self.answer(206 if first else 200, {"ETag": '"of-the-store"'}, content[first:], ends)

        def answer(self, status, headers=None, content=b"", ends=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:ends])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _on_line(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "_PAUSE", 0.01)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- what is there


def test_a_file_that_is_there_is_not_asked_for(hub, tmp_path):
    hub.clip(), hub.dino()
    for name in (f"{CLIP_FOLDER}/open_clip_model.safetensors", f"{DINO_FOLDER}/config.json", f"{DINO_FOLDER}/pytorch_model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"by hand")
    assert clip_files(EncoderSources(tmp_path)).weights == tmp_path / CLIP_FOLDER / "open_clip_model.safetensors"
    assert dino_files(EncoderSources(tmp_path)).weights == tmp_path / DINO_FOLDER / "pytorch_model.bin"
    assert clip_files(EncoderSources(tmp_path, clip=" ")) == clip_files(EncoderSources(tmp_path))
    assert dino_files(EncoderSources(tmp_path, dino="")) == dino_files(EncoderSources(tmp_path))
    assert hub.asked == []


def test_openais_own_file_is_found_under_its_own_name(tmp_path):
    (tmp_path / CLIP_FOLDER).mkdir()
    (tmp_path / CLIP_FOLDER / "ViT-B-32.pt").write_bytes(b"by hand")
    found = clip_files(EncoderSources(tmp_path, download=False))
    assert (found.weights.name, found.architecture, found.tag, found.local) == ("ViT-B-32.pt", "ViT-B-32", "openai", False)


def test_a_local_clip_is_a_folder_or_a_file_of_an_architecture(tmp_path):
    file = tmp_path / "any.pt"
    file.write_bytes(b"")
    found = clip_files(EncoderSources(tmp_path, clip=f"ViT-B-32={file}"))
    assert (found.weights, found.config, found.architecture, found.local) == (file, None, "ViT-B-32", True)
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    found = clip_files(EncoderSources(Path("elsewhere"), clip=str(tmp_path)))
    assert (found.weights.name, found.config, found.local) == ("open_clip_pytorch_model.bin", tmp_path / "open_clip_config.json", True)


@pytest.mark.parametrize("name", ["no/such/folder", "model", "../clip", "C:\\models\\clip", "ViT-B-32="])
def test_what_is_neither_path_nor_name_is_refused(hub, tmp_path, name):
    with pytest.raises(EncoderError, match=r"neither a folder.*ARCHITECTURE/TAG\.$"):
        clip_files(EncoderSources(tmp_path, clip=name))
    with pytest.raises(EncoderError, match=r"neither a folder.*OWNER/MODEL\.$"):
        dino_files(EncoderSources(tmp_path, dino=name))
    assert hub.asked == []


def test_an_incomplete_local_model_is_refused_by_what_it_lacks(tmp_path):
    with pytest.raises(EncoderError, match=re.escape(f"there is no file {tmp_path / 'gone.pt'}.")):
        clip_files(EncoderSources(tmp_path, clip=f"ViT-B-32={tmp_path / 'gone.pt'}"))
    with pytest.raises(EncoderError, match=r"has no open_clip_model\.safetensors and no open_clip_pytorch_model\.bin\.$"):
        clip_files(EncoderSources(tmp_path, clip=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EncoderError, match=r"has no config\.json\.$"):
        dino_files(EncoderSources(tmp_path, dino=str(tmp_path)))


# --- what is fetched


def test_missing_files_are_fetched_with_progress_and_checked(hub, tmp_path):
    hub.clip(), hub.dino()
    told = []
    clip = clip_files(EncoderSources(tmp_path), lambda *news: told.append(news))
    dino = dino_files(EncoderSources(tmp_path))
    assert clip.weights.read_bytes() == dino.weights.read_bytes() == CONTENT
    assert files_in(tmp_path) == [
        f"{CLIP_FOLDER}/open_clip_model.safetensors",
        f"{DINO_FOLDER}/config.json",
        f"{DINO_FOLDER}/model.safetensors",
    ]
    assert {(what, total) for what, _, total in told} == {(f"CLIP {CLIP_DEFAULT}", len(CONTENT))}
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT)


def test_encoders_named_by_the_user_are_fetched_and_built(hub, tmp_path, monkeypatch):
    _, config = clip_model()
    monkeypatch.setattr(open_clip, "get_model_config", lambda architecture: config)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: {"hf_hub": "somebody/small-clip/"})
    clip, dino = write_clip(tmp_path / "clip"), write_dino(tmp_path / "dino")
    hub.files["somebody/small-clip/open_clip_model.safetensors"] = (clip / "open_clip_model.safetensors").read_bytes()
    for file in ("config.json", "model.safetensors"):
        hub.files[f"somebody/small-vit/{file}"] = (dino / file).read_bytes()
    told = []
    named = EncoderSources(tmp_path / "dynfuse", clip="small/tag", dino="somebody/small-vit")
    fetched = load_encoders(named, lambda *news: told.append(news))
    assert {what for what, _, _ in told} == {"CLIP small/tag", "DINO somebody/small-vit"}
    pictures = torch.rand(1, 3, 40, 40)
    by_path = load_encoders(EncoderSources(tmp_path, clip=str(clip), dino=str(dino))).embed(pictures)
    assert torch.equal(fetched.embed(pictures).clip, by_path.clip)
    assert torch.equal(fetched.embed(pictures).dino, by_path.dino)
    asked = len(hub.asked)
    load_encoders(named)
    assert len(hub.asked) == asked


def test_the_numbers_for_preprocessing_come_along_where_there_are_any(hub, tmp_path):
    hub.dino()
    hub.files[f"{DINO_DEFAULT}/preprocessor_config.json"] = b'{"image_mean": [0, 0, 0]}'
    assert dino_files(EncoderSources(tmp_path)).preprocessing.read_bytes() == b'{"image_mean": [0, 0, 0]}'


def test_a_repository_without_safetensors_gives_its_pickle(hub, tmp_path):
    hub.clip(file="open_clip_pytorch_model.bin"), hub.dino(file="pytorch_model.bin")
    assert clip_files(EncoderSources(tmp_path)).weights.name == "open_clip_pytorch_model.bin"
    assert dino_files(EncoderSources(tmp_path)).weights.name == "pytorch_model.bin"


def test_a_renamed_repository_is_followed(hub, tmp_path, monkeypatch):
    hub.clip()
    monkeypatch.setenv("HF_ENDPOINT", hub.address + "/renamed/")
    assert clip_files(EncoderSources(tmp_path)).weights.read_bytes() == CONTENT


def test_weights_of_open_clips_table_come_from_where_it_says(hub, tmp_path, monkeypatch):
    table = {"hf_hub": "laion/some-clip/", "url": ""}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: table)
    hub.files["laion/some-clip/open_clip_model.safetensors"] = CONTENT
    assert clip_files(EncoderSources(tmp_path, clip="ViT-B-16/laion")).weights.read_bytes() == CONTENT


@pytest.mark.parametrize("right", [True, False])
def test_without_the_hub_openais_address_serves_and_its_checksum_is_in_it(hub, tmp_path, monkeypatch, right):
    digest = hashlib.sha256(CONTENT).hexdigest()
    hub.files[f"models/{digest}/ViT-B-32.pt"] = CONTENT
    hub.stored[f"models/{digest}/ViT-B-32.pt"] = CONTENT if right else CONTENT[::-1]
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda architecture, tag: {"url": f"{hub.address}/stored/models/{digest}/ViT-B-32.pt"}
    )
    monkeypatch.setenv("HF_ENDPOINT", closed_address())
    if right:
        assert clip_files(EncoderSources(tmp_path)).weights.read_bytes() == CONTENT
    else:
        with pytest.raises(EncoderError, match="was thrown away"):
            clip_files(EncoderSources(tmp_path))
        assert files_in(tmp_path) == []


def test_the_default_models_address_carries_the_published_checksum():
    remotes = weights._clip_remotes(*CLIP_DEFAULT.split("/"))
    assert [remote.file for remote in remotes] == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "ViT-B-32.pt"]
    assert remotes[-1].sha256 == "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


def test_a_release_names_the_first_digits_of_its_checksum():
    assert weights._clip_remotes("ViT-B-32", "laion400m_e31")[-1].sha256 == "d867053b"


# --- what goes wrong


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on(hub, tmp_path, ranges):
    hub.clip()
    hub.breaks, hub.errors, hub.ranges = [len(CONTENT) // 2, 1000], [503], ranges
    assert clip_files(EncoderSources(tmp_path)).weights.read_bytes() == CONTENT
    resumed = [path for path in hub.asked if "bytes=" in path]
    assert resumed


def test_a_file_that_changes_meanwhile_is_begun_anew(hub, tmp_path):
    hub.clip()
    hub.breaks = [len(CONTENT) // 2]

    def progress(what, done, total):
        hub.clip(CONTENT[::-1])

    assert clip_files(EncoderSources(tmp_path), progress).weights.read_bytes() == CONTENT[::-1]


def test_a_download_that_always_breaks_off_ends_with_a_sentence_and_leaves_nothing(hub, tmp_path):
    hub.clip()
    hub.breaks = [0] * 20
    with pytest.raises(EncoderError, match=r"did not deliver it: the connection ended after 0 of \d+ bytes"):
        clip_files(EncoderSources(tmp_path))
    assert files_in(tmp_path) == []


def test_other_bytes_than_the_hubs_are_thrown_away(hub, tmp_path):
    hub.clip(), hub.dino()
    for name in hub.files:
        hub.stored[name] = CONTENT[:-1] + b"\0"
    with pytest.raises(EncoderError, match=r"was thrown away, because its checksum begins with \w{12} and should with \w{12}: put "):
        clip_files(EncoderSources(tmp_path))
    with pytest.raises(EncoderError, match="was thrown away"):
        dino_files(EncoderSources(tmp_path))
    assert files_in(tmp_path) == [f"{DINO_FOLDER}/config.json"]


def test_without_any_checksum_nothing_is_trusted(hub, tmp_path):
    hub.clip()
    hub.checksums = False
    with pytest.raises(EncoderError, match="the host gives no checksum to compare with"):
        clip_files(EncoderSources(tmp_path))
    assert files_in(tmp_path) == []


def test_a_model_that_the_hub_does_not_have_is_said_so(hub, tmp_path):
    with pytest.raises(EncoderError, match=r"127\.0\.0\.1:\d+ has no config\.json of it: 404"):
        dino_files(EncoderSources(tmp_path, dino="nobody/nothing"))


def test_a_tag_that_open_clip_does_not_know_is_said_so(hub, tmp_path):
    with pytest.raises(EncoderError, match=re.escape(f"is not in {tmp_path / 'ViT-B-32--none'}, and open_clip knows")):
        clip_files(EncoderSources(tmp_path, clip="ViT-B-32/none"))
    assert hub.asked == []


def closed_address() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_without_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed_address())
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: {})
    began = time.monotonic()
    with pytest.raises(EncoderError) as clip:
        clip_files(EncoderSources(tmp_path))
    with pytest.raises(EncoderError) as dino:
        dino_files(EncoderSources(tmp_path))
    assert time.monotonic() - began < 5
    for error, kind, folder, files, repository in (
        (clip, f"CLIP model {CLIP_DEFAULT}", CLIP_FOLDER, "open_clip_model.safetensors", CLIP_REPOSITORY),
        (dino, f"DINO model {DINO_DEFAULT}", DINO_FOLDER, "config.json and model.safetensors", DINO_DEFAULT),
    ):
        text = str(error.value)
        assert text.startswith(f"The {kind} is not in {tmp_path / folder} and could not be downloaded (127.0.0.1:")
        assert text.endswith(
            f": put {files} of {repository} on the Hugging Face hub into that folder, or name a local model in the settings."
        )


@pytest.mark.parametrize("way", ["download", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_nothing_is_fetched_where_that_is_forbidden(hub, tmp_path, monkeypatch, way):
    hub.clip(), hub.dino()
    if way != "download":
        monkeypatch.setenv(way, "1")
    sources = EncoderSources(tmp_path, download=way != "download")
    why = "downloading encoders is switched off" if way == "download" else f"{way} forbids downloading it"
    with pytest.raises(EncoderError, match=f"{why}: put open_clip_model.safetensors of {CLIP_REPOSITORY} on the"):
        clip_files(sources)
    with pytest.raises(EncoderError, match=f"{why}: put config.json and model.safetensors of {DINO_DEFAULT} on the"):
        dino_files(sources)
    assert hub.asked == []
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_said_so(hub, tmp_path):
    hub.clip()
    (tmp_path / CLIP_FOLDER).write_bytes(b"no folder")
    with pytest.raises(EncoderError, match=re.escape(f"cannot be written to {tmp_path / CLIP_FOLDER}: ")):
        clip_files(EncoderSources(tmp_path))


def test_an_interrupt_by_the_progress_is_handed_on_and_leaves_nothing(hub, tmp_path):
    class Interrupted(Exception):
        pass

    def progress(what, done, total):
        raise Interrupted

    hub.clip()
    with pytest.raises(Interrupted):
        clip_files(EncoderSources(tmp_path), progress)
    assert files_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed_a_day_later(hub, tmp_path):
    hub.clip()
    (tmp_path / CLIP_FOLDER).mkdir()
    old, new = tmp_path / CLIP_FOLDER / ".a.1-0.part", tmp_path / CLIP_FOLDER / ".a.2-0.part"
    for path, age in ((old, 2 * 86400), (new, 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    clip_files(EncoderSources(tmp_path))
    assert not old.exists()
    assert new.exists()


def test_two_processes_at_once_do_each_other_no_harm(hub, tmp_path):
    hub.dino()
    hub.gathered = threading.Barrier(2)  # both are in the middle of the weights
    # The module by itself: a process that imports torch first takes seconds to get there.
    program = (
        f"import sys; sys.path.insert(0, {str(Path(weights.__file__).parent)!r}); from pathlib import Path; from weights import *; "
        "print(len(dino_files(EncoderSources(Path(sys.argv[1]))).weights.read_bytes()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == [str(len(CONTENT))] * 2
    assert files_in(tmp_path) == [f"{DINO_FOLDER}/config.json", f"{DINO_FOLDER}/model.safetensors"]
    assert (tmp_path / DINO_FOLDER / "model.safetensors").read_bytes() == CONTENT
