"""From step to step: what decides, when it counts, and that how a host cuts its calls makes no difference."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lib_dynfuse import FuseSettings, Rows, read_lora
from lib_dynfuse.fusion import FusionSession, Step
from lib_dynfuse.fusion.rows import sampled_tokens

from .models import ATTENTION, FEED_FORWARD, WIDTH, Nested, delta_weights, kl, lora_file, tokens_model
from .test_session import Chosen

NAMES = [*ATTENTION, *FEED_FORWARD]
STEPS = 4


@pytest.fixture
def model():
    return tokens_model(NAMES)


@pytest.fixture
def loras(tmp_path, model):
    made = [("dog", 4, 0.3), ("ink", 6, 0.25), ("hat", 4, 0.3)]
    return [
        lora_file(tmp_path / f"{name}.safetensors", model, NAMES, rank=rank, scale=scale, seed=n + 1)
        for n, (name, rank, scale) in enumerate(made)
    ]


@pytest.fixture
def deltas(tmp_path, loras):
    return [delta_weights(tmp_path / f"{lora.name}.safetensors", NAMES) for lora in loras]


def latents(rows, tokens=10, steps=STEPS):
    return torch.randn(steps, rows, tokens, WIDTH, generator=torch.Generator().manual_seed(7))


def product(model, name, x, delta):
    layer = model.get_submodule(name)
    return x.double() @ layer.weight.double().t() + layer.bias.double(), x.double() @ delta.t()


def run(session, model, steps, rows):
    """Outputs of every step, by name."""
    outputs = []
    for number, x in enumerate(steps):
        session.begin(Step.of(number, len(steps)))
        with torch.no_grad(), session.attached(rows):
            outputs.append(model(x))
        session.end_step()
    return outputs


def divergences(model, name, x, deltas, weights=(1.0, 1.0, 1.0)):
    """(B, rows) float64, the mean over all tokens."""
    return torch.stack([kl(*product(model, name, x, weight * delta[name])) for delta, weight in zip(deltas, weights, strict=False)])


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("decide", "every"), [("now", 1), ("now", 3), ("next", 1), ("next", 2)])
def test_the_step_whose_divergences_decide(model, loras, deltas, images, decide, every):
    """now: the last step that chose; next: the step before that, but for the first."""
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide, decide_every=every, vote_tokens=0))
    steps = latents(2 * images, steps=6)
    rows = Rows((*range(images),) * 2, (False,) * images + (True,) * images, images)
    outputs = run(session, model, steps, rows)
    winners = session.trace.winners
    for number, x in enumerate(steps):
        chose = number // every * every if decide == "now" else max(0, (number - 1) // every * every)
        for position, name in enumerate(NAMES):
            subject, style = divergences(model, name, steps[chose], deltas[:2])[:, images:]
            wins = subject >= style
            y0, d_c = product(model, name, x, deltas[0][name])
            _, d_s = product(model, name, x, deltas[1][name])
            assert_close(outputs[number][name], y0 + torch.where(wins.repeat(2)[:, None, None], d_c, d_s))
            assert winners[number, position].tolist() == wins.tolist()
    assert 0 < winners.float().mean() < 1
    assert not winners[0].equal(winners[-1])


def test_the_record_says_what_was_used_and_what_was_measured_at_each_step(model, loras, deltas):
    session = FusionSession(
        model, *loras[:2], FuseSettings(method="dynfuse", decide="next", decide_every=2, vote_tokens=0, style_weight=0.8)
    )
    steps = latents(1)
    run(session, model, steps, Rows((0,), (True,), 1))
    trace = session.trace
    assert trace.reached.all()
    assert trace.measured.all(1).tolist() == [True, False, True, False]
    assert trace.weights[..., 0].unique().tolist() == [0.0, 1.0]
    assert trace.weights[..., 1].unique().tolist() == [0.0, pytest.approx(0.8)]
    for number in (0, 2):
        for position, name in enumerate(NAMES):
            expected = divergences(model, name, steps[number], deltas[:2], (1.0, 0.8))[:, 0]
            torch.testing.assert_close(trace.divergences[number, position, 0].double(), expected, rtol=1e-4, atol=1e-7)


def test_the_record_may_be_read_in_the_middle_of_a_step(model, loras):
    """What is read does not end the step."""
    looked, plain = (FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", vote_tokens=0)) for _ in range(2))
    for number, x in enumerate(latents(2)):
        for session in (looked, plain):
            session.begin(Step.of(number, STEPS))
            with session.attached(Rows((0,), (True,), 1)):
                model(x[:1])
            if session is looked:
                assert session.trace.weights.shape[0] == number + 1
                assert session.trace.weights.shape[0] == number + 1
            with session.attached(Rows((0,), (False,), 1)):
                model(x[1:])
            session.end_step()
    assert torch.equal(looked.trace.weights, plain.trace.weights)
    assert torch.equal(looked.trace.divergences, plain.trace.divergences)


def cuts(parts):
    """Every way to cut a sequence into consecutive pieces."""
    for ends in itertools.product([False, True], repeat=len(parts) - 1):
        pieces, piece = [], [parts[0]]
        for part, cut in zip(parts[1:], ends, strict=True):
            if cut:
                pieces.append(piece)
                piece = []
            piece.append(part)
        yield [*pieces, piece]


@pytest.mark.parametrize("decide", ["now", "next"])
@pytest.mark.parametrize("negative_first", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_however_a_host_cuts_its_rows_into_calls_the_picture_is_the_same(model, loras, images, prompts, negative_first, decide):
    """Rows as hosts have them: for each part of the prompt all images, and the negative prompt; cut between any two of these."""
    stretches = [tuple(("prompt", image) for image in range(images)) for _ in range(prompts)]
    negative = tuple(("negative", image) for image in range(images))
    order = [negative, *stretches] if negative_first else [*stretches, negative]
    kinds = [kind for stretch in order for kind in stretch]
    steps = latents(len(kinds), tokens=6, steps=3)
    settings = FuseSettings(method="dynfuse", decide=decide, vote_tokens=4)

    def outputs(calls):
        session = FusionSession(model, *loras[:2], settings)
        found = []
        for number, x in enumerate(steps):
            session.begin(Step.of(number, len(steps)))
            while True:
                made, first = [], 0
                for call in calls:
                    rows = [row for stretch in call for row in stretch]
                    batch = Rows(tuple(image for _, image in rows), tuple(kind == "prompt" for kind, _ in rows), images)
                    with torch.no_grad(), session.attached(batch):
                        made.append(model(x[first : first + len(rows)]))
                    first += len(rows)
                if not session.undecided:
                    break
                session.repeat()
            session.end_step()
            found.append({name: torch.cat([part[name] for part in made]) for name in NAMES})
        assert session.trace.fallbacks == 0
        return found, session.trace

    expected, trace = outputs([order])
    assert 0 < trace.winners.float().mean() < 1
    for calls in cuts(order):
        found, other = outputs(calls)
        assert torch.equal(other.winners, trace.winners)
        for one, two in zip(found, expected, strict=True):
            for name in NAMES:
                torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decide", ["now", "next"])
def test_an_image_does_not_depend_on_its_batch_mates(model, loras, decide):
    steps = latents(6)
    together = (
        FusionSession(model, *loras, FuseSettings(method="dynfuse", decide=decide))
        if False
        else FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide))
    )
    batch = run(together, model, steps, Rows((0, 1, 2) * 2, (True,) * 3 + (False,) * 3, 3))
    for image in range(3):
        alone = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide))
        single = run(alone, model, steps[:, [image, image + 3]], Rows((0, 0), (True, False), 1))
        assert torch.equal(alone.trace.winners[:, :, 0], together.trace.winners[:, :, image])
        for one, many in zip(single, batch, strict=True):
            for name in NAMES:
                torch.testing.assert_close(many[name][[image, image + 3]], one[name], rtol=1e-5, atol=1e-6)


def test_tiles_vote_by_their_mean_in_whatever_calls_they_come(model, loras):
    """MultiDiffusion: the picture in pieces, several in a call."""
    steps = latents(4)
    rows = Rows((0,) * 4, (True,) * 4, 1)
    whole = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next"))
    expected = run(whole, model, steps, rows)
    apart = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next"))
    for number, x in enumerate(steps):
        apart.begin(Step.of(number, STEPS))
        for first, last in ((0, 1), (1, 4)):
            with torch.no_grad(), apart.attached(Rows((0,) * (last - first), (True,) * (last - first), 1)):
                outputs = model(x[first:last])
            for name in NAMES:
                torch.testing.assert_close(outputs[name], expected[number][name][first:last], rtol=1e-5, atol=1e-6)
        apart.end_step()
    torch.testing.assert_close(apart.trace.divergences, whole.trace.divergences, rtol=1e-4, atol=1e-7)


def test_the_sampled_tokens_are_measured_alone(model, loras, deltas):
    steps = latents(1, tokens=40, steps=2)
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", vote_tokens=7))
    run(session, model, steps, Rows((0,), (True,), 1))
    some = sampled_tokens(40, 7)
    for number in (0, 1):
        for position, name in enumerate(NAMES):
            expected = divergences(model, name, steps[number][:, some], deltas[:2])[:, 0]
            torch.testing.assert_close(session.trace.divergences[number, position, 0].double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("tokens", "wanted"), [(4096, 64), (4096, 256), (1000, 64), (77, 64), (65, 64)])
def test_samples_lie_in_every_stretch_and_in_every_column(tokens, wanted):
    chosen = sampled_tokens(tokens, wanted)
    assert len(chosen.unique()) == wanted
    stretch = torch.bucketize(chosen, torch.arange(1, wanted) * tokens // wanted, right=True)
    assert stretch.tolist() == list(range(wanted))
    width = 64
    columns = torch.bincount(chosen % width, minlength=width)
    assert columns.max() <= 3 * wanted / width + 2  # not one column again and again
    assert sampled_tokens(tokens, 0).tolist() == sampled_tokens(tokens, tokens).tolist() == list(range(tokens))


def test_weights_over_the_steps_are_in_the_sum_and_in_the_choice(model, loras, deltas):
    """Against the same weights written as constants, step by step."""
    steps = latents(2, steps=5)
    rows = Rows((0, 0), (True, False), 1)
    course = [0.0, 0.5, 1.0, 0.8, 0.6]
    for settings in ({"method": "direct"}, {"method": "dynfuse", "decide": "now"}):
        session = FusionSession(model, *loras[:2], FuseSettings(style_weight="0@0,1@0.5,0.6@1", **settings))
        outputs = run(session, model, steps, rows)
        for number, weight in enumerate(course):
            constant = FusionSession(model, *loras[:2], FuseSettings(style_weight=weight, **settings))
            expected = run(constant, model, steps[number : number + 1], rows)[0]
            for name in NAMES:
                torch.testing.assert_close(outputs[number][name], expected[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(session.trace.weights[number], constant.trace.weights[0])


def test_weights_over_the_steps_with_choices_for_the_next_step(model, loras, deltas):
    """A choice goes by the strengths of the step in which it was measured, and is applied at those of its own."""
    steps, course = latents(1, steps=5), [0.2, 0.4, 0.6, 0.8, 1.0]
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", style_weight="0.2@0,1@1", decide="next", vote_tokens=0))
    outputs = run(session, model, steps, Rows((0,), (True,), 1))
    for number, x in enumerate(steps):
        chose = max(0, number - 1)
        for name in NAMES:
            subject, style = divergences(model, name, steps[chose], deltas[:2], (1.0, course[chose]))[:, 0]
            y0, d_c = product(model, name, x, deltas[0][name])
            _, d_s = product(model, name, x, course[number] * deltas[1][name])
            assert_close(outputs[number][name], y0 + (d_c if subject >= style else d_s))


@pytest.mark.parametrize("decide", ["now", "next"])
@pytest.mark.parametrize("images", [1, 2])
def test_of_three_loras_the_one_with_the_largest_divergence_is_used(model, loras, deltas, decide, images):
    settings = FuseSettings(method="dynfuse", subject="dog+hat", style="ink", subject_weight="1+0.9", decide=decide, vote_tokens=0)
    weights, order = (1.0, 0.9, 1.0), [deltas[0], deltas[2], deltas[1]]
    session = FusionSession(model, [loras[0], loras[2]], [loras[1]], settings)
    steps = latents(images, steps=3)
    outputs = run(session, model, steps, Rows(tuple(range(images)), (True,) * images, images))
    used = set()
    for number, x in enumerate(steps):
        chose = max(0, number - 1) if decide == "next" else number
        for position, name in enumerate(NAMES):
            winners = divergences(model, name, steps[chose], order, weights).argmax(0)
            for image, winner in enumerate(winners.tolist()):
                y0, d = product(model, name, x[image], weights[winner] * order[winner][name])
                assert_close(outputs[number][name][image], y0 + d)
                assert session.trace.weights[number, position, image].nonzero().flatten().tolist() == [winner]
                used.add(winner)
    assert used == {0, 1, 2}
    assert [member.subject for member in session.trace.members] == [True, True, False]


def test_the_sum_of_three_is_all_three_merged(model, loras, deltas):
    settings = FuseSettings(method="direct", subject="dog+hat", style="ink", subject_weight="1+0.5", style_weight=-0.4)
    session = FusionSession(model, [loras[0], loras[2]], [loras[1]], settings)
    x = latents(2, steps=3)
    for outputs, step in zip(run(session, model, x, Rows((0, 0), (True, False), 1)), x, strict=True):
        for name in NAMES:
            y0, change = product(model, name, step, deltas[0][name] + 0.5 * deltas[2][name] - 0.4 * deltas[1][name])
            assert_close(outputs[name], y0 + change)


def test_a_layer_of_two_among_three_loras_is_decided_between_those_two(tmp_path, model, loras, deltas):
    part = lora_file(tmp_path / "part.safetensors", model, NAMES[:2], scale=9.0, seed=5)  # would win everywhere
    session = FusionSession(model, [loras[0], part], [loras[1]], FuseSettings(method="dynfuse", decide="next", vote_tokens=0))
    steps = latents(1, steps=3)
    outputs = run(session, model, steps, Rows((0,), (True,), 1))
    for number, x in enumerate(steps):
        for name in NAMES[2:]:
            subject, style = divergences(model, name, steps[max(0, number - 1)], deltas[:2])[:, 0]
            y0, d = product(model, name, x, deltas[0 if subject >= style else 1][name])
            assert_close(outputs[number][name], y0 + d)
    assert (session.trace.weights[:, :2, :, 1] == 1).all()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("weights", ["0@0,0@0.9,1@1", 0.0])
def test_a_lora_at_weight_nothing_is_not_computed_into_the_sum(tmp_path, model, loras, deltas, images, weights):
    """Its product with these features is not a number: 0 times it would be none either."""
    huge = lora_file(tmp_path / "huge.safetensors", model, NAMES, rank=4, scale=1e38, seed=3)
    x = latents(images, steps=2) * 1e3
    rows = Rows(tuple(range(images)), (True,) * images, images)
    for name in NAMES:
        assert not torch.isfinite(x[0] @ huge_change(tmp_path, name)).all()
    settings = FuseSettings(method="direct", subject_weight=weights)
    if weights == 0.0:
        session = FusionSession(
            model, huge, loras[1], FuseSettings(method="dynfuse"), rule=Chosen(lambda site: torch.zeros(images, dtype=torch.bool))
        )
    else:
        session = FusionSession(model, huge, loras[1], settings, steps=20)
    for number, step in enumerate(x):
        session.begin(Step.of(number, 20))
        with torch.no_grad(), session.attached(rows):
            outputs = model(step)
        session.end_step()
        for name in NAMES:
            y0, d = product(model, name, step, deltas[1][name])
            torch.testing.assert_close(outputs[name].double(), y0 + d, rtol=1e-4, atol=1e-3)


def test_so_is_one_whose_weight_is_nothing_throughout(tmp_path, model, loras, deltas):
    lora_file(tmp_path / "huge.safetensors", model, NAMES, rank=4, seed=3)
    tensors = load_file(tmp_path / "huge.safetensors")
    save_file({key: tensor * 1e37 if "down" in key else tensor for key, tensor in tensors.items()}, tmp_path / "huge.safetensors")
    session = FusionSession(model, read_lora(tmp_path / "huge.safetensors"), loras[1], FuseSettings(method="direct", subject_weight=0.0))
    for number, step in enumerate(latents(1, steps=2) * 1e3):
        session.begin(Step.of(number, 20))
        with torch.no_grad(), session.attached(Rows((0,), (True,), 1)):
            outputs = model(step)
        session.end_step()
        for name in NAMES:
            y0, d = product(model, name, step, deltas[1][name])
            torch.testing.assert_close(outputs[name].double(), y0 + d, rtol=1e-4, atol=1e-3)


def huge_change(folder, name):
    return delta_weights(folder / "huge.safetensors", [name])[name].float().t()


def test_a_restarted_session_knows_nothing_of_the_picture_before(model, loras):
    steps, rows = latents(2), Rows((0, 0), (True, False), 1)
    used, fresh = (FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", balance="gamma")) for _ in range(2))
    run(used, model, steps * 3, rows)
    used.restart()
    for one, two in zip(run(used, model, steps, rows), run(fresh, model, steps, rows), strict=True):
        for name in NAMES:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(used.trace.divergences, fresh.trace.divergences)


def test_another_size_and_another_number_of_images_are_followed(model, loras):
    """A hires pass, and a last batch that is smaller."""
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", vote_tokens=8))
    for images, tokens in ((1, 12), (1, 48), (3, 48), (2, 7)):
        session.restart()
        steps = latents(images, tokens=tokens)
        rows = Rows(tuple(range(images)), (True,) * images, images)
        found = run(session, model, steps, rows)
        fresh = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", vote_tokens=8))
        for one, two in zip(found, run(fresh, model, steps, rows), strict=True):
            for name in NAMES:
                torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolutions_choose_for_the_next_step_too(tmp_path, images, kernel, padding, memory):
    name = "input_blocks.3.0.op" if kernel == 3 else "input_blocks.1.1.proj_in"
    torch.manual_seed(0)
    stride = 2 if kernel == 3 else 1
    model = Nested({name: nn.Conv2d(4, 6, kernel, stride=stride, padding=kernel // 2, padding_mode=padding)}).eval().requires_grad_(False)
    model = model.to(memory_format=memory)
    loudness = {1: 0.5, 2: 0.5 if kernel == 1 else 0.8}  # so that each wins at some steps
    files = [lora_file(tmp_path / f"{seed}.safetensors", model, [name], seed=seed, scale=scale) for seed, scale in loudness.items()]
    changes = [delta_weights(tmp_path / f"{seed}.safetensors", [name])[name] for seed in loudness]
    layer = model.get_submodule(name)
    steps = torch.randn(6, images, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    session = FusionSession(model, *files, FuseSettings(method="dynfuse", decide="next", vote_tokens=5))

    def convolved(x, weight, bias=None):
        if kernel == 3:
            x = nn.functional.pad(x.double(), (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
        return nn.functional.conv2d(x.double(), weight.double(), bias, stride=stride)

    wins = []
    for number, x in enumerate(steps):
        session.begin(Step.of(number, len(steps)))
        with torch.no_grad(), session.attached(Rows(tuple(range(images)), (True,) * images, images)):
            output = model(x.to(memory_format=memory))[name]
        session.end_step()
        y0, d_c, d_s = convolved(x, layer.weight, layer.bias.double()), convolved(x, changes[0]), convolved(x, changes[1])
        some = sampled_tokens(y0[0, 0].numel(), 5)
        tokens = [t.flatten(2).transpose(1, 2)[:, some] for t in (y0, d_c, d_s)]
        wins.append(kl(tokens[0], tokens[1]) >= kl(tokens[0], tokens[2]))
        chosen = wins[max(0, number - 1)]
        assert_close(output, y0 + torch.where(chosen[:, None, None, None], d_c, d_s))
    assert len({tuple(w.tolist()) for w in wins}) > 1


def test_layers_that_a_step_leaves_out_keep_their_last_choice(model, loras):
    """A host that skips blocks at some steps (DeepCache)."""
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide="next", vote_tokens=0))
    steps, rows = latents(1, steps=5), Rows((0,), (True,), 1)
    whole = model.order
    for number, x in enumerate(steps):
        model.order = whole[:2] if number in (1, 2) else whole
        session.begin(Step.of(number, len(steps)))
        with torch.no_grad(), session.attached(rows):
            model(x)
        session.end_step()
    trace = session.trace
    assert trace.measured[1].tolist() == [True] * 2 + [False] * (len(NAMES) - 2)
    assert torch.equal(trace.winners[3, 2:], trace.divergences[0, 2:, :, 0] >= trace.divergences[0, 2:, :, 1])
    assert torch.equal(trace.winners[4], trace.divergences[3, :, :, 0] >= trace.divergences[3, :, :, 1])


@pytest.mark.parametrize("decide", ["now", "next"])
def test_a_step_without_a_call_is_none(model, loras, decide):
    """A refiner that takes over inside a denoiser call."""
    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide))
    steps, rows = latents(1), Rows((0,), (True,), 1)
    run(session, model, steps[:2], rows)
    session.begin(Step.of(2, STEPS))
    assert session.trace.weights.shape[0] == 2
    session.end_step()
    assert session.trace.weights.shape[0] == 2
    fresh = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", decide=decide))
    for one, two in zip(run(session, model, steps[2:], rows), run(fresh, model, steps, rows)[2:], strict=True):
        for name in NAMES:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["balanced", "direct", "klora", "switch"])
@pytest.mark.parametrize("images", [1, 2])
def test_what_the_selection_would_choose_is_recorded_under_other_methods(model, loras, deltas, method, images):
    """And changes nothing of the picture. From the second step on, with the LoRAs as strong as they are then."""
    settings = FuseSettings(method=method, vote_tokens=0, style_weight="0.6@0,1.2@1", bias=0.9)
    steps, rows = latents(2 * images), Rows((*range(images),) * 2, (False,) * images + (True,) * images, images)
    plain, watched = (FusionSession(model, *loras[:2], settings, watched=watches) for watches in (False, True))
    for one, other in zip(run(plain, model, steps, rows), run(watched, model, steps, rows)):
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
    assert plain.trace.selected(settings) is None
    trace = watched.trace
    assert trace.measured.all(1).tolist() == [False, True, True, True]
    chosen = trace.selected(settings)
    torch.testing.assert_close(trace.weights, plain.trace.weights)
    for number, x in list(enumerate(steps))[1:]:
        for position, name in enumerate(NAMES):
            expected = divergences(model, name, x, deltas[:2], (1.0, 0.6 + 0.6 * number / (STEPS - 1)))[:, images:]
            torch.testing.assert_close(trace.divergences[number, position].t().double(), expected, rtol=1e-4, atol=1e-7)
            subject = (expected[0] >= 0.9 * expected[1]).float()
            assert chosen.weights[number, position].t().tolist() == [subject.tolist(), (1 - subject).tolist()]
    assert not chosen.reached[0].any()
    assert 0 < chosen.subject_shares[1:].mean() < 1


def test_it_is_recorded_where_the_sum_would_be_in_the_layers_weights(model, loras):
    settings = FuseSettings(method="balanced")
    steps, rows = latents(2), Rows((0, 0), (False, True), 1)
    plain, watched = (FusionSession(model, *loras[:2], settings, watched=watches) for watches in (False, True))
    for one, other in zip(run(plain, model, steps, rows), run(watched, model, steps, rows)):
        for name in NAMES:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert watched.trace.measured[1:].all()
    assert not plain.trace.measured.any()


@pytest.mark.parametrize("where", ["counting", "keeping"])
def test_where_memory_is_too_short_to_measure_the_choices_before_stay_and_it_is_said(model, loras, monkeypatch, where):
    from lib_dynfuse.fusion import votes

    session, undisturbed = (FusionSession(model, *loras[:2], FuseSettings(method="dynfuse", vote_tokens=0)) for _ in range(2))
    rows = Rows((0, 0), (False, True), 1)

    def short(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for number, x in enumerate(latents(2)):
        with monkeypatch.context() as patch:
            if number in (1, 2):
                patch.setattr(votes, "_divergences", short) if where == "counting" else patch.setattr(votes.Ballot, "slot", short)
            session.begin(Step.of(number, STEPS))
            with session.attached(rows), torch.no_grad():
                model(x)
            session.end_step()
        undisturbed.begin(Step.of(number, STEPS))
        with undisturbed.attached(rows), torch.no_grad():
            model(x)
        undisturbed.end_step()
    used = session.trace.weights
    assert used.shape == undisturbed.trace.weights.shape
    assert all(torch.equal(used[0], used[number]) for number in (1, 2, 3))  # the first step decided in the layers
    assert not torch.equal(undisturbed.trace.weights[3], used[3])
    assert session.notes() == ["Memory was too short to measure the LoRAs in 2 steps; the choices before stayed."]
    assert undisturbed.notes() == []


def test_another_error_while_measuring_is_not_swallowed(model, loras, monkeypatch):
    from lib_dynfuse.fusion import votes

    session = FusionSession(model, *loras[:2], FuseSettings(method="dynfuse"))

    def broken(*args, **kwargs):
        raise RuntimeError("a mistake")

    def picture():
        for number, x in enumerate(latents(2)):
            session.begin(Step.of(number, STEPS))
            with session.attached(Rows((0, 0), (False, True), 1)), torch.no_grad():
                model(x)
            session.end_step()

    monkeypatch.setattr(votes, "_divergences", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        picture()
