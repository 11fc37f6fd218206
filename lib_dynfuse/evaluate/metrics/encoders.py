"""The networks that pictures are compared by: each turns pictures into directions, by the protocol that the field uses with it.

CLIP and DINO are the guidance's, from the same files. The others come through transformers, from a folder or the hub, and are kept
where the hub's own library keeps them. Only safetensors and plain tensors are read, never code.
"""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from ...guidance.encoders import load_clip, load_dino
from ...guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderError, EncoderSources, Progress, imported
from ...home import encoders_folder
from ...reasons import first_line

_BATCH = 16
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)

Preprocessing = Callable[[Image.Image], Tensor]
"""An RGB picture -> (3, size, size) float32."""


def cropped(size: int, shorter: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """The shorter side to `shorter` pixels by Pillow's bicubic filter, the square of `size` pixels in the middle, normalised."""
    transforms = importlib.import_module("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = transforms.Resize(shorter, bicubic), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)
    return transforms.Compose(steps)


def squeezed(size: int, bicubic: bool, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """Straight to a square by Pillow's bicubic or bilinear filter, whatever the shape, normalised."""
    transforms = importlib.import_module("torchvision.transforms")
    mode = transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    return transforms.Compose([transforms.Resize((size, size), mode), transforms.ToTensor(), transforms.Normalize(mean, std)])


@dataclass(frozen=True)
class EncoderNames:
    """Encoders by kind: folders, files or names on the hub; each kind's default where it is not named.

    folder: where CLIP and DINO are kept, None for the guidance's own. download: whether what is missing may be fetched. device: where
    they compute, empty for where the pictures are made, and the CPU beside a WebUI.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    download: bool = True
    device: str = ""


class PictureEncoder(ABC):
    """kind: the key of a plan's [encoders]. default: what is used where the plan names none; empty where it must."""

    kind: ClassVar[str]
    default: ClassVar[str]

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.preprocessing = preprocessing

    @classmethod
    @abstractmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> PictureEncoder:
        """Raises EncoderError."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, C)"""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, C), float32 on the CPU, each row of length 1."""
        device = next(self.network.parameters()).device
        pixels = torch.stack([self.preprocessing(picture) for picture in pictures]).to(device)
        return F.normalize(self.features(pixels).float(), dim=-1).cpu()


class Clip(PictureEncoder):
    """CLIP's image embedding after its projection; shorter side to 224 (bicubic), centre crop, CLIP's mean and deviation."""

    kind, default = "clip", CLIP_DEFAULT

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> Clip:
        encoder = load_clip(EncoderSources(sources.folder, clip=name, download=sources.download), progress)
        return cls(encoder.network, cropped(encoder.size, encoder.size, encoder.mean, encoder.std))

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)


class Dino(PictureEncoder):
    """DINO's class token in the last layer, after its norm; shorter side to 256 (bicubic), centre crop to 224, ImageNet's mean and
    deviation (as DreamBooth measures it)."""

    kind, default = "dino", DINO_DEFAULT

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> Dino:
        encoder = load_dino(EncoderSources(sources.folder, dino=name, download=sources.download), progress)
        return cls(encoder.network, cropped(encoder.size, encoder.size * 256 // 224, encoder.mean, encoder.std))

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)


class ViT(PictureEncoder):
    """The class token in the last layer, after its norm; straight to 224 x 224 (bilinear), mean and deviation 0.5."""

    kind, default = "vit", "google/vit-base-patch16-224-in21k"

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> ViT:
        model = _pretrained("ViTModel", name, sources, add_pooling_layer=False)
        return cls(model, squeezed(model.config.image_size, False, _HALF, _HALF))

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


class Blip2(PictureEncoder):
    """BLIP-2's image embedding for retrieval: the Q-Former's 32 queries after their projection, each of length 1, and their mean;
    straight to 224 x 224 (bicubic), CLIP's mean and deviation."""

    kind, default = "blip2", "Salesforce/blip2-itm-vit-g"

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> Blip2:
        model = _pretrained("Blip2VisionModelWithProjection", name, sources)
        return cls(model, squeezed(model.config.vision_config.image_size, True, _CLIP_MEAN, _CLIP_STD))

    def features(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.network(pixel_values=pixels).image_embeds, dim=-1).mean(1)


class Dinov2(PictureEncoder):
    """DINOv2's class token in the last layer, after its norm; shorter side to 256 (bicubic), centre crop to 224, ImageNet's mean and
    deviation."""

    kind, default = "dinov2", "facebook/dinov2-base"

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> Dinov2:
        model = _pretrained("Dinov2Model", name, sources)
        size = min(224, model.config.image_size)
        return cls(model, cropped(size, size * 256 // 224, _IMAGENET_MEAN, _IMAGENET_STD))

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


class SigLip(PictureEncoder):
    """SigLIP's image embedding (its attention pooling); straight to 224 x 224 (bicubic), mean and deviation 0.5."""

    kind, default = "siglip", "google/siglip-base-patch16-224"

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> SigLip:
        model = _pretrained("SiglipVisionModel", name, sources)
        return cls(model, squeezed(model.config.image_size, True, _HALF, _HALF))

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).pooler_output


class Csd(PictureEncoder):
    """CSD's style descriptor (arXiv 2404.01292): CLIP ViT-L/14's vision tower, finetuned, and the projection `last_layer_style`; shorter
    side to 224 (bicubic), centre crop, CLIP's mean and deviation. Its published checkpoint is named by the plan."""

    kind, default = "csd", ""
    architecture: ClassVar[str] = "ViT-L-14-quickgelu"

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, projection: Tensor) -> None:
        """projection: (width, C)."""
        super().__init__(network, preprocessing)
        self.projection = projection

    @classmethod
    def load(cls, name: str, sources: EncoderSources, progress: Progress | None) -> Csd:
        path = Path(name)
        if not name or not path.is_file():
            raise EncoderError(f"CSD's checkpoint {name or 'is not named'}: name its file as csd in the plan's [encoders].")
        state = _tensors(path)
        build = imported("open_clip_torch", "open_clip.model")._build_vision_tower
        config = imported("open_clip_torch", "open_clip").get_model_config(cls.architecture)
        tower = build(config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu")))
        tower.proj = None  # the feature before the projection is what CSD's own ones take
        try:
            tower.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")})
            projection = state["last_layer_style"].float()
        except (RuntimeError, KeyError) as error:
            raise EncoderError(f"{path} is no checkpoint of CSD: {first_line(error)}.") from None
        size = tower.image_size[0] if isinstance(tower.image_size, Sequence) else tower.image_size
        return cls(tower, cropped(size, size, _CLIP_MEAN, _CLIP_STD), projection)

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels) @ self.projection.to(pixels.device)


ENCODERS: dict[str, type[PictureEncoder]] = {kind.kind: kind for kind in (Clip, Dino, ViT, Blip2, Dinov2, SigLip, Csd)}


class Shelf:
    """A plan's encoders, one in memory at a time; a picture is read and encoded once for all metrics of one encoder."""

    def __init__(self, names: EncoderNames, device: str = "cpu", progress: Progress | None = None) -> None:
        self._names, self._device, self._progress = names, device, progress
        self._sources = EncoderSources(names.folder or encoders_folder(), download=names.download)
        self._loaded: PictureEncoder | None = None
        self._known: dict[tuple[str, Path], Tensor] = {}

    def identity(self, kind: str) -> str:
        """Stands for an encoder's weights: its name on the hub, or the sizes and times of its files."""
        name = self._names.names.get(kind) or ENCODERS[kind].default
        path = Path(name)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return " ".join([name, *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)])

    def encoder(self, kind: str) -> PictureEncoder:
        """Raises EncoderError."""
        if self._loaded is None or self._loaded.kind != kind:
            self._loaded = None  # the memory first
            encoder = ENCODERS[kind].load(self._names.names.get(kind) or ENCODERS[kind].default, self._sources, self._progress)
            encoder.network.to(self._device)
            self._loaded = encoder
        return self._loaded

    def encoded(self, kind: str, pictures: Sequence[Path]) -> Tensor:
        """(B, C), rows of length 1. Raises EncoderError, and OSError for a picture that cannot be read."""
        missing = [path for path in dict.fromkeys(pictures) if (kind, path) not in self._known]
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            rows = self.encoder(kind)([opened(path) for path in batch])
            self._known |= {(kind, path): row for path, row in zip(batch, rows)}
        return torch.stack([self._known[kind, path] for path in pictures])


def opened(path: Path) -> Image.Image:
    """As RGB, turned as its camera says; without transparency. Raises OSError."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # a damaged picture raises whatever its bytes happen to mean
        raise OSError(0, first_line(error), str(path)) from None


def _pretrained(kind: str, name: str, sources: EncoderSources, **more: Any) -> nn.Module:
    transformers = imported("transformers", "transformers")
    found = getattr(transformers, kind, None)
    if found is None:
        raise EncoderError(f"transformers {transformers.__version__} has no {kind}, which the encoder {name} needs: use a newer one.")
    try:
        return found.from_pretrained(name, local_files_only=not sources.download, use_safetensors=True, **more)
    except Exception as error:  # transformers raises whatever its libraries raise
        raise EncoderError(
            f"The encoder {name} cannot be loaded ({first_line(error)}): name a folder with its config.json and model.safetensors in the "
            "plan's [encoders]."
        ) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise EncoderError(f"{path} cannot be read: it is damaged or holds other things than tensors ({first_line(error)}).") from None
    content = content.get("model_state_dict") or content.get("state_dict") or content
    return {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


def digest(text: str) -> str:
    """Eight digits that stand for it."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


__all__ = ["ENCODERS", "EncoderNames", "PictureEncoder", "Shelf", "cropped", "digest", "opened", "squeezed"]
