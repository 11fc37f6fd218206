"""Denoisers to measure with: U-Nets of real size with random weights and random LoRAs, and the miniature world's own."""

from __future__ import annotations

import importlib
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion import FusionSession, Rows, Step
from ..fusion.predictions import Call
from ..lora import LoraFile, read_lora
from ..settings import FuseSettings

# The published U-Net configurations of Stable Diffusion 1.5 and SDXL base 1.0 (their model cards' unet/config.json).
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
WORLD = "world"
_DEFAULT_SIZE = {"sd15": 256, "sdxl": 512, WORLD: 64}
# Subjects and styles of the miniature world in the order in which they are taken.
_WORLD_LORAS = (("zib", "mok"), ("blueprint", "candy"))
_TEXT_TOKENS = 77

ROWS = Rows((0, 0), (False, True), 1)
"""One image: an unconditional and a conditional row."""
CFG_SCALE = 5.0


class NoDenoiser(RuntimeError):
    """What was asked for cannot be built here. One sentence for the user."""


@dataclass(frozen=True)
class Denoiser:
    """A U-Net and a step's inputs for it, the latent first."""

    model: str
    size: int
    unet: nn.Module
    inputs: dict[str, Any]

    @property
    def latent(self) -> Tensor:
        return next(iter(self.inputs.values()))

    def run(self, positions: tuple[int, ...] | None = None) -> Any:
        """The prediction. positions: of the rows, None for all."""
        inputs = self.inputs if positions is None else _rows(self.inputs, list(positions))
        output = self.unet(**inputs)
        return getattr(output, "sample", output)

    def step(self, session: FusionSession, step: Step | None = None, run: Call | None = None) -> None:
        """A whole step of a session on it. step: as in FusionSession.begin. run: in place of the denoiser's own."""
        session.begin(step)
        session.predict(run or self.run, ROWS, CFG_SCALE)
        session.end_step()

    def wait(self) -> None:
        if self.latent.is_cuda:
            torch.cuda.synchronize(self.latent.device)


@dataclass(frozen=True)
class Loras:
    """What is fused on a denoiser. rank: the largest, None where they have nothing low-rank."""

    subjects: tuple[LoraFile, ...]
    styles: tuple[LoraFile, ...]

    @classmethod
    def split(cls, files: Sequence[LoraFile]) -> Loras:
        """The first half are the subjects, with the middle one among them."""
        subjects = (len(files) + 1) // 2
        return cls(tuple(files[:subjects]), tuple(files[subjects:]))

    def session(self, denoiser: Denoiser, settings: FuseSettings) -> FusionSession:
        return FusionSession(denoiser.unet, self.subjects, self.styles, settings)

    @property
    def first(self) -> Loras:
        """One LoRA alone."""
        return Loras(self.subjects[:1], ())


def _rows(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Single numbers are for all rows."""
    chosen: dict[str, Any] = {}
    for name, value in inputs.items():
        chosen[name] = _rows(value, rows) if isinstance(value, dict) else value[rows] if value.dim() else value
    return chosen


def default_size(model: str) -> int:
    """Pixels."""
    return _DEFAULT_SIZE[model]


def build(model: str, size: int, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Raises NoDenoiser without diffusers, and for a miniature world that is not there."""
    try:
        return _built(model, size, device, dtype)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise NoDenoiser("The benchmark builds its U-Net with diffusers, which is not installed here: pip install diffusers") from None


def _built(model: str, size: int, device: torch.device, dtype: torch.dtype) -> Denoiser:
    if model == WORLD:
        unet = _world().load_pipeline().unet.to(device, dtype).eval().requires_grad_(False)
    else:
        import diffusers

        torch.manual_seed(0)
        with torch.device(device):
            unet = diffusers.UNet2DConditionModel(sample_size=size // 8, **CONFIGURATIONS[model]).to(dtype).eval().requires_grad_(False)
    return Denoiser(model, size, unet, unet_inputs(model, size, device, dtype))


def _world() -> Any:
    try:
        return importlib.import_module("dynfuse_world.model")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "dynfuse_world":
            raise
        raise NoDenoiser("The miniature world (the folder dynfuse_world) is no part of this copy of the program.") from None


def unet_inputs(model: str, size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A batch of one image: an unconditional and a conditional row."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    width = _world().TEXT_WIDTH if model == WORLD else CONFIGURATIONS[model]["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": noise(2, 4, size // 8, size // 8),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": noise(2, _TEXT_TOKENS, width),
    }
    if model == "sdxl":
        inputs["added_cond_kwargs"] = {
            "text_embeds": noise(2, 1280),
            "time_ids": torch.full((2, 6), float(size), device=device, dtype=dtype),
        }
    return inputs


def loras(denoiser: Denoiser, count: int, rank: int | None) -> Loras:
    """rank: of random ones; the miniature world has its own."""
    if denoiser.model == WORLD:
        folder = _world().WEIGHTS / "loras"
        subjects = (count + 1) // 2
        names = (*_WORLD_LORAS[0][:subjects], *_WORLD_LORAS[1][: count - subjects])
        return Loras.split([read_lora(folder / f"{name}.safetensors") for name in names])
    assert rank is not None
    with tempfile.TemporaryDirectory() as folder:
        return Loras.split([random_lora(denoiser.unet, rank, seed, Path(folder) / f"{seed}.safetensors") for seed in range(1, count + 1)])


def random_lora(unet: nn.Module, rank: int, seed: int, path: Path, layers: int | None = None) -> LoraFile:
    """A kohya LoRA on the linear layers and 1 x 1 convolutions of every transformer block, as its trainer makes by default.

    layers: on so many of them only, spread over the model.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    names = transformer_layers(unet)
    if layers is not None:
        names = [names[place * len(names) // layers] for place in range(layers)]
    for name in names:
        out, width, *kernel = unet.get_submodule(name).weight.shape
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = (torch.randn(rank, width, *kernel, generator=generator) / width**0.5).half()
        tensors[f"{key}.lora_up.weight"] = (0.05 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)).half()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, str(path))
    return read_lora(path)


def transformer_layers(unet: nn.Module) -> list[str]:
    """Names of the layers that LoRAs are usually trained on."""
    weights = ((name, getattr(module, "weight", None)) for name, module in unet.named_modules())
    return [name for name, weight in weights if ".attentions." in name and weight is not None and weight.dim() >= 2]


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


__all__ = [
    "CFG_SCALE",
    "CONFIGURATIONS",
    "ROWS",
    "WORLD",
    "Denoiser",
    "Loras",
    "NoDenoiser",
    "build",
    "default_size",
    "loras",
    "processor",
    "random_lora",
    "transformer_layers",
    "unet_inputs",
]
