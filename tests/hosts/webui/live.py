"""A running WebUI, talked to over HTTP only."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


class Refused(Exception):
    """The WebUI answered with an error; the text is what its user would read."""


@dataclass
class Answer:
    """pixels: (images, height, width, 3) int. info: the job's parameters."""

    pixels: np.ndarray
    info: dict[str, Any]

    @property
    def infotext(self) -> str:
        return self.info["infotexts"][0]


class WebUI:
    def __init__(self, address: str):
        self.address = address.rstrip("/")
        # Never through a proxy: the WebUI is on this machine or on the next.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: Any = None, timeout: float = 600) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                answer = json.loads(text)
                text = " ".join(str(answer.get(key) or "") for key in ("error", "detail", "message", "errors"))
            except (ValueError, AttributeError):
                pass
            raise Refused(text.strip()) from None

    def options(self, **values: Any) -> None:
        self.call("/sdapi/v1/options", values)

    def script_names(self) -> set[str]:
        return set(self.call("/sdapi/v1/scripts")["txt2img"])

    def restart_ui(self, seconds: float = 300) -> None:
        """Have the scripts loaded again, as *Apply and restart UI* does, and wait until those answer."""
        before = self.call("/dynfuse-faults/loaded")
        self.call("/dynfuse-faults/reload-ui", {})
        end = time.monotonic() + seconds
        # A1111 dies of a request that comes after its port is open and before its API is there: none is sent for a while.
        closed = self._until_port(False, min(end, time.monotonic() + 20))
        opened = self._until_port(True, end)
        time.sleep(min(30, (opened - closed) / 3))
        while time.monotonic() < end:
            try:
                if self.call("/dynfuse-faults/loaded", timeout=10) != before:
                    return
            except (OSError, Refused):
                pass  # between two servers, or before the new scripts' routes
            time.sleep(0.5)
        raise TimeoutError(f"the WebUI was not back after {seconds:.0f} s")

    def _until_port(self, open_: bool, end: float) -> float:
        """When the port was seen open (or closed), or `end`."""
        host, port = self.address.removeprefix("http://").split(":")
        while (now := time.monotonic()) < end:
            with socket.socket() as connection:
                connection.settimeout(1)
                if (connection.connect_ex((host, int(port))) == 0) is open_:
                    return now
            time.sleep(0.1)
        return end

    def interrupt(self) -> None:
        self.call("/sdapi/v1/interrupt", {})

    def skip(self) -> None:
        self.call("/sdapi/v1/skip", {})

    def sampling_step(self) -> int:
        state = self.call("/sdapi/v1/progress?skip_current_image=true")["state"]
        return state["sampling_step"] if state["job_count"] else -1


@dataclass
class Case:
    """A base model on a WebUI with a pair of LoRAs for it.

    options: what loads the model. job, hires: parameters of every job, of every hires job. other: a third LoRA, to become part of the
    base. foreign: a LoRA for another model. refiner: a checkpoint of the same kind. flow: a flow model. requantises: the WebUI's merge is
    not exact on this base. neighbours: the other cases on the same WebUI. pristine: a second WebUI, without the extension.
    """

    name: str
    webui: WebUI
    subject: str
    style: str
    options: dict[str, Any]
    job: dict[str, Any] = field(default_factory=dict)
    hires: dict[str, Any] = field(default_factory=dict)
    other: str | None = None
    foreign: str | None = None
    refiner: str | None = None
    flow: bool = False
    requantises: bool = False
    pristine: WebUI | None = None
    neighbours: list[Case] = field(default_factory=list, repr=False)

    @property
    def tag(self) -> str:
        return self.tag_with()

    def tag_with(self, *items: str) -> str:
        return f"<dynfuse:{':'.join((self.subject, self.style, *items))}>"

    @property
    def two_tags(self) -> str:
        return f"<lora:{self.subject}:1><lora:{self.style}:1>"

    def load(self) -> None:
        self.webui.options(**self.options)

    def parameters(self, prompt: str, **changes: Any) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "seed": 1,
            "steps": 3,
            "cfg_scale": 5,
            "sampler_name": "Euler",
            **self.job,
            **changes,
        }

    def image(self, prompt: str, **changes: Any) -> Answer:
        """txt2img; img2img if init_images are given."""
        parameters = self.parameters(prompt, **changes)
        path = "/sdapi/v1/img2img" if "init_images" in parameters else "/sdapi/v1/txt2img"
        answer = self.webui.call(path, parameters)
        info = json.loads(answer["info"])
        images = answer["images"][info["index_of_first_image"] :][: len(info["all_seeds"])]
        return Answer(np.stack([_decoded(image) for image in images]), info)

    def pixels(self, prompt: str, **changes: Any) -> np.ndarray:
        return self.image(prompt, **changes).pixels

    def refusal(self, prompt: str, **changes: Any) -> str:
        """What the user reads instead of an image."""
        try:
            self.image(prompt, **changes)
        except Refused as refused:
            return str(refused)
        raise AssertionError("the WebUI made an image")

    def stopped_at(self, step: int, stop: Any, prompt: str, **changes: Any) -> None:
        """Start a job and call `stop` (WebUI.interrupt, WebUI.skip) once it has reached a step."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.image(prompt, **changes)
            except Refused as refused:
                failures.append(refused)

        job = threading.Thread(target=run)
        job.start()
        reached = time.monotonic() + 60
        while job.is_alive() and self.webui.sampling_step() < step and time.monotonic() < reached:
            time.sleep(0.005)
        stop()
        job.join(120)
        assert not job.is_alive()
        assert not failures, failures


def _decoded(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")).astype(int)


def encoded(pixels: np.ndarray) -> str:
    """One image, as img2img takes it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of any channel, 0 to 255."""
    assert one.shape == other.shape
    return int(abs(one - other).max())
