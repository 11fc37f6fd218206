"""`dynfuse judge DIR`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...arguments import number, whole
from ...bars import Bars
from ..atomic import write_whole
from ..folder import EvaluationError
from ..results import judge_results, judge_text
from ..trials import open_trials
from .endpoint import RETRIES, TIMEOUT, Endpoint, Unanswered
from .protocol import ANSWER_TOKENS, QUESTION, QUESTIONS, RUNS, SIZE, VOTE, Task, message, tasks, tokens
from .verdicts import Verdicts

URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE = "DYNFUSE_JUDGE_URL", "DYNFUSE_JUDGE_MODEL", "DYNFUSE_JUDGE_KEY"
IN_A_ROW = 3
"""Questions without an answer, one after the other, after which no more are asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Let a model that sees pictures choose between 2 to 4 methods, at any endpoint that speaks OpenAI's protocol of chat completions. "
        "Each question is asked several times with the pictures in another random order; a method wins it with more than half of them. "
        "Tells the number of requests and what they cost before it asks. Interrupted, the same command goes on. DIR: as for study."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder with the pictures")
    add("--url", metavar="URL", help=f"base address, such as https://api.openai.com/v1 (default: the variable {URL_VARIABLE})")
    add("--model", metavar="NAME", help=f"the endpoint's name for the model (default: the variable {MODEL_VARIABLE})")
    add("--key-file", type=Path, metavar="FILE", help=f"file that holds the key alone (default: the variable {KEY_VARIABLE}; a judge on "
        "this machine may need none)")  # fmt: skip
    add("--methods", nargs="+", metavar="M", help="2 to 4 methods (default: all that use both LoRAs)")
    add("--questions", type=whole(1), default=QUESTIONS, metavar="N", help=f"drawn by lot (default: {QUESTIONS}, as the paper's pairs)")
    add("--runs", type=whole(1), default=RUNS, metavar="N", help=f"how often each is asked (default: {RUNS})")
    add("--question", default=QUESTION, metavar="TEXT", help=f"what is asked (default: {QUESTION})")
    add("--size", type=whole(16), default=SIZE, metavar="N", help=f"most pixels a side of a picture that is sent (default: {SIZE})")
    add("--max-tokens", type=whole(1), default=300, metavar="N", help="of an answer; models that think need more (default: 300)")
    add("--price", type=number, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, sent and received, to know the costs before")
    add("--timeout", type=number, default=TIMEOUT, metavar="S", help=f"seconds to wait for an answer (default: {TIMEOUT:g})")
    add("--retries", type=whole(0), default=RETRIES, metavar="N", help=f"how often a request that fails is sent again (default: {RETRIES})")
    add("--yes", action="store_true", help="do not ask before the first request")
    add("--result", action="store_true", help="only print what the answers say that are there")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, too")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises EvaluationError, OSError."""
    folder: Path = options.folder
    trials, methods = open_trials(folder)
    if options.result:
        return _result(folder, options.json)
    if options.timeout <= 0 or min(options.price or (0,)) < 0:
        raise EvaluationError("--timeout must be above 0, and no --price below 0.")
    endpoint = Endpoint(
        *(_given(options.url, URL_VARIABLE), _given(options.model, MODEL_VARIABLE), _key(options.key_file)),
        max_tokens=options.max_tokens, retries=options.retries, timeout=options.timeout,
    )  # fmt: skip
    compared = tuple(dict.fromkeys(options.methods or methods))
    planned = tasks(trials, compared, options.questions, options.runs)
    verdicts = Verdicts(folder, endpoint.model, endpoint.url, options.question, compared, options.size, options.runs)
    verdicts.load()
    missing = verdicts.missing(planned)
    print(_plan(planned, missing, endpoint, options))
    if missing:
        if not (options.yes or _agreed()):
            print("Nothing was sent.", file=sys.stderr)
            return 2
        _ask(missing, endpoint, verdicts)
    _told(verdicts, options.price)
    return _result(folder, options.json)


def _given(option: str | None, variable: str) -> str:
    return (option if option is not None else os.environ.get(variable, "")).strip()


def _key(file: Path | None) -> str:
    return (file.read_text("utf-8", errors="replace") if file else os.environ.get(KEY_VARIABLE, "")).strip()


def _plan(planned: Sequence[Task], missing: Sequence[Task], endpoint: Endpoint, options: argparse.Namespace) -> str:
    """What is about to be asked, and what it costs."""
    pictures = len(planned[0].shown)
    there = len(planned) - len(missing)
    lines = [
        f"{endpoint.model} at {endpoint.url}: {len(planned) // options.runs} questions of {pictures} pictures, "
        f"runs of each: {options.runs}, {len(planned)} requests" + (f", of which {there} are answered already." if there else ".")
    ]
    if not missing:
        return lines[0]
    sent = sum(tokens(task, options.question, options.size) for task in missing)
    received, most = ANSWER_TOKENS * len(missing), options.max_tokens * len(missing)
    lines.append(
        f"About {sent:,} tokens to send (pictures of at most {options.size} pixels a side, as GPT-4o counts them; other models differ) and "
        f"{received:,} to receive, at most {most:,}."
    )
    if options.price:
        lines.append(f"Costs at these prices: about {_cost(sent, received, options.price)}, at most {_cost(sent, most, options.price)}.")
    else:
        lines.append("What that costs is not known: no --price of a million tokens is given.")
    lines.append("The pictures and references are sent to that address." + (" Unencrypted, and the key too." if endpoint.is_open else ""))
    return "\n".join(lines)


def _cost(sent: int, received: int, price: Sequence[float]) -> str:
    return f"{(sent * price[0] + received * price[1]) / 1e6:,.2f}"


def _agreed() -> bool:
    print("Go on? [y/N] ", end="", flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _ask(missing: Sequence[Task], endpoint: Endpoint, verdicts: Verdicts) -> None:
    """Raises EvaluationError where it is of no use to go on; what was answered is kept."""
    without = 0
    in_a_row: list[Unanswered] = []
    with Bars() as bars:
        for done, task in enumerate(missing):
            bars.show(endpoint.model, done, len(missing), "answer")
            content = message(task, verdicts.question, verdicts.size)
            try:
                verdicts.keep(task, endpoint.ask(content))
                in_a_row = []
            except Unanswered as error:
                without += 1
                in_a_row.append(error)
                if len(in_a_row) == IN_A_ROW:
                    raise EvaluationError(
                        f"{error} {done + 1 - without} answers came before and are kept; the same command goes on."
                    ) from None
        bars.show(endpoint.model, len(missing), len(missing), "answer")
    if without:
        print(f"{without} of {len(missing)} requests got no answer; the same command asks them again.", file=sys.stderr)


def _told(verdicts: Verdicts, price: Sequence[float] | None) -> None:
    """What kinds of answers there are, and what they took."""
    kinds = verdicts.kinds()
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != VOTE)
    print(f"{sum(kinds.values())} answers, {kinds[VOTE]} votes" + (f", no votes: {others}." if others else "."))
    sent, received = verdicts.tokens()
    if sent or received:
        print(
            f"The endpoint counted {sent:,} tokens sent and {received:,} received"
            + (f": {_cost(sent, received, price)}." if price else ".")
        )
    print()


def _result(folder: Path, file: Path | None) -> int:
    results = judge_results(folder)
    print("\n".join(judge_text(result) for result in results) or "No judge has answered yet.\n", end="")
    if file:
        write_whole(file, json.dumps(results, indent=1, ensure_ascii=False).encode())
    return 0


__all__ = ["KEY_VARIABLE", "MODEL_VARIABLE", "URL_VARIABLE", "add_arguments", "run"]
