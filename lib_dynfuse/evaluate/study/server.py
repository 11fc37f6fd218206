"""The study's page on this machine: its pictures by number, never by method, and votes into the participants' files."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...version import VERSION
from ..folder import EvaluationError, Trial
from ..shown import png
from .draws import Key, Setup, draw, key_of, usable
from .page import SCRIPT, STYLE_SHEET, served_page
from .sheets import (
    LONGEST_ANSWER,
    Answer,
    Sheet,
    clean_name,
    is_participant,
    new_participant,
    now,
    read_sheet,
    read_sheets,
    times_asked,
)

ADDRESS = "127.0.0.1"
PORT = 7899
LONGEST_BODY = 1 << 16
"""Bytes of a request that is read at all."""
SECONDS = 30.0
"""After which a connection that says nothing is closed."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is not answered as it would like. status: HTTP's."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Study:
    """The questions of a folder, and the participants' files in it. May be asked by several threads at once."""

    def __init__(self, folder: Path, trials: Sequence[Trial], setup: Setup, name: str) -> None:
        """name: of the study, by which a browser knows it again. Raises EvaluationError where the setup fits no trial."""
        self.folder, self.setup, self.name = folder, setup, name
        self._trials: dict[Key, Trial] = {key_of(trial): trial for trial in trials}
        self._usable = usable(trials, setup)
        self._files = threading.Lock()

    @property
    def questions(self) -> int:
        """How many a new participant is asked."""
        return min(self.setup.questions, len(self._usable))

    def begin(self, participant: str | None, name: str) -> dict[str, Any]:
        """What the page needs: the participant's own questions so far, or new ones for a new participant."""
        with self._files:
            sheet = read_sheet(self.folder, participant) if participant else None
            if sheet is None:
                before = times_asked(read_sheets(self.folder))
                asked = draw(self._usable, self.setup, before, random.SystemRandom())
                questions = [(key_of(one.trial), one.shown) for one in asked]
                sheet = Sheet(participant or new_participant(), self.setup.question, clean_name(name), now(), questions)
                sheet.save(self.folder)
        return {"participant": sheet.participant, "name": sheet.name, "questions": [self._shown(sheet, n) for n in range(len(sheet.asked))]}

    def vote(self, participant: str, number: int, place: int | None, seconds: float) -> None:
        """place: of the chosen picture, None for a question that is skipped. An earlier answer to the same question is replaced."""
        with self._files:
            sheet = self._sheet(participant)
            _, shown = self._asked(sheet, number)
            if place is not None and not 0 <= place < len(shown):
                raise Refused(HTTPStatus.BAD_REQUEST, "There is no such picture.")
            chosen = None if place is None else shown[place]
            sheet.answers[number] = Answer(chosen, now(), max(seconds, 0.0))
            sheet.save(self.folder)

    def picture(self, participant: str, number: int, what: str, place: int) -> Path:
        """what: "picture", "subject" or "style"."""
        with self._files:  # a file that is being read cannot be replaced on Windows
            key, shown = self._asked(self._sheet(participant), number)
        trial = self._trials.get(key)
        if trial is None:
            raise Refused(HTTPStatus.NOT_FOUND, "This question's pictures are no longer there.")
        if what == "picture":
            paths: Sequence[Path | None] = [trial.pictures.get(method) for method in shown]
        else:
            paths = trial.pair.subject_references if what == "subject" else trial.pair.style_references
        path = paths[place] if 0 <= place < len(paths) else None
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such picture.")
        return path

    def _sheet(self, participant: str) -> Sheet:
        sheet = read_sheet(self.folder, participant)
        if sheet is None:
            raise Refused(HTTPStatus.NOT_FOUND, "Nobody of that number takes part.")
        return sheet

    def _asked(self, sheet: Sheet, number: int) -> tuple[Key, tuple[str, ...]]:
        if not 0 <= number < len(sheet.asked):
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such question.")
        return sheet.asked[number]

    def _shown(self, sheet: Sheet, number: int) -> dict[str, Any]:
        key, shown = sheet.asked[number]
        trial = self._trials.get(key)
        pair = trial.pair if trial else None
        base = f"/pictures/{sheet.participant}/{number}"
        answer = sheet.answers.get(number)
        return {
            "prompt": trial.text if trial and self.setup.prompts else "",
            "subject": [f"{base}/subject/{place}" for place in range(len(pair.subject_references) if pair else 0)],
            "style": [f"{base}/style/{place}" for place in range(len(pair.style_references) if pair else 0)],
            "pictures": [f"{base}/picture/{place}" for place in range(len(shown))],
            "answered": answer is not None,
            "place": shown.index(answer.chosen) if answer and answer.chosen is not None else None,
        }


class Server(ThreadingHTTPServer):
    """Serves a study until it is shut down. Only this machine reaches it."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it lets two servers have one port

    def __init__(self, study: Study, port: int = PORT) -> None:
        """port: 0 for any that is free. Raises OSError for one that is taken."""
        self.study = study
        super().__init__((ADDRESS, port), _Handler)
        self.hosts = tuple(f"{name}:{self.server_port}" for name in (ADDRESS, "localhost"))

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a picture is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    server_version = f"DynFuse/{VERSION}"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, make: Any) -> None:
        try:
            self._check_sender()
            kind, content = make()
            self._send(HTTPStatus.OK, kind, content, "private, max-age=3600" if kind == "image/png" else "no-store")
        except Refused as refused:
            self._send_sentence(refused.status, str(refused))
        except EvaluationError:  # its sentence names a file, and with it a method
            self._send_sentence(HTTPStatus.INTERNAL_SERVER_ERROR, "A file of this question cannot be read.")
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as error:
            self._send_sentence(HTTPStatus.INSUFFICIENT_STORAGE, f"This could not be saved: {error.strerror or 'the disk refuses it'}.")

    def _check_sender(self) -> None:
        """Pages of other sites can reach this machine's addresses through its user's browser; they get nothing."""
        self.close_connection = self.close_connection or self.command not in ("GET", "POST")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise self._closing(HTTPStatus.FORBIDDEN, "This page is at another address.")
        origin = self.headers.get("Origin")
        own = origin is not None and origin.lower() == f"http://{hosts[0].lower()}"
        if (origin is not None and not own) or (self.command == "POST" and not own):
            raise self._closing(HTTPStatus.FORBIDDEN, "Only the study's own page may ask this.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and self.path != "/":
            raise self._closing(HTTPStatus.FORBIDDEN, "Only the study's own page may ask this.")

    def _closing(self, status: HTTPStatus, sentence: str) -> Refused:
        """For requests whose body stays unread: what follows on the connection would be taken for the next request."""
        self.close_connection = True
        return Refused(status, sentence)

    def _get(self) -> tuple[str, bytes]:
        study = self.server.study
        if self.path == "/":
            return "text/html; charset=utf-8", served_page(study.setup, study.name, study.questions).encode()
        if self.path == "/page.css":
            return "text/css; charset=utf-8", STYLE_SHEET.read_bytes()
        if self.path == "/page.js":
            return "text/javascript; charset=utf-8", SCRIPT.read_bytes()
        if self.path == "/favicon.ico":
            return "image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
        parts = self.path.split("/")
        if len(parts) == 6 and parts[1] == "pictures" and parts[4] in ("picture", "subject", "style"):
            number, place = _whole(parts[3]), _whole(parts[5])
            if number is not None and place is not None:
                return "image/png", png(study.picture(parts[2], number, parts[4], place))
        raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _post(self) -> tuple[str, bytes]:
        body = self._body()
        if self.path == "/begin":
            participant, name = body.get("participant"), body.get("name", "")
            if not (participant is None or is_participant(participant)) or not isinstance(name, str):
                raise Refused(HTTPStatus.BAD_REQUEST, "That is no participant.")
            return _json(self.server.study.begin(participant, name))
        if self.path == "/vote":
            participant, number, place = body.get("participant"), body.get("number"), body.get("place")
            seconds = body.get("seconds", 0)
            timed = type(seconds) in (int, float) and seconds == seconds
            if type(number) is not int or not (place is None or type(place) is int) or not is_participant(participant) or not timed:
                raise Refused(HTTPStatus.BAD_REQUEST, "That is no vote.")
            self.server.study.vote(str(participant), number, place, float(min(seconds, LONGEST_ANSWER)))
            return _json({"saved": True})
        raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _body(self) -> Mapping[str, Any]:
        length = _whole(self.headers.get("Content-Length", ""))
        if length is None or "Transfer-Encoding" in self.headers:
            raise self._closing(HTTPStatus.LENGTH_REQUIRED, "The request does not say how long it is.")
        if length > LONGEST_BODY:
            raise self._closing(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
        content = self.rfile.read(length)
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The request is no JSON.")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "The request is no JSON.") from None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "The request is no JSON object.")
        return body

    def _send_sentence(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, "text/plain; charset=utf-8", sentence.encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, keep: str = "no-store") -> None:
        try:
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Content-Security-Policy", _POLICY),
                ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
                ("Cache-Control", keep),
            ):
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *values: Any) -> None:
        """The terminal is for the address and the votes that came in."""


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()


__all__ = ["ADDRESS", "PORT", "Refused", "Server", "Study"]
