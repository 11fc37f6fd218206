"""The fusion on small models, against the formulas in float64 and against merged weights."""

import copy

import pytest
import torch
from torch import nn

from lib_dynfuse import FuseSettings, FusionError, Rows, fuse
from lib_dynfuse.fusion import FusionSession, Rule, Step
from lib_dynfuse.fusion.divergence import CRITERIA

from .models import ATTENTION, BLOCK, CONVOLUTION, FEED_FORWARD, WIDTH, Nested, delta_weights, kl, lora_file, tokens_model

NAMES = [*ATTENTION, *FEED_FORWARD]


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def pair(tmp_path, model):
    """Two LoRAs of like strength and different rank, so that each wins some layers."""
    return (
        lora_file(tmp_path / "dog.safetensors", model, NAMES, rank=4, seed=1, alpha=4),
        lora_file(tmp_path / "ink.safetensors", model, NAMES, rank=6, seed=2, alpha=3, scale=0.5),
    )


@pytest.fixture
def deltas(tmp_path, pair):
    return delta_weights(tmp_path / "dog.safetensors", NAMES), delta_weights(tmp_path / "ink.safetensors", NAMES)


def latent(rows=2, tokens=10, seed=7):
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def products(model, name, x, delta):
    """y0 and one branch's change of it, float64."""
    layer = model.get_submodule(name)
    x = x.double()
    return x @ layer.weight.double().t() + layer.bias.double(), x @ delta.t()


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def merged(model, *deltas_and_strengths):
    """The model with W0 + sum s dW in its weights."""
    result = copy.deepcopy(model)
    for name in result.order:
        weight = result.get_submodule(name).weight
        for deltas, strength in deltas_and_strengths:
            if name in deltas:
                weight.data += (strength * deltas[name]).to(weight.dtype)
    return result


def test_each_layer_uses_the_branch_with_the_larger_divergence(model, pair, deltas):
    x = latent(rows=1)
    with fuse(model, *pair, FuseSettings(method="dynfuse", subject_weight=0.9, style_weight=1.1)) as session:
        outputs = model(x)
    winners = session.trace.winners[0, :, 0].tolist()
    expected_winners = []
    for name in NAMES:
        y0, d_c = products(model, name, x, 0.9 * deltas[0][name])
        _, d_s = products(model, name, x, 1.1 * deltas[1][name])
        subject = bool(kl(y0, d_c) >= kl(y0, d_s))
        expected_winners.append(subject)
        assert_close(outputs[name], y0 + (d_c if subject else d_s))
    assert winners == expected_winners
    assert {True, False} == set(winners)  # else the test would not tell the branches apart


def test_the_trace_holds_the_divergences(model, pair, deltas):
    x = latent(rows=1)
    with fuse(model, *pair, FuseSettings(method="dynfuse")) as session:
        model(x)
        model(x * 1.5)
    assert session.trace.winners.shape == (2, len(NAMES), 1)
    for step, scale in enumerate((1.0, 1.5)):
        for position, name in enumerate(NAMES):
            for side in (0, 1):
                y0, d = products(model, name, x * scale, deltas[side][name])
                assert session.trace.divergences[step, position, 0, side].item() == pytest.approx(kl(y0, d).item(), rel=1e-4)


def test_the_choice_is_made_on_the_conditional_row_and_used_for_both(model, pair, deltas):
    x = latent(rows=2)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with session.attached(Rows((0, 0), (False, True), 1)):
        outputs = model(x)
    for name in NAMES:
        y0, d_c = products(model, name, x, deltas[0][name])
        _, d_s = products(model, name, x, deltas[1][name])
        subject = bool(kl(y0, d_c)[1] >= kl(y0, d_s)[1])
        assert_close(outputs[name], y0 + (d_c if subject else d_s))


def test_the_first_of_several_prompts_of_an_image_decides_in_the_layer(model, pair, deltas):
    """`a AND b`: A1111's order for two images, the first with two parts. Whether the second part runs in the same call must not matter."""
    x = latent(rows=5)
    rows = Rows((0, 0, 1, 0, 1), (True, True, True, False, False), 2)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with session.attached(rows):
        outputs = model(x)
    for name in NAMES:
        y0, d_c = products(model, name, x, deltas[0][name])
        _, d_s = products(model, name, x, deltas[1][name])
        k_c, k_s = kl(y0, d_c), kl(y0, d_s)
        first, second = bool(k_c[0] >= k_s[0]), bool(k_c[2] >= k_s[2])
        wins = torch.tensor([first, first, second, first, second])[:, None, None]
        assert_close(outputs[name], y0 + torch.where(wins, d_c, d_s))


def test_a_batch_of_four_equals_four_single_images(model, pair):
    x = latent(rows=8)
    together = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with together.attached(Rows((0, 1, 2, 3) * 2, (True,) * 4 + (False,) * 4, 4)):
        batch = model(x)
    for image in range(4):
        alone = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
        with alone.attached(Rows((0, 0), (True, False), 1)):
            single = model(x[[image, image + 4]])
        for name in NAMES:
            torch.testing.assert_close(batch[name][[image, image + 4]], single[name], rtol=1e-5, atol=1e-6)
        assert together.trace.winners[0, :, image].equal(alone.trace.winners[0, :, 0])
    assert len({tuple(w) for w in together.trace.winners[0].t().tolist()}) > 1  # the images do differ


def test_split_calls_decide_as_one_call_does(model, pair):
    """Memory short: conditional rows image by image, then the unconditional rows by themselves."""
    x = latent(rows=4)
    whole, split = (FusionSession(model, *pair, FuseSettings(method="dynfuse")) for _ in range(2))
    with whole.attached(Rows((0, 1, 0, 1), (True, True, False, False), 2)):
        expected = model(x)
    parts = []
    for rows, part in ((Rows((0,), (True,), 2), x[:1]), (Rows((1,), (True,), 2), x[1:2]), (Rows((0, 1), (False, False), 2), x[2:])):
        with split.attached(rows):
            parts.append(model(part))
    for name in NAMES:
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), expected[name], rtol=1e-5, atol=1e-6)
    assert split.trace.winners.equal(whole.trace.winners)
    assert split.trace.fallbacks == 0


def test_unconditional_rows_alone_and_first_decide_for_themselves_and_are_counted(model, pair, deltas):
    x = latent(rows=1)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with session.attached(Rows((0,), (False,), 1)):
        outputs = model(x)
    name = NAMES[0]
    y0, d_c = products(model, name, x, deltas[0][name])
    _, d_s = products(model, name, x, deltas[1][name])
    assert_close(outputs[name], y0 + (d_c if kl(y0, d_c) >= kl(y0, d_s) else d_s))
    assert session.trace.fallbacks == len(NAMES)
    assert any("negative prompt" in note for note in session.notes())


def test_a_new_step_forgets_the_last_ones_choice(model, pair):
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", decide="now"))
    with session.attached(Rows((0,), (True,), 1)):
        model(latent(rows=1))
    session.begin()
    with session.attached(Rows((0,), (False,), 1)):
        model(latent(rows=1, seed=9))
    assert session.trace.fallbacks == len(NAMES)


def test_rows_can_choose_for_themselves(model, pair, deltas):
    x = latent(rows=2)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", granularity="row"))
    with session.attached(Rows((0, 0), (True, False), 1)):
        outputs = model(x)
    for name in NAMES:
        y0, d_c = products(model, name, x, deltas[0][name])
        _, d_s = products(model, name, x, deltas[1][name])
        wins = (kl(y0, d_c) >= kl(y0, d_s))[:, None, None]
        assert_close(outputs[name], y0 + torch.where(wins, d_c, d_s))


def test_tokens_can_choose_for_themselves(model, pair, deltas):
    x = latent(rows=2)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", granularity="token"))
    with session.attached(Rows((0, 0), (True, False), 1)):
        outputs = model(x)
    for name in NAMES:
        y0, d_c = products(model, name, x, deltas[0][name])
        _, d_s = products(model, name, x, deltas[1][name])

        def per_token(d, y0=y0):
            return torch.stack([kl(y0[:, t : t + 1], d[:, t : t + 1]) for t in range(y0.shape[1])], 1)

        wins = (per_token(d_c) >= per_token(d_s)).unsqueeze(-1)
        assert_close(outputs[name], y0 + torch.where(wins, d_c, d_s))


def test_the_bias_favours_the_style(model, pair, deltas):
    x = latent(rows=1)
    with fuse(model, *pair, FuseSettings(method="dynfuse", bias=1e9)) as session:
        outputs = model(x)
    assert not session.trace.winners.any()
    y0, d_s = products(model, NAMES[0], x, deltas[1][NAMES[0]])
    assert_close(outputs[NAMES[0]], y0 + d_s)


def test_gamma_makes_both_equally_loud_over_the_first_step_and_then_stays(model, pair, deltas):
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse", balance="gamma", style_weight=3.0, decide="now"))
    rows = Rows((0, 1), (True, True), 2)
    x, later = latent(rows=2), latent(rows=2, seed=8)
    for step in (x, later, 2 * later):
        session.begin()
        with session.attached(rows):
            model(step)
    first = [torch.stack([kl(*products(model, name, x, (1, 3.0)[side] * deltas[side][name])) for name in NAMES]) for side in (0, 1)]
    expected = first[0].sum(0) / first[1].sum(0)
    for position, name in enumerate(NAMES):
        for step, latents in ((1, later), (2, 2 * later)):
            d_c = kl(*products(model, name, latents, deltas[0][name]))
            d_s = kl(*products(model, name, latents, 3.0 * deltas[1][name]))
            assert session.trace.winners[step, position].tolist() == (d_c >= expected * d_s).tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_temperature_runs_and_chooses(model, pair, criterion):
    for temperature in ("raw", "rms"):
        with fuse(model, *pair, FuseSettings(method="dynfuse", criterion=criterion, temperature=temperature)) as session:
            model(latent(rows=1))
        assert session.trace.measured.all()
        assert torch.isfinite(session.trace.divergences).all()


@pytest.mark.parametrize("granularity", ["image", "row", "token"])
def test_the_same_lora_twice_is_that_lora_merged(model, pair, deltas, granularity):
    x = latent(rows=2)
    with fuse(model, pair[0], pair[0], FuseSettings(method="dynfuse", granularity=granularity)) as session:
        outputs = model(x)
    expected = merged(model, (deltas[0], 1.0))(x)
    for name in NAMES:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
    assert session.trace.winners.all()  # a tie goes to the subject
    assert session.trace.ties == session.trace.winners.numel()


def test_direct_is_both_loras_merged(model, pair, deltas):
    x = latent(rows=2)
    with fuse(model, *pair, FuseSettings(method="direct", subject_weight=0.7, style_weight=-0.4)) as session:
        outputs = model(x)
    expected = merged(model, (deltas[0], 0.7), (deltas[1], -0.4))(x)
    for name in NAMES:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not session.trace.measured.any()


def test_a_direct_sum_of_nothing_is_the_model_itself(model, pair):
    x = latent()
    plain = model(x)
    with fuse(model, *pair, FuseSettings(method="direct", subject_weight=0.0, style_weight=0.0)) as session:
        for name, output in model(x).items():
            assert torch.equal(output, plain[name])
    assert session.trace.winners.numel() == 0
    assert session.notes() == []


def test_a_layer_of_one_lora_gets_that_lora_or_nothing(tmp_path, model, pair, deltas):
    style = lora_file(tmp_path / "part.safetensors", model, NAMES[:2], seed=5)
    x = latent(rows=1)
    with fuse(model, pair[0], style, FuseSettings(method="dynfuse")) as session:
        applied = model(x)
    assert len(session.report.one_sided) == len(NAMES) - 2
    assert session.trace.decided.tolist() == [True, True] + [False] * (len(NAMES) - 2)
    with fuse(model, pair[0], style, FuseSettings(method="dynfuse", one_sided="skip")) as session:
        skipped = model(x)
    assert len(session.report.skipped) == len(NAMES) - 2
    y0, d_c = products(model, NAMES[-1], x, deltas[0][NAMES[-1]])
    assert_close(applied[NAMES[-1]], y0 + d_c)
    assert_close(skipped[NAMES[-1]], y0)


def test_scope_attention_leaves_the_other_layers_to_the_base(model, pair, deltas):
    x = latent(rows=1)
    with fuse(model, *pair, FuseSettings(method="dynfuse", scope="attention")) as session:
        outputs = model(x)
    assert len(session.report.matched) == len(ATTENTION)
    for name in FEED_FORWARD:
        y0, _ = products(model, name, x, deltas[0][name])
        assert_close(outputs[name], y0)


def test_convolutions_choose_per_image_over_their_pixels(tmp_path):
    torch.manual_seed(0)
    model = Nested({CONVOLUTION: nn.Conv2d(4, 6, 3, stride=2, padding=1)}).eval().requires_grad_(False)
    files = [lora_file(tmp_path / f"{seed}.safetensors", model, [CONVOLUTION], seed=seed, scale=0.5) for seed in (1, 2)]
    deltas = [delta_weights(tmp_path / f"{seed}.safetensors", [CONVOLUTION])[CONVOLUTION] for seed in (1, 2)]
    x = torch.randn(6, 4, 8, 8)
    session = FusionSession(model, *files, FuseSettings(method="dynfuse"))
    with session.attached(Rows((0, 1, 2, 0, 1, 2), (False,) * 3 + (True,) * 3, 3)):
        output = model(x)[CONVOLUTION]
    layer = model.get_submodule(CONVOLUTION)
    y0 = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride=2, padding=1)
    changes = [nn.functional.conv2d(x.double(), d, stride=2, padding=1) for d in deltas]
    as_tokens = [t.flatten(2).transpose(1, 2) for t in (y0, *changes)]
    wins = (kl(as_tokens[0], as_tokens[1]) >= kl(as_tokens[0], as_tokens[2]))[3:].repeat(2)
    assert_close(output, y0 + torch.where(wins[:, None, None, None], *changes))


@pytest.mark.parametrize("granularity", ["image", "row", "token"])
def test_a_convolution_keeps_its_padding_mode(tmp_path, granularity):
    """The WebUI's tiling option turns convolutions circular."""
    torch.manual_seed(0)
    model = Nested({CONVOLUTION: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")}).eval().requires_grad_(False)
    file = lora_file(tmp_path / "a.safetensors", model, [CONVOLUTION], scale=0.5)
    x = torch.randn(2, 4, 8, 8)
    with fuse(model, file, file, FuseSettings(method="dynfuse", granularity=granularity)):
        output = model(x)[CONVOLUTION]
    deltas = delta_weights(tmp_path / "a.safetensors", [CONVOLUTION])
    torch.testing.assert_close(output, merged(model, (deltas, 1.0))(x)[CONVOLUTION], rtol=1e-4, atol=1e-5)


def test_tiles_folded_into_the_batch_belong_to_their_image(model, pair):
    """HyperTile runs attention with every row split into consecutive tiles; the choice must be the whole row's."""
    x = latent(rows=4, tokens=12)
    rows = Rows((0, 1, 0, 1), (True, True, False, False), 2)
    whole, tiled = (FusionSession(model, *pair, FuseSettings(method="dynfuse")) for _ in range(2))
    with whole.attached(rows):
        expected = model(x)
    with tiled.attached(rows):
        outputs = model(x.reshape(12, 4, WIDTH))
    for name in NAMES:
        torch.testing.assert_close(outputs[name].reshape(4, 12, WIDTH), expected[name], rtol=1e-5, atol=1e-6)


class FluxBlock(nn.Module):
    """The fused query, key, value layer of a Flux block, under its own name."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.Module()])
        self.double_blocks[0].img_attn = nn.Module()
        self.double_blocks[0].img_attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return self.double_blocks[0].img_attn.qkv(x)


def test_the_parts_of_a_fused_layer_choose_apart_whatever_the_dialect(tmp_path):
    """The same change, written once as a fused kohya layer and once as three diffusers layers."""
    from safetensors.torch import save_file

    from lib_dynfuse import read_lora

    torch.manual_seed(0)
    model = FluxBlock().eval().requires_grad_(False)
    fused, split, deltas = [], [], []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(4, WIDTH, generator=generator) / WIDTH**0.5
        up = torch.randn(3 * WIDTH, 4, generator=generator) * 0.5
        save_file(
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down, "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up},
            str(tmp_path / f"fused{seed}.safetensors"),
        )
        tensors = {}
        for part, letter in enumerate("qkv"):
            key = f"transformer.transformer_blocks.0.attn.to_{letter}"
            tensors[f"{key}.lora_A.weight"] = down.clone()
            tensors[f"{key}.lora_B.weight"] = up[part * WIDTH : (part + 1) * WIDTH].clone()
        save_file(tensors, str(tmp_path / f"split{seed}.safetensors"))
        fused.append(read_lora(tmp_path / f"fused{seed}.safetensors"))
        split.append(read_lora(tmp_path / f"split{seed}.safetensors"))
        deltas.append((up @ down).double())
    x = latent(rows=1)
    expected = []
    layer = model.double_blocks[0].img_attn.qkv
    for part in range(3):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        y0 = x.double() @ layer.weight[rows].double().t() + layer.bias[rows].double()
        d_c, d_s = (x.double() @ d[rows].t() for d in deltas)
        expected.append(y0 + (d_c if kl(y0, d_c) >= kl(y0, d_s) else d_s))
    for files in (fused, split, (fused[0], split[1])):
        with fuse(model, *files, FuseSettings(method="dynfuse")) as session:
            assert_close(model(x), torch.cat(expected, -1))
        assert session.trace.winners.shape == (1, 3, 1)


class HostMadeLinear(nn.Module):
    """A linear layer as hosts make them: no nn.Linear, its weight stored in another type."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("weight", torch.randn(width, width).to(torch.bfloat16))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).t()


def test_layers_are_found_by_name_and_weight_not_by_class(tmp_path):
    torch.manual_seed(0)
    model = Nested({name: HostMadeLinear(WIDTH) for name in NAMES})
    file = lora_file(tmp_path / "a.safetensors", model, NAMES)
    x = latent()
    plain = model(x)
    with fuse(model, file, file, FuseSettings(method="dynfuse")):
        outputs = model(x)
    deltas = delta_weights(tmp_path / "a.safetensors", NAMES)
    for name in NAMES:
        assert_close(outputs[name] - plain[name], x.double() @ deltas[name].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_and_type_gives_the_layers_own_type(model, pair, mode, dtype):
    model = model.to(dtype)
    with mode(), fuse(model, *pair, FuseSettings(method="dynfuse")):
        outputs = model(latent().to(dtype))
    assert {output.dtype for output in outputs.values()} == {dtype}
    assert all(torch.isfinite(output).all() for output in outputs.values())


def test_under_autocast_the_branch_follows_the_layers_output(model, pair):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), fuse(model, *pair, FuseSettings(method="dynfuse")):
        outputs = model(latent())
    assert {output.dtype for output in outputs.values()} == {torch.bfloat16}


def test_a_session_outlives_a_change_of_grad_mode(model, pair):
    """Forge samples under inference_mode; the same session may be called outside of it."""
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with torch.inference_mode(), session.attached():
        model(latent())
    with torch.no_grad(), session.attached():
        assert model(latent())[NAMES[0]].shape == (2, 10, WIDTH)


def state_of(model):
    return {n: (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def test_nothing_stays_on_the_model(model, pair):
    before, x = state_of(model), latent()
    expected = model(x)
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    for _ in range(100):
        session.begin()
        with session.attached():
            model(x)
        assert state_of(model) == before
    for name, output in model(x).items():
        assert output.equal(expected[name])


def test_an_exception_inside_a_layer_leaves_the_model_as_it_was(model, pair):
    before, x = state_of(model), latent()
    expected = model(x)
    layer = model.get_submodule(NAMES[2])

    def broken(x):
        raise RuntimeError("out of memory")

    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    layer.forward = broken
    with pytest.raises(RuntimeError, match="out of memory"), session.attached():
        model(x)
    assert layer.forward is broken  # somebody else's forward is theirs to take off
    del layer.forward
    assert state_of(model) == before
    for name, output in model(x).items():
        assert output.equal(expected[name])


def test_a_forward_put_on_top_of_ours_and_left_there_passes_through(model, pair):
    layer, x = model.get_submodule(NAMES[0]), latent()
    expected = model(x)[NAMES[0]]
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"))
    with session.attached():
        fused = model(x)[NAMES[0]]
        ours = layer.forward
        layer.forward = lambda x: ours(x)
    assert model(x)[NAMES[0]].equal(expected)
    session.begin()
    with session.attached():
        assert model(x)[NAMES[0]].equal(fused)
    assert model(x)[NAMES[0]].equal(expected)


def test_a_non_finite_divergence_goes_to_the_subject_and_is_counted(model, pair, deltas):
    x = latent(rows=1)
    x[0, 0, 0] = float("inf")
    with fuse(model, *pair, FuseSettings(method="dynfuse")) as session:
        model(x)
    assert session.trace.winners.all()
    assert session.trace.non_finite == len(NAMES)
    assert any("not finite" in note for note in session.notes())


def test_a_norm_gets_the_sum_of_both_shifts(tmp_path):
    from safetensors.torch import save_file

    from lib_dynfuse import read_lora

    norm_name, linear = f"{BLOCK}.norm1", NAMES[0]
    model = Nested({norm_name: nn.LayerNorm(WIDTH), linear: nn.Linear(WIDTH, WIDTH)}).eval().requires_grad_(False)
    files = []
    shifts = []
    for seed in (1, 2):
        lora_file(tmp_path / "linear.safetensors", model, [linear], seed=seed)
        from safetensors.torch import load_file

        generator = torch.Generator().manual_seed(seed)
        shift = torch.randn(2, WIDTH, generator=generator)
        key = "lora_unet_" + norm_name.replace(".", "_")
        tensors = {**load_file(str(tmp_path / "linear.safetensors")), f"{key}.w_norm": shift[0], f"{key}.b_norm": shift[1]}
        save_file(tensors, str(tmp_path / f"{seed}.safetensors"))
        files.append(read_lora(tmp_path / f"{seed}.safetensors"))
        shifts.append(shift)
    x = latent()
    with fuse(model, *files, FuseSettings(method="dynfuse", subject_weight=0.5, style_weight=2.0)) as session:
        output = model(x)[norm_name]
    norm = model.get_submodule(norm_name)
    gain = norm.weight + 0.5 * shifts[0][0] + 2.0 * shifts[1][0]
    offset = norm.bias + 0.5 * shifts[0][1] + 2.0 * shifts[1][1]
    torch.testing.assert_close(output, nn.functional.layer_norm(x, (WIDTH,), gain, offset, norm.eps), rtol=1e-5, atol=1e-5)
    assert session.report.summed_norms == [norm_name]


def test_loras_of_another_width_are_refused_by_name(tmp_path, model, pair):
    other = lora_file(tmp_path / "wide.safetensors", tokens_model(NAMES, width=24), NAMES)
    with pytest.raises(FusionError, match=r"wide.safetensors was made for another base model: .*24.*16"):
        fuse(model, other, other, FuseSettings(method="dynfuse"))
    with pytest.raises(FusionError, match="made for different base models"):
        fuse(model, pair[0], other, FuseSettings(method="dynfuse"))


def test_two_loras_that_touch_nothing_here_are_refused(tmp_path, pair):
    stranger = Nested({"somewhere.else": nn.Linear(WIDTH, WIDTH)})
    with pytest.raises(FusionError, match="No layer of this model"):
        fuse(stranger, *pair)


def test_rows_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Rows((0, 2), (True, True), 2)
    with pytest.raises(ValueError, match="flags"):
        Rows((0, 1), (True,), 2)


class Chosen(Rule):
    """A rule that measures nothing. choose: site -> (images,) bool, True for the subject."""

    name, summary, selects = "chosen", "for this test", True

    def __init__(self, choose):
        self.choose = choose

    def weights(self, step, votes):
        wins = torch.stack([self.choose(site) for site in self.places.sites])
        return torch.stack([wins, ~wins], -1).float()


def test_a_rules_choice_takes_the_place_of_the_measurement_image_by_image(model, pair, deltas):
    x = latent(rows=4)
    chosen = {name: torch.tensor([position % 2 == 0, position % 3 == 0]) for position, name in enumerate(NAMES)}
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"), rule=Chosen(lambda site: chosen[site.layer]))
    with session.attached(Rows((0, 1, 0, 1), (False, False, True, True), 2)):
        outputs = model(x)
    for name in NAMES:
        y0, d_c = products(model, name, x, deltas[0][name])
        _, d_s = products(model, name, x, deltas[1][name])
        wins = chosen[name].repeat(2)[:, None, None]
        assert_close(outputs[name], y0 + torch.where(wins, d_c, d_s))
    assert not session.trace.measured.any()


def test_a_rule_is_asked_anew_at_every_step(model, pair, deltas):
    x = latent(rows=1)
    answers = iter([True] * len(NAMES) + [False] * len(NAMES))
    session = FusionSession(model, *pair, FuseSettings(method="dynfuse"), rule=Chosen(lambda site: torch.tensor([next(answers)])))
    for side in (0, 1):
        session.begin()
        with session.attached(Rows((0,), (True,), 1)):
            outputs = model(x)
        for name in NAMES:
            y0, d = products(model, name, x, deltas[side][name])
            assert_close(outputs[name], y0 + d)


@pytest.mark.parametrize("method", ["balanced", "direct", "dynfuse", "klora", "switch", "np-lora"])
def test_a_second_picture_is_the_same_to_the_bit_as_in_a_session_of_its_own(model, pair, method):
    settings = FuseSettings(method=method)
    steps = [latent(seed=seed) for seed in range(4)]

    def picture(session):
        outputs = []
        for number, x in enumerate(steps):
            session.begin(Step.of(number, len(steps)))
            with torch.no_grad(), session.attached(Rows((0, 0), (False, True), 1)):
                outputs.append(model(x))
            session.end_step()
        return outputs

    session = FusionSession(model, *pair, settings)
    picture(session)
    session.restart()
    for second, alone in zip(picture(session), picture(FusionSession(model, *pair, settings)), strict=True):
        assert all(second[name].equal(alone[name]) for name in NAMES)
