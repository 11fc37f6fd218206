"""First of all: do no harm. A WebUI in which something is missing or different works as if DynFuse were not there."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect

import pytest
import torch

from lib_dynfuse.hosts.webui import job
from lib_dynfuse.hosts.webui.capabilities import Call, Seam
from lib_dynfuse.hosts.webui.detect import nearest
from lib_dynfuse.hosts.webui.host import WebUIHost
from lib_dynfuse.hosts.webui.job import JobSeams
from lib_dynfuse.text.tag import parse_tags
from tests.fakes.webui import Processing

from .conftest import HOSTS

TAG = "<dynfuse:dog:watercolor>"
SEAMS = [need for need in job.NEEDS if isinstance(need, Seam)]
WRAPPERS = [name for name in vars(JobSeams) if name.startswith("_around_")]

# Everything of a host that can be looked up before a model is loaded.
NEEDS = [
    pytest.param(fake, roles, need, id=f"{name}-{need.name}")
    for name, (fake, roles) in HOSTS.items()
    for need in dict.fromkeys(WebUIHost(roles).needs)
]
CALLED = [case for case in NEEDS if isinstance(case.values[2], (Call, Seam))]
# And everything else that the fakes' modules hold, whether we know of reading it or not.
EVERYTHING = [
    pytest.param(fake, roles, module, name, id=f"{key}-{module}.{name}")
    for key, (fake, roles) in HOSTS.items()
    for module, contents in fake({}).modules.items()
    for name in vars(contents)
    if not name.startswith("__")
]


@contextlib.contextmanager
def removed(owner, name):
    """Without an attribute, whichever way the owner has it."""
    value = inspect.getattr_static(owner, name, None)
    field = getattr(owner, "__dataclass_fields__", {}).pop(name, None)
    if name in vars(owner):
        delattr(owner, name)
    try:
        yield
    finally:
        if field is not None:
            owner.__dataclass_fields__[name] = field
        if value is not None:
            setattr(owner, name, value)


@contextlib.contextmanager
def resigned(owner, name):
    """The function with other parameters, as a version to come might have it; for its own WebUI it works as before."""
    static = inspect.getattr_static(owner, name)
    original = getattr(owner, name)

    def changed(*args, **kwargs):
        return original(*args, **kwargs)

    parameters = [inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY) for parameter in ("one", "other")]  # and both are required
    changed.__signature__ = inspect.Signature(parameters)
    setattr(owner, name, changed)
    try:
        yield
    finally:
        if static is original or name in vars(owner):
            setattr(owner, name, static)


@contextlib.contextmanager
def renamed(owner, name):
    value = inspect.getattr_static(owner, name, None)
    with removed(owner, name):
        setattr(owner, f"{name}_2", value)
        try:
            yield
        finally:
            delattr(owner, f"{name}_2")


def functions_of(webui):
    """All that a WebUI's modules hold, and what the classes in them hold: by identity."""
    held = {}
    for module, contents in webui.modules.items():
        for name, value in vars(contents).items():
            held[module, name] = value
            if isinstance(value, type):
                held.update({(module, name, attribute): found for attribute, found in vars(value).items()})
    return held


def untouched(webui, before):
    after = functions_of(webui)
    return after.keys() == before.keys() and all(after[key] is before[key] for key in before)


def outcome(webui, prompt, **settings):
    """The latents of a job, or what kind of error ended it."""
    try:
        return webui.run(prompt, **settings)
    except Exception as error:
        return type(error)


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other


PROMPTS = ("a cat", "a cat <lora:sharp:0.8>", f"a cat {TAG}")


def left_alone(fake, roles, loras, change, capsys):
    """Why DynFuse is off in a WebUI that was changed, all of whose jobs are those of one without DynFuse."""
    with fake(loras) as webui, change(webui):
        expected = [outcome(webui, prompt) for prompt in PROMPTS]
    with fake(loras) as webui, change(webui):
        before = functions_of(webui)
        ours = WebUIHost(roles())
        capsys.readouterr()
        ours.install(parse_tags)
        off = ours.off
        assert untouched(webui, before)
        assert all(same(outcome(webui, prompt), other) for prompt, other in zip(PROMPTS, expected))
        assert capsys.readouterr().out.count(off) == 1
        ours.uninstall()
        assert untouched(webui, before)
    return off


def without(need, how=removed):
    @contextlib.contextmanager
    def change(webui):
        with how(*need.place()):
            yield

    return change


class TestWhatIsNeeded:
    @pytest.mark.parametrize(("fake", "roles", "need"), NEEDS)
    def test_missing_it_is_named_and_nothing_is_wrapped(self, fake, roles, need, loras, capsys):
        off = left_alone(fake, lambda: roles, loras, without(need), capsys)
        assert need.name in off
        assert "\n" not in off

    @pytest.mark.parametrize(("fake", "roles", "need"), NEEDS)
    def test_under_another_name_it_is_missing(self, fake, roles, need, loras):
        with fake(loras) as webui, without(need, renamed)(webui):
            ours = WebUIHost(roles)
            ours.install(parse_tags)
            assert f"{need.name} is missing" in ours.off

    @pytest.mark.parametrize(("fake", "roles", "need"), CALLED)
    def test_with_other_parameters_it_is_named_and_nothing_is_wrapped(self, fake, roles, need, loras, capsys):
        off = left_alone(fake, lambda: roles, loras, without(need, resigned), capsys)
        assert f"{need.name} takes other arguments" in off

    @pytest.mark.parametrize("name", list(HOSTS))
    def test_parameters_behind_ours_do_not_matter(self, name, loras):
        fake, roles = HOSTS[name]
        with fake(loras) as webui:
            load = webui.networks.load_networks
            webui.networks.load_networks = lambda names, te_multipliers, unet_multipliers, *others, more=None: load(
                names, te_multipliers, unet_multipliers, *others
            )
            ours = WebUIHost(roles)
            ours.install(parse_tags)
            assert ours.off is None
            fused = webui.run(f"a cat {TAG}<lora:sharp:0.5>")
            ours.uninstall()
        with fake(loras) as webui:
            ours = WebUIHost(roles)
            ours.install(parse_tags)
            assert torch.equal(webui.run(f"a cat {TAG}<lora:sharp:0.5>"), fused)
            ours.uninstall()

    def test_another_extensions_wrapper_may_take_whatever_comes(self, webui):
        activate = webui.modules["modules.extra_networks"].activate
        webui.modules["modules.extra_networks"].activate = lambda *args, **kwargs: activate(*args, **kwargs)
        webui.host.install(parse_tags)
        assert webui.host.off is None

    def test_a_function_that_cannot_be_replaced_leaves_all_the_others(self, pristine, host_name):
        class Fixed(type):
            def __setattr__(cls, name, value):
                raise AttributeError("fixed")

        with pristine() as webui:
            module = webui.modules["modules.sd_samplers_timesteps"]
            module.CompVisSampler = Fixed("CompVisSampler", (), {"get_timesteps": lambda self, p, steps: None})
            before = functions_of(webui)
            ours = WebUIHost(HOSTS[host_name][1])
            ours.install(parse_tags)
            assert "could not be installed" in ours.off
            assert untouched(webui, before)

    def test_what_comes_back_is_used_after_the_next_reload(self, pristine, host_name):
        with pristine() as webui:
            ours = WebUIHost(HOSTS[host_name][1])
            with removed(webui.networks, "load_networks"):
                ours.install(parse_tags)
            assert ours.off is not None
            ours.install(parse_tags)
            assert ours.off is None
            ours.uninstall()

    def test_what_goes_away_takes_the_wrappers_along(self, webui):
        with removed(webui.modules["modules.paths_internal"], "models_path"):
            webui.host.install(parse_tags)
        assert "models_path" in webui.host.off
        assert webui.networks.load_networks == webui.load_networks


class TestEverythingElse:
    @pytest.mark.parametrize(("fake", "roles", "module", "name"), EVERYTHING)
    def test_a_missing_attribute_changes_no_plain_picture_and_a_fused_job_says_what_is_wrong(self, fake, roles, module, name, loras):
        with fake(loras) as webui, removed(webui.modules[module], name):
            expected = [outcome(webui, prompt) for prompt in PROMPTS[:2]]
        with fake(loras) as webui, removed(webui.modules[module], name):
            ours = WebUIHost(roles)
            ours.install(parse_tags)
            assert all(same(outcome(webui, prompt), other) for prompt, other in zip(PROMPTS, expected))
            if ours.off is None and all(isinstance(picture, torch.Tensor) for picture in expected):
                assert isinstance(outcome(webui, PROMPTS[2]), torch.Tensor)
            ours.uninstall()


class TestDetection:
    """One WebUI is not taken for another; and what is taken for one, but is not, is left alone."""

    def test_each_is_known(self, pristine, host_name):
        with pristine():
            assert nearest() is HOSTS[host_name][1]

    @pytest.mark.parametrize("taken_for", list(HOSTS))
    def test_as_another_it_is_left_alone_with_one_sentence(self, host_name, taken_for, loras, capsys):
        if taken_for != host_name:
            left_alone(HOSTS[host_name][0], lambda: HOSTS[taken_for][1], loras, lambda webui: contextlib.nullcontext(), capsys)

    def test_its_own_loras_work_there(self, pristine):
        with pristine() as webui:
            plain = webui.run("a cat")
            assert not torch.equal(webui.run("a cat <lora:dog:1>"), plain)
            assert torch.equal(webui.run("a cat"), plain)


class Mishap(Exception):
    pass


def fail(*args, **kwargs):
    raise Mishap("ours")


def fails_after(self, original, *args, **kwargs):
    original(*args, **kwargs)
    raise Mishap("ours")


class TestOurOwnErrors:
    @pytest.fixture
    def broken(self, host_name, loras):
        """A WebUI with a host part one of whose methods is another function, and how often each of its functions was called."""
        fake, roles = HOSTS[host_name]
        with contextlib.ExitStack() as stack:

            def start(**methods):
                webui = stack.enter_context(fake(loras))
                webui.calls = []
                for seam in SEAMS:
                    count(*seam.place(), webui.calls)
                webui.host = WebUIHost(roles)
                webui.host.jobs.__class__ = type("Broken", (JobSeams,), methods)
                webui.host.install(parse_tags)
                stack.callback(webui.host.uninstall)
                return webui

            def count(owner, name, calls):
                original = getattr(owner, name)

                def counted(*args, **kwargs):
                    calls.append(name)
                    return original(*args, **kwargs)

                counted.__signature__ = inspect.signature(original)
                stack.callback(setattr, owner, name, inspect.getattr_static(owner, name))
                setattr(owner, name, counted)

            yield start

    @pytest.mark.parametrize("failure", [fail, fails_after])
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_a_wrapper_that_fails_changes_no_plain_picture(self, broken, pristine, wrapper, failure, caplog):
        with pristine() as webui:
            expected = [webui.run(prompt, enable_hr=True) for prompt in PROMPTS[:2]]
        webui = broken()
        webui.run("a cat", enable_hr=True)
        once = list(webui.calls)
        webui = broken(**{wrapper: failure})
        for prompt, picture in zip(PROMPTS, expected):
            webui.calls.clear()
            assert torch.equal(webui.run(prompt, enable_hr=True), picture)
            assert webui.calls == once
        about_us = [record for record in caplog.records if "the WebUI goes on" in record.message]
        assert 1 <= len(about_us) <= 2  # two seams share a wrapper

    @pytest.mark.parametrize("method", ["_asks", "_is_fused", "_begin_pass", "_end_job", "_tell", "_take_text_parts_back"])
    def test_a_step_of_ours_that_fails_changes_no_plain_picture(self, broken, pristine, method):
        with pristine() as webui:
            expected = [webui.run(prompt) for prompt in PROMPTS[:2]]
        webui = broken(**{method: fail})
        assert all(torch.equal(webui.run(prompt), picture) for prompt, picture in zip(PROMPTS, expected))

    @pytest.mark.parametrize("wrapper", ["_around_activate", "_around_denoiser"])
    def test_in_a_fused_job_it_stops_the_job_with_a_sentence(self, broken, wrapper):
        webui = broken(**{wrapper: fail})
        if wrapper == "_around_denoiser":
            webui.run("a cat")  # here it does no harm
        with pytest.raises(RuntimeError, match="DynFuse could not fuse this picture: Mishap: ours"):
            webui.run(f"a cat {TAG}")

    def test_reading_the_lora_tags_of_a_fused_job_stops_it_with_a_sentence(self, broken):
        webui = broken(_without_ours=fail)
        with pytest.raises(RuntimeError, match="DynFuse could not read the prompt's <lora"):
            webui.run(f"a cat {TAG}<lora:sharp:0.5>")

    @pytest.mark.parametrize("method", ["_end_job", "_tell"])
    def test_a_fused_picture_is_not_lost_by_what_comes_after_it(self, webui, broken, method):
        fused = webui.run(f"a cat {TAG}")
        webui.host.uninstall()
        assert torch.equal(broken(**{method: fail}).run(f"a cat {TAG}"), fused)

    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.parametrize("seam", [seam for seam in SEAMS if "get_timesteps" not in seam.name], ids=lambda seam: seam.path)
    def test_an_error_of_the_host_passes_through_and_its_function_is_called_once(self, host_name, loras, seam, prompt):
        fake, roles = HOSTS[host_name]
        with fake(loras) as webui:
            owner, name = seam.place()
            static, original = inspect.getattr_static(owner, name), getattr(owner, name)
            calls = []

            def failing(*args, **kwargs):
                calls.append(name)
                raise Mishap("the host's")

            failing.__signature__ = inspect.signature(original)
            setattr(owner, name, failing)
            ours = WebUIHost(roles)
            ours.install(parse_tags)
            assert ours.off is None
            try:
                if name == "load_networks":
                    webui.run(prompt)  # what an ExtraNetwork raises is printed, and the job goes on
                else:
                    with pytest.raises(Mishap, match="the host's"):
                        webui.run(prompt)
            finally:
                ours.uninstall()
                setattr(owner, name, static)
            assert calls == [name]

    def test_the_job_after_a_failed_end_is_plain_again(self, host_name, loras, pristine):
        """Text parts that could not be taken back are tried again at the next prompt."""
        fake, roles = HOSTS[host_name]
        with pristine() as webui:
            expected = webui.run("a cat")
        failing = [True]

        class Forgetful(type(roles.text_encoders)):
            def remove(self):
                if failing and failing.pop():
                    raise Mishap("ours")
                super().remove()

        with fake(loras) as webui:
            ours = WebUIHost(dataclasses.replace(roles, text_encoders=Forgetful()))
            ours.install(parse_tags)
            webui.run(f"a cat {TAG}")
            assert torch.equal(webui.run("a cat"), expected)
            ours.uninstall()


@pytest.mark.parametrize("host_name", ["forge"])
def test_a_plain_job_reads_nothing_of_the_patchers(webui):
    """Forge Neo's patchers have no lora_patches: reading it at every activation ended every job there."""
    clip = webui.shared.sd_model.forge_objects_original.clip
    store, patcher = clip.patcher.lora_patches, clip.patcher
    read = []

    class Watched(type(patcher)):
        def __getattribute__(self, name):
            if name == "lora_patches" and any("lib_dynfuse" in frame.filename for frame in inspect.stack()[1:4]):
                read.append(name)
            return super().__getattribute__(name)

    patcher.__class__ = Watched
    webui.process(Processing("a cat <lora:sharp:0.8>", enable_hr=True))
    assert read == []
    assert store == {}
