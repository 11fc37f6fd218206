"""The two image encoders of the score: CLIP's vision tower (open_clip) and DINO (transformers' ViT).

Both are built from their files alone, without the libraries' own loaders: those would fetch what is missing, keep CLIP's text tower,
and unpickle whatever a file holds.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]
from torch import Tensor, nn

from .preprocessing import prepared
from .weights import EncoderError, EncoderSources, ModelFiles, Progress, clip_files, dino_files

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
        with _without_autocast(weight.device):
            inputs = prepared(pictures.to(weight.device, weight.dtype), self.size, self.mean, self.std)
            features = self.network(inputs)
            return F.normalize(features, dim=-1)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    try:
        return torch.autocast(device.type, enabled=False)
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
        """Of one picture: one row each."""
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        with torch.inference_mode(False):
            return self.embed(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None])


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
            encoders = Encoders(_clip_encoder(clip), _dino_encoder(dino), f"{_identity(clip)} {_identity(dino)}")
            _loaded.clear()  # one pair in memory is enough
            _loaded[key] = encoders
        return _loaded[key]


def _identity(files: ModelFiles) -> str:
    if not files.local:
        return files.name
    digest = hashlib.sha256()
    for path in (files.config, files.preprocessing, files.weights):
        if path is None:
            continue
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _clip_encoder(files: ModelFiles) -> ImageEncoder:
    try:
        import open_clip
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise EncoderError(f"CLIP needs the Python package open_clip_torch, which cannot be imported ({_first_line(error)}).") from None
    state = _state(files, "visual.")
    config: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}
    if files.config is not None:
        content = _json(files)
        config, preprocessing = content.get("model_cfg") or content, content.get("preprocess_cfg") or {}
    else:
        config = open_clip.get_model_config(files.architecture) or {}
        if not config:
            raise _refusal(files, f"open_clip {_version('open_clip_torch')} knows no architecture {files.architecture}")
        if files.tag is not None:
            preprocessing = open_clip.get_pretrained_cfg(files.architecture, files.tag)
    # OpenAI's own weights want its approximation of GELU; open_clip's table of architectures does not say so (open_clip/openai.py).
    quick_gelu = bool(config.get("quick_gelu")) or files.tag == "openai"
    try:
        vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
        tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
        tower.load_state_dict(state)
        size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ImportError) as error:
        raise _refusal(files, _first_line(error)) from None
    return ImageEncoder(_frozen(tower), size, preprocessing.get("mean") or _CLIP_MEAN, preprocessing.get("std") or _CLIP_STD)


class _ClassToken(nn.Module):
    """DINO's feature of a picture: the class token's last state."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vit(pixel_values=pictures).last_hidden_state[:, 0]


def _dino_encoder(files: ModelFiles) -> ImageEncoder:
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError as error:
        raise EncoderError(f"DINO needs the Python package transformers, which cannot be imported ({_first_line(error)}).") from None
    content = _json(files)
    if content.get("model_type") != "vit":
        raise _refusal(files, f"config.json describes a model of type {content.get('model_type')}, and only vit is supported")
    state = {key.removeprefix("vit."): value for key, value in _state(files).items()}
    try:
        vit = ViTModel(ViTConfig.from_dict(content), add_pooling_layer=False)
        missing = vit.load_state_dict({key: value for key, value in state.items() if key in vit.state_dict()}, strict=False).missing_keys
        if missing:
            raise _refusal(files, f"it lacks {len(missing)} weights, such as {missing[0]}")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, EncoderError):
            raise
        raise _refusal(files, _first_line(error)) from None
    preprocessing = json.loads(files.preprocessing.read_text("utf-8")) if files.preprocessing is not None else {}
    mean, std = preprocessing.get("image_mean") or _IMAGENET_MEAN, preprocessing.get("image_std") or _IMAGENET_STD
    return ImageEncoder(_frozen(_ClassToken(vit)), vit.config.image_size, mean, std)


def _frozen(network: nn.Module) -> nn.Module:
    return network.float().eval().requires_grad_(False)


def _json(files: ModelFiles) -> dict[str, Any]:
    assert files.config is not None
    try:
        content = json.loads(files.config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{files.config} cannot be read: {_first_line(error)}.") from None
    if not isinstance(content, dict):
        raise EncoderError(f"{files.config} cannot be read: it describes no model.")
    return content


def _state(files: ModelFiles, prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors under `prefix`, named without it, float32."""
    path = files.weights
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                content: Mapping[str, Any] = {key: file.get_tensor(key).clone() for key in list(file.keys()) if key.startswith(prefix)}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise _refusal(files, f"it is damaged ({_first_line(error)})") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise _refusal(files, "it holds no named tensors")
    state = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    return {key[len(prefix) :]: value.float() for key, value in state.items() if key.startswith(prefix)}


def _refusal(files: ModelFiles, reason: str) -> EncoderError:
    return EncoderError(f"The encoder {files.name} cannot be loaded from {files.weights}: {reason}.")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


__all__ = ["Embeddings", "EncoderError", "EncoderSources", "Encoders", "ImageEncoder", "load_encoders"]
