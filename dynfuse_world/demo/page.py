"""The demo's page: one HTML file with all pictures in it, to be opened by a double click or sent to somebody."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import mean

from PIL import Image

from lib_dynfuse.fusion import selection_map
from lib_dynfuse.guidance import curve

from ..benchmark.protocol import CFG_SCALE
from .pictures import Judged, Show

METHODS = {
    "direct": ("Direct", "both LoRAs added up everywhere, as two ordinary LoRA tags do"),
    "default": ("Default", "both added up, neither more than twice as loud, and moved away from the picture without them"),
    "selection": (
        "Selection",
        "each layer uses the LoRA that changes its features more, chosen anew at every step: the paper's first half",
    ),
    "both": ("Selection + guidance", "and every step nudged towards the two pictures of one LoRA alone: all of the paper"),
}
"""Name and explanation of those of the benchmark's methods that are shown."""

_STYLE_SHEET = Path(__file__).with_name("page.css")

_ABOUT = """
<p>What you see was made on this computer, in {seconds} seconds, without a network. The model is a text-to-image diffusion model built of
the same parts as Stable Diffusion, but about a hundred times smaller: its pictures have 64 × 64 pixels and are shown enlarged. The pictures
that it learned from were drawn by a program of ours, and we trained all of it: the model, the LoRAs, the encoders of the guidance, and the
judges.</p>
<p>It shows how the methods behave where everything can be measured. It is <strong>no evidence about SDXL</strong> or any other model of
ordinary size, and the few pictures of this page are too few to say which method is better: that is measured over many pairs and seeds, in
docs/quality.md of this project.</p>
<p>The judges are networks of their own that took no part in making the pictures: no method sees them or is steered by them. A percentage is
how sure they are, and they can be wrong. <em>Both</em> is the harmonic mean of subject and style, which is near 0 where either is. The
seeds are the first six. The two pairs were drawn by lot from the twelve of this world on which no setting was chosen; docs/quality.md shows
others. Everybody who runs this demo gets about the same pictures.</p>
"""


def page(shows: Sequence[Show], seconds: float) -> str:
    """The whole page. seconds: how long all of it took."""
    contents = "\n".join(_pair(show) for show in shows)
    names = "".join(f'<li><a href="#{show.pair.name}">{escape(show.pair.prompt)}</a></li>' for show in shows)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>DynFuse in a miniature world</title>
<style>
{_STYLE_SHEET.read_text("utf-8")}</style>
</head>
<body>
<header>
<h1>DynFuse in a miniature world</h1>
<p class="lead">One LoRA knows a character, another knows a way of drawing. Here are both in one picture, in four ways.</p>
<nav aria-label="Pairs of LoRAs"><ul>{names}<li><a href="#about">What this is, and what it is not</a></li></ul></nav>
</header>
<main>
{contents}
<section id="about">
<h2>What this is, and what it is not</h2>
{_ABOUT.format(seconds=round(seconds)).strip()}
<p class="faint">{shows[0].steps} steps, CFG scale {CFG_SCALE:g}, DDIM.</p>
</section>
</main>
</body>
</html>
"""


def choices(show: Show) -> Image.Image:
    """The selection map of the pair's first picture by selection alone."""
    return selection_map.draw(show.trace.of_image(0), show.pair.subject, show.pair.style)


def similarities(show: Show) -> Image.Image:
    """The curves of the pair's pictures by selection and guidance."""
    return curve.draw(show.record, 760)


def percent(score: float) -> str:
    return f"{100 * score:.0f} %"


def _pair(show: Show) -> str:
    pair = show.pair
    return f"""<section id="{show.pair.name}">
<h2>“{escape(pair.prompt)}”</h2>
<div class="cards">
{_lora(show, "subject", f"The subject: {pair.subject}", f"a {show.kind} with a look of its own")}
{_lora(show, "style", f"The style: {pair.style}", "a way to draw anything")}
</div>
<h3>Both in one picture</h3>
<p>The same prompt and the same {len(show.seeds)} seeds with each method. Is it the {show.kind} above, and is it drawn in the style
above?</p>
{_pictures(show)}
<h3>In numbers</h3>
{_means(show)}
<div class="figures">
<figure>
{_image(choices(show), f"Selection map: which of the two LoRAs each layer used at each step, for seed {show.seeds[0]}", "map")}
<figcaption>What the <em>selection</em> did in the picture of seed {show.seeds[0]}: at each step (row) each layer of the model (column)
used the subject's LoRA (blue) or the style's (orange).</figcaption>
</figure>
<figure>
{_image(similarities(show), "Curves: how similar the pictures are to the two references at each step, as CLIP and DINO see it", "map")}
<figcaption>What the <em>guidance</em> steered by, beside the selection: how similar a CLIP and a DINO encoder find the picture that is
coming up to the two pictures of one LoRA alone. Thin lines are single pictures.</figcaption>
</figure>
</div>
</section>"""


def _lora(show: Show, side: str, title: str, what: str) -> str:
    taught = "".join(_image(picture, f"Training picture: {caption}") for caption, picture in show.taught[side])
    alone = show.alone[side]
    prompt = escape(show.prompts[side])
    return f"""<article class="card {side}">
<h3>{escape(title)}</h3>
<figure class="taught">
<div class="strip">{taught}</div>
<figcaption>What this LoRA was taught: {escape(what)}.</figcaption>
</figure>
<figure class="alone">
{_image(alone.picture, f"Picture of the {side} LoRA alone")}
<figcaption>What it makes alone, of “{prompt}”. {_verdict(alone, (side,))}</figcaption>
</figure>
</article>"""


def _pictures(show: Show) -> str:
    seeds = "".join(f'<th scope="col">Seed {seed}</th>' for seed in show.seeds)
    groups = []
    for method, (label, explanation) in METHODS.items():
        cells = []
        for seed, judged in zip(show.seeds, show.fused[method]):
            picture = _image(judged.picture, f"{label}, seed {seed}")
            cells.append(f'<td data-method="{method}" data-seed="{seed}">{picture}{_verdict(judged, ("subject", "style"))}</td>')
        groups.append(
            f'<tbody><tr><th colspan="{len(show.seeds)}" scope="rowgroup"><span><strong>{label}</strong>: '
            f"{explanation}</span></th></tr>\n<tr>{''.join(cells)}</tr></tbody>"
        )
    return (
        f'<div class="wide" role="region" aria-label="Pictures of all methods and seeds" tabindex="0"><table class="pictures">\n'
        f"<thead><tr>{seeds}</tr></thead>\n" + "\n".join(groups) + "\n</table></div>"
    )


def _means(show: Show) -> str:
    columns: dict[str, Callable[[Judged], float]] = {
        "Subject": lambda judged: judged.subject,
        "Style": lambda judged: judged.style,
        "Both": lambda judged: judged.both,
    }
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = []
    for method, (label, _) in METHODS.items():
        numbers = "".join(
            f'<td class="{name.lower()}">{_bar(mean(map(score, show.fused[method])))}</td>' for name, score in columns.items()
        )
        rows.append(f'<tr data-method="{method}"><th scope="row">{label}</th>{numbers}</tr>')
    return (
        f'<table class="means"><caption>The judges’ means over the {len(show.seeds)} pictures of each method, which are too few to tell '
        "methods apart.</caption>\n"
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table>"
    )


def _verdict(judged: Judged, which: Sequence[str]) -> str:
    """What the judges say of a picture, as a list of terms."""
    entries = "".join(f'<div class="{name}"><dt>{name}</dt><dd>{_bar(getattr(judged, name))}</dd></div>' for name in which)
    return f'<dl class="verdict">{entries}</dl>'


def _bar(score: float) -> str:
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * score:.0f}%"></i></span><span class="number">{percent(score)}</span>'
    )


def _image(picture: Image.Image, alternative: str, kind: str = "toy") -> str:
    """kind: "toy" for a picture of the miniature world, which is shown enlarged."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<img class="{kind}" src="data:image/png;base64,{content}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(alternative)}">'
    )


__all__ = ["choices", "page", "percent", "similarities"]
