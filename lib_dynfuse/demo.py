"""`python -m lib_dynfuse demo`: the fusion at work on any machine, without a download.

A Stable Diffusion 1.5 in miniature is made on the spot from random numbers, two random LoRAs for it, and two random image encoders. Such
a model has never seen a picture, so it paints abstract fields of colour; what they show is that both LoRAs change the image, which of them
each layer used, and that the guidance brings the image closer to its references, as far as the encoders can tell.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

from .fusion import selection_map
from .fusion.selection_map import text_font
from .guidance import curve
from .guidance.encoders import Encoders, ImageEncoder
from .guidance.references import ReferenceCache
from .guidance.weights import imported
from .lora import read_lora
from .settings import FuseSettings

PROMPT = "a dog in the style of watercolor"
SEED = 7
STEPS = 12
CFG_SCALE = 4.0

_TEXT_WIDTH = 64
_START, _END = "<|startoftext|>", "<|endoftext|>"


def run(out: Path) -> int:
    """Make the model, the LoRAs and the pictures, with progress on standard error. Returns the exit code.

    out: the folder for subject.png, style.png, direct.png, fused.png, guided.png, selection-map.png, curve.png, and demo.png with all
    of them. The pictures of one LoRA alone are the guidance's references.
    """
    from tqdm import tqdm

    from .hosts.diffusers import FusedImages, FusedPipeline, GuidanceSources

    out.mkdir(parents=True, exist_ok=True)
    print("Making a tiny Stable Diffusion 1.5, two LoRAs and two image encoders of random numbers ...", file=sys.stderr)
    pipeline = tiny_pipeline()
    subject_path, style_path = out / "demo-subject.safetensors", out / "demo-style.safetensors"
    write_random_lora(subject_path, pipeline, rank=8, strength=0.7, seed=1)
    write_random_lora(style_path, pipeline, rank=4, strength=0.7, seed=3)
    subject, style = read_lora(subject_path), read_lora(style_path)

    jobs = {"direct": FuseSettings(method="direct"), "fused": FuseSettings(), "guided": FuseSettings(guidance=True)}
    alone = {"subject": "Subject LoRA alone", "style": "Style LoRA alone"}
    labels = {**alone, "direct": "Both added up (direct)", "fused": "Both fused (dynfuse)", "guided": "Fused and guided"}
    made: dict[str, FusedImages] = {}
    with one_thread(), tempfile.TemporaryDirectory() as cache, tqdm(total=STEPS * len(labels), unit="step") as bar:
        sources = GuidanceSources(tiny_encoders(), ReferenceCache(Path(cache)))

        def show(name: str, done: int, total: int) -> None:
            bar.set_description(f"{labels[name]:<22}")
            bar.update()

        for name, settings in jobs.items():
            made[name] = FusedPipeline(pipeline, subject, style, settings, sources)(
                PROMPT,
                seeds=[SEED],
                steps=STEPS,
                cfg_scale=CFG_SCALE,
                progress=partial(show, name),
                reference_progress=show,
            )
    guided = made["guided"]
    assert guided.guidance is not None
    pictures = {reference.side: reference.picture for reference in guided.references}
    pictures.update({name: result.images[0] for name, result in made.items()})
    map_of_choices = selection_map.draw(made["fused"].trace, subject.name, style.name)
    similarities = curve.draw(guided.guidance, map_of_choices.width)
    for name, picture in {**pictures, "selection-map": map_of_choices, "curve": similarities}.items():
        picture.save(out / f"{name}.png")
    contact_sheet([(label, pictures[name]) for name, label in labels.items()], map_of_choices, similarities).save(out / "demo.png")
    trace = made["fused"].trace
    print(
        f"{out / 'demo.png'} shows all five pictures, the selection map (the subject was used in {trace.subject_share():.0%} of "
        f"{trace.measured.sum()} choices) and how similar the guided picture became to the two references, which are the pictures of one "
        "LoRA alone.\nThe model and the encoders are random, so the pictures are abstract; with a real model and two real LoRAs, try "
        "python -m lib_dynfuse generate --help."
    )
    return 0


def tiny_pipeline(seed: int = 0) -> Any:
    """A StableDiffusionPipeline with Stable Diffusion 1.5's layers in their places, but narrow, and random weights; 256 px.

    Same seed, same weights. Needs no network.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = letter_tokenizer()
        words = len(tokenizer)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=_TEXT_WIDTH,
                intermediate_size=2 * _TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64, 96, 96), cross_attention_dim=_TEXT_WIDTH, attention_head_dim=8, norm_num_groups=16
        )
        autoencoder = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
        )
        _make_smooth(unet, 2.5)
        _make_smooth(autoencoder.decoder, 2.0)
        # A random network cannot predict noise, and one that predicts the picture jumps about from step to step. Of velocity v,
        # D = x / (1 + s^2) - v s / sqrt(1 + s^2): the first part is the exact denoiser of data without structure, which v bends.
        with torch.no_grad():
            for parameter in unet.conv_out.parameters():
                parameter.mul_(0.5)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        )
        pipeline = StableDiffusionPipeline(
            vae=autoencoder.eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        _fit_colours(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_encoders(seed: int = 0) -> Encoders:
    """CLIP's and DINO's architectures in miniature, at 32 px, with random weights: they compare pictures, but by no human measure.

    Same seed, same weights. Needs no network.
    """
    from transformers import ViTConfig, ViTModel

    _build_vision_tower = imported("open_clip_torch", "open_clip.model")._build_vision_tower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = _build_vision_tower(32, {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}, False)
        # As they are initialised, networks so shallow are nearly blind to what they are shown.
        with torch.no_grad():
            for name, weight in clip.named_parameters():
                if any(part in name for part in ("in_proj_weight", "c_fc.weight", "c_proj.weight", "conv1")):
                    weight.mul_(3)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            initializer_range=0.2,
        )
        dino = ClassToken(ViTModel(config, add_pooling_layer=False))
    ready = [ImageEncoder(network.eval().requires_grad_(False), 32, (0.5,) * 3, (0.5,) * 3) for network in (clip, dino)]
    return Encoders(ready[0], ready[1], f"tiny and random, seed {seed}")


class ClassToken(nn.Module):
    """A ViT's class token, DINO's feature of a picture."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vit(pixel_values=pictures).last_hidden_state[:, 0]


def write_random_lora(path: Path, pipeline: Any, *, rank: int, strength: float, seed: int, text: bool = True) -> None:
    """A kohya-style LoRA file on all linear layers and residual convolutions of the U-Net and, if wanted, of the text encoder.

    strength: standard deviation of each branch's output on inputs of unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    networks = [("lora_unet", pipeline.unet)] + ([("lora_te", pipeline.text_encoder)] if text else [])
    for prefix, network in networks:
        for name, module in network.named_modules():
            if not _carries_lora(name, module):
                continue
            weight = module.weight
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) / math.sqrt(weight[0].numel())
            ones = (1,) * (weight.dim() - 2)
            tensors[f"{key}.lora_up.weight"] = strength * torch.randn(weight.shape[0], rank, *ones, generator=generator) / math.sqrt(rank)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, str(path))


def contact_sheet(pictures: list[tuple[str, Image.Image]], map_of_choices: Image.Image, similarities: Image.Image) -> Image.Image:
    """The labelled pictures in a row above the selection map and the curve."""
    margin, line, ink, faint = 14, 22, (32, 32, 32), (96, 96, 96)
    figures = [
        ("Which LoRA each layer of the fused picture used, step by step:", map_of_choices),
        ("How similar the guided picture was to the references (the first two pictures), step by step:", similarities),
    ]
    row = margin + sum(picture.width + margin for _, picture in pictures)
    width = max(row, *(figure.width + 2 * margin for _, figure in figures))
    tallest = max(picture.height for _, picture in pictures)
    height = margin + line + tallest + margin + sum(line + figure.height + margin for _, figure in figures) + line + margin
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), text_font()
    left = margin
    for label, picture in pictures:
        pen.text((left, margin), label, fill=ink, font=font)
        sheet.paste(picture, (left, margin + line))
        left += picture.width + margin
    top = margin + line + tallest + margin
    for label, figure in figures:
        pen.text((margin, top), label, fill=ink, font=font)
        sheet.paste(figure, ((width - figure.width) // 2, top + line))
        top += line + figure.height + margin
    note = "The model, both LoRAs and the encoders are random numbers made on the spot: the pictures are abstract on purpose."
    pen.text((margin, top), note, fill=faint, font=font)
    return sheet


def letter_tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of single letters: nothing to download."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), "utf-8")
        merges.write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


@contextmanager
def one_thread() -> Iterator[None]:
    """For layers this small a second thread gains little, and on a busy machine waiting for it makes the whole several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _make_smooth(network: nn.Module, gain: float) -> None:
    """Random 3 x 3 convolutions that blur, so that a random network paints fields of colour and not noise."""
    row = torch.tensor([1.0, 2.0, 1.0])
    blur = row[:, None] * row / 16
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            out, channels = module.weight.shape[:2]
            module.weight.data = torch.randn(out, channels, 1, 1) * gain / math.sqrt(channels) * blur
            if module.bias is not None:
                module.bias.data = 0.1 * torch.randn(out)


@torch.no_grad()
def _fit_colours(pipeline: Any) -> None:
    """Scale the autoencoder's last layer so that the model's pictures use the range of colours."""
    last = pipeline.vae.decoder.conv_out
    latent = 2.0 * nn.functional.avg_pool2d(torch.randn(1, 4, 32, 32), 7, 1, 3) * 7
    colours = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    scale = 0.45 / colours.std((0, 2, 3))
    last.bias.data = (last.bias - colours.mean((0, 2, 3))) * scale
    last.weight.data = last.weight * scale[:, None, None, None]


def _carries_lora(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and name.rsplit(".", 1)[-1] in ("conv1", "conv2", "proj_in", "proj_out")


__all__ = ["letter_tokenizer", "run", "tiny_pipeline", "write_random_lora"]
