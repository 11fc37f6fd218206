"""Reading LoRA files: every dialect and kind, into branches by flat layer name.

A file is read as a whole or refused with one sentence that names it and the reason. Tensors stay as they are stored (fp32, fp16,
bf16) and are not computed with, so that a file of 200 MB takes about a second.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..printable import printable
from . import cloneofsimo, families
from .adapter_config import AdapterConfig, Alpha, has_strength
from .branch import Branch, Dense, FromWeight, LoraError, LowRank, NormShift
from .contents import Contents, opened
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
    embeddings: names of bundled embeddings. keys: denoiser layer -> the file's keys for it. alphas: what the strengths of the layers whose
    kind has one are made from -> number of layers; None for those of strength 1, because nothing is said.
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
    alphas: dict[Alpha | None, int] = field(default_factory=dict)
    possible: tuple[str, ...] = ()


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file (.safetensors; .pt, .ckpt and .bin as tensors only). Raises LoraError: one sentence, file and reason."""
    path = Path(path)
    contents = opened(path)
    parsed = _parsed(path, contents)
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
            first, second = printable(roles[name.role]), printable(key)
            raise LoraError(f"{path.name} cannot be used: it holds layer {printable(name.layer)} twice, as {first} and as {second}.")
        roles[name.role] = key
    for roles in groups.values():
        # A plain "weight" is a whole layer's, of a checkpoint; beside "on_input" it is the vector of IA3.
        if "weight" in roles and "on_input" not in roles:
            unmatched.append(roles.pop("weight"))
    groups = {place: roles for place, roles in groups.items() if roles}
    if not any(_changes_something(roles) for roles in groups.values()):
        raise LoraError(_no_lora(path, list(parsed)))
    tensors = contents.load([key for roles in groups.values() for key in roles.values()])
    _refuse_infinite(path, tensors)
    return _taken_apart(path, groups, tensors, unmatched, list(dict.fromkeys(embeddings)), contents.metadata, parsed)


def _parsed(path: Path, contents: Contents) -> dict[str, KeyName | None]:
    """What each key says."""
    if not cloneofsimo.is_numbered(contents.keys):
        return {key: parse_key(key) for key in contents.keys}
    shapes = {key: tuple(tensor.shape) for key, tensor in contents.load(contents.keys).items()}
    try:
        names = cloneofsimo.names(contents.keys, contents.metadata, shapes)
    except ValueError as error:
        raise LoraError(f"{path.name} cannot be used: it is of cloneofsimo's kind, and {error}.") from None
    return {key: names.get(key) for key in contents.keys}


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
    alphas: Counter[Alpha | None] = Counter()
    config = AdapterConfig(path, metadata)
    for (component, layer), roles in groups.items():
        known = layout_of(layer) is not None if component == "denoiser" else known_text_layer(component, layer)
        own = {role: tensors[key] for role, key in roles.items()}
        try:
            further, alpha = config.of(next(name for key in roles.values() if (name := parsed[key])), own)
            made = branch_of(_norm_roles(layer, {**own, **further}))
            if made is not None:
                _refuse_scaled_bias(component, layer, own, made[1])
        except LoraError as error:
            if known:
                raise LoraError(f"{path.name} cannot be used: at layer {printable(layer)}, {error}.") from None
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
        if has_strength(own):
            alphas[alpha] += 1
        rank = None if isinstance(branch, NormShift) else branch.rank
        if rank is not None:
            ranks[rank] += 1
    # The denoiser's own names serve a model of a scheme that no family has.
    foreign = len(unknown) == len(denoiser) + len(norms) and any(names_denoiser(key) for layer in unknown for key in keys_of.get(layer, ()))
    if not foreign and len(unknown) == len(denoiser) + len(norms) + sum(len(layers) for layers in text.values()):
        names = ", ".join(known.name for known in families.FAMILIES)
        raise LoraError(
            f"{path.name} was made for another kind of model: its layers, such as {printable(unknown[0])}, belong to none of {names}."
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
        alphas=dict(alphas.most_common()),
        possible=possible if family is None else (),
    )


def _refuse_infinite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise LoraError if a tensor holds NaN or an infinity, which would make every picture black, even at weight 0."""
    for key, tensor in tensors.items():
        # A sum costs a fraction of looking at each number, and only finite numbers can have a finite one.
        # torch cannot add up numbers of 8 bits.
        numbers = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if not numbers.is_floating_point() or math.isfinite(numbers.sum(dtype=torch.float32).item()):
            continue
        if not torch.isfinite(numbers).all():
            what = "NaN, which is no number" if numbers.isnan().any() else "an infinite number"
            raise LoraError(f"{path.name} cannot be used: its tensor {printable(key)} holds {what}.")


def _changes_something(roles: Mapping[str, str]) -> bool:
    return bool(roles.keys() - {"alpha", "scale", "dora_scale", "magnitude", "on_input", "rescale", "bias", "oft_s", "boft_s"})


# What the tensors' names of PEFT's other kinds have in them.
_PEFT_KINDS = {
    ".lora_E": "AdaLoRA",
    ".vera_lambda": "VeRA",
    ".hra_u": "HRA",
    ".ln_tuning_layers": "LN tuning",
    ".fourierft_": "FourierFT",
    ".vblora_": "VB-LoRA",
    ".bone_": "Bone",
    ".miss_block": "MiSS",
    ".randlora_": "RandLoRA",
    ".shira_weight": "SHiRA",
    ".c3a_kernel": "C3A",
    ".road_": "RoAd",
    ".delora_": "DeLoRA",
}


def _no_lora(path: Path, keys: list[str]) -> str:
    if not keys:
        return f"{path.name} is no LoRA: it holds no tensors."
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")) for key in keys):
        what = "it is a whole model (checkpoint)"
    elif any(key in ("emb_params", "string_to_param", "clip_l", "clip_g") for key in keys):
        what = "it is an embedding (textual inversion)"
    elif kind := next((kind for part, kind in _PEFT_KINDS.items() if any(part in key for key in keys)), None):
        return f"{path.name} cannot be used: it is an adapter of PEFT's kind {kind}, which is not among those that are read."
    else:
        what = f"none of its {len(keys)} tensors, such as {printable(keys[0])}, is named as in a LoRA"
    return f"{path.name} is no LoRA: {what}."


_WITHOUT_BIAS = re.compile(r"(?:down|up|mid|input|output|middle)_blocks?_.+_attn[12]_to_[qkv]")


def _refuse_scaled_bias(component: str, layer: str, tensors: Mapping[str, Tensor], branch: Branch | NormShift) -> None:
    """PEFT's IA3 scales a layer's output, its bias included, which a branch does not reach; a U-Net's to_q, to_k and to_v have none."""
    if "ia3_l" not in tensors or not isinstance(branch, FromWeight) or branch.out is None:
        return
    if component != "denoiser" or _WITHOUT_BIAS.fullmatch(layer) is None:
        raise LoraError("it scales the layer's output (IA3) and with it a bias, which cannot be scaled here")


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
