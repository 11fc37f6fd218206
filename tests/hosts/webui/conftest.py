from __future__ import annotations

import pytest

from lib_dynfuse.hosts.webui.a1111 import A1111
from lib_dynfuse.hosts.webui.forge import FORGE
from lib_dynfuse.hosts.webui.host import WebUIHost
from lib_dynfuse.hosts.webui.ldm_forge import CLASSIC, REFORGE
from lib_dynfuse.hosts.webui.neo import NEO
from lib_dynfuse.text.tag import parse_tags
from tests.fakes.a1111 import FakeA1111
from tests.fakes.encoders import write_clip, write_dino
from tests.fakes.forge import FakeForge
from tests.fakes.forks import FakeClassic, FakeNeo, FakeReForge
from tests.fakes.models import TextEncoder, UNet, write_lora

HOSTS = {
    "a1111": (FakeA1111, A1111),
    "forge": (FakeForge, FORGE),
    "neo": (FakeNeo, NEO),
    "reforge": (FakeReForge, REFORGE),
    "classic": (FakeClassic, CLASSIC),
}


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """LoRAs on all layers of the fakes' UNet and text encoder, by name."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", seed, UNet(), TextEncoder())
        for seed, name in enumerate(("dog", "watercolor", "sharp"))
    }


@pytest.fixture(params=list(HOSTS))
def host_name(request):
    return request.param


@pytest.fixture
def pristine(host_name, loras):
    """A WebUI that has never seen the extension, for as long as no other is entered."""
    fake, _ = HOSTS[host_name]
    return lambda: fake(loras)


@pytest.fixture
def webui(host_name, loras):
    """A WebUI with DynFuse installed; `.host` is DynFuse's side."""
    fake, roles = HOSTS[host_name]
    with fake(loras, aliases={"dog": "doggo"}) as running:
        running.host = WebUIHost(roles)
        running.host.install(parse_tags)
        yield running
        running.host.uninstall()


@pytest.fixture(scope="session")
def encoders_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    write_clip(folder / "clip")
    write_dino(folder / "dino")
    return folder


@pytest.fixture
def guided(webui, encoders_folder, tmp_path):
    """A WebUI whose user has local encoders."""
    webui.modules["modules.paths_internal"].models_path = str(tmp_path / "models")
    webui.shared.opts.dynfuse_clip_model = str(encoders_folder / "clip")
    webui.shared.opts.dynfuse_dino_model = str(encoders_folder / "dino")
    return webui
