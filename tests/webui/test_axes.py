"""The axes of the X/Y/Z plot: a cell asks for what its axes say, and nothing is left for the next job."""

import copy
import types

import pytest

from lib_dynfuse import FuseSettings
from lib_dynfuse.settings import PRESETS, field_metadata, field_types
from lib_dynfuse.text import tag
from lib_dynfuse.webui import axes

from .conftest import Job


class AxisOption:
    """xyz_grid.AxisOption's constructor, as A1111 1.10.1 and the Forges have it."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


class Plot:
    """A script class; a WebUI loads it under its file's name."""

    __module__ = axes.PLOT


@pytest.fixture
def plot():
    module = types.SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    loaded = [types.SimpleNamespace(script_class=Job, module=None), types.SimpleNamespace(script_class=Plot, module=module)]
    axes.add_axes(loaded, lambda: ["dog", "watercolor"])
    module.loaded = loaded
    return module


def axis(plot, name):
    label = "Preset" if name == "preset" else field_metadata(name)["label"]
    return next(option for option in plot.axis_options if option.label == f"[DynFuse] {label}")


def asked(script, job, *arguments):
    """The settings that the host reads in the job's first prompt."""
    data = job.run_batch(script, *arguments)
    return tag.parse_tags([params.items for params in data["dynfuse"]])


@pytest.fixture
def script(script_module):
    made = script_module.DynFuseScript()
    made.is_img2img = False
    return made


def test_every_setting_and_the_presets_have_an_axis_of_their_own(plot):
    assert len(plot.axis_options) == 1 + 1 + len(field_types())
    assert len({option.label for option in plot.axis_options}) == len(plot.axis_options)
    for name in field_types():
        option = axis(plot, name)
        default = getattr(FuseSettings(), name)
        assert option.type is (type(default) if type(default) in (int, float) and field_types()[name] in (int, float) else str)
    assert axis(plot, "subject").choices() == ["dog", "watercolor"]
    assert axis(plot, "preset").choices() == list(PRESETS)
    assert axis(plot, "guidance").choices() == ["true", "false"]
    assert "ties" in axis(plot, "method").choices()
    assert axis(plot, "contrast").choices is None


def test_the_axes_are_given_once(plot):
    before = len(plot.axis_options)
    axes.add_axes(plot.loaded, list)
    assert len(plot.axis_options) == before


def test_without_the_plot_nothing_happens():
    axes.add_axes([types.SimpleNamespace(script_class=Job, module=None)], list)


def test_before_the_page_is_built_the_plot_has_them(script_module, webui, plot, monkeypatch):
    plot.axis_options.clear()
    monkeypatch.setattr(script_module.scripts, "scripts_data", plot.loaded, raising=False)
    script_module._before_ui()
    assert len(plot.axis_options) == 1 + len(field_types())


def test_a_cell_asks_for_its_values_and_the_job_for_none(plot, script):
    """As the plot does it: a shallow copy for each cell."""
    job = Job("a dog")
    panel = (True, {"subject": "dog", "style": "watercolor", "style_weight": 0.5})
    for method, contrast in (("ties", 0.0), ("balanced", 2.0)):
        cell = copy.copy(job)
        cell.all_prompts = list(job.all_prompts)
        axis(plot, "method").apply(cell, method, ["ties", "balanced"])
        axis(plot, "contrast").apply(cell, contrast, [0.0, 2.0])
        wanted = FuseSettings(subject="dog", style="watercolor", style_weight=0.5, method=method, contrast=contrast)
        assert asked(script, cell, *panel) == wanted
    assert asked(script, job, *panel) == FuseSettings(subject="dog", style="watercolor", style_weight=0.5)


def test_the_axes_change_a_tag_and_the_infotext_repeats_the_cell(plot, script):
    cell = Job("a dog <dynfuse:dog:watercolor:0.8>")
    axis(plot, "preset").apply(cell, "paper", ["paper"])
    axis(plot, "style").apply(cell, "ink", ["ink"])
    settings = asked(script, cell, False)
    assert (settings.subject, settings.style, settings.subject_weight, settings.gradient) == ("dog", "ink", 0.8, "exact")
    assert tag.parse_tags(tag.find_tags(cell.all_prompts[0])) == settings


def test_a_later_axis_goes_before_what_a_preset_says(plot, script):
    cell = Job("a dog <dynfuse:dog:watercolor>")
    axis(plot, "preset").apply(cell, "paper", ["paper"])
    axis(plot, "guidance").apply(cell, "false", ["false"])
    assert not asked(script, cell, False).guidance


def test_two_axes_can_name_the_pair_with_the_panel_switched_off(plot, script):
    cell = Job("a dog")
    axis(plot, "subject").apply(cell, "dog", ["dog"])
    axis(plot, "style").apply(cell, "watercolor", ["watercolor"])
    assert asked(script, cell, False) == FuseSettings(subject="dog", style="watercolor")


def test_an_axis_without_a_pair_says_what_is_missing(plot, script):
    cell = Job("a dog")
    axis(plot, "m").apply(cell, 3.0, [3.0])
    with pytest.raises(Exception, match="no subject and no style LoRA is chosen"):
        asked(script, cell, False)


@pytest.mark.parametrize(("name", "values"), [("contrast", [1.0, -3.0]), ("method", ["sum"]), ("preset", ["mine"]), ("switch_every", [0])])
def test_an_impossible_value_stops_the_plot_before_its_first_cell(plot, name, values):
    with pytest.raises(RuntimeError, match=r"^\[DynFuse\] "):
        axis(plot, name).confirm(None, values)


def test_two_values_that_do_not_go_together_stop_the_cell_with_a_sentence(plot, script):
    cell = Job("a dog <dynfuse:dog:watercolor>")
    axis(plot, "start").apply(cell, 0.9, [0.9])
    axis(plot, "end").apply(cell, 0.1, [0.1])
    with pytest.raises(Exception, match=r"start \(0\.9\) must not be after end"):
        asked(script, cell, False)
