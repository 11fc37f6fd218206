"""The few parts of a WebUI that the script and the panel call, as small stand-ins under the host's module names."""

import contextlib
import enum
import importlib
import re
import sys
import types

import gradio as gr
import pytest

from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.lora import read_lora
from lib_dynfuse.settings import use_own_presets
from lib_dynfuse.user_presets import UserPresets


class FakeHost:
    """What hosts.webui.host.WebUIHost and its catalogue promise, over a dict of LoRAs: name -> hash."""

    name = "fake"
    off = None

    def __init__(self, folder, loras=None, previews=None):
        self.reference_cache = ReferenceCache(folder)
        self.loras = {"dog": "aa11", "watercolor": "bb22"} if loras is None else loras
        self.previews = previews or {}
        self.refreshed = 0
        self.installed = None
        self.catalogue = self

        self.lora_folder = folder.parent / "Lora"
        self.lora_folder.mkdir(exist_ok=True)

    inner = False

    def is_inner(self, p):
        return self.inner

    def folder(self):
        return self.lora_folder

    def names(self):
        return list(self.loras)

    def refresh(self):
        self.refreshed += 1

    def path(self, name):
        return f"/loras/{name}.safetensors" if name in self.loras else None

    def hash(self, name):
        return self.loras.get(name)

    def name_by_hash(self, value):
        return next((name for name, other in self.loras.items() if other == value), None)

    @property
    def presets(self):
        return UserPresets(self.lora_folder.parent / "presets.json")

    layers = None

    def loaded_layers(self):
        return self.layers

    def read_lora(self, path):
        return read_lora(self.lora_folder / path.rpartition("/")[2])

    words = None

    def activation_text(self, *names):
        return self.words

    def preview(self, name):
        return self.previews.get(name)

    def passes(self, p):
        return getattr(p, "passes", [])

    def install(self, parse_request, tell_tuned=None):
        self.installed = parse_request
        self.told = tell_tuned

    def uninstall(self):
        self.installed = None


class PasteField(tuple):
    def __new__(cls, component, target, api=None):
        return super().__new__(cls, (component, target))


class Script:
    is_img2img = False


class ExtraNetwork:
    def __init__(self, name):
        self.name = name


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []


class OptionInfo:
    def __init__(self, default, label, component=None, component_args=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args

    def info(self, text):
        return self


class Options:
    """modules/options.py."""

    def add_option(self, key, info):
        setattr(self, key, info.default)


# gradio 4 writes a .pyi beside the file of every component class; Forge switches that off as well (modules/gradio_extensions.py).
with contextlib.suppress(ImportError):
    importlib.import_module("gradio.component_meta").create_or_modify_pyi = lambda *arguments: None


class SwitchedAccordion(gr.Checkbox):
    """A hidden checkbox that is also an accordion, as A1111's InputAccordion."""

    def __init__(self, value, label, elem_id):
        super().__init__(value=value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
        self.accordion = gr.Accordion(label, open=value, elem_id=elem_id)

    def get_block_name(self):
        return "checkbox"

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *exception):
        self.accordion.__exit__(*exception)


def accordion_function(value, **arguments):
    """Forge's InputAccordion is a function."""
    return SwitchedAccordion(value, **arguments)


def create_refresh_button(component, refresh, arguments, elem_id):
    button = gr.Button("refresh", elem_id=elem_id)
    button.refresh_choices = lambda: (refresh(), arguments())[1]["choices"]
    return button


class Kind(enum.Enum):
    A1111 = "class"
    FORGE = "function"


@pytest.fixture(params=list(Kind), ids=lambda kind: kind.value)
def webui(request, monkeypatch):
    """The host's modules, with callbacks and extra networks recorded; InputAccordion as a class and as a function."""
    recorded = types.SimpleNamespace(callbacks={}, networks={}, options={}, errors=[], opts=Options())

    def callback(name):
        return lambda function: recorded.callbacks.__setitem__(name, function)

    def section(identifier, options):
        for option in options.values():
            option.section, option.category_id = identifier[:2], identifier[2] if len(identifier) > 2 else None
        return options

    modules = {
        "modules": {"__path__": []},
        "modules.errors": {"report": lambda message, exc_info: recorded.errors.append(message)},
        "modules.extra_networks": {
            "ExtraNetwork": ExtraNetwork,
            "ExtraNetworkParams": ExtraNetworkParams,
            "register_extra_network": lambda network: recorded.networks.__setitem__(network.name, network),
        },
        "modules.infotext_utils": {"PasteField": PasteField},
        "modules.script_callbacks": {
            f"on_{name}": callback(name) for name in ("before_ui", "script_unloaded", "infotext_pasted", "image_saved")
        },
        "modules.scripts": {"Script": Script, "AlwaysVisible": object()},
        "modules.shared": {
            "opts": recorded.opts,
            "OptionInfo": OptionInfo,
            "options_templates": recorded.options,
            "options_section": section,
        },
        "modules.ui_common": {"create_refresh_button": create_refresh_button},
        "modules.ui_components": {
            "ToolButton": gr.Button,
            "InputAccordion": SwitchedAccordion if request.param is Kind.A1111 else accordion_function,
        },
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["modules"], name.partition(".")[2], module)
    return recorded


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path / "references")


@pytest.fixture
def script_module(webui, host, monkeypatch):
    """lib_dynfuse.webui.script as a WebUI has imported it, running on host."""
    monkeypatch.delitem(sys.modules, "lib_dynfuse.webui.script", raising=False)
    module = importlib.import_module("lib_dynfuse.webui.script")
    monkeypatch.setattr(module, "detect", lambda: host)
    yield module
    use_own_presets(dict)
    sys.modules.pop("lib_dynfuse.webui.script", None)


class Job:
    """A StableDiffusionProcessing as far as the script looks at it, and the host's steps for one batch."""

    def __init__(self, *prompts, hr_prompts=None, disable_extra_networks=False, **attributes):
        self.all_prompts = list(prompts) or ["a dog"]
        self.all_seeds = [7 + i for i in range(len(self.all_prompts))]
        self.all_hr_prompts = hr_prompts
        self.enable_hr = hr_prompts is not None
        self.hr_extra_network_data = None
        self.disable_extra_networks = disable_extra_networks
        self.extra_generation_params = {}
        self.comments = []
        vars(self).update(attributes)

    def comment(self, text):
        self.comments.append(text)

    def run_batch(self, script, *arguments):
        """The tags that the host cuts out of the first prompt: items by network name."""
        script.process(self, *arguments)
        prompts = list(self.all_prompts)
        script.before_process_batch(self, *arguments, prompts=prompts, seeds=[1], subseeds=[1], batch_number=0)
        if self.enable_hr:
            self.hr_extra_network_data = extra_network_data(self.all_hr_prompts[0])
        script.process_batch(self, *arguments, prompts=prompts, seeds=[1], subseeds=[1], batch_number=0)
        return extra_network_data(prompts[0])


def extra_network_data(prompt):
    """How a WebUI reads `<name:a:b>` out of a prompt."""
    data = {}
    for name, items in re.findall(r"<(\w+):([^>]+)>", prompt):
        data.setdefault(name, []).append(ExtraNetworkParams(items.split(":")))
    return data
