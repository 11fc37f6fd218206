"""The study's page: one that a server of ours completes, or a file that has all pictures in it."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..atomic import write_whole
from ..folder import VOTES, Trial
from ..shown import webp_url
from .draws import Key, Setup, key_of, selections, usable

STYLE_SHEET = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
KEY_FILE = "study.key"
SIZE = 768
"""Most pixels a side of a picture in a page that is a file."""

_FILE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


class Hidden:
    """The numbers that stand for pictures in a page that is a file: nobody learns from them which method a picture is of."""

    def __init__(self, folder: Path) -> None:
        """Of a folder's own key, votes/study.key, which is made with the first page. Raises OSError."""
        path = folder / VOTES / KEY_FILE
        if not path.exists():
            write_whole(path, secrets.token_hex(32).encode())
        self._key = path.read_bytes()

    @property
    def study(self) -> str:
        """The study's own number: which folder a page and its votes belong to."""
        return self._digest("study")

    def picture(self, key: Key, method: str) -> str:
        return self._digest("picture", *map(str, key), method)

    def question(self, key: Key) -> str:
        return self._digest("question", *map(str, key))

    def _digest(self, *what: str) -> str:
        return hmac.new(self._key, json.dumps(what).encode(), hashlib.sha256).hexdigest()[:32]


def served_page(setup: Setup, study: str, count: int) -> str:
    """count: how many questions a new participant gets."""
    head = '<link rel="stylesheet" href="/page.css">\n<script src="/page.js" defer></script>'
    return _page(setup, {"mode": "served", "study": study, "count": count}, head)


def file_page(
    trials: Sequence[Trial], setup: Setup, hidden: Hidden, size: int = SIZE, progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """A page for a double click. size: most pixels a side. progress: called with (pictures done, of all). Raises EvaluationError."""
    found = usable(trials, setup)
    references = sorted({path for trial in found for side in _sides(trial) for path in side})
    total = len(references) + sum(len(_methods(trial, setup)) for trial in found)
    done = 0

    def packed(path: Path) -> str:
        nonlocal done
        url = webp_url(path, size)
        done += 1
        progress(done, total)
        return url

    sides = {path: number for number, path in enumerate(references)}
    shared = [packed(path) for path in references]
    questions = []
    for trial in found:
        key = key_of(trial)
        methods = _methods(trial, setup)
        pictures = {hidden.picture(key, method): packed(trial.pictures[method]) for method in methods}
        sets = [sorted(hidden.picture(key, method) for method in some) for some in selections(trial, setup)]
        subject, style = ([sides[path] for path in side] for side in _sides(trial))
        questions.append(
            {
                **{"question": hidden.question(key), "subject": subject, "style": style, "sets": sorted(sets)},
                **{"pictures": dict(sorted(pictures.items())), "prompt": trial.text if setup.prompts else ""},
            }
        )
    random.SystemRandom().shuffle(questions)
    data = {"mode": "file", "study": hidden.study, "count": min(setup.questions, len(found)), "references": shared, "questions": questions}
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{_FILE_POLICY}">\n<style>\n{STYLE_SHEET.read_text("utf-8")}</style>\n'
        f"<script>\naddEventListener('DOMContentLoaded', () => {{\n{SCRIPT.read_text('utf-8')}}});\n</script>"
    )
    return _page(setup, data, head)


def _sides(trial: Trial) -> tuple[Iterable[Path], Iterable[Path]]:
    return trial.pair.subject_references, trial.pair.style_references


def _methods(trial: Trial, setup: Setup) -> list[str]:
    """Those that any of its questions shows."""
    return sorted({method for some in selections(trial, setup) for method in some})


def _page(setup: Setup, data: dict[str, Any], head: str) -> str:
    content = json.dumps({**data, "pictures": setup.pictures, "question": setup.question}).replace("<", "\\u003c")
    question = escape(setup.question)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>Which picture?</title>
{head}
</head>
<body>
<script type="application/json" id="study">{content}</script>
<noscript><p class="notice">This page needs JavaScript, which is switched off.</p></noscript>
<p id="notice" class="notice" role="alert" hidden></p>

<main id="welcome" hidden>
<h1 tabindex="-1">Which picture?</h1>
<p class="lead">You will see a subject, a style, and {_COUNTED[setup.pictures]} pictures that are to show this subject in this style.
Choose the one that does it best:</p>
<p class="asked">{question}</p>
<p>There are <span class="count"></span> questions and no right answers. You may skip a question, go back and change your mind, or close
this page and go on another day.</p>
<form id="start">
<label for="name">Your name, if you like</label>
<input id="name" name="name" maxlength="60" autocomplete="off">
<button class="main" type="submit"></button>
<button id="so-far" type="button" hidden>Save my votes so far</button>
<button id="another" type="button" hidden>Begin as somebody else</button>
</form>
</main>

<main id="asking" hidden>
<div class="bar"><span id="where" role="status"></span><progress aria-label="Questions that are answered"></progress></div>
<section id="references" aria-label="What the pictures are to show">
<figure><figcaption>Subject</figcaption><div class="subject"></div></figure>
<figure><figcaption>Style</figcaption><div class="style"></div></figure>
</section>
<h1 id="question" tabindex="-1">{question}</h1>
<p id="prompt" hidden></p>
<div id="pictures" role="group" aria-labelledby="question" data-count="{setup.pictures}"></div>
<nav aria-label="Questions">
<button id="back" type="button"><span aria-hidden="true">←</span> Back</button>
<button id="larger" type="button" aria-pressed="false">Larger</button>
<button id="skip" type="button">Skip <span aria-hidden="true">→</span></button>
</nav>
<p class="keys">Keys: <kbd>1</kbd> to <kbd>{setup.pictures}</kbd> choose, <kbd>←</kbd> or <kbd>U</kbd> goes back, <kbd>S</kbd> or
<kbd>→</kbd> skips, the space bar makes the pictures larger.</p>
</main>

<main id="done" hidden>
<h1 tabindex="-1">Thank you</h1>
<p class="summary" role="status"></p>
<p class="sending"></p>
<button id="download" class="main" type="button" hidden>Save my votes</button>
<button id="again" type="button"><span aria-hidden="true">←</span> Back to the last question</button>
</main>
</body>
</html>
"""


_COUNTED = {2: "two", 3: "three", 4: "four"}

__all__ = ["KEY_FILE", "SCRIPT", "SIZE", "STYLE_SHEET", "Hidden", "file_page", "served_page"]
