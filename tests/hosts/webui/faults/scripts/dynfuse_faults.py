"""Fails where an API client wants it: `"alwayson_scripts": {"dynfuse faults": {"args": ["hook:process"]}}`.

hook:NAME       an exception in that script hook
callback:NAME   an exception in that cfg callback
layer:POSITION  an exception inside the denoiser, after the layer at that fraction (0 to 1) of its layers
denoiser        an exception in the denoiser's call
interrupt:STEP, skip:STEP    as the buttons, at that step
short           memory is short in Forge and its forks: every stretch of rows gets a model call of its own, the negative prompt's first

Also tells what is on the model and in memory, and what became of the last job's guidance.
"""

from __future__ import annotations

import base64
import gc
import io
import os
import time

import gradio as gr
import torch
from modules import script_callbacks, scripts, shared

HOOKS = (
    "setup",
    "before_process",
    "process",
    "before_process_batch",
    "after_extra_networks_activate",
    "process_batch",
    "process_before_every_sampling",
    "before_hr",
    "post_sample",
    "postprocess_batch",
    "postprocess_batch_list",
    "postprocess_image",
    "postprocess",
)
CALLBACKS = ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg")

wanted = ""
last = []
loaded = time.time()  # another after each restart of the UI


def denoiser():
    model = shared.sd_model
    objects = getattr(model, "forge_objects", None)
    return objects.unet.model.diffusion_model if objects is not None else model.model.diffusion_model


def fail(place):
    raise RuntimeError(f"failed as wanted: {place}")


def fail_once(register, place):
    def hook(*args):
        handle.remove()
        fail(place)

    handle = register(hook)


class Faults(scripts.Script):
    def title(self):
        return "DynFuse faults"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox(value="", visible=False)]


class ShortOfMemory:
    """The WebUI's memory management, which has none to spare."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def get_free_memory(self, *args, **kwargs):
        return 0


def memory(short):
    try:
        from backend.sampling import sampling_function as owner

        name = "memory_management"
    except ModuleNotFoundError:  # reForge, Forge Classic
        from ldm_patched.modules import samplers as owner

        name = "model_management"
    real = getattr(owner, name)
    real = getattr(real, "real", real)
    setattr(owner, name, ShortOfMemory(real) if short else real)


def hook_method(name):
    def method(self, p, *args, **kwargs):
        global wanted
        if name == "before_process":
            wanted = next((a for a in args if isinstance(a, str)), "")
        kind, _, detail = wanted.partition(":")
        if kind == "short" and name in ("process_before_every_sampling", "postprocess"):
            memory(name != "postprocess")
        if name == "postprocess":
            last[:] = [told(done) for done in dynfuse().passes(p)]
        if kind == "hook" and detail == name:
            fail(name)
        if name != "process_before_every_sampling":
            return
        if kind == "layer":
            layers = [m for m in denoiser().modules() if getattr(m, "weight", None) is not None]
            fail_once(layers[int(float(detail) * (len(layers) - 1))].register_forward_hook, "layer")
        if kind == "denoiser":
            fail_once(denoiser().register_forward_pre_hook, "denoiser")

    return method


for name in HOOKS:
    setattr(Faults, name, hook_method(name))


def callback(name):
    def called(params):
        kind, _, detail = wanted.partition(":")
        if kind == "callback" and detail == name:
            fail(name)
        if name == "cfg_denoiser" and kind in ("interrupt", "skip") and params.denoiser.step == int(detail):
            getattr(shared.state, kind)()

    return called


for name in CALLBACKS:
    getattr(script_callbacks, f"on_{name}")(callback(name))


def dynfuse():
    from lib_dynfuse.hosts.webui.detect import detect

    return detect()


def told(done):
    """What a pass of the last job tells of its guidance."""
    guidance = done.guidance
    record = guidance.record if guidance is not None else None
    return {
        "hires": done.hires,
        "notes": done.notes,
        "steps": record.steps if record is not None else [],
        "total_steps": record.total_steps if record is not None else 0,
        "similarities": record.similarities.tolist() if record is not None else [],
        "references": [reference_told(reference) for reference in (guidance.references if guidance is not None else [])],
    }


def reference_told(reference):
    buffer = io.BytesIO()
    reference.picture.save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    return {"side": reference.side, "prompt": reference.prompt, "given": reference.given, "picture": picture}


def guidance():
    return {"passes": last, "kept": len(dynfuse().reference_cache.entries())}


def state():
    """What is on the denoiser and in memory."""
    gc.collect()
    modules = list(denoiser().modules())
    with open("/proc/self/statm") as numbers:
        resident = int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "own_forwards": sum("forward" in m.__dict__ for m in modules),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "attributes": sum(len(m.__dict__) for m in modules),
        "tensors": sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()),
        "resident": resident,
        "wrappers": wrappers(),
    }


def wrappers():
    """How often DynFuse has wrapped each function of the WebUI."""
    import networks
    from modules import extra_networks, processing, sd_samplers_cfg_denoiser, sd_samplers_common

    return {
        name: sum("lib_dynfuse" in function.__code__.co_filename for function in chain(getattr(owner, name)))
        for owner, name in (
            (processing, "process_images_inner"),
            (extra_networks, "activate"),
            (networks, "load_networks"),
            (sd_samplers_cfg_denoiser.CFGDenoiser, "forward"),
            (sd_samplers_common, "apply_refiner"),
        )
    }


def chain(function):
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def routes(_, app):
    app.add_api_route("/dynfuse-faults/loaded", lambda: loaded, methods=["GET"])
    app.add_api_route("/dynfuse-faults/state", state, methods=["GET"])
    app.add_api_route("/dynfuse-faults/guidance", guidance, methods=["GET"])
    app.add_api_route("/dynfuse-faults/clear-references", lambda: dynfuse().reference_cache.clear(), methods=["POST"])
    app.add_api_route("/dynfuse-faults/reload-ui", lambda: shared.state.request_restart(), methods=["POST"])


script_callbacks.on_app_started(routes)
