"""One row's pictures of one pair, made and judged."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_dynfuse.fusion import Rule, Step
from lib_dynfuse.fusion.rules import Votes
from lib_dynfuse.fusion.session import FusionSession
from lib_dynfuse.guidance.references import ReferenceCache
from lib_dynfuse.guidance.weights import EncoderSources
from lib_dynfuse.hosts.diffusers import FusedPipeline, GuidanceSources, denoiser
from lib_dynfuse.hosts.diffusers.ziplora import Recipe, lessons, train
from lib_dynfuse.lora import LoraFile, read_lora
from lib_dynfuse.lora.naming import Site
from lib_dynfuse.settings import FuseSettings
from lib_dynfuse.ziplora import write

from ..judges import load_judges, load_second_judges
from ..lora_sets import SETS, lora_path
from ..model import load_pipeline
from ..oracles import read_oracle
from .colour import colour
from .diagnosis import Diagnosis, EveryRow, diagnosis
from .methods import Row
from .protocol import REFERENCE_SEED, Pair
from .work import Judge, Outcome, Setup, Task


def shipped_judges(weights: Path) -> tuple[Judge, Judge]:
    return load_judges(weights / "judges.safetensors"), load_second_judges(weights / "judges2.safetensors")


class Studio:
    """Makes and judges pictures, in one process: the model, its LoRAs, and the judges."""

    def __init__(self, setup: Setup, on_step: Callable[[], None] = lambda: None) -> None:
        """on_step: called after each denoising step; an exception that it raises ends the work. Raises OSError for a missing file."""
        self.setup = setup
        self._on_step = on_step
        weights = setup.weights
        self.pipeline = load_pipeline(weights)
        self.judges = setup.load_judges(weights)
        encoders = EncoderSources(weights, str(weights / "clip"), str(weights / "dino"), download=False)
        self.guidance = GuidanceSources(encoders, ReferenceCache(setup.references))
        self._loras: dict[tuple[str, str], LoraFile] = {}
        self._copies = tempfile.TemporaryDirectory()

    def loras(self, pair: Pair) -> tuple[LoraFile, LoraFile]:
        """The subject's and the style's, of the pair's set, at its loudness and the setup's."""
        of_set = SETS[pair.files]
        subject, style = (mine * of_all for mine, of_all in zip(of_set.loudness, self.setup.loudness, strict=True))
        return self._lora(pair.subject, pair.files, subject), self._lora(pair.style, pair.files, style)

    def _lora(self, name: str, files: str, loudness: float) -> LoraFile:
        if (name, files) not in self._loras:
            path = lora_path(self.setup.weights, name, SETS[files].trained)
            self._loras[name, files] = read_lora(path) if loudness == 1 else self._louder(path, files, loudness)
        return self._loras[name, files]

    def _louder(self, path: Path, files: str, loudness: float) -> LoraFile:
        folder = Path(self._copies.name, files)
        folder.mkdir(exist_ok=True)
        return louder(path, loudness, folder)

    def make(self, task: Task) -> Outcome:
        pair, row = task.pair, task.row
        zipped = self._zipped(pair) if row.loras == "ziplora" else None
        clock = _Clock(self._on_step)
        images, trace = self._base(pair, clock) if row.loras == "none" else self._fused(pair, row, clock, zipped)
        seconds = clock.seconds() / len(images)
        pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])
        floats = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        first, second = (judges.scores(floats) for judges in self.judges)
        return Outcome(
            pair,
            row.name,
            first.subject(pair.subject).double().numpy(),
            first.style(pair.style).double().numpy(),
            second.subject(pair.subject).double().numpy(),
            second.style(pair.style).double().numpy(),
            *colour(pictures),
            seconds,
            pictures[: task.shown],
            trace,
        )

    def _base(self, pair: Pair, clock: _Clock) -> tuple[list[Image.Image], None]:
        setup = self.setup
        output = self.pipeline(
            pair.asked(setup.prompt),
            num_images_per_prompt=len(setup.seeds),
            num_inference_steps=setup.steps,
            guidance_scale=setup.cfg_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in setup.seeds],
            callback_on_step_end=clock.pipeline_step,
        )
        return output.images, None

    def _zipped(self, pair: Pair) -> LoraFile:
        """The pair's LoRAs as the command ziplora merges them, of the prompts that each LoRA alone is asked for; 4 pictures at once."""
        subject, style = self.loras(pair)
        fused = FusedPipeline(self.pipeline, subject, style, FuseSettings(method="direct", contrast=0.0))
        recipe = Recipe(batch=4, seed=REFERENCE_SEED)
        prompts = {"subject": pair.subject_prompt, "style": pair.style_prompt}
        mergers = train(fused, lessons(fused, prompts, recipe, lambda *_: self._on_step()), recipe, lambda loss: self._on_step())
        session = FusionSession(denoiser(self.pipeline), subject, style, fused.settings)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{pair.name}.safetensors")
            write(path, session, (subject, style), mergers, {}, dtype=torch.float32)
            return read_lora(path)

    def _fused(self, pair: Pair, row: Row, clock: _Clock, zipped: LoraFile | None) -> tuple[list[Image.Image], Diagnosis | None]:
        setup = self.setup
        subject, style = self.loras(pair)
        if zipped is not None:
            subject = zipped
        elif row.loras == "oracle":
            subject = read_oracle(setup.weights, pair.plain.name)
        rule = RandomChoice(pair, setup.seeds) if row.loras == "random" else None
        fused = _Fusion(self.pipeline, subject, style, row, pair, self.guidance, rule)
        made = fused(
            pair.asked(setup.prompt),
            seeds=setup.seeds,
            steps=setup.steps,
            cfg_scale=setup.cfg_scale,
            progress=clock.step,
            reference_progress=clock.reference_step,
            tuning_progress=clock.tuning_step,
        )
        return made.images, diagnosis(made.trace, all_rows=fused.every_row)


def louder(path: Path, factor: float, folder: Path) -> LoraFile:
    """The LoRA as if it had been saved, in that folder, at that strength: its weight in the fusion stays 1.

    The file has to stay for as long as the LoRA is guided with: the references are kept by what is in it.
    """
    tensors = {name: tensor * factor if name.endswith(".alpha") else tensor for name, tensor in load_file(path).items()}
    copy = folder / path.name
    save_file(tensors, str(copy))
    return read_lora(copy)


def random_choice(pair: Pair, seeds: tuple[int, ...], site: Site) -> Tensor:
    """A coin for each picture: (images,) bool, True for the subject."""
    coins = [np.random.default_rng([*f"{pair.plain.name} {seed} {site.layer}".encode()]).random() < 0.5 for seed in seeds]
    return torch.tensor(coins)


class RandomChoice(Rule):
    """The control: for every layer and picture a coin decides which LoRA is used, at all steps."""

    name = "random"
    summary = "a coin for each layer and picture"
    selects = True
    constant = True

    def __init__(self, pair: Pair, seeds: tuple[int, ...]):
        self.pair, self.seeds = pair, seeds

    def weights(self, step: Step, votes: Votes | None) -> Tensor:
        coins = torch.stack([random_choice(self.pair, self.seeds, site) for site in self.places.sites])
        return torch.stack([coins, ~coins], -1).float().to(self.device)


class _Fusion(FusedPipeline):
    """A row's fusion, with what only the benchmark asks of a session."""

    def __init__(
        self, pipeline: Any, subject: LoraFile, style: LoraFile, row: Row, pair: Pair, guidance: GuidanceSources, rule: Rule | None
    ):
        self._rule = rule
        self.every_row = row.loras == "pair" and row.settings.method == "dynfuse" and row.settings.granularity == "row"
        super().__init__(pipeline, subject, style, row.settings_for(pair), guidance)

    def _new_session(self) -> FusionSession:
        kind = EveryRow if self.every_row else FusionSession
        return kind(denoiser(self.pipeline), self.subjects, self.styles, self.settings, rule=self._rule)


class _Clock:
    """Times a row, without the references and the small pictures that were made on the way.

    In processor time: on one thread of a quiet machine that is the wall's.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self._start = time.process_time()

    def step(self, done: int, steps: int) -> None:
        self._on_step()

    def reference_step(self, side: str, done: int, steps: int) -> None:
        self._on_step()
        self._start = time.process_time()

    def tuning_step(self, done: int, pictures: int) -> None:
        self.reference_step("", done, pictures)

    def pipeline_step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._on_step()
        return tensors

    def seconds(self) -> float:
        return time.process_time() - self._start


__all__ = ["RandomChoice", "Studio", "louder", "random_choice", "shipped_judges"]
