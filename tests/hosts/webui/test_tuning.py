"""Settings found for a pair inside a WebUI, on the fakes of all hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_dynfuse.guidance.encoders import load_encoders
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.text.tag import format_tag
from lib_dynfuse.tuning.plan import candidates
from tests.fakes.webui import Processing

ASKED = FuseSettings(subject="dog", style="watercolor", tune="auto")
TAG = format_tag(ASKED)
COUNT = 4
ONE_HOST = pytest.mark.parametrize("host_name", ["a1111"], indirect=True)


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """What is tried, and that the present settings stay, where a test does not say otherwise."""
    monkeypatch.setattr("lib_dynfuse.tuning.plan.CONTRASTS", (1.5, 2.0))
    monkeypatch.setattr("lib_dynfuse.tuning.plan.TILTS", (0.0, 0.4))
    monkeypatch.setattr("lib_dynfuse.tuning.search.MARGIN", 1.0)
    assert len(candidates(ASKED)) == COUNT


def job(webui, prompt, **settings):
    """(images, the record of the last pass)"""
    done = webui.process(Processing(prompt, **settings))
    return done.images, webui.host.passes(done.p)[-1]


def cosine(one, other):
    one, other = (np.asarray(x, dtype=np.float64).ravel() for x in (one, other))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def expected_totals(webui, seed):
    """Of every candidate's picture, by the formula in float64."""
    encoders = load_encoders(webui.host.storage.encoder_sources())

    def embedded(settings):
        return encoders.embed_picture(webui.picture(webui.run(f"a cat {settings}", seed=seed)[0]))

    subject, style = (embedded(f"<dynfuse:dog:watercolor:{weights}:method=direct>") for weights in ("1:0", "0:1"))
    totals = []
    for tried in candidates(ASKED):
        picture = embedded(format_tag(FuseSettings(subject="dog", style="watercolor", **tried)))
        places = []
        for own, other, networks in ((subject, style, ("clip",)), (style, subject, ("clip", "dino"))):
            near, far = (np.mean([cosine(getattr(x, n), getattr(own, n)) for n in networks]) for x in (picture, other))
            places.append(min(1.0, max(0.0, (near - far) / (1 - far))))
        totals.append(2 * places[0] * places[1] / sum(places) if sum(places) else 0.0)
    return totals


def test_the_best_of_the_small_pictures_is_what_the_picture_is_made_with(guided, monkeypatch):
    webui = guided
    monkeypatch.setattr("lib_dynfuse.tuning.search.MARGIN", 0.0)
    # The encoders' weights are random, and others under another PyTorch: a noise on which they tell the candidates apart.
    tried = ((seed, expected_totals(webui, seed)) for seed in range(3, 40))
    seed, totals = next((seed, own) for seed, own in tried if len({round(total, 4) for total in own}) > 2)
    before = webui.jobs
    images, done = job(webui, f"a cat {TAG}", seed=seed)
    assert webui.jobs == before + 1 + 2 + COUNT
    assert [one.score.total for one in done.tuned.tried] == pytest.approx(totals, abs=1e-5)
    best = candidates(ASKED)[int(np.argmax(totals))]
    assert done.settings == FuseSettings(subject="dog", style="watercolor", **best)
    assert torch.equal(images, webui.run(f"a cat {format_tag(done.settings)}", seed=seed))


@ONE_HOST
def test_what_was_found_is_found_again_without_work(guided):
    first, found = job(guided, f"a cat {TAG}")
    made = guided.jobs
    again, known = job(guided, f"a cat {TAG}")
    assert guided.jobs == made + 1
    assert torch.equal(first, again)
    assert known.settings == found.settings
    assert [one.score for one in known.tuned.tried] == [one.score for one in found.tuned.tried]


@ONE_HOST
@pytest.mark.parametrize(
    ("settings", "new"),
    [
        ({"seed": 2}, True),
        ({"cfg_scale": 4.0}, True),
        ({"negative_prompt": "dark"}, True),
        ({"sampler_name": "Heun"}, True),
        ({"width": 64}, True),
        ({"n_iter": 2}, False),
        ({"batch_size": 2}, False),
        ({"enable_hr": True}, False),
    ],
)
def test_a_change_of_the_job_that_changes_the_small_pictures_searches_anew(guided, settings, new):
    guided.run(f"a cat {TAG}")
    made = guided.jobs
    guided.run(f"a cat {TAG}", **settings)
    assert (guided.jobs == made + 1) is not new


@ONE_HOST
def test_so_do_other_prompts_and_settings_but_not_the_guidances(guided):
    guided.run(f"a cat {TAG}")
    for prompt, references in ((f"a house {TAG}", 2), (f"a cat {TAG[:-1]}:loser=0.5>", 0), (f"a cat {TAG} <lora:sharp:0.5>", 2)):
        made = guided.jobs
        guided.run(prompt)
        assert guided.jobs == made + 1 + references + COUNT
    made = guided.jobs
    guided.run(f"a cat {TAG[:-1]}:guidance=true:m=5:hr=0.5>")
    assert guided.jobs == made + 1  # the guidance's references are of the same size here


@ONE_HOST
def test_a_reference_seed_makes_one_search_serve_every_seed(guided):
    prompt = f"a cat {TAG[:-1]}:reference_seed=5>"
    guided.run(prompt, seed=1)
    made = guided.jobs
    guided.run(prompt, seed=2)
    assert guided.jobs == made + 1


def test_batches_and_the_hires_pass_share_one_search(guided):
    done = guided.process(Processing(f"a cat {TAG}", n_iter=2, batch_size=2, enable_hr=True)).p
    assert guided.jobs == 1 + 2 + COUNT
    first, second = guided.host.passes(done)
    assert second.hires
    assert first.settings == second.settings
    assert first.settings.tune == "off"


@ONE_HOST
def test_the_small_pictures_are_small_and_of_the_jobs_aspect(guided):
    seen = []
    sample = guided.sample

    def watched(p, x):
        seen.append((p.width, p.height, p.steps))
        return sample(p, x)

    guided.sample = watched
    guided.run(f"a cat {TAG}", width=1536, height=768, steps=20)
    assert seen[-1] == (1536, 768, 20)
    assert set(seen[:-1]) == {(704, 384, 12)}  # of a family that is not known: 512 x 512 pixels


def test_no_script_runs_in_them_and_they_are_not_guided(guided):
    hooks = []
    callbacks = {"process": lambda p: hooks.append(p.number)}
    done = guided.process(Processing(f"a cat {TAG[:-1]}:guidance=true>", callbacks=callbacks)).p
    assert hooks == [1]
    assert guided.host.passes(done)[-1].guidance is not None
    assert guided.jobs == 1 + 2 + COUNT  # of the picture's own size, the guidance's references are the same two


@ONE_HOST
def test_progress_counts_them_and_says_what_is_made(guided, capsys):
    seen = []
    sample = guided.sample

    def watched(p, x):
        seen.append((guided.state.job_count, guided.state.textinfo))
        return sample(p, x)

    guided.sample = watched
    guided.run(f"a cat {TAG}")
    assert seen[2] == (3 + COUNT, f"DynFuse: small picture for tuning (1 of {COUNT})")
    assert seen[-1] == (3 + COUNT, None)
    assert f"small picture for tuning ({COUNT} of {COUNT})" in capsys.readouterr().out


@ONE_HOST
@pytest.mark.parametrize("number", [2, 5])
def test_an_interrupt_stops_the_job_and_keeps_no_half_search(guided, number):
    guided.interrupt_at, guided.interrupt_job = 1, number
    _, done = job(guided, f"a cat {TAG}")
    assert done.error is None
    assert done.tuned is None
    assert guided.jobs == number
    guided.interrupt_at = None
    _, done = job(guided, f"a cat {TAG}")
    assert len(done.tuned.tried) == COUNT


@ONE_HOST
def test_without_encoders_the_picture_is_made_as_asked_with_one_sentence(guided):
    plain = guided.run("a cat <dynfuse:dog:watercolor>")
    guided.shared.opts.dynfuse_clip_model = "ViT-B-32/openai"
    guided.shared.opts.dynfuse_download_encoders = False
    made = guided.jobs
    images, done = job(guided, f"a cat {TAG}", n_iter=1)
    assert guided.jobs == made + 1
    assert torch.equal(images, plain)
    assert [note for note in done.notes if note.startswith("The pair was not tuned: ")]
    assert done.settings.tune == "off"


@ONE_HOST
def test_one_that_cannot_be_made_stops_the_job_with_the_reason(guided):
    sample = guided.sample

    def failing(p, x):
        if p.number == 4:
            raise RuntimeError("the GPU is on fire")
        return sample(p, x)

    guided.sample = failing
    with pytest.raises(RuntimeError, match="DynFuse: the small picture for tuning could not be made: the GPU is on fire"):
        guided.run(f"a cat {TAG}")


@ONE_HOST
def test_the_caller_is_told_what_is_used_instead(guided):
    told = []
    guided.host.requests.tell_tuned = lambda p, asked, used, found: told.append((p.number, asked, used, found))
    done = guided.process(Processing(f"a cat {TAG}")).p
    ((number, asked, used, found),) = told
    assert number == 1
    assert asked == ASKED
    assert used == guided.host.passes(done)[-1].settings == found.settings(asked)


@ONE_HOST
def test_a_method_that_compares_pictures_is_tuned_too(guided):
    _, done = job(guided, f"a cat {TAG[:-1]}:method=est-lora>")
    assert done.error is None
    assert len(done.tuned.tried) == len(candidates(FuseSettings(method="est-lora")))


@ONE_HOST
def test_a_picture_without_it_is_the_same_before_and_after(guided):
    prompt = "a cat <dynfuse:dog:watercolor>"
    plain = guided.run(prompt)
    guided.run(f"a cat {TAG}")
    assert torch.equal(guided.run(prompt), plain)
    assert torch.equal(guided.run("a cat"), guided.run("a cat"))
