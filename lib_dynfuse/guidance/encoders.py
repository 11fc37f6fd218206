"""The two image encoders of the score: CLIP's vision tower (open_clip) and DINO (transformers' ViT).

Both are built from their files alone, without the libraries' own loaders: those would fetch what is missing, keep CLIP's text tower in
memory, and unpickle whatever a file holds.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ..memory import is_out_of_memory
from ..reasons import first_line
from .preprocessing import prepared
from .torchscript import is_torchscript, torchscript_state
from .weights import EncoderError, EncoderSources, ModelFiles, Progress, clip_files, dino_files, imported

# open_clip's and DINO's own: what their weights were trained with where no file says otherwise.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """clip (B, C), dino (B, C'): float32, each row of length 1."""

    clip: Tensor
    dino: Tensor


class ImageEncoder:
    """Pictures -> directions. size: pixels of the square that the network sees."""

    def __init__(self, network: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """network: (B, 3, size, size) normalised -> (B, C)."""
        self.network = network
        self.size = size
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in about [-1, 1], any float dtype and device -> (B, C) of length 1, differentiable.

        In the network's float32 also under a host's autocast: in half precision the score's gradient would be mostly rounding.
        """
        weight = next(self.network.parameters())
        with without_autocast(weight.device.type):
            inputs = prepared(pictures.to(weight.device, weight.dtype), self.size, self.mean, self.std)
            features = self.network(inputs)
            return F.normalize(features, dim=-1)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, operations on that kind of device keep their operands' types, whatever a host has switched on."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:  # a device that has no autocast, such as MPS in torch 2.1
        return nullcontext()


class Encoders:
    """Both encoders. identity: stands for them in the key of a cached reference. memory: bytes of their weights."""

    def __init__(self, clip: ImageEncoder, dino: ImageEncoder, identity: str) -> None:
        self.clip, self.dino = clip, dino
        self.identity = identity

    @property
    def memory(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for encoder in (self.clip, self.dino)
            for tensor in (*encoder.network.parameters(), *encoder.network.buffers())
        )

    def to(self, device: torch.device | str) -> Encoders:
        """Move both, in place."""
        # A weight that is moved inside inference mode (Forge's whole job is) could never be differentiated through again.
        with torch.inference_mode(False):
            self.clip.network.to(device)
            self.dino.network.to(device)
        return self

    def embed(self, pictures: Tensor) -> Embeddings:
        """pictures: (B, 3, H, W) in [-1, 1]. On the encoders' device, without a graph."""
        with torch.inference_mode(False), torch.no_grad():
            return Embeddings(self.clip(pictures), self.dino(pictures))

    def embed_picture(self, picture: Image.Image) -> Embeddings:
        """Of one picture: one row each. Where the encoders' device has no room for that, they move to the CPU and do it there."""
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        with torch.inference_mode(False):
            one = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
            try:
                return self.embed(one)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the except clause: the exception's frames hold on to the memory that ran out.
            return self.to("cpu").embed(one)


_loaded: dict[object, Encoders] = {}
_loading = Lock()


def load_encoders(sources: EncoderSources, progress: Progress | None = None) -> Encoders:
    """The encoders, float32, on the CPU where they are new; the ones of the last call as long as sources and files are the same.

    Downloads what is missing, where sources allow it, and tells `progress`. Raises EncoderError: which file is missing, where it was
    looked for and where to put it; or which file is damaged or of another model.
    """
    with _loading, torch.inference_mode(False):
        clip, dino = clip_files(sources, progress), dino_files(sources, progress)
        key = (sources, clip.version, dino.version)
        if key not in _loaded:
            # Layers are first filled with random numbers: not with those that a job draws its noise from.
            with torch.random.fork_rng(devices=[]):
                encoders = Encoders(_clip_encoder(clip), _dino_encoder(dino), f"{_identity(clip)} {_identity(dino)}")
            _loaded.clear()  # one pair in memory is enough
            _loaded[key] = encoders
        return _loaded[key]


def load_clip(sources: EncoderSources, progress: Progress | None = None) -> ImageEncoder:
    """CLIP alone, as load_encoders has it, new at each call. Raises EncoderError."""
    files = clip_files(sources, progress)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return _clip_encoder(files)


def load_dino(sources: EncoderSources, progress: Progress | None = None) -> ImageEncoder:
    """DINO alone, as load_encoders has it, new at each call. Raises EncoderError."""
    files = dino_files(sources, progress)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return _dino_encoder(files)


def _identity(files: ModelFiles) -> str:
    if not files.local:
        return files.name
    digest = hashlib.sha256()
    for path in files.paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _clip_encoder(files: ModelFiles) -> ImageEncoder:
    open_clip = imported("open_clip_torch", "open_clip")
    build = imported("open_clip_torch", "open_clip.model")._build_vision_tower
    state, scripted = _state(files, "visual.")
    preprocessing: Mapping[str, Any] = {}
    if files.config is not None:
        content = _json(files.config)
        config, preprocessing = content.get("model_cfg") or content, content.get("preprocess_cfg") or {}
    else:
        config = open_clip.get_model_config(files.architecture)
        if config is None:
            raise _refusal(files, f"{_release('open_clip_torch')} knows no architecture {files.architecture}")
        if files.tag is not None:
            preprocessing = open_clip.get_pretrained_cfg(files.architecture, files.tag)
    # OpenAI's own weights want its approximation of GELU, which open_clip's table of architectures does not say (open_clip/openai.py).
    quick_gelu = scripted or files.tag == "openai" or bool(config.get("quick_gelu") or preprocessing.get("quick_gelu"))
    try:
        # The tower alone; of a CoCa model only the pooled output; and nothing that timm would fetch.
        vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
        tower = build(config["embed_dim"], vision, quick_gelu)
        height, width = tower.image_size if isinstance(tower.image_size, Sequence) else (tower.image_size, tower.image_size)
    except Exception as error:  # whatever a configuration of another time or another program leads to
        raise _refusal(files, f"{_release('open_clip_torch')} cannot build it ({first_line(error)})") from None
    if height != width:
        raise _refusal(files, f"it takes pictures of {width} × {height} pixels, and only square ones are supported")
    _fill(tower, state, files)
    return ImageEncoder(_frozen(tower), height, preprocessing.get("mean") or _CLIP_MEAN, preprocessing.get("std") or _CLIP_STD)


class _ClassToken(nn.Module):
    """DINO's feature of a picture: the class token's last state."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vit(pixel_values=pictures).last_hidden_state[:, 0]


def _dino_encoder(files: ModelFiles) -> ImageEncoder:
    transformers = imported("transformers", "transformers")
    assert files.config is not None
    content = _json(files.config)
    if content.get("model_type") != "vit":
        raise _refusal(files, f"{files.config.name} describes a model of type {content.get('model_type')}, and only vit is supported")
    state, _ = _state(files)
    try:
        vit = transformers.ViTModel(transformers.ViTConfig.from_dict(content), add_pooling_layer=False)
        size = int(vit.config.image_size)
    except Exception as error:  # as with CLIP
        raise _refusal(files, f"{_release('transformers')} cannot build it ({first_line(error)})") from None
    # A classifier's file names the same weights with a prefix, and holds more than is needed; so does DINO's, its pooling layer.
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    _fill(vit, {key: state[key] for key in vit.state_dict() if key in state}, files)
    preprocessing = _json(files.preprocessing) if files.preprocessing is not None else {}
    mean, std = preprocessing.get("image_mean") or _IMAGENET_MEAN, preprocessing.get("image_std") or _IMAGENET_STD
    return ImageEncoder(_frozen(_ClassToken(vit)), size, mean, std)


def _fill(network: nn.Module, state: Mapping[str, Tensor], files: ModelFiles) -> None:
    """Put the weights into the network. Raises EncoderError where they are not just the network's."""
    wanted = network.state_dict()
    for name, weight in wanted.items():
        if name not in state and not weight.is_floating_point():
            continue  # a counter of batch normalisation, which only training needs
        if name not in state:
            raise _refusal(files, f"its weights are of another model, they lack {name}")
        if state[name].shape != weight.shape:
            shapes = [" × ".join(map(str, tensor.shape)) for tensor in (state[name], weight)]
            raise _refusal(files, f"its weights are of another model, {name} is {shapes[0]} instead of {shapes[1]}")
        if not bool(state[name].isfinite().all()):
            raise _refusal(files, f"its weights are damaged, {name} is not finite")
    if surplus := state.keys() - wanted.keys():
        raise _refusal(files, f"its weights are of another model, which has {min(surplus)}")
    network.load_state_dict(dict(state), strict=False)


def _frozen(network: nn.Module) -> nn.Module:
    network.float().eval().requires_grad_(False)
    for module in network.modules():
        if (forward := _FORWARDS.get(type(module))) is not None:
            module.forward = MethodType(forward, module)
    return network


def _linear(self: nn.Linear, inputs: Tensor) -> Tensor:
    return F.linear(inputs, self.weight, self.bias)


def _convolution(self: nn.Conv2d, inputs: Tensor) -> Tensor:
    return self._conv_forward(inputs, self.weight, self.bias)


def _layer_norm(self: nn.LayerNorm, inputs: Tensor) -> Tensor:
    return F.layer_norm(inputs, self.normalized_shape, self.weight, self.bias, self.eps)


# WebUIs replace these classes' forward, A1111 for a whole sampling where a device has no autocast: then in half precision, and with the
# weights converted back and forth between forward and backward (devices.py:174, manual_cast). The encoders keep their own.
_FORWARDS: dict[type, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.MultiheadAttention: nn.MultiheadAttention.forward,
}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"The encoder's file {path} cannot be read: {first_line(error)}.") from None
    if not isinstance(content, dict):
        raise EncoderError(f"The encoder's file {path} cannot be read: it describes no model.")
    return content


def _state(files: ModelFiles, prefix: str = "") -> tuple[dict[str, Tensor], bool]:
    """The file's tensors under `prefix`, named without it, float32; and whether it is an archive as OpenAI publishes them."""
    path = files.weights
    scripted = is_torchscript(path)
    content: object
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                # Clones, because a tensor that safetensors maps from the file would change, or kill the process, with the file.
                content = {key: file.get_tensor(key).clone() for key in list(file.keys()) if key.startswith(prefix)}
        elif scripted:
            content = torchscript_state(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _refusal(files, "it is damaged or holds other things than tensors, which might be code, and was not opened") from None
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise _refusal(files, f"it is damaged ({first_line(error)})") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    # A1111 replaces torch.load by its own check, which prints its refusal and returns None.
    if not isinstance(content, Mapping):
        raise _refusal(files, "it holds no named tensors")
    named = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    state = {name.removeprefix(prefix): value.float() for name, value in named.items() if name.startswith(prefix)}
    if not state:
        raise _refusal(files, f"none of its tensors has a name that begins with {prefix}" if prefix else "it holds no tensors")
    return state, scripted


def _refusal(files: ModelFiles, reason: str) -> EncoderError:
    return EncoderError(f"The encoder {files.name} cannot be loaded from {files.weights}: {reason}.")


def _release(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


__all__ = [
    "Embeddings",
    "EncoderError",
    "EncoderSources",
    "Encoders",
    "ImageEncoder",
    "load_clip",
    "load_dino",
    "load_encoders",
    "without_autocast",
]
