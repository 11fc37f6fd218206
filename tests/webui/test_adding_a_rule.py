"""The example in docs/development.md: one file in fusion/rules, and everything has the method."""

import textwrap
from pathlib import Path

import gradio as gr
import pytest
import torch

from lib_dynfuse import FuseSettings, Rows, cli
from lib_dynfuse.fusion import RULES, FusionSession, Step, rules, selection_map
from lib_dynfuse.settings import METHODS
from lib_dynfuse.text import infotext, tag
from lib_dynfuse.webui import panel
from lib_dynfuse.webui.arguments import read_arguments
from tests.fusion.models import delta_weights, lora_file, tokens_model

DEVELOPMENT = Path(__file__).parents[2] / "docs" / "development.md"
NAMES = [f"input_blocks.1.1.transformer_blocks.0.attn1.to_{q}" for q in "qkv"]


def example():
    section = DEVELOPMENT.read_text("utf-8").split("\n## Adding a rule\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


@pytest.fixture
def _turns(tmp_path, monkeypatch):
    """The file put beside the others."""
    code = example()
    assert len(code.splitlines()) <= 40
    (tmp_path / "turns.py").write_text(code, "utf-8")
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    for registry in (RULES, METHODS):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])  # puts the registries back
    rules.discover()
    yield
    for registry in (RULES, METHODS):
        registry.pop("turns", None)


@pytest.mark.usefixtures("_turns")
class TestTurns:
    def test_the_panel_offers_it(self, webui, host):
        with gr.Blocks():
            control = panel.build("txt2img", host).fields["method"]
        assert "turns" in [choice[0] if isinstance(choice, tuple) else choice for choice in control.choices]
        assert "another at every step" in control.webui_tooltip

    def test_tag_api_infotext_and_command_line_take_it(self, host, capsys):
        settings = tag.parse_tag(["dog", "watercolor", "method=turns"])
        assert settings.method == "turns"
        assert tag.format_tag(settings) == "<dynfuse:dog:watercolor:method=turns>"
        assert read_arguments([True, {"subject": "dog", "style": "watercolor", "method": "turns"}], host.reference_cache) == settings
        assert infotext.read_settings(infotext.settings_fields(settings)) == settings
        with pytest.raises(SystemExit):
            cli.main(["generate", "--help"])
        assert "turns: one LoRA at a time" in " ".join(capsys.readouterr().out.split())

    def test_it_fuses_and_its_record_and_map_show_it(self, tmp_path):
        model = tokens_model(NAMES)
        loras = [lora_file(tmp_path / f"{n}.safetensors", model, NAMES, seed=n) for n in (1, 2)]
        deltas = [delta_weights(tmp_path / f"{n}.safetensors", NAMES) for n in (1, 2)]
        session = FusionSession(model, *loras, FuseSettings(method="turns", style_weight=0.5))
        x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
        for number in range(4):
            session.begin(Step.of(number, 4))
            with torch.no_grad(), session.attached(Rows((0, 0), (True, False), 1)):
                outputs = model(x)
            session.end_step()
            for name in NAMES:
                layer = model.get_submodule(name)
                change = (deltas[0][name], 0.5 * deltas[1][name])[number % 2]
                expected = x.double() @ (layer.weight.double() + change).t() + layer.bias.double()
                torch.testing.assert_close(outputs[name].double(), expected, rtol=1e-4, atol=1e-5)
        assert session.trace.weights[:, 0, 0].tolist() == [[1.0, 0.0], [0.0, 0.5]] * 2
        colours = {colour for _, colour in selection_map.draw(session.trace).getcolors(1 << 20)}
        assert {selection_map.SUBJECT, selection_map.STYLE} <= colours


def test_without_the_file_there_is_no_such_method():
    assert "turns" not in RULES
    assert "turns" not in METHODS
