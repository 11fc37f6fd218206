"""The benchmark's command line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib_dynfuse.bench.denoisers import processor
from lib_dynfuse.evaluate.statistics import RESAMPLES
from lib_dynfuse.program import program

from ..captions import words as world_words
from ..lora_sets import PLAIN, SETS, missing
from ..model import WEIGHTS
from .making import shipped_judges
from .methods import METHODS, RANDOM, ROWS, SWEEP, ZIPLORA, Row, RowError, chosen, row_of
from .paper import distinct, paper_text, summaries_of, tables_of
from .protocol import CFG_SCALE, PAIRS, PROMPT, REFERENCE_SEED, REPORTED, SEEDS, STEPS, TUNING, Pair
from .run import made, processors
from .summary import agreements, as_json, summaries
from .table import agreement_text, colour_table, diagnosis_table, scores_table, second_table
from .work import SCORES, Outcome, Setup, tasks

_QUICK_SEEDS = 4
_PAIRS = {"all": PAIRS, "tuning": TUNING, "reported": REPORTED}
_ALL = "all"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; argv: without the program's name. Returns the exit code. Raises OSError for a file that is missing."""
    options = _parser().parse_args(argv)
    try:
        sets = _sets(options.sets or [PLAIN])
        pairs = _of_sets(_pairs(options.pairs or ("tuning" if options.quick else "all")), sets, options.weights)
        standard = [*ROWS, *((ZIPLORA,) if options.ziplora else ()), *(() if options.quick else SWEEP)]
        rows = [*chosen(standard, options.only or []), *(row_of(text, "tried") for text in options.tried or [])]
        _known(options.prompt)
    except RowError as error:
        print(f"{str(error)[:1].upper()}{str(error)[1:]}.", file=sys.stderr)
        return 2
    paper = tables_of(options.table) if options.table else ()
    if paper:
        pairs = pairs if options.pairs else _of_sets(REPORTED, sets, options.weights)
        rows = distinct(paper)
    rows = list({row.name: row for row in rows}.values())
    count = options.seeds or (_QUICK_SEEDS if options.quick else len(SEEDS))
    seeds = tuple(range(options.first_seed, options.first_seed + count))
    work = tasks(pairs, rows)
    if not work:
        print("Nothing to do: the sweep's rows are for the tuning pairs.", file=sys.stderr)
        return 2
    workers = min(options.workers or processors(), len(work))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dynfuse-bench-") as references:
        setup = Setup(
            options.weights,
            Path(references),
            options.load_judges,
            seeds,
            options.steps,
            options.cfg_scale,
            tuple(options.loudness),
            options.prompt,
        )
        outcomes = made(work, setup, workers)
    seconds = time.perf_counter() - start
    if paper:
        found = [(table, summaries_of(table, outcomes, rows, pairs)) for table in paper]
        if options.json:
            print(json.dumps({str(table.number): [as_json(summary) for summary in own] for table, own in found}))
        else:
            print(f"{paper_text(found)}\n\n{len(pairs)} pairs, {len(seeds)} seeds each; {setup.steps} steps, CFG {setup.cfg_scale:g}.")
        return 0
    # A machine's other work at the start; its own workers are not yet in it.
    about = {"workers": workers, "load_before": load, "seconds": seconds}
    said = {name: _Found(group, outcomes, rows, pairs, sets) for name, group in (("reported", REPORTED), ("tuning", TUNING))}
    if options.json:
        print(json.dumps(_result(outcomes, said, setup, sets, about)))
    else:
        print(_text(outcomes, said, setup, about))
    if options.pictures:
        from .pictures import write_pictures

        for path in write_pictures(options.pictures, outcomes, rows, said["reported"].pooled, said["tuning"].pooled):
            print(path, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program()} toy bench",
        description="Which fusion is better, in the miniature world: pictures of 16 pairs of LoRAs, made by each method on the same noise, "
        "and judged by networks that no method has seen. Settings are tried on 4 of the pairs, methods are compared on the 12 others. "
        "The reported pairs take ten minutes on two processors.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print everything as JSON: means, intervals, every picture's scores, the machine")
    add("--pictures", type=Path, metavar="DIR", help="write sheets of pictures and figures of the scores there")
    add("--only", action="append", metavar="ROW", help="only these rows, by name ('selection*') or group (floor, method, sweep, ceiling); "
        "may be repeated")  # fmt: skip
    add("--try", action="append", dest="tried", metavar="'ROW SETTING=X ...'", help=f"a further row: {', '.join([*METHODS, RANDOM])}, with "
        "settings ('selection bias=2 criterion=js'); may be repeated")  # fmt: skip
    add("--table", choices=("3", "4", "5", "all"), help="instead of all that: the paper's Tables 3 to 5, on the reported pairs unless "
        "--pairs names others")  # fmt: skip
    add("--ziplora", action="store_true", help="also ZipLoRA, whose coefficients are trained for each pair: minutes more")
    add("--pairs", metavar="P", help=f"{', '.join(_PAIRS)}, or names with commas between ({PAIRS[0].name},{PAIRS[1].name}) (default: all)")
    add("--seeds", type=_positive, metavar="N", help=f"pictures of each pair (default: {len(SEEDS)})")
    add("--quick", action="store_true", help=f"{_QUICK_SEEDS} pictures of each tuning pair, without the sweep: only shows that all works")
    add("--first-seed", type=int, default=0, metavar="N", help="of the pictures (default: 0)")
    add("--steps", type=_positive, default=STEPS, metavar="N", help=f"of the sampler (default: {STEPS})")
    add("--cfg", type=float, default=CFG_SCALE, dest="cfg_scale", metavar="X", help=f"scale (default: {CFG_SCALE:g})")
    add("--loudness", type=float, nargs=2, default=(1.0, 1.0), metavar=("S", "T"), help="as if the subjects' and the styles' files had "
        "been saved S and T times as strong; their weights stay 1")  # fmt: skip
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"with {{subject}} (zib creature) or {{word}} (zib) and {{style}} (default: "
        f"{PROMPT})")  # fmt: skip
    add("--workers", type=_positive, metavar="N", help="processes (default: one for each processor)")
    add("--set", action="append", dest="sets", choices=(*SETS, _ALL), help=f"of LoRAs, as users' files differ (default: {PLAIN}); may be "
        "repeated: the pairs of all are pooled, zib-chalk@overfit among them; some are made by toy train loras --set ...")  # fmt: skip
    add("--weights", type=Path, default=WEIGHTS, metavar="DIR", help="the world's weights (default: those that come along)")
    parser.set_defaults(load_judges=shipped_judges)
    return parser


def _pairs(text: str) -> tuple[Pair, ...]:
    if text in _PAIRS:
        return _PAIRS[text]
    names = {pair.name: pair for pair in PAIRS}
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise RowError(f"there is no pair {unknown[0]!r}; there are {', '.join(names)}")
    return tuple(pair for name, pair in names.items() if name in wanted)


def _known(template: str) -> None:
    """Raises RowError for a prompt that is not the pair's, or has words that the model has never seen."""
    try:
        asked = PAIRS[0].asked(template)
    except (KeyError, IndexError, ValueError):
        raise RowError(f"{template!r} is no prompt: {{subject}}, {{word}} and {{style}} may stand in it") from None
    words = asked.replace(",", " ").split()
    if unknown := [word for word in words if word not in world_words()]:
        raise RowError(f"the world's model does not know the word {unknown[0]!r}; it knows {', '.join(world_words())}")
    if not {PAIRS[0].subject, PAIRS[0].style} <= set(words):
        raise RowError(f"{template!r} has not both of {{subject}} (or {{word}}) and {{style}}")


def _sets(names: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order of the table."""
    return tuple(name for name in SETS if name in names or _ALL in names)


def _of_sets(pairs: Sequence[Pair], sets: Sequence[str], weights: Path) -> tuple[Pair, ...]:
    """Every pair of every set. Raises RowError where one's files were not made."""
    found = tuple(replace(pair, files=files) for files in sets for pair in pairs)
    for pair in found:
        trained = SETS[pair.files].trained
        if trained != PLAIN and (reason := missing(weights, (pair.subject, pair.style), trained)):
            raise RowError(reason)
    return found


class _Found:
    """What is said of one group of pairs: over all sets of LoRAs, and of each where there are several."""

    def __init__(
        self, group: Sequence[Pair], outcomes: Sequence[Outcome], rows: Sequence[Row], pairs: Sequence[Pair], sets: Sequence[str]
    ) -> None:
        self.pairs = [pair for pair in pairs if pair.plain in group]
        self.pooled = summaries(outcomes, rows, self.pairs)
        self.by_set = {
            files: summaries(outcomes, rows, [pair for pair in self.pairs if pair.files == files]) for files in sets if len(sets) > 1
        }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _text(outcomes: Sequence[Outcome], found: Mapping[str, _Found], setup: Setup, about: dict[str, Any]) -> str:
    parts = []
    for name, group in found.items():
        if group.pooled:
            parts += [f"### {name.capitalize()} pairs: {len(group.pairs)} × {len(setup.seeds)} pictures a row", scores_table(group.pooled)]
            for files, of_set in group.by_set.items():
                parts += [f"Of the set {files} alone:", scores_table(of_set)]
            parts += [second_table(group.pooled), colour_table(group.pooled), diagnosis_table(group.pooled)]
    parts.append(agreement_text(agreements(outcomes)))
    load = "" if about["load_before"] is None else f" (load before: {about['load_before']:.1f})"
    parts.append(
        f"Means with 95 % bootstrap intervals (pairs, and seeds within pairs). {setup.steps} steps of DDIM, CFG {setup.cfg_scale:g}.\n"
        f"{about['seconds'] / 60:.1f} minutes in {about['workers']} processes of one thread on {processor()}{load}.\n"
        "Seconds per picture: of one processor, without making the guidance's references.\n"
        "Saturation: the mean of a pixel's largest channel less its smallest; contrast: the standard deviation of luma; clipped: the share "
        "of pixels with a channel of at most 1 or at least 254."
    )
    return "\n\n".join(part for part in parts if part)


def _result(
    outcomes: Sequence[Outcome], found: Mapping[str, _Found], setup: Setup, sets: Sequence[str], about: dict[str, Any]
) -> dict[str, Any]:
    pairs = [pair for group in found.values() for pair in group.pairs]
    return {
        "protocol": {
            "steps": setup.steps,
            "cfg_scale": setup.cfg_scale,
            "loudness": list(setup.loudness),
            "seeds": list(setup.seeds),
            "reference_seed": REFERENCE_SEED,
            "prompts": {pair.name: [pair.asked(setup.prompt), pair.subject_prompt, pair.style_prompt] for pair in pairs},
            **{name: [pair.name for pair in group.pairs] for name, group in found.items()},
            "sets": list(sets),
            "resamples": RESAMPLES,
        },
        **{name: [as_json(summary) for summary in group.pooled] for name, group in found.items()},
        "sets": {
            files: {name: [as_json(summary) for summary in group.by_set[files]] for name, group in found.items()}
            for files in sets
            if len(sets) > 1
        },
        "agreement": {question: asdict(agreement) for question, agreement in agreements(outcomes).items()},
        "pictures": [
            {
                "pair": outcome.pair.name,
                "row": outcome.row,
                **{name: np.round(getattr(outcome, name), 5).tolist() for name in SCORES},
            }
            for outcome in outcomes
        ],
        "run": {
            **about,
            "processor": processor(),
            "processors": processors(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{package: version(package) for package in ("diffusers", "transformers", "numpy")},
        },
    }


__all__ = ["main"]
