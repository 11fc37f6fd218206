"""`python -m lib_dynfuse toy export DIR`: the miniature world for a WebUI, so that the extension can be tried offline.

Everything is written below DIR/models, where a WebUI's own root has its models: DIR is that root, or any other folder to which the
WebUI is pointed. Needs neither diffusers nor a network, so a WebUI's own Python can run it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from .captions import caption, name_of
from .ldm import checkpoint, configuration
from .lora_sets import lora_path
from .model import WEIGHTS, load_text_encoder, new_text_encoder, write_tokenizer
from .painter import HELD_OUT_STYLES, SUBJECTS, Scene, paint
from .shipped import verify

NAME = "dynfuse-toy"
LORAS = (*SUBJECTS, *HELD_OUT_STYLES)

_ENCODERS = {
    "clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "dino": ("config.json", "model.safetensors", "preprocessor_config.json"),
}
_TEXT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Export:
    """What was written. checkpoints, loras: the folders of a WebUI that hold them. clip, dino: the encoders' folders. files: all files."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "models" / "Stable-diffusion"

    @property
    def loras(self) -> Path:
        return self.folder / "models" / "Lora"

    @property
    def clip(self) -> Path:
        return self.folder / "models" / "dynfuse" / "toy" / "clip"

    @property
    def dino(self) -> Path:
        return self.folder / "models" / "dynfuse" / "toy" / "dino"

    @property
    def text_encoder(self) -> Path:
        return self.folder / "models" / "dynfuse" / "toy" / "text"


def run(folder: Path) -> int:
    """Export the shipped weights, and say what to do next. Returns the exit code. Raises as export does."""
    written = export(folder)
    print(instructions(written))
    return 0


def export(folder: Path, weights: Path = WEIGHTS) -> Export:
    """Write the checkpoint, the LoRAs and the guidance's encoders. Files that are there already must be the same.

    Before anything is written, raises WeightsError where weights are missing or damaged, and FileExistsError, with a reason for people,
    where a file of another content has the place or the name of one of these. Raises OSError.
    """
    verify(weights)
    result = Export(folder.resolve(), ())
    contents = _contents(result, weights)
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise _in_the_way(path, "it is there already, with other content: remove it, or export to another folder")
    for name in LORAS:  # a WebUI tells LoRAs apart by their file names, whatever the folder
        for path in sorted(result.loras.rglob(f"{name}.*")):
            if path not in contents and path.suffix in (".safetensors", ".ckpt", ".pt"):
                raise _in_the_way(path, "the exported LoRA has the same name: rename this one, or export to another folder")
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return Export(result.folder, tuple(contents))


def instructions(written: Export) -> str:
    """What a person does with an export in a WebUI."""
    size = sum(path.stat().st_size for path in written.files) / 1e6
    subject, style = next(iter(SUBJECTS)), next(iter(HELD_OUT_STYLES))
    return f"""\
Wrote {len(written.files)} files, {size:.0f} MB, to {written.folder / "models"}:
  Stable-diffusion   {NAME}.safetensors and {NAME}.yaml
  Lora/{NAME}   {", ".join(LORAS)}
  dynfuse/toy        the text encoder, and the guidance's CLIP and DINO

Try it in AUTOMATIC1111 (Forge refuses the checkpoint: it knows models by the widths of the published ones):
1. If {written.folder} is not the WebUI's own folder, start the WebUI with
   --ckpt-dir "{written.checkpoints}" --lora-dir "{written.loras}"
   The .yaml names the folder {written.text_encoder}: after moving it, export again.
2. Choose the checkpoint {NAME}. Width and height 64, 20 steps, CFG scale 5, sampler DDIM or Euler.
3. Prompt: {caption(name_of(subject), style)} <dynfuse:{subject}:{style}>
   or without the tag, and with {subject} and {style} chosen in the panel DynFuse. Subjects: {", ".join(SUBJECTS)}; \
styles: {", ".join(HELD_OUT_STYLES)}.
4. For guidance, in Settings > DynFuse:
   CLIP encoder of the guidance   {written.clip}
   DINO encoder of the guidance   {written.dino}"""


def _contents(result: Export, weights: Path) -> dict[Path, bytes]:
    """Every file of an export."""
    unet, vae, text_encoder = (weights / f"{part}.safetensors" for part in ("unet", "vae", "text_encoder"))
    loras = {name: lora_path(weights, name) for name in LORAS}
    encoders = {kind: [weights / kind / name for name in names] for kind, names in _ENCODERS.items()}
    # Halves again, as in the file; the positions are no weights, and only some releases of transformers count them among these.
    text = {name: tensor.half() for name, tensor in load_text_encoder(text_encoder).state_dict().items() if tensor.is_floating_point()}
    with safe_open(vae, "pt") as file:  # type: ignore[attr-defined]
        scaling_factor = float(file.metadata()["scaling_factor"])
    contents = {
        result.checkpoints / f"{NAME}.safetensors": save(
            checkpoint(load(unet.read_bytes()), load(vae.read_bytes()), text), {"format": "pt"}
        ),
        result.checkpoints / f"{NAME}.yaml": configuration(scaling_factor, result.text_encoder.as_posix()).encode(),
    }
    for name, path in loras.items():
        contents[result.loras / NAME / path.name] = path.read_bytes()
        contents[result.loras / NAME / f"{name}.json"] = _json(_card(name))
        contents[result.loras / NAME / f"{name}.png"] = _preview(name)
    for name, content in _text_files().items():
        contents[result.text_encoder / name] = content
    for kind, paths in encoders.items():
        contents |= {getattr(result, kind) / path.name: path.read_bytes() for path in paths}
    return contents


def _card(name: str) -> dict[str, str]:
    """What a WebUI keeps about a LoRA; the activation text is also the prompt of the guidance's reference."""
    return {
        "description": "A LoRA of DynFuse's miniature world",
        "sd version": "SD1",
        "activation text": caption(name_of(name)) if name in SUBJECTS else caption("house", name),
    }


def _preview(name: str) -> bytes:
    """The picture that a WebUI and the panel show for a LoRA: painted, not generated."""
    scene = Scene(name, "flat") if name in SUBJECTS else Scene("house", name)
    file = io.BytesIO()
    paint(scene, random.Random(name)).save(file, "PNG")
    return file.getvalue()


def _text_files() -> dict[str, bytes]:
    """The text encoder's folder, as transformers reads it, without the weights."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    with torch.random.fork_rng(devices=[]):
        config = new_text_encoder().config
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return {
        **files,
        "config.json": _json({name: getattr(config, name) for name in _TEXT_FIELDS}),
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}),
    }


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2).encode()


def _in_the_way(path: Path, reason: str) -> OSError:
    return FileExistsError(errno.EEXIST, reason, str(path))


__all__ = ["LORAS", "NAME", "Export", "export", "instructions", "run"]
