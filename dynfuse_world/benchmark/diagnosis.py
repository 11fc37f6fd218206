"""Why a fusion does what it does: what its trace says about whose layers are used, when, and how loud the two LoRAs are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib_dynfuse.fusion import Rows, Trace
from lib_dynfuse.fusion.session import FusionSession
from lib_dynfuse.lora.naming import Site


@dataclass(frozen=True)
class Diagnosis:
    """Of one fusion's pictures.

    share: of the choices, those for the subject; by_kind and by_depth: of the choices at those layers; by_step: at each step.
    flips: share of choices that differ from the same layer's at the step before. loudness: sum D_c / sum D_s over layers and steps,
    the geometric mean over the pictures; None where a sum is not positive (as with the criterion dot). agreement: share of layers and
    steps at which conditional and unconditional rows choose alike, each for itself; None where one choice serves both. Where tokens
    choose, a layer's choice here is what it would be for the whole picture.
    """

    share: float
    by_kind: dict[str, float]
    by_depth: dict[str, float]
    by_step: list[float]
    flips: float
    loudness: float | None
    agreement: float | None = None


def diagnosis(trace: Trace, *, all_rows: bool = False) -> Diagnosis | None:
    """Of a trace; None where nothing was measured. all_rows: it is of a session that EveryRow made."""
    if not trace.measured.any():
        return None
    images = trace.winners.shape[2] // 2 if all_rows else trace.winners.shape[2]
    winners = trace.winners[:, trace.decided]
    shown = winners[:, :, -images:]
    sites = [site for site, decided in zip(trace.sites, trace.decided.tolist()) if decided]
    return Diagnosis(
        share=shown.float().mean().item(),
        by_kind=_share_by(kind, sites, shown),
        by_depth=_share_by(depth, sites, shown),
        by_step=shown.float().mean((1, 2)).tolist(),
        flips=flips(shown),
        loudness=loudness(trace.divergences[:, trace.decided, -images:]),
        agreement=(winners[:, :, :images] == shown).float().mean().item() if all_rows else None,
    )


def flips(winners: Tensor) -> float:
    """(steps, sites, images) bool. 0 for one step."""
    return (winners[1:] != winners[:-1]).float().mean().item() if len(winners) > 1 else 0.0


def loudness(divergences: Tensor) -> float | None:
    """(steps, sites, images, 2) -> the geometric mean over images of sum D_c / sum D_s."""
    subject, style = divergences.double().sum((0, 1)).unbind(-1)
    ratio = subject / style
    if not bool((torch.isfinite(ratio) & (ratio > 0)).all()):
        return None
    return ratio.log().mean().exp().item()


def kind(site: Site) -> str:
    """ "self q", "cross out", ..."""
    found = re.search(r"\.attn([12])\.to_(q|k|v|out)", site.layer)
    return f"{'self' if found[1] == '1' else 'cross'} {found[2]}" if found else "other"


def depth(site: Site) -> str:
    """ "down 0", "mid", "up 3", ..."""
    found = re.match(r"(down|mid|up)_block(?:s\.(\d+))?", site.layer)
    return " ".join(part for part in found.groups() if part) if found else "other"


def _share_by(group: Callable[[Site], str], sites: Sequence[Site], winners: Tensor) -> dict[str, float]:
    members: dict[str, list[int]] = defaultdict(list)
    for position, site in enumerate(sites):
        members[group(site)].append(position)
    return {name: winners[:, positions].float().mean().item() for name, positions in members.items()}


def over_pairs(diagnoses: Iterable[Diagnosis]) -> Diagnosis:
    """The mean over pairs; of the loudness the geometric one."""
    found = list(diagnoses)
    loud = [d.loudness for d in found]
    agreements = [d.agreement for d in found]
    return Diagnosis(
        share=_mean(d.share for d in found),
        by_kind={name: _mean(d.by_kind[name] for d in found) for name in found[0].by_kind},
        by_depth={name: _mean(d.by_depth[name] for d in found) for name in found[0].by_depth},
        by_step=np.mean([d.by_step for d in found], axis=0).tolist(),
        flips=_mean(d.flips for d in found),
        loudness=None if None in loud else float(np.exp(np.mean(np.log(np.array(loud, dtype=float))))),
        agreement=None if None in agreements else _mean(a for a in agreements if a is not None),
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


class EveryRow(FusionSession):
    """Granularity "row", with every row's choices in the trace and not the conditional ones' alone: first all unconditional rows', then
    all conditional ones', in the order of diffusers' batches.
    """

    def attached(self, rows: Rows | None = None):  # type: ignore[no-untyped-def]  # a context manager, as the session's
        return super().attached(Rows.separate(len(rows.images)) if rows is not None else None)


__all__ = ["Diagnosis", "EveryRow", "depth", "diagnosis", "flips", "kind", "loudness", "over_pairs"]
