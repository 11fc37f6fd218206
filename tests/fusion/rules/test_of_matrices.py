"""The methods that rewrite the LoRAs' matrices: each element against the papers' formulas in float64, in a session and in a merged file."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse import FuseSettings, Rows
from lib_dynfuse.fusion import FusionSession
from lib_dynfuse.fusion.merging import merge_pictures
from lib_dynfuse.lora import read_lora
from lib_dynfuse.settings import SettingsError

from ..models import ATTENTION, CONVOLUTION, WIDTH, Nested, delta_weights, lora_file, tokens_model

NAMES = ATTENTION
ROWS = Rows((0, 0), (False, True), 1)
SUBJECT_STRENGTH, STYLE_STRENGTH = 1.5, 0.8


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def loras(tmp_path, model):
    return [lora_file(tmp_path / f"{n}.safetensors", model, NAMES, rank=r, seed=k + 1) for k, (n, r) in enumerate((("dog", 4), ("ink", 3)))]


@pytest.fixture
def deltas(tmp_path, loras):
    return [delta_weights(tmp_path / f"{lora.name}.safetensors", NAMES) for lora in loras]


def ties(subject, style, density):
    """Element by element, as the paper's algorithm 1 with lambda = 1."""

    def trimmed(matrix):
        smallest = sorted(matrix.abs().flatten().tolist(), reverse=True)[max(1, round(density * matrix.numel())) - 1]
        return torch.where(matrix.abs() >= smallest, matrix, 0.0)

    a, b = trimmed(SUBJECT_STRENGTH * subject), trimmed(STYLE_STRENGTH * style)
    result = torch.zeros_like(a)
    for place in torch.cartesian_prod(*map(torch.arange, a.shape)).tolist():
        values = [part[tuple(place)].item() for part in (a, b)]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [value for value in values if value * sign > 0]
        result[tuple(place)] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def np_lora(subject, style, mu=0.5):
    """I - mu / (1 + mu) P with the projector P = W+ W onto the row space of the style's change, from its pseudo-inverse."""
    projector = torch.linalg.pinv(style, rtol=1e-9) @ style
    return (
        SUBJECT_STRENGTH * subject @ (torch.eye(len(projector), dtype=subject.dtype) - mu / (1 + mu) * projector) + STYLE_STRENGTH * style
    )


def settings(method, **others):
    return FuseSettings(method=method, subject_weight=SUBJECT_STRENGTH, style_weight=STYLE_STRENGTH, **others)


def change(model, loras, given):
    """What the session adds to each layer's weight, read off identity inputs."""
    x = torch.eye(WIDTH).expand(2, -1, -1)
    session = FusionSession(model, *loras, given)
    session.begin()
    with torch.no_grad():
        plain = model(x)
        with session.attached(ROWS):
            fused = model(x)
    session.end_step()
    return session, {name: (fused[name] - plain[name])[1].t().double() for name in NAMES}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_elects_signs_and_averages(model, loras, deltas, density):
    _, got = change(model, loras, settings("ties", density=density))
    for name in NAMES:
        torch.testing.assert_close(got[name], ties(deltas[0][name], deltas[1][name], density), rtol=1e-4, atol=1e-5)


def test_np_lora_projects_the_subject_off_the_styles_inputs(model, loras, deltas):
    _, got = change(model, loras, settings("np-lora"))
    for name in NAMES:
        torch.testing.assert_close(got[name], np_lora(deltas[0][name], deltas[1][name]), rtol=1e-4, atol=1e-5)


def test_with_the_same_inputs_np_lora_is_the_subject_at_two_thirds(tmp_path, model, loras, deltas):
    """1 / (1 + mu) where the style listens to everything that the subject listens to."""
    _, got = change(model, [loras[0], loras[0]], settings("np-lora"))
    for name in NAMES:
        torch.testing.assert_close(got[name], (SUBJECT_STRENGTH / 1.5 + STYLE_STRENGTH) * deltas[0][name], rtol=1e-4, atol=1e-5)


def test_np_lora_takes_a_kernel_as_one_direction(tmp_path):
    torch.manual_seed(0)
    model = Nested({CONVOLUTION: torch.nn.Conv2d(4, 6, 3, padding=1)}).eval().requires_grad_(False)
    files = [lora_file(tmp_path / f"{n}.safetensors", model, [CONVOLUTION], rank=2, seed=n) for n in (1, 2)]
    subject, style = (delta_weights(tmp_path / f"{n}.safetensors", [CONVOLUTION])[CONVOLUTION].flatten(1) for n in (1, 2))
    session = FusionSession(model, *files, settings("np-lora"))
    x = torch.randn(2, 4, 5, 5)
    session.begin()
    with torch.no_grad():
        plain = model(x)[CONVOLUTION]
        with session.attached(ROWS):
            fused = model(x)[CONVOLUTION]
    kernel = np_lora(subject, style).view(6, 4, 3, 3)
    torch.testing.assert_close((fused - plain).double(), torch.nn.functional.conv2d(x.double(), kernel, padding=1), rtol=1e-4, atol=1e-4)


def test_dare_keeps_a_share_and_makes_it_larger(model, loras, deltas):
    """One LoRA is silenced by its strength, so that the other's coins can be read off."""
    density = 0.3
    given = FuseSettings(method="dare", density=density, subject_weight=1.0, style_weight=1e-6)
    _, got = change(model, loras, given)
    kept = 0
    for name in NAMES:
        delta = deltas[0][name]
        is_kept = got[name].abs() > 1e-3 * delta.abs().max()
        torch.testing.assert_close(got[name][is_kept], (delta / density)[is_kept], rtol=1e-3, atol=1e-4)
        kept += is_kept.sum().item()
    total = len(NAMES) * WIDTH * WIDTH
    assert abs(kept / total - density) < 4 * (density * (1 - density) / total) ** 0.5 + 0.01


def test_dares_coins_follow_from_its_seed(model, loras):
    _, one = change(model, loras, settings("dare"))
    _, same = change(model, loras, settings("dare"))
    _, other = change(model, loras, settings("dare", dare_seed=1))
    assert all(one[name].equal(same[name]) for name in NAMES)
    assert not any(one[name].equal(other[name]) for name in NAMES)


@pytest.mark.parametrize("method", ["ties", "dare", "np-lora"])
def test_the_merged_file_holds_what_the_session_added(tmp_path, model, loras, method):
    given = settings(method)
    session, got = change(model, loras, given)
    path = tmp_path / "both.safetensors"
    merge_pictures(path, loras[:1], loras[1:], given, [session.trace], session.shapes, dtype=torch.float32)
    merged = FusionSession(model, read_lora(path), (), FuseSettings(method="direct"))
    x = torch.eye(WIDTH).expand(2, -1, -1)
    with torch.no_grad():
        plain = model(x)
        merged.begin()
        with merged.attached(ROWS):
            fused = model(x)
    for name in NAMES:
        torch.testing.assert_close((fused[name] - plain[name])[1].t().double(), got[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "np-lora"])
def test_a_lora_alone_is_what_it_was(model, loras, deltas, method):
    """Only what several LoRAs change is rewritten."""
    given = FuseSettings(method=method, style_weight=0.0)
    _, got = change(model, loras, given)
    for name in NAMES:
        torch.testing.assert_close(got[name], deltas[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 1.01])
def test_a_density_is_a_share(density):
    with pytest.raises(SettingsError, match="density"):
        FuseSettings(density=density)
