"""Bringing a file's branches to a model's layers, and two files to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .branch import Branch, Dense, FromWeight, LoraError, LowRank, NormShift, bound
from .families import Family, Layers, families_of_model, family, has_variable_input, knowing
from .naming import Alias, Part, Site
from .reader import LoraFile


@dataclass(frozen=True)
class SiteBranch:
    """What a file does at one site.

    branch: of the whole layer that the file names. source: which of its rows belong to the site (None: all). whole: for a file
    that names a fused layer of this model as one, all the layer's parts in the order of the file's rows. name, file: the layer's
    flat name and the file's name, for messages. shape: of the whole layer's weight, once `fitted` to it.
    """

    branch: Branch
    source: Part | None = None
    whole: tuple[Part, ...] = ()
    name: str = ""
    file: str = ""
    shape: tuple[int, ...] | None = None

    def fitted(self, site: Site, shape: tuple[int, ...]) -> SiteBranch:
        """The same for a layer whose weight is known to have this shape, (out, in[, kh, kw]): `bind` then gives that form.

        Files write a 1 x 1 convolution's matrices in two or four dimensions, and some kinds flatten a kernel; an inpainting model's
        first convolution is wider than the file's, which changes its first channels only. Raises LoraError, naming layer and file,
        if the branch does not fit.
        """
        own = self.branch.shape
        if own is not None:
            if self.source is not None:
                own = (self.rows(self.source, own[0])[1], *own[1:])
            if not self._fits(site, own, self._wanted(site, shape)):
                raise self._misfit(site, own, self._wanted(site, shape))
        return replace(self, shape=tuple(shape))

    def bind(self, site: Site, layer_weight: Callable[[], Tensor]) -> LowRank | Dense:
        """The branch of this site, ready to be applied.

        layer_weight: gives the whole layer's weight (out, in[, kh, kw]), dequantised; called only for kinds that depend on it.
        Raises LoraError, naming layer and file, if the branch does not fit.
        """
        branch, shape = self.branch, self.shape
        if isinstance(branch, FromWeight):
            weight = layer_weight().detach()
            shape = tuple(weight.shape)
            own = self._rows_of_file(site, weight)
            if branch.out not in (None, own.shape[0]):
                raise self._misfit(site, (branch.out or 0, *own.shape[1:]), tuple(own.shape))
            if branch.shape is not None and math.prod(branch.shape) != own.numel():
                raise self._misfit(site, branch.shape, tuple(own.shape))
            try:
                made: LowRank | Dense = branch.bind(own)
            except RuntimeError as error:
                raise LoraError(f"{self.file} cannot be used: at layer {self.name}, {str(error).splitlines()[0]}.") from None
        else:
            made = bound(branch, layer_weight)
        if self.source is not None:
            made = made.rows(*self.rows(self.source, made.shape[0]))
        return made if shape is None else self._in_form(made, self._wanted(site, shape), site)

    def _rows_of_file(self, site: Site, weight: Tensor) -> Tensor:
        """The rows of the layer's weight that the file's tensors stand for, in the file's order."""
        parts = self.whole or ((site.part,) if site.part is not None else ())
        if not parts:
            return weight
        spans = [self.rows(part, weight.shape[0]) for part in parts]
        return torch.cat([weight[start : start + length] for start, length in spans])

    def rows(self, part: Part, total: int) -> tuple[int, int]:
        """(first row, number of rows) of a part of `total` rows. Raises LoraError, naming layer and file, if they do not divide."""
        try:
            return part.rows(total)
        except ValueError as error:
            raise LoraError(f"{self.file} cannot be used: at layer {self.name}, {error}.") from None

    def _wanted(self, site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the site's rows of the layer's weight."""
        return tuple(shape) if site.part is None else (self.rows(site.part, shape[0])[1], *shape[1:])

    def _fits(self, site: Site, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        if shape[0] == wanted[0] and math.prod(shape) == math.prod(wanted):
            return True
        narrower = len(shape) == len(wanted) == 4 and (shape[0], *shape[2:]) == (wanted[0], *wanted[2:]) and shape[1] < wanted[1]
        return narrower and has_variable_input(site.layer)

    def _in_form(self, made: LowRank | Dense, wanted: tuple[int, ...], site: Site) -> LowRank | Dense:
        shape = made.shape
        if shape == wanted:
            return made
        if not self._fits(site, shape, wanted):
            raise self._misfit(site, shape, wanted)
        kernels = made.down if isinstance(made, LowRank) else made.weight
        if math.prod(shape) == math.prod(wanted):
            kernels = kernels.reshape(kernels.shape[0], *wanted[1:])
        else:
            kernels = torch.nn.functional.pad(kernels, (0, 0, 0, 0, 0, wanted[1] - shape[1]))
        return replace(made, down=kernels) if isinstance(made, LowRank) else replace(made, weight=kernels)

    def _misfit(self, site: Site, shape: tuple[int, ...], wanted: tuple[int, ...]) -> LoraError:
        return LoraError(
            f"{self.file} was made for another base model: its layer {self.name} changes a weight of {_times(shape)}, "
            f"where this model has {_times(wanted)} ({site.layer})."
        )


def branches_by_site(file: LoraFile, aliases: Mapping[str, list[Alias]]) -> tuple[dict[Site, SiteBranch], list[str]]:
    """(branch at each site of a model, keys of the file that none of its layers takes).

    aliases: of the model (families.denoiser_aliases). A layer that the file names twice, fused and split, counts as first named. A
    change that depends on the weight of a fused layer is unmatched on a model whose layer is split.
    """
    found: dict[Site, SiteBranch] = {}
    unmatched: list[str] = []
    for layer, branch in file.denoiser.items():
        targets = aliases.get(layer, [])
        split = isinstance(branch, FromWeight) and len({alias.site.layer for alias in targets}) > 1
        if not targets or split or any(alias.site in found for alias in targets):
            unmatched.extend(file.keys.get(layer, (layer,)))
            continue
        ordered = sorted(targets, key=lambda alias: alias.source.start if alias.source else 0)
        whole = tuple(alias.site.part for alias in ordered if alias.site.part is not None) if len(ordered) > 1 else ()
        for alias in targets:
            found[alias.site] = SiteBranch(branch, alias.source, whole, layer, file.path.name)
    for layer in file.norms:
        if len(aliases.get(layer, [])) != 1:
            unmatched.extend(file.keys.get(layer, (layer,)))
    return found, unmatched


def norms_by_layer(file: LoraFile, aliases: Mapping[str, list[Alias]]) -> dict[str, NormShift]:
    """Shifts of the model's normalisation layers, by dotted layer name."""
    return {targets[0].site.layer: shift for layer, shift in file.norms.items() if len(targets := aliases.get(layer, [])) == 1}


def compatible(a: LoraFile, b: LoraFile) -> str | None:
    """Why two LoRAs cannot be fused on one model, in a sentence; None if nothing speaks against it."""
    kinds = [_base_models(file) for file in (a, b)]
    if kinds[0] and kinds[1] and not _with_relatives(kinds[0]) & _with_relatives(kinds[1]):
        return _different(a, _either(kinds[0]), b, _either(kinds[1]))
    kinds = [{known.kind for known in knowing((*file.denoiser, *file.norms))} for file in (a, b)]
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return _different(a, _either(kinds[0]), b, _either(kinds[1]))
    for layer, branch in a.denoiser.items():
        other = b.denoiser.get(layer)
        if other is None or branch.shape is None or other.shape is None:
            continue
        if branch.shape[0] != other.shape[0] or math.prod(branch.shape) != math.prod(other.shape):
            return (
                f"{a.path.name} and {b.path.name} were made for different base models: layer {layer} has "
                f"{_times(branch.shape)} weights in one and {_times(other.shape)} in the other."
            )
    return None


def misfit(file: LoraFile, layers: Layers) -> str | None:
    """Why a LoRA cannot be used on a model with these layers, in a sentence; None if nothing speaks against it. That layers fit says
    little: other models name theirs as Flux does, and have some of its sizes.
    """
    made, model = _base_models(file), {known.name for known in families_of_model(layers)}
    if not made or not model or _with_relatives(made) & _with_relatives(model):
        return None
    return f"{file.path.name} was made for {_either(made)}, and the model is {_either(model)}."


def shared_families(files: Sequence[LoraFile]) -> list[Family]:
    """The families that all of these files may be for, as far as their layers tell; where one file names its own, that alone."""
    if name := next((file.family for file in files if file.family is not None), None):
        return [family(name)]
    allowed = [file.possible for file in files if file.possible]
    return [family(name) for name in allowed[0] if all(name in others for others in allowed)] if allowed else []


def naming_family(files: Sequence[LoraFile]) -> Family | None:
    """The family in whose names a file made of these is written; None if those that they may be for do not name the layers alike."""
    found = shared_families(files)
    return found[0] if len({known.kohya_layout for known in found}) == 1 else None


def _different(a: LoraFile, one: str, b: LoraFile, other: str) -> str:
    return f"{a.path.name} was made for {one} and {b.path.name} for {other}: both must be for the same base model."


def _base_models(file: LoraFile) -> set[str]:
    """The families that a file may be for; empty where its layers tell none."""
    return set(file.possible) if file.family is None else {file.family}


def _with_relatives(names: set[str]) -> set[str]:
    return names.union(*(family(name).relatives for name in names))


def _either(kinds: set[str]) -> str:
    return " or ".join(sorted(kinds))


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


__all__ = ["SiteBranch", "branches_by_site", "compatible", "misfit", "naming_family", "norms_by_layer", "shared_families"]
