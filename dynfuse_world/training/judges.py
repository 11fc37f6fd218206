"""Training of the judges of subject and style, and the figures that say how far they can be trusted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..judges import STYLE_NAMES, SUBJECT_NAMES, Judges, Scores, load_judges, load_second_judges
from ..model import WEIGHTS, load_vae, save_network
from ..painter import CLASSES, HELD_OUT_STYLES, JUNK, STYLES, SUBJECTS, Scene
from .flawed import KINDS, Example, any_kind, batch, example, softened
from .loop import TrainingLoop
from .pictures import as_floats, as_tensor, kept

STEPS = 7000
BATCH = 64
RATE = 3e-3
_SEED = 7_001
_POOL = 4096  # pictures at hand
_FRESH = 24  # of them painted anew at each step
_DECODED = 3000  # pictures that went through the autoencoder
_SHARE_DECODED = 0.5
_CALIBRATED = 1500  # pictures that the temperatures are chosen on
_DISTURBED = 0.4  # the most noise in their latents, as a share of the latents' spread


def train_judges(work: Path, weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Writes judges.safetensors. Returns what is worth recording.

    With vae.safetensors there, a part of the pictures goes through it.
    """
    rng = random.Random(_SEED)
    pool = [example(any_kind(rng), rng) for _ in range(_POOL)]
    vae = weights / "vae.safetensors"
    through_vae = _decoded_examples(work / "judges-decoded.pt", vae) if vae.is_file() else None

    torch.manual_seed(_SEED)
    judges = Judges().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = TrainingLoop("judges", {"judges": judges}, steps=steps, rate=RATE, checkpoint=work / "judges.pt", seed=_SEED, decay=0.02)
    generator = torch.Generator()
    for step in loop:
        rng = random.Random(_SEED + step)
        generator.manual_seed(_SEED + step)
        for _ in range(_FRESH):
            pool[rng.randrange(_POOL)] = example(any_kind(rng), rng)
        chosen: tuple[Tensor, ...] = batch(rng.sample(pool, BATCH), SUBJECT_NAMES, STYLE_NAMES)
        if through_vae is not None:
            seen = torch.randint(len(through_vae[0]), (round(_SHARE_DECODED * BATCH),), generator=generator)
            chosen = tuple(torch.cat([new[len(seen) :], old[seen]]) for new, old in zip(chosen, through_vae, strict=True))
        pictures, *answers = chosen
        pictures = softened(pictures.float(), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judges(pictures)
        subject, style = errors(tuple(each.float() for each in logits), answers)
        loop.descend(subject + style, subject=subject, style=style)
    loop.finish()
    judges.to(memory_format=torch.contiguous_format)
    calibrate(judges, _SEED - 2)
    save_network(judges, weights / "judges.safetensors")
    return {"steps": loop.step, "seconds": round(loop.seconds), "batch": BATCH, "temperatures": judges.temperatures.tolist()}


def errors(logits: Sequence[Tensor], answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropies with the shares of subjects and of styles."""
    return F.cross_entropy(logits[0], answers[0].float()), F.cross_entropy(logits[1], answers[1].float())


def _decoded_examples(file: Path, vae: Path) -> tuple[Tensor, ...]:
    """Examples of all kinds through the autoencoder, kept in a file."""

    def examples() -> tuple[Tensor, ...]:
        rng = random.Random(_SEED - 1)
        pictures, *answers = batch([example(any_kind(rng), rng) for _ in range(_DECODED)], SUBJECT_NAMES, STYLE_NAMES)
        return through(vae, pictures, _DISTURBED).half(), *answers

    return kept(file, examples)


@torch.no_grad()
def through(vae: Path, pictures: Tensor, disturbed: float = 0.0, seed: int = _SEED) -> Tensor:
    """pictures, (B, 3, 64, 64) in [-1, 1], as the autoencoder reproduces them.

    disturbed: the most noise that is added to a picture's latent, in units of the latents' standard deviation. A denoiser's latents are
    never quite those of a picture: without this the judges take most generated pictures, which a person names at once, for flawed.
    """
    network = load_vae(vae)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in pictures.split(64):
        latent = network.encode(part).latent_dist.mode()
        strength = torch.rand(len(part), 1, 1, 1, generator=generator) * disturbed / network.config.scaling_factor
        parts.append(network.decode(latent + strength * torch.randn(latent.shape, generator=generator)).sample.clamp(-1, 1))
    return torch.cat(parts)


@torch.no_grad()
def calibrate(judges: Judges, seed: int) -> None:
    """Choose the temperatures on pictures that nothing was trained on."""
    rng = random.Random(seed)
    pictures, *answers = batch([example(any_kind(rng), rng) for _ in range(_CALIBRATED)], SUBJECT_NAMES, STYLE_NAMES)
    judges.temperatures.fill_(1.0)
    logits = [torch.cat(parts) for parts in zip(*(judges(part) for part in softened(pictures, torch.Generator()).split(250)), strict=True)]
    candidates = torch.linspace(0.5, 2.5, 81)
    found = torch.tensor([[float(error) for error in errors([each / t for each in logits], answers)] for t in candidates])
    judges.temperatures[:] = candidates[found.argmin(0)]


def evaluate(judges: Judges, pictures: int = 200, seed: int = 9_001, vae: Path | None = None) -> dict[str, Any]:
    """How right the judges are, on painted pictures of another seed than they were trained with.

    pictures: of each subject or class, of each style, and of each kind of flaw. vae: let all pictures pass through that autoencoder.
    Result, shares of 1: "subjects" {name: named right}; "styles" {name: named right}; "near misses" {kind: taken for the subject, where
    the difference shows}; "false subjects" {kind: taken for a subject, where it is none}.
    """
    rng = random.Random(seed)

    def seen(tensor: Tensor) -> Scores:
        tensor = through(vae, tensor) if vae is not None else tensor
        parts = [judges.scores(part) for part in tensor.split(200)]
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("subject_probabilities", "style_probabilities")))

    def painted(scenes: Iterable[Scene]) -> Scores:
        return seen(as_floats(as_tensor(list(scenes), rng)))

    styles = [*STYLES, *HELD_OUT_STYLES, None]
    things = [*CLASSES, *SUBJECTS]
    subjects = {}
    for name in things:
        scores = painted(Scene(name, rng.choice(styles)) for _ in range(pictures))
        subjects[name] = _share(scores.subject_probabilities.argmax(1) == SUBJECT_NAMES.index(name))
    scores = painted(Scene(JUNK, rng.choice(styles)) for _ in range(pictures))
    subjects[SUBJECT_NAMES[-1]] = _share(scores.subject_probabilities.argmax(1) == len(SUBJECT_NAMES) - 1)
    named = {}
    for number, style in enumerate(styles):
        scores = painted(Scene(rng.choice(things), style) for _ in range(pictures))
        named[STYLE_NAMES[number]] = _share(scores.style_probabilities.argmax(1) == number)

    near_misses, kinds = {}, {}
    is_subject = torch.tensor([name in SUBJECTS for name in SUBJECT_NAMES])
    for kind in KINDS:
        examples = [example(kind, rng) for _ in range(pictures)]
        tensor, shares, _ = batch(examples, SUBJECT_NAMES, STYLE_NAMES)
        scores = seen(tensor)
        if kind in ("one part", "two parts", "three parts"):
            shows = shares[:, is_subject].sum(1) == 0
            near_misses[kind] = _share(scores.subject_probabilities[shows][:, is_subject].amax(1) > 0.5)
        wrong = shares[:, is_subject].sum(1) < 0.1
        kinds[kind] = _share(scores.subject_probabilities[wrong][:, is_subject].amax(1) > 0.5)
    return {"subjects": subjects, "styles": named, "near misses": near_misses, "false subjects": kinds}


def _share(answers: Tensor) -> float:
    return round(float(answers.float().mean()), 3) if len(answers) else float("nan")


if __name__ == "__main__":
    both = {"judges": load_judges(), "second judges": load_second_judges()}
    ways = {"painted": None, "decoded": WEIGHTS / "vae.safetensors"}
    print(json.dumps({name: {way: evaluate(judges, vae=vae) for way, vae in ways.items()} for name, judges in both.items()}, indent=1))

__all__ = ["STEPS", "Example", "calibrate", "errors", "evaluate", "through", "train_judges"]
