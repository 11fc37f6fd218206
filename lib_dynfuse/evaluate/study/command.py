"""`dynfuse study DIR`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import webbrowser
from pathlib import Path

from ...arguments import whole
from ...bars import Bars
from ..atomic import write_whole
from ..folder import EvaluationError
from ..results import study_result, study_text
from ..trials import open_trials
from .draws import QUESTION, QUESTIONS, Setup, usable
from .page import SIZE, Hidden, file_page
from .returned import read_back
from .server import ADDRESS, PORT, Server, Study
from .sheets import read_sheets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask people which of two to four pictures shows the style better and is still the same subject, without telling them which method "
        "made which. Serves a page on this machine until it is interrupted; --out writes a page that can be sent instead, --read takes its "
        "votes, --result says what came out. DIR: what evaluate made, or folders PAIR/METHOD/SEED.png with PAIR/subject.png and "
        "PAIR/style.png."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder with the pictures")
    add("--methods", nargs="+", metavar="M", help="methods to compare (default: all that use both LoRAs)")
    add("--pictures", type=int, choices=(2, 3, 4), default=2, help="how many pictures are shown at once (default: 2)")
    add("--always", metavar="M", help="a method that is among the pictures of every question; the paper shows its own beside another")
    add("--questions", type=whole(1), default=QUESTIONS, metavar="N", help=f"of each participant, at most (default: {QUESTIONS})")
    add("--question", metavar="TEXT", help=f"what is asked (default: {QUESTION.format('better')})")
    add("--prompts", action="store_true", help="show the prompt, too")
    add("--port", type=whole(0), default=PORT, metavar="N", help=f"of the page; 0: any that is free (default: {PORT})")
    add("--open", action="store_true", help="open the page in the browser")
    add("--out", type=Path, metavar="FILE.html", help="write a page that works without this program, in place of serving one")
    add("--size", type=whole(16), default=SIZE, metavar="N", help=f"with --out: most pixels a side of a picture (default: {SIZE})")
    add("--read", type=Path, nargs="+", metavar="VOTES.json", help="take the votes that pages of --out saved")
    add("--result", action="store_true", help="print what the votes say")
    add("--json", type=Path, metavar="FILE", help="with --result: write it as JSON, too")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises EvaluationError, OSError."""
    if options.port > 65535:
        raise EvaluationError("--port is at most 65535.")
    if options.json and not options.result:
        raise EvaluationError("--json is for --result, which is not given.")
    folder: Path = options.folder
    trials, methods = open_trials(folder)
    setup = Setup(
        tuple(dict.fromkeys(options.methods or methods)),
        options.pictures,
        options.always,
        options.questions,
        options.question,
        options.prompts,
    )
    for file in options.read or ():
        sheet = read_back(file, folder, trials, Hidden(folder))
        print(f"{file}: {len(sheet.answers)} answers of {sheet.voter}.")
    if options.result:
        result = study_result(folder)
        print(study_text(result), end="")
        if options.json:
            write_whole(options.json, json.dumps(result, indent=1, ensure_ascii=False).encode())
    if options.out:
        with Bars() as bars:
            page = file_page(trials, setup, Hidden(folder), options.size, lambda done, total: bars.show("pictures", done, total, "picture"))
        content = page.encode()
        write_whole(options.out, content)
        print(f"{options.out}: {min(setup.questions, len(usable(trials, setup)))} questions, {len(content) / (1 << 20):.1f} MiB.")
    if not (options.read or options.result or options.out):
        serve(Study(folder, trials, setup, Hidden(folder).study), options.port, options.open)
    return 0


def serve(study: Study, port: int, browser: bool) -> None:
    """Until the user interrupts. browser: open the page there."""
    try:
        server = Server(study, port)
    except OSError as error:
        raise EvaluationError(f"Port {port} of {ADDRESS} cannot be had ({error.strerror or error}): try another with --port.") from None
    with server:
        print(f"{server.url}  ({study.questions} questions; Ctrl+C ends, and the same command goes on later)", flush=True)
        if browser:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    sheets = read_sheets(study.folder)
    print(f"\n{sum(len(sheet.answers) for sheet in sheets)} answers of {len(sheets)} so far; --result says what came out.", file=sys.stderr)


__all__ = ["add_arguments", "run", "serve"]
