"""javascript/dynfuse_completion.js beside a1111-sd-webui-tagcomplete, whose globals are written down here (4170882f), run by node."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import gradio as gr
import pytest

from lib_dynfuse.text import tag
from lib_dynfuse.webui import panel

SCRIPT = Path(__file__).parents[2] / "javascript" / "dynfuse_completion.js"
LORAS = [["dog.safetensors", "1", "aa"], ["folder/Hot Dog.safetensors"], ["ink_v1.5.pt"], ["a:b+c.safetensors"]]

# __globals.js, _result.js and _utils.js (processParsers, processQueueReturn); what insertTextAtCursor makes of a result.
EXTENSION = """
var tagword = ""; var loras = LORAS; const PARSERS = [];
const QUEUE_SANITIZE = [(type, text) => type === 7 ? text.replaceAll("_", " ") : null];
const ResultType = Object.freeze({tag: 1, umiWildcard: 7, lora: 9});
class AutocompleteResult { constructor(text, type) { this.text = text; this.type = type; } }
function offered(prompt, word) {
    tagword = word.toLowerCase();
    const parsers = PARSERS.filter((one) => one.triggerCondition()).map((one) => one.parse);
    const found = parsers.flatMap((parse) => parse.call(null, null, prompt));
    return found.map((one) => QUEUE_SANITIZE.map((write) => write(one.type, one.text)).filter((text) => text)[0]);
}
"""

node = shutil.which("node")
pytestmark = pytest.mark.skipif(node is None, reason="node is not installed")


def run(*programs):
    page = "const loaded = []; function onUiLoaded(f) { loaded.push(f); } const dataset = {keys: KEYS};"
    page += "function gradioApp() { return {querySelector: () => ({dataset: dataset})}; }"
    text = "\n".join([page, *programs]).replace("LORAS", json.dumps(LORAS)).replace("KEYS", "process.argv[1]")
    done = subprocess.run([node, "-e", text, "--", keys()], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def keys():
    return html.unescape(re.search('data-keys="(.*?)"', panel._keys())[1])


@pytest.fixture(scope="module")
def offered():
    words = ["<", "<d", "<dyn", "<dynfuse:", "<dynfuse:do", "<dynfuse:Dog:INK", "<dynfuse:dog+hot", "<dynfuse:a%", "<lora:dog"]
    words += ["<dynfuse:dog:ink:cont", "<dynfuse:dog:ink:0.5:method=b", "<dynfuse:dog:ink:guidance=", "<dynfuse:dog:ink:preset=p", "dog"]
    ask = f"const answers = {{}}; for (const word of {json.dumps(words)}) answers[word] = offered('a cat, ' + word, word);"
    return run(EXTENSION, SCRIPT.read_text(), "for (const f of loaded) f();", ask, "console.log(JSON.stringify(answers));")


def test_without_the_extension_nothing_happens():
    assert run(SCRIPT.read_text(), "for (const f of loaded) f(); console.log(JSON.stringify(loaded.length));") == 1


def test_the_tag_is_offered_as_soon_as_it_is_begun(offered):
    assert offered["<d"] == offered["<dyn"] == ["<dynfuse:"]
    assert offered["<"] == offered["<lora:dog"] == offered["dog"] == []


def test_names_are_offered_on_both_sides(offered):
    assert offered["<dynfuse:"] == ["<dynfuse:dog:", "<dynfuse:Hot Dog:", "<dynfuse:ink_v1.5:", "<dynfuse:a%3Ab%2Bc:"]
    assert offered["<dynfuse:do"] == ["<dynfuse:dog:", "<dynfuse:Hot Dog:"]
    assert offered["<dynfuse:dog+hot"] == ["<dynfuse:dog+Hot Dog:"]


def test_what_was_written_before_stays_as_it_is(offered):
    assert offered["<dynfuse:Dog:INK"] == ["<dynfuse:Dog:ink_v1.5"]


def test_a_name_is_read_back(offered):
    (name,) = offered["<dynfuse:a%"]
    assert tag.parse_tag([*name.removeprefix("<dynfuse:").removesuffix(":").split(":"), "ink"]).subjects == ("a:b+c",)


def test_settings_and_their_values_are_offered(offered):
    assert offered["<dynfuse:dog:ink:cont"][:2] == ["<dynfuse:dog:ink:content_weight=", "<dynfuse:dog:ink:contrast="]
    assert offered["<dynfuse:dog:ink:0.5:method=b"] == ["<dynfuse:dog:ink:0.5:method=balanced", "<dynfuse:dog:ink:0.5:method=blora"]
    assert offered["<dynfuse:dog:ink:guidance="] == ["<dynfuse:dog:ink:guidance=true", "<dynfuse:dog:ink:guidance=false"]
    assert offered["<dynfuse:dog:ink:preset=p"] == ["<dynfuse:dog:ink:preset=paper"]


def test_the_page_has_what_the_script_looks_for(webui, host):
    with gr.Blocks() as demo:
        panel.build("txt2img", host)
    assert "dynfuse_txt2img_keys" in [block.elem_id for block in demo.blocks.values() if getattr(block, "elem_id", None)]
