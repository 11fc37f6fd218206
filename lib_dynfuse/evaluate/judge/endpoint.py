"""An endpoint that speaks OpenAI's protocol of chat completions: one question, one answer, with patience."""

from __future__ import annotations

import http.client
import ipaddress
import json
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...printable import printable
from ...reasons import first_line
from ...version import VERSION
from ..folder import EvaluationError
from .protocol import Content

RETRIES = 5
TIMEOUT = 120.0
LONGEST_WAIT = 120.0
LARGEST = 1 << 24
"""Bytes of an answer that is read at all."""

_PASSING = frozenset({408, 409, 425, 429})
"""Statuses of the 400s that may be gone when asked again; all of the 500s may."""
_POLICIES = frozenset({"content_filter", "content_policy_violation"})
_NEVER = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


class Unanswered(EvaluationError):
    """A question that got no answer however often it was asked; another may."""


@dataclass(frozen=True)
class Reply:
    """raw: the answer as it came. text: what the model said. finish: the protocol's finish_reason. refused: by the endpoint or the model.
    sent, received: tokens, where the endpoint tells them. seconds: that the answer took."""

    raw: Any
    text: str
    finish: str
    refused: bool
    sent: int | None
    received: int | None
    seconds: float


@dataclass
class Endpoint:
    """url: the base address, such as https://api.openai.com/v1. key: sent to it, and neither shown nor written. max_tokens: of an answer.
    timeout: seconds without a word. sleep: waits that many seconds."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    max_tokens: int = 300
    retries: int = RETRIES
    timeout: float = TIMEOUT
    sleep: Callable[[float], None] = time.sleep
    _limit: str = field(default="max_tokens", init=False)
    _reached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Raises EvaluationError for an address or a key that cannot be used."""
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise EvaluationError(f"{printable(self.url)} is no address such as https://api.openai.com/v1.")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise EvaluationError("The address may hold no name, password or query: the key goes into DYNFUSE_JUDGE_KEY or --key-file.")
        if not self.model:
            raise EvaluationError("Name the model: --model, or the variable DYNFUSE_JUDGE_MODEL.")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise EvaluationError("The key has characters that no key has.")
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        # A judge on this machine is asked directly, whatever proxy the environment names.
        proxies = [urllib.request.ProxyHandler({})] if _is_here(host) else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def is_open(self) -> bool:
        """Whether what is sent can be read on the way: no TLS, and not to this machine."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and not _is_here(parts.hostname or "")

    def ask(self, content: Content) -> Reply:
        """Ask until there is an answer, at most 1 + retries times.

        Raises Unanswered where none of them was answered, EvaluationError where asking again is of no use.
        """
        attempt = 0
        while True:
            try:
                return self._once(content)
            except _Passing as passing:
                if attempt >= self.retries:
                    times = f"{attempt + 1} times" if attempt else "once"
                    raise Unanswered(f"{self.url} did not answer, asked {times}: {passing.reason}.") from None
                wait = min(2.0**attempt, 60.0) * random.uniform(1, 1.25) if passing.wait is None else passing.wait
            attempt += 1
            self.sleep(min(wait, LONGEST_WAIT))

    def _once(self, content: Content) -> Reply:
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], self._limit: self.max_tokens}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": f"DynFuse/{VERSION}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST")
        started = time.monotonic()
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                raw = answer.read(LARGEST)
        except urllib.error.HTTPError as error:
            self._reached = True
            return self._refusal_of(error, content, time.monotonic() - started)
        except urllib.error.URLError as error:
            raise self._unreached(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreached(error) from None
        self._reached = True
        try:
            return _reply(_without(self.key, json.loads(raw)), time.monotonic() - started)
        except (ValueError, RecursionError):
            raise _Passing("what came is no answer of this protocol") from None

    def _refusal_of(self, error: urllib.error.HTTPError, content: Content, seconds: float) -> Reply:
        """What an answer of 300 and more means."""
        try:
            with error:
                raw = self._hidden(error.read(LARGEST).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            raw = ""
        said, code = _error_of(raw)
        shown = f"HTTP {error.code}" + (f", {said}" if said else "")
        if code in _POLICIES:
            return Reply(_without(self.key, _json_or_text(raw)), said, "content_filter", True, None, None, seconds)
        if error.code == 400 and self._limit == "max_tokens" and "max_completion_tokens" in raw:
            self._limit = "max_completion_tokens"  # the newer name, which some models insist on
            return self._once(content)
        if code not in _NEVER and (error.code in _PASSING or error.code >= 500):
            raise _Passing(shown, _retry_after(error.headers.get("Retry-After")))
        meaning = {
            401: "The endpoint does not take the key",
            403: "The endpoint does not allow this with this key",
            404: f"The endpoint knows no such address or no model {printable(self.model)}",
        }
        raise EvaluationError(f"{meaning.get(error.code, 'The endpoint refuses the question')} ({self.url}: {shown}).")

    def _unreached(self, reason: object) -> Exception:
        """For a connection that did not come about, or broke."""
        text = self._hidden(printable(first_line(reason) if isinstance(reason, BaseException) else str(reason)))
        if isinstance(reason, ssl.SSLCertVerificationError):
            return EvaluationError(f"{self.url} shows no certificate that is trusted: {text}.")
        if not self._reached and isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
            return EvaluationError(f"{self.url} cannot be reached: {text}.")
        return _Passing(f"no answer in {self.timeout:g} seconds" if isinstance(reason, TimeoutError) else text)

    def _hidden(self, text: str) -> str:
        """Without the key, which some endpoints repeat when they refuse it."""
        return str(_without(self.key, text))


class _Passing(Exception):
    """A failure that may be gone when asked again. wait: seconds, where the endpoint says."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given and to no other."""

    def redirect_request(self, *details: Any) -> None:
        return None


def _without(key: str, value: Any) -> Any:
    """A JSON value in whose texts the key is not."""
    if isinstance(value, str):
        return value.replace(key, "[key]") if key else value
    if isinstance(value, list):
        return [_without(key, item) for item in value]
    return {name: _without(key, item) for name, item in value.items()} if isinstance(value, dict) else value


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _reply(raw: Any, seconds: float) -> Reply:
    """Raises ValueError for what is no chat completion."""
    try:
        choice = raw["choices"][0]
        said = choice["message"]
        text, refusal = said.get("content"), said.get("refusal")
        usage = raw.get("usage") or {}
        sent, received = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        finish = str(choice.get("finish_reason") or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("no chat completion") from None
    if isinstance(text, list):  # some servers answer in parts, as they are asked
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
    return Reply(raw, text if isinstance(text, str) else str(refusal or ""), finish, bool(refusal), sent, received, seconds)


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if type(value) is int and value >= 0 else None


def _error_of(raw: str) -> tuple[str, str]:
    """(what the endpoint says, its code), as far as it speaks the protocol."""
    found = _json_or_text(raw)
    error = found.get("error") if isinstance(found, Mapping) else None
    if isinstance(error, Mapping):
        return printable(str(error.get("message") or ""), 300).rstrip("."), str(error.get("code") or error.get("type") or "")
    return (printable(error, 300).rstrip("."), "") if isinstance(error, str) else ("", "")


def _json_or_text(raw: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def _retry_after(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None  # a date: our own patience will do
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else None


__all__ = ["RETRIES", "TIMEOUT", "Endpoint", "Reply", "Unanswered"]
