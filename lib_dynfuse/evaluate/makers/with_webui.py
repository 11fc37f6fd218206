"""Pictures by a running WebUI, through its API (/sdapi/v1): the user's own host, with its own models and settings."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...reasons import first_line
from ...settings import FuseSettings
from ...text import infotext
from ..plan import Making, Plan
from .maker import Job, Made, MakerGoneError, OnStep

_QUICK = 30.0  # seconds for a question that needs no computing
_LONGEST = 3600.0  # seconds for a picture
_ATTEMPTS = 3
_PAUSE = 2.0  # seconds between attempts


class WebUIMaker:
    """One address. A picture that did not come is asked for again; then the WebUI counts as gone."""

    def __init__(self, address: str, make: Making, *, longest: float = _LONGEST, pause: float = _PAUSE) -> None:
        """longest: seconds to wait for a picture. pause: seconds between attempts."""
        self.name = address
        self._making = make
        self._longest, self._pause = longest, pause

    def problems(self, plan: Plan) -> list[str]:
        """What the WebUI lacks of the plan, a sentence each. Raises MakerGoneError where it does not answer."""
        used = [method.of(pair) for pair in plan.pairs for method in plan.methods]
        names = [name for pair in used for side in (pair.subject, pair.style) for name in side.lora_names]
        known = {text for lora in self._get("loras") for text in (lora.get("name"), lora.get("alias"))}
        found = [f"{self.name} has no LoRA {name}." for name in dict.fromkeys(names) if name not in known]
        if "dynfuse" not in self._get("scripts").get("txt2img", ()):
            found.append(f"{self.name} does not have the extension DynFuse, or has it switched off.")
        if self._making.sampler:
            samplers = [text for sampler in self._get("samplers") for text in (sampler["name"], *sampler.get("aliases", ()))]
            if self._making.sampler not in samplers:
                found.append(f"{self.name} has no sampler {self._making.sampler}; it has {', '.join(samplers[:12])} and others.")
        if self._making.checkpoint:
            models = [text for model in self._get("sd-models") for text in (model.get("title"), model.get("model_name"))]
            if self._making.checkpoint not in models:
                found.append(f"{self.name} has no checkpoint {self._making.checkpoint}.")
        return found

    def make(self, jobs: Sequence[Job], on_step: OnStep) -> list[Made]:
        return [self._make(job) for job in jobs]

    def together(self, job: Job) -> int:
        return 1

    def _make(self, job: Job) -> Made:
        answer = self._asked("txt2img", self._request(job), self._longest)
        try:
            image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2] or answer["images"][0])))
            image.load()
            text = json.loads(answer["info"])["infotexts"][0]
        except Exception as error:  # what is no picture raises whatever its bytes happen to mean
            raise MakerGoneError(f"{self.name} answered with something else than a picture ({first_line(error)}).") from None
        if job.loras != "none" and (reason := _not_as_asked(text, job.settings)):
            raise MakerGoneError(f"{self.name} did not make {job.picture.file} as it was asked to: {reason}.")
        note = _note(text).strip(" ()")
        return Made(image.convert("RGB"), text, [note] if note else [])

    def _request(self, job: Job) -> dict[str, Any]:
        making = self._making
        request: dict[str, Any] = {"prompt": job.prompt, "negative_prompt": making.negative_prompt, "seed": job.picture.seed}
        request |= {"steps": making.steps, "batch_size": 1, "n_iter": 1, "send_images": True, "save_images": False}
        if making.cfg_scale is not None:
            request["cfg_scale"] = making.cfg_scale
        if making.size:
            request["width"], request["height"] = making.size
        if making.sampler:
            request["sampler_name"] = making.sampler
        if making.scheduler:
            request["scheduler"] = making.scheduler
        if making.checkpoint:
            request |= {"override_settings": {"sd_model_checkpoint": making.checkpoint}, "override_settings_restore_afterwards": False}
        if job.loras != "none":
            sides = {"subject": list(job.settings.subjects), "style": list(job.settings.styles)}
            request["alwayson_scripts"] = {"dynfuse": {"args": [True, {**job.settings.non_default(), **sides}]}}
        return request

    def _get(self, what: str) -> Any:
        return self._asked(what, None, _QUICK)

    def _asked(self, what: str, request: dict[str, Any] | None, seconds: float) -> Any:
        data = None if request is None else json.dumps(request).encode()
        question = urllib.request.Request(f"{self.name}/sdapi/v1/{what}", data, {"Content-Type": "application/json"})
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(question, timeout=seconds) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:  # it is there, and says no: again it would say the same
                raise MakerGoneError(f"{self.name} refused {what}: {_reason(error)}.") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == _ATTEMPTS:
                    reason = getattr(error, "reason", None) or first_line(error)
                    raise MakerGoneError(f"{self.name} does not answer ({reason}).") from None
                time.sleep(self._pause)
        raise AssertionError


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        content = json.loads(error.read())
        told = content.get("errors") or content.get("detail") or content.get("error")
        return f"{error.code}, {str(told).strip().rstrip('.')[:300]}" if told else f"{error.code} {error.reason}"
    except (OSError, ValueError, AttributeError):
        return f"{error.code} {error.reason}"
    finally:
        error.close()


def _not_as_asked(text: str, asked: FuseSettings) -> str:
    """Why a picture is not the one that was asked for, by its infotext; empty for one that is."""
    marks = {infotext.field_key("method"): asked.method, **({infotext.field_key("guidance"): "True"} if asked.guidance else {})}
    entries = text.splitlines()[-1] if text else ""
    if f"{infotext.ENABLED}: True" not in entries:
        return f"DynFuse did not take part{_note(entries)}"
    for key, value in marks.items():
        if f"{key}: {value}".lower() not in entries.lower():
            return f"{key} is not {value}{_note(entries)}"
    return ""


def _note(entries: str) -> str:
    _, found, note = entries.partition(f"{infotext.NOTE}: ")
    return f" ({note.split(', DynFuse')[0].strip(chr(34))[:300]})" if found else ""


__all__ = ["WebUIMaker"]
