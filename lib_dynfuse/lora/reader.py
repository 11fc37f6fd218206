"""Reading LoRA files: every dialect and kind, into branches by flat layer name.

A file is read as a whole or refused with one sentence that names it and the reason. Tensors stay as they are stored (fp32, fp16,
bf16) and are not computed with, so that a file of 200 MB takes about a second.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]
from torch import Tensor

from ..reasons import first_line
from . import families
from .branch import Branch, Dense, LoraError, LowRank, NormShift
from .families import (
    has_variable_input,
    is_kernel,
    is_norm,
    known_text_layer,
    layout_of,
    recognise,
    reference_aliases,
    reference_layers,
)
from .kinds import branch_of
from .naming import KeyName, names_denoiser, parse_key


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file, taken apart. Layers are named by flat names in the file's own scheme (naming.py).

    name: the file's name without its ending. family: "SD 1.x", "SDXL", "Flux", ..., or None where the layers do not tell; possible: the
    families that they allow then.
    dialects: how its keys are written, for reports. denoiser: layer -> branch. norms: denoiser layer -> shift of gain and offset.
    text: encoder ("te1" CLIP-L and the only one of SD 1.x and 2.x, "te2" CLIP-G, "t5") -> layer -> branch.
    ranks: rank -> number of layers. kinds: "LoRA", "LoHa", ... -> number of layers.
    unmatched: keys that no layer of the family's published model takes (a model at hand may differ, so they are kept).
    embeddings: names of bundled embeddings. keys: denoiser layer -> the file's keys for it.
    """

    path: Path
    name: str
    family: str | None
    dialects: tuple[str, ...]
    denoiser: dict[str, Branch]
    norms: dict[str, NormShift] = field(default_factory=dict)
    text: dict[str, dict[str, Branch]] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    possible: tuple[str, ...] = ()


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file (.safetensors; .pt, .ckpt and .bin as tensors only). Raises LoraError: one sentence, file and reason."""
    path = Path(path)
    keys, load, metadata = _opened(path)
    parsed = {key: parse_key(key) for key in keys}
    groups: dict[tuple[str, str], dict[str, str]] = {}  # (component, layer) -> role -> key
    embeddings: list[str] = []
    unmatched = [key for key, name in parsed.items() if name is None]
    for key, name in parsed.items():
        if name is None:
            continue
        if name.component == "embedding":
            embeddings.append(name.layer)
            continue
        roles = groups.setdefault((name.component, name.layer), {})
        if name.role in roles:
            raise LoraError(f"{path.name} cannot be used: it holds layer {name.layer} twice, as {roles[name.role]} and as {key}.")
        roles[name.role] = key
    for roles in groups.values():
        # A plain "weight" is a whole layer's, of a checkpoint; beside "on_input" it is the vector of IA3.
        if "weight" in roles and "on_input" not in roles:
            unmatched.append(roles.pop("weight"))
    if not any(_changes_something(roles) for roles in groups.values()):
        raise LoraError(_no_lora(path, list(parsed)))
    tensors = load([key for roles in groups.values() for key in roles.values()])
    _refuse_infinite(path, tensors)
    return _taken_apart(path, groups, tensors, unmatched, list(dict.fromkeys(embeddings)), metadata, parsed)


def _taken_apart(
    path: Path,
    groups: Mapping[tuple[str, str], Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    unmatched: list[str],
    embeddings: list[str],
    metadata: dict[str, str],
    parsed: Mapping[str, KeyName | None],
) -> LoraFile:
    denoiser: dict[str, Branch] = {}
    norms: dict[str, NormShift] = {}
    text: dict[str, dict[str, Branch]] = {}
    keys_of: dict[str, tuple[str, ...]] = {}
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    unknown: list[str] = []
    for (component, layer), roles in groups.items():
        known = layout_of(layer) is not None if component == "denoiser" else known_text_layer(component, layer)
        try:
            made = branch_of(_norm_roles(layer, {role: tensors[key] for role, key in roles.items()}))
        except LoraError as error:
            if known:
                raise LoraError(f"{path.name} cannot be used: at layer {layer}, {error}.") from None
            unmatched.extend(roles.values())
            continue
        if made is None or (isinstance(made[1], NormShift) and component != "denoiser"):
            unmatched.extend(roles.values())
            continue
        kind, branch = made[0], _unflattened(layer, made[1]) if component == "denoiser" else made[1]
        if not known:
            unknown.append(layer)
        if component != "denoiser":
            assert not isinstance(branch, NormShift)
            text.setdefault(component, {})[layer] = branch
            if not known:
                unmatched.extend(roles.values())
        else:
            keys_of[layer] = tuple(roles.values())
            if isinstance(branch, NormShift):
                norms[layer] = branch
            else:
                denoiser[layer] = branch
        kinds[kind] += 1
        rank = None if isinstance(branch, NormShift) else branch.rank
        if rank is not None:
            ranks[rank] += 1
    # The denoiser's own names serve a model of a scheme that no family has.
    foreign = len(unknown) == len(denoiser) + len(norms) and any(names_denoiser(key) for layer in unknown for key in keys_of.get(layer, ()))
    if not foreign and len(unknown) == len(denoiser) + len(norms) + sum(len(layers) for layers in text.values()):
        names = ", ".join(known.name for known in families.FAMILIES)
        raise LoraError(
            f"{path.name} was made for another kind of model: its layers, such as {unknown[0]}, belong to none of {names}."
            if unknown
            else _no_lora(path, list(parsed))
        )
    shapes = {layer: branch.shape for layer, branch in denoiser.items()} | dict.fromkeys(norms)
    known_text = {name: layers for name, layers in text.items() if any(known_text_layer(name, layer) for layer in layers)}
    possible = recognise(shapes, {encoder: _text_width(branches) for encoder, branches in known_text.items()}, metadata)
    family = possible[0] if len(possible) == 1 else None
    if not foreign:
        for layer in (layer for layer in keys_of if not _in_families(layer, possible)):
            unmatched.extend(keys_of[layer])
    if family is not None:
        _refuse_misfits(path, family, {layer: shape for layer, shape in shapes.items() if shape is not None})
    return LoraFile(
        path=path,
        name=path.stem,
        family=family,
        dialects=_dialects((name for name in parsed.values() if name is not None), possible),
        denoiser=denoiser,
        norms=norms,
        text=text,
        ranks=dict(sorted(ranks.items())),
        kinds=dict(kinds.most_common()),
        unmatched=unmatched,
        embeddings=embeddings,
        metadata=metadata,
        keys=keys_of,
        possible=possible if family is None else (),
    )


_Load = Callable[[Iterable[str]], dict[str, Tensor]]


def _opened(path: Path) -> tuple[list[str], _Load, dict[str, str]]:
    """(keys, function that loads the tensors of some keys, metadata) of a file. Raises LoraError."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(9)
        size = path.stat().st_size
    except FileNotFoundError:
        raise LoraError(f"{path.name} cannot be read: there is no such file.") from None
    except IsADirectoryError:
        raise LoraError(f"{path.name} cannot be read: it is a folder.") from None
    except OSError as error:
        raise LoraError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    if size == 0:
        raise LoraError(f"{path.name} cannot be read: the file is empty.")
    # Contents before endings; and the header first, as its length may begin with the bytes that mark a pickle or a zip archive.
    pickled = beginning.startswith((b"PK", b"\x80")) or path.suffix.lower() in (".pt", ".ckpt", ".bin", ".pth")
    if pickled and beginning[8:] != b"{":
        return _opened_pickle(path)
    return _opened_safetensors(path, beginning[:8], size)


def _opened_safetensors(path: Path, beginning: bytes, size: int) -> tuple[list[str], _Load, dict[str, str]]:
    header = int.from_bytes(beginning, "little")
    # safetensors reports a cut-off file and one that never was a safetensors file by the same error.
    if len(beginning) < 8 or header > size - 8:
        reason = "it is cut off" if len(beginning) == 8 and header < 100_000_000 else "it is no safetensors file"
        raise LoraError(f"{path.name} cannot be read: {reason}.")

    def load(keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                # Clones, because a tensor that safetensors maps from the file would change, or kill the process, with the file.
                return {key: file.get_tensor(key).clone() for key in keys}
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise LoraError(f"{path.name} cannot be read: {first_line(error)}.") from None

    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            return list(file.keys()), load, dict(file.metadata() or {})
    except SafetensorError as error:
        reason = "it is cut off or damaged" if re.search("Incomplete|Invalid", str(error)) else first_line(error)
        raise LoraError(f"{path.name} cannot be read: {reason}.") from None


def _opened_pickle(path: Path) -> tuple[list[str], _Load, dict[str, str]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LoraError(f"{path.name} was not opened: it is damaged or holds other things than tensors, which might be code.") from None
    except Exception as error:  # a damaged pickle makes its reader fail in any way, struct.error and AssertionError among them
        raise LoraError(f"{path.name} cannot be read: it is damaged ({first_line(error)}).") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    # A1111 replaces torch.load by its own check, which prints its refusal and returns None.
    if not isinstance(content, Mapping):
        raise LoraError(f"{path.name} is no LoRA: it holds no named tensors.")
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    return list(tensors), lambda keys: {key: tensors[key] for key in keys}, {}


def _refuse_infinite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise LoraError if a tensor holds NaN or an infinity, which would make every picture black, even at weight 0."""
    for key, tensor in tensors.items():
        # A sum costs a fraction of looking at each number, and only finite numbers can have a finite one.
        if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32).item()):
            continue
        numbers = tensor.float()
        if not torch.isfinite(numbers).all():
            what = "NaN, which is no number" if numbers.isnan().any() else "an infinite number"
            raise LoraError(f"{path.name} cannot be used: its tensor {key} holds {what}.")


def _changes_something(roles: Mapping[str, str]) -> bool:
    return bool(roles.keys() - {"alpha", "scale", "dora_scale", "magnitude", "on_input", "rescale", "bias"})


def _no_lora(path: Path, keys: list[str]) -> str:
    if not keys:
        return f"{path.name} is no LoRA: it holds no tensors."
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")) for key in keys):
        what = "it is a whole model (checkpoint)"
    elif any(key in ("emb_params", "string_to_param", "clip_l", "clip_g") for key in keys):
        what = "it is an embedding (textual inversion)"
    else:
        what = f"none of its {len(keys)} tensors, such as {keys[0]}, is named as in a LoRA"
    return f"{path.name} is no LoRA: {what}."


def _norm_roles(layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A lone diff_b is a bias: of a normalisation layer, if the name says so, which shifts and has no branch."""
    if tensors.keys() == {"diff_b"} and is_norm(layer):
        return {"b_norm": tensors["diff_b"]}
    return tensors


def _unflattened(layer: str, branch: Branch | NormShift) -> Branch | NormShift:
    """LyCORIS flattens the kernels of its LoHa and LoKr convolutions to (out, in * 9); the layer's name tells them."""
    if isinstance(branch, NormShift) or branch.shape is None or len(branch.shape) != 2 or not is_kernel(layer) or branch.shape[1] % 9:
        return branch
    out, into = branch.shape[0], branch.shape[1] // 9
    if isinstance(branch, LowRank):
        return replace(branch, down=branch.down.reshape(-1, into, 3, 3))
    if isinstance(branch, Dense):
        return replace(branch, weight=branch.weight.reshape(out, into, 3, 3))
    return replace(branch, shape=(out, into, 3, 3))


def _text_width(branches: Mapping[str, Branch]) -> int | None:
    for layer, branch in branches.items():
        if layer.endswith(("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj")) and branch.shape is not None:
            return branch.shape[1]
    return None


def _in_families(layer: str, names: tuple[str, ...]) -> bool:
    return any(layer in reference_aliases(name) for name in names) if names else layout_of(layer) is not None


def _refuse_misfits(path: Path, family: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LoraError if nearly all layers have the base model's shapes and some do not: such a file is damaged.

    A file that fits the published model nowhere or in part belongs to a model of another size, and that model decides.
    """
    layers, aliases = reference_layers(family), reference_aliases(family)
    misfits: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    checked = 0
    for layer, shape in shapes.items():
        sites = [alias.site for alias in aliases.get(layer, ())]
        if not sites or has_variable_input(sites[0].layer):
            continue
        whole = layers[sites[0].layer]
        rows = sum(whole[0] if site.part is None else site.part.rows(whole[0])[1] for site in sites)
        checked += 1
        if shape[0] != rows or _columns(shape) != _columns(whole):
            misfits.append((layer, shape, (rows, *whole[1:])))
    if misfits and len(misfits) * 10 <= checked:
        layer, shape, wanted = misfits[0]
        raise LoraError(
            f"{path.name} cannot be used: at layer {layer} it makes up a weight of {_times(shape)}, where {family} has {_times(wanted)}."
        )


def _columns(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape[1:]:
        product *= size
    return product


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _dialects(names: Iterable[KeyName], possible: tuple[str, ...]) -> tuple[str, ...]:
    """How the keys are written, the commonest first: "kohya, LDM names", "PEFT, Flux diffusers names", ..."""
    counts: Counter[str] = Counter()
    own: Counter[str] = Counter()
    family = possible[0] if possible else None
    for name in names:
        if name.component == "denoiser" and name.style:
            layout = layout_of(name.layer, family)
            (own if layout is None else counts)[f"{name.style}, {layout or 'names of its own'}"] += 1
        elif name.component in ("te1", "te2", "t5") and name.style:
            counts[f"{name.style}, text encoder"] += 1
    return tuple(label for label, _ in (counts or own).most_common())


__all__ = ["LoraError", "LoraFile", "read_lora"]
