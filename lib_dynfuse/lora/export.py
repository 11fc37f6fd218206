"""A fused set of LoRAs as one file in kohya's format, which every WebUI and diffusers can load.

A sum of low-rank changes is one of higher rank: sum_i f_i s_i U_i D_i = [f_1 s_1 U_1, f_2 s_2 U_2, ...] [D_1; D_2; ...], so for constant
factors f the file is exact, of rank r_1 + r_2 + ..., but for the rounding to its dtype. Where the parts of a fused layer (Flux's qkv,
linear1) have different branches or factors, the first matrix has a block of rows for each.

Kinds that are no product of two thin matrices (full, large LoHa and LoKr) are written whole, as `diff`, which A1111 and Forge read
but diffusers does not; with a rank they become low rank too. Changes of biases (`diff_b`) are kept; A1111 reads them only beside `diff`.
Normalisation layers are summed as `w_norm` and `b_norm`. Kinds that depend on the base model's weights (DoRA, IA3, OFT, BOFT, GLoRA)
need those weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError  # type: ignore[attr-defined]
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SettingsError
from . import families
from .branch import Branch, Dense, FromWeight, LoraError, LowRank, NormShift, bound
from .families import Family, Shape, denoiser_aliases, family, reference_layers
from .matching import SiteBranch, branches_by_site, compatible, naming_family, shared_families
from .naming import Alias, Site
from .reader import LoraFile

Rewrite = Callable[[Site, Sequence[LowRank | Dense], Sequence[int], Sequence[float]], Sequence[LowRank | Dense]]
"""(site, the shares' changes, the shares' numbers, their factors) -> what takes the changes' place (see fusion.rules.Rule.rewritten)"""
Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""

_TEXT_PREFIXES = {"te1": "lora_te_", "te2": "lora_te2_", "t5": "lora_te3_"}


@dataclass(frozen=True)
class Share:
    """A LoRA, and how much of it goes into the merged file.

    factor: site of the model -> factor on the branch there, and on a normalisation layer's shift. A part of a fused layer is a site of
    its own. text: encoder ("te1", "te2", "t5") -> factor on its branches.
    """

    file: LoraFile
    factor: Callable[[Site], float] = lambda site: 1.0
    text: Callable[[str], float] = lambda encoder: 1.0


@dataclass(frozen=True)
class MergeReport:
    """What a merged file holds.

    ranks: rank -> number of layers, text encoders included. whole: key beginnings of layers written as `diff`. norms: number of
    normalisation layers. text: encoder -> number of layers. unmatched: LoRA's name -> its keys that fit no layer of the model, left out.
    errors: key beginning -> relative error |dW - dW'| / |dW| (Frobenius) where the rank was reduced. error: the same of all layers
    together, those that were kept exactly included; the rounding to the file's dtype is in neither.
    """

    family: str | None
    ranks: dict[int, int]
    whole: tuple[str, ...]
    norms: int
    text: dict[str, int]
    unmatched: dict[str, list[str]]
    errors: dict[str, float]
    error: float


def write_merged(
    path: str | os.PathLike[str],
    shares: Sequence[Share],
    *,
    layers: Mapping[str, Shape | None] | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
    weight_of: Callable[[str], Tensor] | None = None,
    rewrite: Rewrite | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the LoRAs of `shares` as one file. Arguments: see `merged_tensors`. A file that exists is never overwritten.

    metadata: the settings it was made with, written under "dynfuse_<name>". Raises LoraError: one sentence.
    """
    path = Path(path)
    check_target(path)
    tensors, report = merged_tensors(shares, layers=layers, rank=rank, dtype=dtype, weight_of=weight_of, rewrite=rewrite, progress=progress)
    _save(path, tensors, _metadata(path, [share.file for share in shares], report, metadata or {}))
    return report


def merged_tensors(
    shares: Sequence[Share],
    *,
    layers: Mapping[str, Shape | None] | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    weight_of: Callable[[str], Tensor] | None = None,
    rewrite: Rewrite | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], MergeReport]:
    """The merged LoRA's tensors by their keys, and the report.

    layers: dotted layer names of the model, in any scheme, with the shapes of their weights where known: its sites are what the shares'
    factors are asked for. By default those of the published model of the LoRAs' family, in its authors' scheme (LDM, BFL).
    rank: highest rank of a layer; higher ones are reduced by singular values. None: every layer exactly.
    weight_of: dotted layer name -> the layer's weight on the CPU, dequantised, for the kinds that depend on it. rewrite: changes what
    several shares do at a site, before their factors. progress: called after each layer of the denoiser.
    Raises SettingsError for the rank, LoraError: the LoRAs do not go together, fit no layer, or are of a kind that cannot be written.
    """
    if rank is not None and rank < 1:
        raise SettingsError(f"rank must be at least 1, not {rank}")
    base = _family(shares, layers)
    if layers is None:
        layers = reference_layers(base.name) if base is not None else {}
    writer = _Writer(rank, dtype)
    unmatched = _write_denoiser(writer, shares, layers, base, weight_of, rewrite, progress)
    _write_text_encoders(writer, shares, base)
    if not writer.tensors:
        names = " and ".join(share.file.path.name for share in shares)
        raise LoraError(f"Nothing is left of {names} to write: all factors are 0, or no layer of the model fits.")
    # Where the files may be for several base models, so may what is made of them.
    told = base if len(shared_families([share.file for share in shares])) < 2 else None
    return writer.tensors, writer.report(told, unmatched)


def _write_denoiser(
    writer: _Writer,
    shares: Sequence[Share],
    layers: Mapping[str, Shape | None],
    base: Family | None,
    weight_of: Callable[[str], Tensor] | None,
    rewrite: Rewrite | None,
    progress: Progress | None,
) -> dict[str, list[str]]:
    """Returns the keys that fit no layer, by LoRA."""
    aliases = denoiser_aliases(layers)
    found: list[dict[Site, SiteBranch]] = []
    unmatched: dict[str, list[str]] = {}
    for share in shares:
        sites, keys = branches_by_site(share.file, aliases)
        unmatched.setdefault(share.file.name, []).extend(keys)
        found.append({site: binding for site, binding in sites.items() if share.factor(site)})
        if weight_of is None:
            _refuse_weight_dependent(
                share, [binding.branch for binding in found[-1].values()], "; generate --save-lora, which loads the model, can merge it"
            )
    shifts = [_shifts(share, aliases) for share in shares]
    touched: set[Site] = set().union(*found, *shifts)
    written = list(_targets(aliases, base, touched))
    for done, (name, targets) in enumerate(written):
        layer, site = _Layer(f"lora_unet_{name}"), targets[0].site
        for alias in targets:
            for origin, piece, factor in _pieces(alias.site, found, shares, weight_of, rewrite):
                layer.add(origin, piece, factor, alias)
        writer.write(layer, layers.get(site.layer))
        writer.write_norm(layer.key, [(at[site], share.factor(site)) for share, at in zip(shares, shifts) if site in at])
        if progress is not None:
            progress(done + 1, len(written))
    return unmatched


def _write_text_encoders(writer: _Writer, shares: Sequence[Share], base: Family | None) -> None:
    prefixes = {**_TEXT_PREFIXES, **(base.kohya_text if base is not None else {})}
    used = [{name: layers for name, layers in share.file.text.items() if share.text(name)} for share in shares]
    for share, encoders in zip(shares, used):
        _refuse_weight_dependent(share, [branch for layers in encoders.values() for branch in layers.values()])
    for encoder, name in dict.fromkeys((encoder, name) for encoders in used for encoder, layers in encoders.items() for name in layers):
        layer = _Layer(f"{prefixes[encoder]}{name}")
        for number, (share, encoders) in enumerate(zip(shares, used)):
            if (branch := encoders.get(encoder, {}).get(name)) is not None:
                layer.add(number, _applicable(branch), share.text(encoder), Alias(Site(name)))
        writer.text[encoder] += writer.write(layer, None)


def _family(shares: Sequence[Share], layers: Mapping[str, Shape | None] | None) -> Family | None:
    """The family that the files are for, which names the keys. Raises LoraError if they do not go together, or nothing tells the model."""
    files = [share.file for share in shares]
    for index, a in enumerate(files):
        for b in files[index + 1 :]:
            if reason := compatible(a, b):
                raise LoraError(reason)
    if named := naming_family(files):
        return named
    if layers is None:
        if nameless := next((file for file in files if file.denoiser or file.norms), None):
            raise LoraError(f"{nameless.path.name} cannot be merged without a model: its layers do not tell the base model.")
        return None
    return next((known for known in families.FAMILIES if known.aliases(layers) is not None), None)


def _targets(aliases: Mapping[str, list[Alias]], base: Family | None, touched: set[Site]) -> Iterator[tuple[str, list[Alias]]]:
    """(flat name to write, what it denotes), so that every touched site is written once, fused layers as one."""
    layout = None if base is None else base.layouts[base.kohya_layout]

    def order(item: tuple[str, list[Alias]]) -> tuple[bool, int]:
        return layout is not None and layout.fullmatch(item[0]) is None, -len(item[1])

    covered: set[Site] = set()
    for name, targets in sorted(aliases.items(), key=order):
        sites = {alias.site for alias in targets}
        if sites & touched and not sites & covered:
            covered |= sites
            yield name, targets


def _refuse_weight_dependent(share: Share, branches: Sequence[Branch], way_out: str = "") -> None:
    dependent = sum(isinstance(branch, FromWeight) and not branch.only_bias for branch in branches)
    if dependent:
        kinds = [kind for kind in share.file.kinds if kind.startswith("DoRA") or kind in ("IA3", "OFT", "BOFT", "GLoRA")]
        raise LoraError(
            f"{share.file.path.name} cannot be merged into one file: {dependent} of its layers ({', '.join(kinds)}) depend on "
            f"the base model's own weights{way_out}."
        )


def _pieces(
    site: Site,
    found: Sequence[Mapping[Site, SiteBranch]],
    shares: Sequence[Share],
    weight_of: Callable[[str], Tensor] | None,
    rewrite: Rewrite | None,
) -> list[tuple[object, LowRank | Dense | Tensor, float]]:
    """Of each share that changes the site: what pieces of one branch have in common, the piece, its factor."""
    there = [(number, at[site], share.factor(site)) for number, (at, share) in enumerate(zip(found, shares)) if site in at]
    pieces = [(number, binding.name, factor, _piece(binding, site, weight_of)) for number, binding, factor in there]
    changes = [(number, factor, piece) for number, _, factor, piece in pieces if not isinstance(piece, Tensor)]
    if rewrite is None or len(changes) < 2:
        return [((number, name), piece, factor) for number, name, factor, piece in pieces]
    numbers, factors, own = zip(*changes)
    rewritten = dict(zip(numbers, rewrite(site, own, numbers, factors)))
    return [((number, site), rewritten.get(number, piece), factor) for number, _, factor, piece in pieces]


def _piece(binding: SiteBranch, site: Site, weight_of: Callable[[str], Tensor] | None) -> LowRank | Dense | Tensor:
    """The branch of a site; of a change of the bias alone, that."""
    branch = binding.branch
    if isinstance(branch, FromWeight) and branch.only_bias:
        assert branch.bias is not None
        start, length = (0, len(branch.bias)) if binding.source is None else binding.rows(binding.source, len(branch.bias))
        return branch.bias[start : start + length]
    if weight_of is None:
        return binding.bind(site, torch.Tensor)
    read = weight_of
    return binding.bind(site, lambda: read(site.layer))


def _applicable(branch: Branch) -> LowRank | Dense | Tensor:
    if isinstance(branch, FromWeight):
        assert branch.only_bias
        assert branch.bias is not None
        return branch.bias
    return bound(branch, torch.Tensor)


def _shifts(share: Share, aliases: Mapping[str, list[Alias]]) -> dict[Site, NormShift]:
    found = {aliases[layer][0].site: shift for layer, shift in share.file.norms.items() if len(aliases.get(layer, [])) == 1}
    return {site: shift for site, shift in found.items() if share.factor(site)}


class _Layer:
    """The sum of the branches of one layer that is written."""

    def __init__(self, key: str):
        self.key = key
        self.thin: dict[object, tuple[Tensor, Tensor]] = {}  # branch -> (out, rank) with the factors, (rank, columns); float32
        self.whole: Tensor | None = None  # (out, columns) float32
        self.bias: Tensor | None = None
        self.inputs: Shape = ()  # (in[, kh, kw])
        self.size: Shape = ()  # (rows[, columns])

    def add(self, origin: object, piece: LowRank | Dense | Tensor, factor: float, alias: Alias) -> None:
        """origin: what pieces of one branch have in common. piece: of one site, or (rows,) of its bias. alias.source: its rows here."""
        rows = piece.shape[0]
        start, total = 0, rows
        if alias.source is not None:
            unit, rest = divmod(rows, alias.source.length)
            if rest:
                raise LoraError(f"The LoRAs cannot be merged: {rows} rows at {self.key} cannot be divided into {alias.source.length}.")
            start, total = unit * alias.source.start, unit * alias.source.units
        place = slice(start, start + rows)
        bias = piece if isinstance(piece, Tensor) else piece.bias
        if bias is not None:
            self._fits(total)
            self.bias = torch.zeros(total) if self.bias is None else self.bias
            self.bias[place] += factor * bias.float()
        if isinstance(piece, Tensor):
            return
        columns = math.prod(piece.shape[1:])
        if len(piece.shape) - 1 > len(self.inputs):
            self.inputs = piece.shape[1:]
        self._fits(total, columns)
        if isinstance(piece, Dense):
            self.whole = torch.zeros(total, columns) if self.whole is None else self.whole
            self.whole[place] += factor * piece.weight.float().reshape(rows, columns)
            return
        if origin not in self.thin:
            self.thin[origin] = torch.zeros(total, piece.rank), piece.down.float().reshape(piece.rank, columns)
        self.thin[origin][0][place] += factor * piece.scale * piece.up.float()

    def _fits(self, *size: int) -> None:
        """Raise LoraError if the layer has another size, (rows[, columns]), in another LoRA."""
        if any(one != other for one, other in zip(self.size, size)):
            one, other = (" × ".join(map(str, numbers)) for numbers in (self.size[: len(size)], size))
            raise LoraError(f"The LoRAs were made for different base models: at {self.key} one has {one} weights and another {other}.")
        self.size = max(self.size, size, key=len)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """(up (out, rank), down (rank, columns)) of the low-rank part; None if that is zero."""
        blocks = [_balanced(up, down) for up, down in self.thin.values() if up.any() and down.any()]
        if not blocks:
            return None
        return torch.cat([up for up, _ in blocks], 1), torch.cat([down for _, down in blocks])


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both of about the same size, for float16's sake, by a power of two, which changes no digit."""
    ratio = (up.abs().max() / down.abs().max()).item()
    power = 2.0 ** round(math.log2(ratio) / 2) if 0 < ratio < math.inf else 1.0
    return up / power, down * power


class _Writer:
    """Tensors under their keys, and what the report says of them."""

    def __init__(self, rank: int | None, dtype: torch.dtype):
        self.rank, self.dtype = rank, dtype
        self.tensors: dict[str, Tensor] = {}
        self.ranks: Counter[int] = Counter()
        self.whole: list[str] = []
        self.text: Counter[str] = Counter()
        self.norms = 0
        self.errors: dict[str, float] = {}
        self._lost = self._size = 0.0  # squared lengths

    def write(self, layer: _Layer, shape: Shape | None) -> bool:
        """Write a layer, in the form of its weight's shape where that is known. Returns whether there was anything to write."""
        product = layer.product()
        inputs = layer.inputs if shape is None or math.prod(shape[1:]) != math.prod(layer.inputs) else shape[1:]
        if layer.whole is not None and product is not None:
            layer.whole += product[0] @ product[1]
        if layer.whole is not None and self.rank is None:
            self._put(f"{layer.key}.diff", layer.whole.reshape(-1, *inputs))
            self.whole.append(layer.key)
        elif layer.whole is not None or product is not None:
            up, down = self._reduced(layer, product)
            rank = down.shape[0]
            self._put(f"{layer.key}.lora_up.weight", up.reshape(*up.shape, *(1,) * (len(inputs) - 1)))
            self._put(f"{layer.key}.lora_down.weight", down.reshape(rank, *inputs))
            self._put(f"{layer.key}.alpha", torch.tensor(float(rank)))
            self.ranks[rank] += 1
        if layer.bias is not None:
            self._put(f"{layer.key}.diff_b", layer.bias)
        return layer.whole is not None or product is not None or layer.bias is not None

    def write_norm(self, key: str, shifts: Sequence[tuple[NormShift, float]]) -> None:
        self.norms += bool(shifts)
        gains = [factor * shift.weight.float() for shift, factor in shifts if shift.weight is not None]
        offsets = [factor * shift.bias.float() for shift, factor in shifts if shift.bias is not None]
        for name, parts in (("w_norm", gains), ("b_norm", offsets)):
            if len({len(part) for part in parts}) > 1:
                raise LoraError(f"The LoRAs were made for different base models: {key} has different numbers of channels in them.")
            if parts:
                self._put(f"{key}.{name}", torch.stack(parts).sum(0))

    def report(self, base: Family | None, unmatched: dict[str, list[str]]) -> MergeReport:
        return MergeReport(
            base.name if base is not None else None,
            dict(sorted(self.ranks.items())),
            tuple(self.whole),
            self.norms,
            {encoder: count for encoder, count in self.text.items() if count},
            {name: keys for name, keys in unmatched.items() if keys},
            self.errors,
            math.sqrt(self._lost / self._size) if self._size else 0.0,
        )

    def _reduced(self, layer: _Layer, product: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(up, down) of at most the wanted rank."""
        if layer.whole is None and product is not None and (self.rank is None or product[1].shape[0] <= self.rank):
            self._size += 0.0 if self.rank is None else _square_of_product(*product)
            return product
        assert self.rank is not None
        if layer.whole is not None:
            up, down, lost, size = _nearest(layer.whole, self.rank)
        else:
            assert product is not None
            up, down, lost, size = _nearest_of_product(*product, self.rank)
        self.errors[layer.key] = math.sqrt(lost / size) if size else 0.0
        self._lost, self._size = self._lost + lost, self._size + size
        return _balanced(up, down)

    def _put(self, key: str, tensor: Tensor) -> None:
        stored = tensor.to(self.dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise LoraError(f"The merged LoRA cannot be written as {str(self.dtype).removeprefix('torch.')}: {key} has too large numbers.")
        self.tensors[key] = stored


def _nearest_of_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """`_nearest` of up @ down, (out, r) and (r, columns), without making it: singular values of the r x r core between two QRs."""
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    lost, size = s[rank:].square().sum().item(), s.square().sum().item()
    return (left @ (u[:, :rank] * root)).float(), (root[:, None] * (vh[:rank] @ right.T)).float(), lost, size


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(up, down, squared distance, squared length): the product of that rank nearest to a matrix (Eckart and Young 1936).

    The eigenvectors of the smaller Gram matrix are the singular vectors of that side, in a fraction of the time of a decomposition; in
    float64 the squaring costs no digit that the file keeps.
    """
    exact = matrix.double()
    wide = exact.shape[0] < exact.shape[1]
    values, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    kept = vectors[:, -rank:]
    up, down = (kept, kept.T @ exact) if wide else (exact @ kept, kept.T)
    return up.float(), down.float(), values[:-rank].clamp_min(0).sum().item(), values.sum().item()


def _square_of_product(up: Tensor, down: Tensor) -> float:
    """|up @ down|^2 from the two Gram matrices."""
    return ((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum().item()


def _metadata(path: Path, files: Sequence[LoraFile], report: MergeReport, settings: Mapping[str, str]) -> dict[str, str]:
    """What WebUIs and sd-scripts show of a LoRA, the inputs with their hashes, and the settings."""
    ranks = sorted(report.ranks)
    size = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    entries = {
        "format": "pt",
        "ss_output_name": path.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": size,
        "ss_network_alpha": size,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": path.stem,
        "modelspec.description": f"Merged by DynFuse from {' and '.join(file.name for file in files)}",
    }
    if report.family is not None:
        entries |= family(report.family).metadata
    for key in ("ss_sd_model_name", "modelspec.trigger_phrase"):
        values = dict.fromkeys(file.metadata[key] for file in files if file.metadata.get(key, "").strip())
        if values and (key != "ss_sd_model_name" or len(values) == 1):
            entries[key] = ", ".join(values)
    entries["dynfuse_loras"] = json.dumps([{"name": file.name, "sha256": _sha256(file.path)} for file in files])
    return entries | {f"dynfuse_{name}": value for name, value in settings.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise LoraError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    return digest.hexdigest()


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a name of its own, and rename: nobody ever sees half a file under the name that was asked for."""
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(partial, "xb"):
            pass  # says what is wrong with the folder; safetensors does not
        save_file(tensors, partial, metadata)
        _rename(partial, path)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path.name} cannot be written: {_reason(error)}.") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _rename(partial: Path, path: Path) -> None:
    """A rename alone would replace the file of somebody who was quicker: first the name is taken, if nobody has it."""
    try:
        with open(path, "xb"):
            pass
    except FileExistsError:
        raise _existing(path) from None
    try:
        os.replace(partial, path)
    except OSError:
        path.unlink()
        raise


def check_target(path: Path) -> None:
    """Raises LoraError if a merged file cannot have this name: its ending, a file that exists, a folder that does not."""
    if path.suffix.lower() != ".safetensors":
        raise LoraError(f"{path.name} cannot be written: its name must end in .safetensors.")
    if os.path.lexists(path):
        raise _existing(path)
    if not path.parent.is_dir():
        raise LoraError(f"{path.name} cannot be written: there is no folder {path.parent}.")


def _existing(path: Path) -> LoraError:
    return LoraError(f"{path.name} cannot be written: there is a file of this name, which is never overwritten.")


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r'message: "([^"]+)"', str(error))
    return (found[1] if found else (str(error).strip().splitlines() or [type(error).__name__])[0]).rstrip(".")


__all__ = ["MergeReport", "Progress", "Share", "check_target", "merged_tensors", "write_merged"]
