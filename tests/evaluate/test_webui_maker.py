"""Pictures by a WebUI, against a small server that speaks its API."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from lib_dynfuse.evaluate.claims import Claims
from lib_dynfuse.evaluate.folder import EvaluationError
from lib_dynfuse.evaluate.makers import MakerGoneError
from lib_dynfuse.evaluate.makers.with_webui import WebUIMaker
from lib_dynfuse.evaluate.making import jobs_of, make_pictures
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.text import infotext
from tests.evaluate.plans import PLAN, plan_in


class WebUI(ThreadingHTTPServer):
    """asked: the requests for pictures. faults: what happens to the next ones: "hang up", "500", "nonsense", "no dynfuse", "unguided"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.faults = [], []
        self.lists = {
            "loras": [{"name": "dog", "alias": "Dog"}, {"name": "ink", "alias": "ink"}],
            "scripts": {"txt2img": ["dynfuse", "x/y/z plot"]},
            "samplers": [{"name": "DDIM", "aliases": ["ddim"]}],
            "sd-models": [{"title": "sd15.safetensors [abc]", "model_name": "sd15"}],
        }

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(self.server.lists[self.path.rpartition("/")[2]])

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "500":
            self.answer({"error": "RuntimeError", "errors": "CUDA out of memory."}, 500)
            return
        entries = f"Steps: {request['steps']}, Seed: {request['seed']}"
        if (script := request.get("alwayson_scripts", {}).get("dynfuse")) and fault != "no dynfuse":
            settings = FuseSettings.from_mapping(script["args"][1])
            fields = infotext.settings_fields(settings)
            if fault == "unguided":
                fields.pop("DynFuse guidance")
                fields["DynFuse note"] = "Made without guidance: no encoder"
            entries += "".join(f", {key}: {value}" for key, value in fields.items())
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (request["seed"],) * 3).save(file, "PNG")
        picture = "nonsense" if fault == "nonsense" else base64.b64encode(file.getvalue()).decode()
        self.answer({"images": [picture], "info": json.dumps({"infotexts": [f"{request['prompt']}\n{entries}"]})})

    def answer(self, content, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments):
        pass


def serving(server):
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def webui():
    with WebUI() as server:
        serving(server)
        yield server
        server.shutdown()


def plan_of(folder, server, more=""):
    make = f'webuis = ["{server.address}"]\nsampler = "DDIM"\ncfg_scale = 5\nsize = "512x768"\nnegative_prompt = "blurry"'
    return plan_in(folder, PLAN.replace('model = "model"', make) + '[methods.base]\nloras = "none"\n' + more)


def maker_of(plan, **more):
    return WebUIMaker(plan.make.webuis[0], plan.make, pause=0.01, **more)


def run(plan, *makers):
    with Claims() as claims:
        return make_pictures(plan, plan.out, [lambda maker=maker: maker for maker in makers], claims, show=False, poll=0.01)


def test_a_picture_is_asked_for_as_the_plan_says_and_kept_with_the_webuis_infotext(tmp_path, webui):
    plan = plan_of(tmp_path, webui)
    run(plan, maker_of(plan))
    assert len(webui.asked) == plan.count == 6
    first = webui.asked[0]
    assert (first["prompt"], first["negative_prompt"], first["seed"]) == ("a sks dog in ink style", "blurry", 1)
    assert (first["steps"], first["cfg_scale"], first["width"], first["height"], first["sampler_name"]) == (4, 5.0, 512, 768, "DDIM")
    assert first["alwayson_scripts"] == {"dynfuse": {"args": [True, {"subject": ["dog"], "style": ["ink"], "method": "direct"}]}}
    assert "alwayson_scripts" not in webui.asked[-1]
    with Image.open(plan.out / jobs_of(plan)[0].picture.file) as file:
        assert file.text["parameters"].endswith("DynFuse: True, DynFuse subject: dog, DynFuse style: ink, DynFuse method: direct")
        assert file.getpixel((0, 0)) == (1, 1, 1)


def test_what_the_webui_lacks_is_told_before_anything_is_made(tmp_path, webui):
    plan = plan_of(tmp_path, webui)
    assert maker_of(plan).problems(plan) == []
    webui.lists |= {"loras": [{"name": "dog", "alias": ""}], "scripts": {"txt2img": []}, "samplers": [{"name": "Euler"}]}
    problems = "\n".join(maker_of(plan).problems(plan))
    assert "has no LoRA ink." in problems
    assert "has no LoRA dog." not in problems
    assert "does not have the extension DynFuse" in problems
    assert "has no sampler DDIM; it has Euler" in problems


def test_a_picture_that_did_not_come_is_asked_for_again(tmp_path, webui):
    webui.faults = ["hang up", "hang up"]
    plan = plan_of(tmp_path, webui)
    run(plan, maker_of(plan))
    assert len(webui.asked) == plan.count + 2


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (["hang up"] * 3, "does not answer"),
        (["500"], "refused txt2img: 500, CUDA out of memory"),
        (["nonsense"], "answered with something else than a picture"),
        (["no dynfuse"], "DynFuse did not take part"),
    ],
)
def test_a_webui_that_fails_is_left_with_a_sentence_and_the_rest_can_be_made_later(tmp_path, webui, faults, sentence):
    plan = plan_of(tmp_path, webui)
    webui.faults = ["", *faults]
    with pytest.raises(EvaluationError, match=rf"{webui.address}.*{sentence}.*5 of 6 pictures are missing"):
        run(plan, maker_of(plan))
    run(plan, maker_of(plan))
    assert all((plan.out / job.picture.file).is_file() for job in jobs_of(plan))


def test_a_picture_made_without_the_guidance_that_was_asked_for_does_not_count(tmp_path, webui):
    plan = plan_of(tmp_path, webui, "[methods.guided]\nguidance = true\n")
    job = next(job for job in jobs_of(plan) if job.picture.method == "guided")
    webui.faults = ["unguided"]
    with pytest.raises(MakerGoneError, match=r"guidance is not True \(Made without guidance: no encoder\)"):
        maker_of(plan).make([job], lambda done, steps: None)
    assert maker_of(plan).make([job], lambda done, steps: None)[0].infotext


def test_when_one_webui_goes_the_other_makes_the_rest(tmp_path, webui, capsys):
    plan = plan_of(tmp_path, webui)
    with WebUI() as other:
        serving(other)
        other.faults = ["500"]
        run(plan, WebUIMaker(other.address, plan.make, pause=0.01), maker_of(plan))
        other.shutdown()
    assert all((plan.out / job.picture.file).is_file() for job in jobs_of(plan))
    assert capsys.readouterr().err == f"Note: {other.address} refused txt2img: 500, CUDA out of memory.\n"
