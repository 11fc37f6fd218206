"""What A1111 and Forge have in common, as far as DynFuse touches it: the modules that it imports, and one job's order of events.

The order is that of modules/processing.py of both; a picture is the final latent.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .models import embedded

HOOKS = (
    "before_process",
    "process",
    "before_process_batch",
    "process_batch",
    "process_before_every_sampling",
    "cfg_denoiser",
    "cfg_denoised",
    "cfg_after_cfg",
    "post_sample",
    "postprocess_batch",
    "postprocess",
)


class InterruptedException(BaseException):
    pass


class ExtraNetworkParams:
    def __init__(self, items):
        self.items = items
        self.positional = [item for item in items if "=" not in item]


@dataclass
class Entry:
    """networks.NetworkOnDisk."""

    name: str
    filename: str
    alias: str
    shorthash: str = ""

    def read_hash(self):
        self.shorthash = self.shorthash or f"hash-{self.name}"


@dataclass
class Conditioning:
    """prompt_parser.MulticondLearnedConditioning: per image, one tensor (tokens, width) per AND part."""

    batch: list[list[torch.Tensor]]


@dataclass(eq=True)  # as in the WebUIs: not hashable
class Processing:
    prompt: str
    negative_prompt: str = ""
    seed: int = 1
    steps: int = 3
    cfg_scale: float = 5.0
    batch_size: int = 1
    n_iter: int = 1
    enable_hr: bool = False
    hr_prompt: str = ""
    disable_extra_networks: bool = False
    refiner: Any = None
    refiner_step: int = 1
    callbacks: dict[str, Any] = field(default_factory=dict)
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, int] = field(default_factory=dict)
    is_hr_pass: bool = False
    distilled_cfg_scale: float = 3.5  # Forge only
    hr_cfg: float = 5.0  # not A1111's, nor Forge Classic's
    s_min_uncond: float = 0.0
    iteration: int = 0
    number: int = 0  # of the job, from 1
    cached_c: list[Any] = field(default_factory=lambda: [None, None])
    cached_uc: list[Any] = field(default_factory=lambda: [None, None])
    sampler_name: str = "Euler"
    scheduler: str = "Automatic"
    width: int = 32
    height: int = 32
    hr_upscale_to_x: int = 64
    hr_upscale_to_y: int = 64
    tiling: bool = False
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    outpath_samples: str = ""
    outpath_grids: str = ""
    sd_model: Any = None
    mask: Any = None
    nmask: Any = None
    all_prompts: list[str] | None = None
    all_negative_prompts: list[str] | None = None
    all_seeds: list[int] | None = None

    def comment(self, text):
        self.comments[text] = 1

    def hook(self, name, *args):
        """The hosts print what a script's hook raises, and go on. An interrupt is no Exception."""
        with contextlib.suppress(Exception):
            if name in self.callbacks:
                self.callbacks[name](self, *args)


class StableDiffusionProcessingTxt2Img(Processing):
    """A job that another job starts; its images are pictures, as process_images gives them."""

    def __init__(self, *, sd_model, styles, subseed, subseed_strength, restore_faces, override_settings, **settings):
        assert settings.pop("do_not_save_samples")
        assert settings.pop("do_not_save_grid")
        assert settings.pop("do_not_reload_embeddings")
        super().__init__(sd_model=sd_model, **settings)

    def close(self): ...


class KDiffusionSampler:
    """modules/sd_samplers_kdiffusion.py."""

    def __init__(self, p, sample):
        self.p, self.func, self.eta = p, sample, 1.0
        self.last_latent = None
        self.sampler_extra_args = {"cond": p.cond, "uncond": p.uncond}

    def get_sigmas(self, p, steps):
        return torch.tensor([float(steps - step) for step in range(steps)] + [0.0])


class CompVisSampler:
    """modules/sd_samplers_timesteps.py."""

    def get_timesteps(self, p, steps):
        raise AssertionError


@dataclass
class Processed:
    images: torch.Tensor
    infotext: dict[str, Any]
    comments: str
    p: Processing


OPTIONS = {
    ("sd", "sd"): {"sd_model_checkpoint": "model.ckpt", "emphasis": "Original", "CLIP_stop_at_last_layers": 1, "randn_source": "GPU"},
    ("sdxl", "sd"): {"sdxl_crop_top": 0},
    ("vae", "sd"): {"sd_vae": "Automatic", "sd_vae_decode_method": "Full"},
    ("img2img", "sd"): {"img2img_extra_noise": 0.0},
    ("optimizations", "sd"): {
        **{"s_min_uncond": 0.0, "s_min_uncond_all": False, "token_merging_ratio": 0.0},
        **{"pad_cond_uncond": False, "batch_cond_uncond": True},
    },
    ("sampler-params", "sd"): {
        **{"sigma_min": 0.0, "sigma_max": 0.0, "rho": 0.0, "eta_noise_seed_delta": 0, "always_discard_next_to_last_sigma": False},
        **{"sgm_noise_multiplier": False, "uni_pc_variant": "bh1", "uni_pc_order": 3, "skip_early_cond": 0.0},
    },
    ("extra_networks", "sd"): {"sd_hypernetwork": "None", "extra_networks_default_multiplier": 1.0},
    ("compatibility", None): {"lora_functional": False},
    ("hypertile", None): {"hypertile_enable_unet": False},
    ("another", None): {"another_api_key": ""},
    ("saving-images", "saving"): {"samples_format": "png"},
    ("ui", "ui"): {"show_progress_every_n_steps": 10},
    ("system", "system"): {"multiple_tqdm": True},
    (None, None): {"sd_checkpoint_hash": "", "forge_inference_memory": 1024},
}


class Options(types.SimpleNamespace):
    """modules/options.py: values by name, and where in the settings they stand."""

    def __init__(self):
        values = {name: value for options in OPTIONS.values() for name, value in options.items()}
        labels = {
            name: types.SimpleNamespace(section=(section, section), category_id=category, do_not_save=False)
            for (section, category), options in OPTIONS.items()
            for name in options
        }
        super().__init__(data_labels=labels, **values)


class FakeWebUI:
    """Installs the fake modules into sys.modules; `files` are the LoRAs by name."""

    guard = staticmethod(torch.no_grad)

    def __init__(self, files, aliases=None):
        self.files, self.aliases = dict(files), dict(aliases or {})
        self.activations = 0
        self.jobs = 0
        self.interrupt_at = None
        self.interrupt_job = 1
        self.refiner_from_disk = False
        self.empty_prompt = None
        self.modules = {}
        shared = self.module(
            "modules.shared",
            opts=Options(),
            sd_model=None,
            state=types.SimpleNamespace(
                **{"interrupted": False, "skipped": False, "job": "", "textinfo": None, "job_count": -1, "job_no": 0},
                **{"sampling_steps": 0, "current_latent": None},
            ),
            total_tqdm=types.SimpleNamespace(_tqdm=None),
        )
        self.state = shared.state
        self.module("modules.paths_internal", models_path="unset")
        self.module("modules.sd_vae", loaded_vae_file=None)
        self.module("modules.sd_vae_taesd", decoder_model=self.taesd)
        self.module("modules.sd_samplers_kdiffusion", KDiffusionSampler=KDiffusionSampler)
        self.module("modules.sd_samplers_timesteps", CompVisSampler=CompVisSampler)
        self.module("modules.sd_unet", current_unet=None)
        self.module("modules.sd_models", model_data=types.SimpleNamespace(get_sd_model=lambda: shared.sd_model, sd_model=None))
        self.module("modules.sd_samplers_common", apply_refiner=self.apply_refiner, InterruptedException=InterruptedException)
        self.module("modules.sd_samplers_cfg_denoiser", CFGDenoiser=self.denoiser_class())
        self.module(
            "modules.extra_networks",
            activate=self.activate,
            parse_prompt=self.parse_prompt,
            register_extra_network=self.register_extra_network,
        )
        self.module(
            "modules.processing",
            process_images_inner=self.process_images_inner,
            StableDiffusionProcessing=Processing,
            StableDiffusionProcessingTxt2Img=StableDiffusionProcessingTxt2Img,
        )
        self.module(
            "networks",
            load_networks=self.load_networks,
            list_available_networks=self.list_available_networks,
            loaded_networks=[],
            available_networks={},
            available_network_aliases={},
            forbidden_network_aliases={},
            available_network_hash_lookup={},
        )
        self.shared, self.networks = self.modules["modules.shared"], self.modules["networks"]

    def module(self, name, **contents):
        module = self.modules[name] = types.ModuleType(name)
        vars(module).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(self.modules.get(parent) or self.module(parent), child, module)
        return module

    def __enter__(self):
        self._before = {name: sys.modules.get(name) for name in [*self.modules, "backend"]}
        sys.modules.pop("backend", None)
        sys.modules.update(self.modules)
        self.list_available_networks()
        return self

    def __exit__(self, *error):
        for name, module in self._before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

    def list_available_networks(self):
        self.networks.available_networks.clear()
        self.networks.available_network_aliases.clear()
        for name, path in self.files.items():
            entry = Entry(name, path, self.aliases.get(name, name))
            self.networks.available_networks[name] = entry
            self.networks.available_network_aliases.update({name: entry, entry.alias: entry})
            self.networks.available_network_hash_lookup[f"hash-{name}"] = entry

    # extra_networks

    @staticmethod
    def parse_prompt(prompt):
        import re

        data = defaultdict(list)

        def found(match):
            data[match[1]].append(ExtraNetworkParams(match[2].split(":")))
            return ""

        return re.sub(r"<(\w+):([^>]+)>", found, prompt), dict(data)

    def register_extra_network(self, extra_network): ...

    def activate(self, p, extra_network_data):
        self.activations += 1
        params = extra_network_data.get("lora", [])
        # What an ExtraNetwork's activate raises is printed, and the job goes on (extra_networks.py:118).
        with contextlib.suppress(Exception):
            strengths = [float(x.positional[1]) if len(x.positional) > 1 else 1.0 for x in params]
            self.call_load_networks([x.positional[0] for x in params], strengths)

    def call_load_networks(self, names, strengths):
        self.networks.load_networks(names, strengths, strengths, [None] * len(names))

    # processing

    def run(self, prompt, **settings):
        """The final latents of one job, as processing.process_images gives them."""
        return self.process(Processing(prompt, **settings)).images

    def process(self, p):
        p.hook("before_process")
        self.state.interrupted = self.state.skipped = False
        self.state.job_count = p.n_iter
        return self.modules["modules.processing"].process_images_inner(p)

    def process_images_inner(self, p):
        self.jobs += 1
        p.number = self.jobs
        count = p.n_iter * p.batch_size
        p.all_prompts, p.all_negative_prompts = [p.prompt] * count, [p.negative_prompt] * count
        p.all_seeds = [p.seed + i for i in range(count)]
        p.hook("process")
        images = []
        infotext = {}
        with self.guard():
            for batch in range(p.n_iter):
                p.iteration = batch
                self.begin_batch(p)
                prompts = [p.prompt] * p.batch_size
                p.hook("before_process_batch", prompts)
                texts = [self.parse_prompt(prompt)[0] for prompt in prompts]
                data = p.extra_network_data = self.parse_prompt(prompts[0])[1]
                if not p.disable_extra_networks:
                    self.modules["modules.extra_networks"].activate(p, data)
                self.after_activate(p)
                p.hook("process_batch")
                seeds = [p.seed + p.iteration * p.batch_size + i for i in range(p.batch_size)]
                p.cond, p.uncond = self.conditionings(p, texts, data)
                latents = self.sample(p, torch.stack([noise(seed) for seed in seeds]))
                if p.enable_hr:
                    latents = self.second_pass(p, latents, seeds)
                p.hook("post_sample")
                p.hook("postprocess_batch")
                images.append(latents)
                infotext = {k: v(**{}) if callable(v) else v for k, v in p.extra_generation_params.items()}
        images = torch.cat(images)
        if isinstance(p, StableDiffusionProcessingTxt2Img):
            images = [self.picture(latent) for latent in images]
        self.state.job_no += 1
        result = Processed(images, infotext, "".join(f"{c}\n" for c in p.comments), p)
        p.hook("postprocess", result)
        return result

    def second_pass(self, p, latents, seeds):
        p.is_hr_pass = True
        text, data = self.parse_prompt(p.hr_prompt or p.prompt)
        p.hr_extra_network_data = data
        latents = torch.nn.functional.interpolate(latents, scale_factor=2.0, mode="nearest")
        if not p.disable_extra_networks:
            self.modules["modules.extra_networks"].activate(p, data)
        self.after_activate(p)
        p.cond, p.uncond = self.conditionings(p, [text] * p.batch_size, data)
        latents = self.sample(p, latents + torch.stack([noise(seed + 1000, 8) for seed in seeds]))
        p.is_hr_pass = False
        return latents

    def conditionings(self, p, texts, data):
        """Positive and negative conditionings, kept across jobs under prompt and tags as in processing.py:440."""
        key = (tuple(texts), p.negative_prompt, repr({name: [x.items for x in params] for name, params in data.items()}))
        if p.cached_c[0] != key:
            parts = [[part.strip() for part in text.split(" AND ")] for text in texts]
            p.cached_c[:] = [key, Conditioning([[self.encode([t])[0] for t in image] for image in parts])]
        if p.cached_uc[0] != key:
            p.cached_uc[:] = [key, [self.encode([p.negative_prompt])[0] for _ in texts]]
        return p.cached_c[1], p.cached_uc[1]

    def sampler_class(self, p):
        return self.modules["modules.sd_samplers_kdiffusion"].KDiffusionSampler

    def sample(self, p, x):
        sampler = self.sampler_class(p)(p, sample_euler)
        denoiser = self.modules["modules.sd_samplers_cfg_denoiser"].CFGDenoiser(self, sampler, p)
        denoiser.mask, denoiser.nmask = p.mask, p.nmask
        p.hook("process_before_every_sampling")
        self.before_sampling(p)
        sigmas = sampler.get_sigmas(p, p.steps)
        try:
            for step in range(p.steps):
                if self.interrupt_at == step and p.number == self.interrupt_job:
                    self.state.interrupted = True
                if self.state.interrupted:
                    raise InterruptedException
                sigma = sigmas[step].expand(x.shape[0])
                extra = {**sampler.sampler_extra_args, "cond_scale": p.cfg_scale, "s_min_uncond": p.s_min_uncond, "image_cond": None}
                denoised = denoiser(x, sigma, **extra)
                x = sample_euler(x, denoised, sigmas[step], sigmas[step + 1])
        except InterruptedException:
            pass
        return x

    def apply_refiner(self, cfg_denoiser, *args):
        p = cfg_denoiser.p
        if p.refiner is None or cfg_denoiser.step != p.refiner_step or self.shared.sd_model is p.refiner:
            return False
        self.shared.sd_model = p.refiner
        if self.refiner_from_disk:
            self.load()
        self.switch_model(cfg_denoiser)
        return True

    def load(self):
        """The end of sd_models.load_model: the empty prompt, for a p that is no job."""
        self.modules["modules.extra_networks"].activate(Processing(""), {})
        self.empty_prompt = self.encode([""])

    @staticmethod
    def picture(latent):
        """What the VAE makes of a latent, (4, h, w), as a PIL image."""
        with torch.inference_mode(False), torch.no_grad():
            pixels = decoder()(latent.clone()[None] / SCALE)[0]
        return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())

    @staticmethod
    def taesd():
        raise FileNotFoundError("TAESD model not found")

    # Differs between the hosts.

    def begin_batch(self, p): ...

    def after_activate(self, p): ...

    def before_sampling(self, p): ...

    def switch_model(self, cfg_denoiser): ...

    def encode(self, texts):
        return torch.stack([embedded(text) for text in texts])

    def denoiser_class(self):
        raise AssertionError

    def load_networks(self, names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        raise AssertionError


SCALE = 0.5  # of the latents to the VAE's units


def sample_euler(x, denoised, sigma, sigma_next):
    """One step of k-diffusion's sampler of this name."""
    return x + (x - denoised) / sigma * (sigma_next - sigma)


def decoder(seed=3):
    """A VAE's decoder: (B, 4, h, w) in the VAE's units -> (B, 3, 8 h, 8 w)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Upsample(scale_factor=8), torch.nn.Conv2d(8, 3, 3, padding=1)
        )
    return network.requires_grad_(False)


def noise(seed, size=4):
    return torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed))
