"""DynFuse: fuse a subject LoRA and a style LoRA by the features they change, while an image is made."""

from .fusion import FusionError, FusionSession, Rows, Trace, fuse
from .lora import LoraError, LoraFile, read_lora
from .settings import FuseSettings, SettingsError

__all__ = [
    "FuseSettings",
    "FusionError",
    "FusionSession",
    "LoraError",
    "LoraFile",
    "Rows",
    "SettingsError",
    "Trace",
    "fuse",
    "read_lora",
]
