"""SSR: the routing of signals against least squares in float64, in a session, in a merged file, for several LoRAs of a side."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.fusion import FusionError, FusionSession
from lib_dynfuse.fusion.merging import merge_files, merge_pictures
from lib_dynfuse.fusion.rules.ssr import RIDGE
from lib_dynfuse.lora import LoraError, read_lora

from ..models import ATTENTION, CONVOLUTION, WIDTH, Nested, delta_weights, lora_file, tokens_model

NAMES = ATTENTION
RANKS = {"dog": 4, "ink": 3, "hat": 2}
STRENGTHS = {"dog": 1.5, "ink": 0.8, "hat": 0.6}
ROWS = Rows((0, 0), (False, True), 1)
TOKENS = 40


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def loras(tmp_path, model):
    return {
        name: lora_file(tmp_path / f"{name}.safetensors", model, NAMES, rank=rank, seed=seed, alpha=2.0 * rank)
        for seed, (name, rank) in enumerate(RANKS.items(), 1)
    }


def inputs(side):
    """(2, TOKENS, WIDTH): a negative and a prompt's row. Each side's prompt goes into directions of its own, and some in common."""
    generator = torch.Generator().manual_seed(len(side))
    spread = torch.rand(WIDTH, WIDTH, generator=torch.Generator().manual_seed({"subject": 5, "style": 6}[side]))
    return torch.randn(2, TOKENS, WIDTH, generator=generator) @ (0.2 * torch.eye(WIDTH) + spread / WIDTH)


def settings(**others):
    return FuseSettings(method="ssr", **others)


def taught(model, subjects, styles, given):
    """A session that has been shown both sides."""
    seen = []
    for side in ("subject", "style"):
        showing = FusionSession(model, subjects, styles, given)
        showing.show(side)
        showing.begin()
        x = inputs(side)
        showing.predict(lambda positions, x=x: model(x), ROWS)
        showing.end_step()
        seen.append(showing.shown)
    session = FusionSession(model, subjects, styles, given)
    session.learn(*seen)
    return session


@torch.no_grad()
def change(model, session):
    """What the session adds to each layer's weight, read off identity inputs."""
    x = torch.eye(WIDTH).expand(2, -1, -1)
    plain = model(x)
    session.begin()
    fused = session.predict(lambda positions: model(x), ROWS)
    session.end_step()
    return {name: (fused[name] - plain[name])[1].t().double() for name in NAMES}


def factors(folder, name, layer):
    from safetensors.torch import load_file

    tensors = load_file(folder / f"{name}.safetensors")
    key = f"lora_unet_{layer.replace('.', '_')}"
    down, up = tensors[f"{key}.lora_down.weight"].double().flatten(1), tensors[f"{key}.lora_up.weight"].double().flatten(1)
    return down, up * tensors[f"{key}.alpha"].item() / len(down)


def expected(folder, sides, layer):
    """W = B R A: R the ridge regression that brings A x to the rows of x's own side alone, one row of R after the other."""
    names = [name for side in sides.values() for name in side]
    downs, ups = zip(*(factors(folder, name, layer) for name in names), strict=True)
    down, up = torch.cat(downs), torch.cat([STRENGTHS[name] * matrix for name, matrix in zip(names, ups, strict=True)], 1)
    signals = {side: down @ inputs(side)[1].double().t() for side in sides}
    own = {side: torch.cat([torch.full((RANKS[n],), float(n in sides[side])) for n in names]).double()[:, None] for side in sides}
    z = torch.cat(list(signals.values()), 1).t()
    target = torch.cat([signals[side] * own[side] for side in sides], 1).t()
    scale = z.square().sum(0).sqrt()
    z, target = z / scale, target / scale
    padded = torch.cat([z, RIDGE**0.5 * torch.eye(len(scale), dtype=torch.float64)])
    route = torch.linalg.lstsq(padded, torch.cat([target, torch.zeros(len(scale), len(scale), dtype=torch.float64)])).solution.t()
    return up @ (scale[:, None] * route / scale) @ down


@pytest.mark.parametrize("sides", [{"subject": ["dog"], "style": ["ink"]}, {"subject": ["dog", "hat"], "style": ["ink"]}])
def test_signals_go_to_their_own_side(tmp_path, model, loras, sides):
    subjects, styles = ([loras[name] for name in sides[side]] for side in ("subject", "style"))
    weights = {f"{side}_weight": "+".join(str(STRENGTHS[name]) for name in names) for side, names in sides.items()}
    session = taught(model, subjects, styles, settings(**weights))
    got = change(model, session)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected(tmp_path, sides, name), rtol=1e-3, atol=1e-4)
    assert session.trace.uniform is not None or sides["subject"] != ["dog"]
    path = tmp_path / "both.safetensors"
    merge_pictures(path, subjects, styles, session.settings, [session.trace], session.shapes, dtype=torch.float32)
    alone = change(model, FusionSession(model, read_lora(path), (), FuseSettings(method="direct")))
    for name in NAMES:
        torch.testing.assert_close(alone[name], got[name], rtol=1e-4, atol=1e-5)


def test_it_is_not_the_sum(tmp_path, model, loras):
    got = change(model, taught(model, loras["dog"], loras["ink"], settings()))
    sums = [delta_weights(tmp_path / f"{name}.safetensors", NAMES) for name in ("dog", "ink")]
    for name in NAMES:
        total = sums[0][name] + sums[1][name]
        assert (got[name] - total).norm() > 0.1 * total.norm()


def test_where_both_sides_see_the_same_it_is_their_mean(tmp_path, model, loras):
    session = FusionSession(model, loras["dog"], loras["ink"], settings())
    showing = FusionSession(model, loras["dog"], loras["ink"], settings())
    showing.show("subject")
    showing.predict(lambda positions: model(torch.randn(2, TOKENS, WIDTH)), ROWS)
    session.learn(showing.shown, showing.shown)
    got = change(model, session)
    sums = [delta_weights(tmp_path / f"{name}.safetensors", NAMES) for name in ("dog", "ink")]
    for name in NAMES:
        torch.testing.assert_close(got[name], 0.5 * (sums[0][name] + sums[1][name]), rtol=1e-2, atol=1e-3)


def test_a_side_is_shown_with_the_other_one_silent(model, loras):
    """The layers are run with that side's LoRAs alone, each in full."""
    showing, alone = (FusionSession(model, loras["dog"], loras["ink"], settings(**weights)) for weights in ({}, {"style_weight": 0}))
    showing.show("subject")
    alone.learn({}, {})
    out = showing.predict(lambda positions: model(inputs("subject")), ROWS)
    wanted = alone.predict(lambda positions: model(inputs("subject")), ROWS)
    for name in NAMES:
        torch.testing.assert_close(out[name], wanted[name])


def test_a_kernel_is_one_row_of_inputs(tmp_path):
    """A 3 x 3 convolution and the linear layer on its unfolded input are fused alike."""
    torch.manual_seed(0)
    model = Nested({CONVOLUTION: torch.nn.Conv2d(4, 6, 3, padding=1)}).eval().requires_grad_(False)
    files = [lora_file(tmp_path / f"{n}.safetensors", model, [CONVOLUTION], rank=2, seed=n) for n in (1, 2)]
    pictures = {"subject": torch.randn(2, 4, 5, 5), "style": torch.randn(2, 4, 5, 5) * torch.tensor([3.0, 1, 1, 0.1]).view(1, 4, 1, 1)}
    seen = {}
    for side, x in pictures.items():
        showing = FusionSession(model, *files, settings())
        showing.show(side)
        showing.predict(lambda positions, x=x: model(x), ROWS)
        seen[side] = next(iter(showing.shown.values())).matrix
    from safetensors.torch import load_file

    tensors = [load_file(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    downs = torch.cat([next(t for key, t in own.items() if "down" in key) for own in tensors])
    for side, x in pictures.items():
        z = torch.nn.functional.conv2d(x[1:].double(), downs.double(), padding=1)[0].flatten(1)
        torch.testing.assert_close(seen[side].double(), z @ z.t(), rtol=1e-4, atol=1e-4)


def test_another_picture_is_shown_anew(model, loras):
    session = taught(model, loras["dog"], loras["ink"], settings())
    first = change(model, session)
    session.restart()
    assert session.calibrates
    session.learn({}, {})
    summed = change(model, session)
    assert any((first[name] - summed[name]).norm() > 0.1 * summed[name].norm() for name in NAMES)


def test_without_having_seen_anything_a_sentence_says_what_it_needs(tmp_path, model, loras):
    session = FusionSession(model, loras["dog"], loras["ink"], settings())
    with pytest.raises(FusionError, match="must see each side alone"):
        session.predict(lambda positions: model(inputs("subject")), ROWS)
    with pytest.raises(LoraError, match=r"The method ssr goes by what it sees of pictures.*generate --save-lora"):
        merge_files(tmp_path / "both.safetensors", [loras["dog"]], [loras["ink"]], settings())
