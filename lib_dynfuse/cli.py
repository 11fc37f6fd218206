"""The command line: `python -m lib_dynfuse generate | merge | ziplora | demo | evaluate | study | judge | inspect | cache | bench | toy`.

A mistake of the user or a file that cannot be used: one sentence on standard error, exit code 2.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image, ImageOps

from .arguments import number, whole
from .evaluate import command as evaluate_command
from .evaluate.folder import EvaluationError
from .evaluate.judge import command as judge_command
from .evaluate.study import command as study_command
from .fusion import FusionError
from .fusion.merging import GUIDANCE_FIELDS
from .guidance.references import ReferenceCache
from .guidance.weights import CLIP_DEFAULT, DINO_DEFAULT, EncoderError, EncoderSources
from .home import VARIABLE, encoders_folder, references_folder
from .lora import LoraError
from .program import program
from .settings import (
    LORA_FIELDS,
    PRESET,
    PRESETS,
    FuseSettings,
    SettingsError,
    default_value,
    field_metadata,
    field_types,
    format_value,
    parse_value,
    preset_values,
)
from .strength import BLOCKS_EXAMPLE, SCHEDULE_EXAMPLE
from .version import VERSION

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MERGE_METHOD = "direct"
NOT_MERGED = (
    *GUIDANCE_FIELDS,
    *("hr", "criterion", "granularity", "temperature", "balance", "bias", "decide", "decide_every", "vote_tokens"),
    *("contrast", "style_contrast", "subject_contrast", "contrast_every", "contrast_start", "contrast_end", "negative_weight"),
    "tune",
)
"""Settings that cannot matter to a file that is made without a picture."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv: without the program's name, None for the process's. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Western Windows cannot print every LoRA's name
    try:
        if arguments[:1] == ["bench"]:  # has options of its own
            from . import bench

            return bench.main(arguments[1:])
        if arguments[:1] == ["toy"]:
            from dynfuse_world import cli

            return cli.main(arguments[1:])
        options = _parser().parse_args(arguments)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("diffusers", "transformers", "accelerate", "tqdm", "open_clip"):
            raise
        return _refused(
            f"This command needs the package {package}, which is not installed: "
            "pip install diffusers transformers accelerate open_clip_torch"
        )
    except torch.cuda.OutOfMemoryError:
        return _refused("The GPU's memory is too small for this: try a smaller --size, a smaller --batch-size or --dtype float16.")
    except (LoraError, SettingsError, FusionError, EncoderError, EvaluationError) as error:
        return _refused(str(error))
    except BrokenPipeError:
        # Who reads the output, such as head, has enough. The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refused(f"{error.filename or 'A file'} cannot be read or written: {error.strerror or error}.")
    except RuntimeError as error:
        # Their modules are not everywhere: the one imports diffusers, the other is no part of the extension.
        if type(error).__name__ not in ("PipelineError", "WeightsError"):
            raise
        return _refused(str(error))


def _refused(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # A weight over the steps that begins below zero is a value too: -0.5@0,1@1.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        print(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=program(), description="Fuse a subject LoRA and a style LoRA while an image is made.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"DynFuse {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_merge(commands)
    _add_ziplora(commands)

    demo = commands.add_parser(
        "demo", help="a page with pictures of two LoRAs fused, from a miniature model that is part of the program; nothing is downloaded"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder for the page and its pictures (default: out/demo)"
    )
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser(
        "evaluate",
        help="compare methods on a model of your own: pictures, scores and a report by a plan",
        description="Make a plan's pictures, score them and write a report. Started again, it goes on where it stopped; started on several "
        "GPUs (accelerate launch -m lib_dynfuse evaluate PLAN) or machines that share the folder, they share the work.",
        allow_abbrev=False,
    )
    evaluate_command.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command.run)

    inspect = commands.add_parser("inspect", help="what a LoRA file holds; for two files, whether they go together")
    inspect.add_argument("files", nargs="+", metavar="FILE", help="LoRA file")
    inspect.set_defaults(run=_inspect)

    study = commands.add_parser(
        "study", help="ask people which picture is better, on a page of this machine or in a file", allow_abbrev=False
    )
    study_command.add_arguments(study)
    study.set_defaults(run=study_command.run)

    judge = commands.add_parser("judge", help="let a model choose between pictures, at an OpenAI-compatible endpoint", allow_abbrev=False)
    judge_command.add_arguments(judge)
    judge.set_defaults(run=judge_command.run)

    cache = commands.add_parser("cache", help="the reference pictures that are kept; --clear removes them")
    cache.add_argument("--clear", action="store_true", help="remove all of them")
    _add_cache(cache)
    cache.set_defaults(run=_cache)

    commands.add_parser("bench", help="measure what the fusion and the guidance cost on this machine, and what the guidance gains")
    commands.add_parser("toy", help="the miniature model that is part of the program: train, check, export it, and measure fusions with it")
    return parser


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="images from a diffusers pipeline or a checkpoint, with two LoRAs fused",
        description="Make images with a subject LoRA and a style LoRA fused. Each PNG carries its settings; the selection map, which shows "
        "which LoRA each layer used at each step, is saved beside it.",
        allow_abbrev=False,
    )
    main_options = generate.add_argument_group("model, LoRAs and picture")
    add = main_options.add_argument
    add("--model", required=True, type=Path, metavar="M", help="diffusers pipeline folder, or .safetensors/.ckpt checkpoint: "
        "Stable Diffusion 1.x, 2.x, SDXL or Flux")  # fmt: skip
    add("--config", type=Path, metavar="DIR", help="for a checkpoint: pipeline folder of the same base model, for its configuration and "
        "tokenizers (for Flux: all but the transformer); without it they come from diffusers' cache or are downloaded")  # fmt: skip
    add("--subject", required=True, type=Path, nargs="+", metavar="A", help="LoRA file of the character, creature or thing to show; "
        "several are fused together")  # fmt: skip
    add("--style", required=True, type=Path, nargs="+", metavar="B", help="LoRA file of the way it is drawn; several are fused together")
    add("--prompt", required=True, metavar="P", help="what to make")
    add("--negative-prompt", default="", metavar="P", help="what to avoid")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the images; it is made if it is missing")
    _add_pairs(add)
    add("--steps", type=whole(1), default=30, metavar="N", help="denoising steps (default: 30)")
    add("--cfg", type=number, metavar="X", help="CFG scale; for Flux the distilled guidance (default: the pipeline's own)")
    add("--size", type=_size, metavar="WxH", help="width and height in pixels, such as 768x512 (default: the model's own)")
    add("--seed", type=whole(-1), default=-1, metavar="N", help="seed of the first image, the next have the next; -1: random "
        "(default)")  # fmt: skip
    add("--images", type=whole(1), default=1, metavar="N", help="number of images (default: 1)")
    add("--batch-size", type=whole(1), default=1, metavar="N", help="images made at once; takes more memory (default: 1)")
    add("--device", metavar="D", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", choices=tuple(DTYPES), help="numbers to compute with (default: float32 on a CPU, bfloat16 for Flux, else float16)")
    add("--save-lora", type=Path, metavar="FILE", help="after the pictures, also write the LoRAs as one file that every program reads, "
        "each weighted in each layer as it was on average over the steps and pictures")  # fmt: skip
    add("--rank", type=whole(1), metavar="N", help="with --save-lora: at most this rank in a layer; says what is lost (default: exact)")

    fusion = generate.add_argument_group("fusion and guidance")
    _add_preset(fusion)
    for name in field_types():
        if name not in LORA_FIELDS:  # files here; their names come from them
            _add_setting(fusion, name)
    _add_guidance_files(generate.add_argument_group("encoders and references of the guidance"))
    generate.set_defaults(run=_generate)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="two or more LoRAs as one file",
        description="Write a subject LoRA and a style LoRA as one file, which every WebUI and diffusers can load: merge A B --out FILE, or "
        "with several on a side merge --subject A A2 --style B --out FILE. Exact, but for the rounding to --dtype, unless --rank reduces "
        "it. A file that exists is never overwritten. A method that chooses by what it measures needs a picture: generate --save-lora.",
        allow_abbrev=False,
    )
    files = merge.add_argument_group("files")
    add = files.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="two LoRA files: the subject's and the style's")
    add("--subject", type=Path, nargs="+", metavar="A", help="in place of the two files: LoRA files of what is shown")
    add("--style", type=Path, nargs="+", metavar="B", help="and LoRA files of the way it is drawn")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write, ending in .safetensors")
    add("--rank", type=whole(1), metavar="N", help="at most this rank in a layer, by singular values; says what is lost (default: exact)")
    add("--dtype", choices=tuple(DTYPES), default="float16", help="numbers in the file (default: float16)")
    fusion = merge.add_argument_group("fusion")
    _add_pairs(fusion.add_argument)
    fusion.add_argument("--steps", type=whole(1), default=30, metavar="N", help="weights that vary over the steps are averaged over this "
        "many (default: 30)")  # fmt: skip
    _add_preset(fusion)
    for name in field_types():
        if name not in (*LORA_FIELDS, *NOT_MERGED):
            _add_setting(fusion, name, MERGE_METHOD if name == "method" else None)
    merge.set_defaults(run=_merge)


def _add_ziplora(commands: Any) -> None:
    ziplora = commands.add_parser(
        "ziplora",
        help="two LoRAs as one file, merged by coefficients that are trained on the base model (ZipLoRA)",
        description="Write a subject LoRA and a style LoRA as one file: ziplora A B --base M --out FILE. Each column of each LoRA's change "
        "gets a coefficient, trained so that the file predicts what each LoRA alone predicts of its own prompt, and that both have "
        "little in common. No pictures are needed: the LoRAs make their own first. A file that exists is never overwritten.",
        allow_abbrev=False,
    )
    files = ziplora.add_argument_group("files and prompts")
    add = files.add_argument
    add("subject", type=Path, metavar="A", help="LoRA file of the character, creature or thing to show")
    add("style", type=Path, metavar="B", help="LoRA file of the way it is drawn")
    add("--base", required=True, type=Path, metavar="M", help="diffusers pipeline folder, or .safetensors/.ckpt checkpoint, as of generate")
    add("--config", type=Path, metavar="DIR", help="for a checkpoint: pipeline folder of the same base model, as of generate")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write, ending in .safetensors")
    add("--subject-prompt", default="", metavar="P", help="what the subject's LoRA was taught (default: its activation text)")
    add("--style-prompt", default="", metavar="P", help="what the style's LoRA was taught (default: its activation text)")
    _add_pairs(add)
    add("--file-dtype", choices=tuple(DTYPES), default="float16", help="numbers in the file (default: float16)")
    add = ziplora.add_argument_group("training").add_argument
    add("--steps", type=whole(1), default=100, metavar="N", help="gradient steps (default: 100, the paper's)")
    add("--learning-rate", type=_positive, default=0.01, metavar="X", help="of Adam (default: 0.01)")
    add("--lambda", dest="weight", type=number, default=0.01, metavar="X", help="weight of the sum of |cos| of both LoRAs' coefficients "
        "in the loss (default: 0.01)")  # fmt: skip
    add("--pictures", type=whole(1), default=4, metavar="N", help="that each LoRA makes of its prompt, to be trained with (default: 4)")
    add("--picture-steps", type=whole(1), default=20, metavar="N", help="denoising steps of these (default: 20)")
    add("--cfg", type=number, metavar="X", help="CFG scale of these (default: the pipeline's own)")
    add("--size", type=_size, metavar="WxH", help="of these, in pixels (default: the model's own)")
    add("--batch", type=whole(1), default=1, metavar="N", help="pictures made, and latents trained with, at once; takes more memory "
        "(default: 1)")  # fmt: skip
    add("--seed", type=whole(0), default=0, metavar="N", help="of the pictures and of what is drawn from them (default: 0)")
    add("--low-memory", action="store_true", help="compute activations anew on the way back: a third slower, much less memory")
    add("--device", metavar="D", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", choices=("float32", "bfloat16"), help="numbers to compute with (default: bfloat16 on a GPU of NVIDIA's, else float32)")
    ziplora.set_defaults(run=_ziplora)


def _add_pairs(add: Callable[..., Any]) -> None:
    """Options for both sides at once."""
    add("--weights", nargs=2, metavar=("A", "B"), help="subject weight and style weight at once: a number, points "
        f"over the steps ({SCHEDULE_EXAMPLE}), or one each for several LoRAs (1+0.5)")  # fmt: skip
    add("--blocks", nargs=2, metavar=("A", "B"), help="subject and style block weights at once: factors by name "
        f"({BLOCKS_EXAMPLE}), a list of numbers, a preset's name, or '' for 1 everywhere")  # fmt: skip


def _add_preset(group: Any) -> None:
    group.add_argument(f"--{PRESET}", choices=tuple(PRESETS), help="many settings at once, which those given by name change; best: "
        "a stronger contrast, half as long again; paper: those of the paper's experiments, with guidance: much slower")  # fmt: skip


def _add_guidance_files(group: Any) -> None:
    add = group.add_argument
    add("--clip-model", default=CLIP_DEFAULT, metavar="C", help="open_clip model (ARCHITECTURE/TAG), or a folder or ARCHITECTURE=FILE with "
        f"one (default: {CLIP_DEFAULT})")  # fmt: skip
    add("--dino-model", default=DINO_DEFAULT, metavar="D", help=f"ViT on the hub, or a folder with one (default: {DINO_DEFAULT})")
    add("--encoders", type=Path, metavar="DIR", help=f"folder where the encoders are looked for and downloaded to (default: "
        f"{_shown(encoders_folder())}; the variable {VARIABLE} names another place)")  # fmt: skip
    add("--offline", action="store_true", help="download nothing for the guidance")
    add("--without-encoders", choices=("stop", "go-on"), default="stop", help="what to do when the encoders cannot be had: stop, or make "
        "the picture without guidance (default: stop)")  # fmt: skip
    add("--taesd", type=Path, metavar="DIR", help="diffusers folder of an AutoencoderTiny for the model, for --decoder taesd")
    _add_cache(group)


def _add_cache(group: Any) -> None:
    group.add_argument("--cache", type=Path, metavar="DIR", help=f"folder of the reference pictures (default: "
        f"{_shown(references_folder())})")  # fmt: skip


def _shown(path: Path) -> str:
    """With "~" for the user's own folder."""
    try:
        shown = str(Path("~") / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        shown = str(path)
    return shown.replace("%", "%%")


def _add_setting(group: Any, name: str, default: str | None = None) -> None:
    """default: where the command has another than the settings."""
    metadata = field_metadata(name)
    default = default or format_value(default_value(name))
    text = (metadata["tooltip"] if metadata["picture"] else f"{metadata['tooltip']} (default: {default or 'empty'})").replace("%", "%%")
    if field_types()[name] is bool:
        off = f"--no-{name.replace('_', '-')}"
        group.add_argument(option_of(name), dest=f"setting_{name}", action="store_const", const="true", help=text)
        group.add_argument(off, dest=f"setting_{name}", action="store_const", const="false", help=f"the opposite of {option_of(name)}")
        return
    metavar = "{" + ",".join(metadata["choices"]) + "}" if metadata["choices"] else "FILE" if metadata["picture"] else "X"
    group.add_argument(option_of(name), dest=f"setting_{name}", metavar=metavar, help=text)


def option_of(field: str) -> str:
    """The command line's name of a field of FuseSettings."""
    return f"--{field.replace('_', '-')}"


def settings_of(options: argparse.Namespace, cache: ReferenceCache | None = None) -> FuseSettings:
    """The settings that were given. Raises SettingsError, naming the option; OSError for a picture that cannot be read.

    cache: where given pictures are kept; None for the user's own.
    """
    preset = getattr(options, PRESET, None)
    values: dict[str, Any] = dict(preset_values(preset)) if preset else {}
    for what, texts in (("weight", options.weights), ("blocks", options.blocks)):
        values |= {
            f"{side}_{what}": _typed(f"{side}_{what}", text, f"--{what.removesuffix('s')}s") for side, text in zip(LORA_FIELDS, texts or ())
        }
    for name in field_types():
        text = getattr(options, f"setting_{name}", None)
        if text is not None and field_metadata(name)["picture"]:
            values[name] = _kept_picture(text, option_of(name), cache or ReferenceCache(references_folder()))
        elif text is not None:
            values[name] = _typed(name, text, option_of(name))
    try:
        return FuseSettings(**values)
    except SettingsError as error:  # about two of them
        raise SettingsError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None


def _kept_picture(file: str, option: str, cache: ReferenceCache) -> str:
    """The digits that stand for a file's picture."""
    if not file:
        return ""
    try:
        with open(file, "rb") as content, Image.open(content) as picture:
            return cache.keep_picture(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise SettingsError(f"{option}: there is no file {file}.") from None
    except PermissionError:
        raise
    except Exception:  # a damaged picture raises whatever its bytes happen to mean
        raise SettingsError(f"{option}: {file} is no picture.") from None


def _typed(name: str, text: str, option: str) -> Any:
    try:
        value = parse_value(name, text)
        FuseSettings(**{name: value})
    except SettingsError as error:
        raise SettingsError(f"{option}: {error}.") from None
    return value


def _merge(options: argparse.Namespace) -> int:
    if options.files and (options.subject or options.style):
        raise SettingsError(_SIDES)
    subjects, styles = (options.files[:1], options.files[1:]) if options.files else (options.subject or (), options.style or ())
    if not subjects or not styles or (options.files and len(styles) > 1):
        raise SettingsError(_SIDES)
    if options.setting_method is None and getattr(options, PRESET) is None:
        options.setting_method = MERGE_METHOD
    settings = settings_of(options)
    from . import merge

    return merge.run(
        merge.Request(subjects, styles, options.out, settings, rank=options.rank, dtype=DTYPES[options.dtype], steps=options.steps)
    )


def _ziplora(options: argparse.Namespace) -> int:
    options.setting_method, options.setting_contrast = "direct", "0"
    settings = settings_of(options)
    for side in LORA_FIELDS:
        if any(schedule.constant is None for schedule in getattr(settings, f"{side}_schedules")):
            raise SettingsError("--weights must be numbers here: what is trained cannot follow the steps.")
    from . import ziplora

    return ziplora.run(
        ziplora.Request(
            base=options.base,
            subject=options.subject,
            style=options.style,
            out=options.out,
            settings=settings,
            prompts={"subject": options.subject_prompt, "style": options.style_prompt},
            options={
                "steps": options.steps,
                "rate": options.learning_rate,
                "weight": options.weight,
                "pictures": options.pictures,
                "batch": options.batch,
                "picture_steps": options.picture_steps,
                "cfg_scale": options.cfg,
                "size": options.size,
                "seed": options.seed,
                "low_memory": options.low_memory,
            },
            config=options.config,
            device=options.device,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            file_dtype=DTYPES[options.file_dtype],
        )
    )


_SIDES = "Give two files, the subject's and the style's, or --subject and --style with one or more each."


def _generate(options: argparse.Namespace) -> int:
    if options.rank is not None and options.save_lora is None:
        raise SettingsError("--rank is for the file of --save-lora, which is not given.")
    cache = _cache_of(options)
    settings = settings_of(options, cache)
    from . import generate

    return generate.run(
        generate.Request(
            model=options.model,
            subjects=options.subject,
            styles=options.style,
            prompt=options.prompt,
            settings=settings,
            out=options.out,
            negative_prompt=options.negative_prompt,
            steps=options.steps,
            cfg_scale=options.cfg,
            size=options.size,
            seed=options.seed,
            images=options.images,
            batch=options.batch_size,
            device=options.device,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            config=options.config,
            encoders=EncoderSources(
                options.encoders or encoders_folder(), options.clip_model, options.dino_model, download=not options.offline
            ),
            go_on_without_encoders=options.without_encoders == "go-on",
            taesd=options.taesd,
            cache=cache,
            save_lora=options.save_lora,
            save_rank=options.rank,
        )
    )


def _cache_of(options: argparse.Namespace) -> ReferenceCache:
    return ReferenceCache(options.cache or references_folder())


def _cache(options: argparse.Namespace) -> int:
    cache = _cache_of(options)
    if options.clear:
        size = cache.size()
        print(f"Removed from {cache.folder}: {_pictures(cache.clear())} ({_mebibytes(size)}).")
        return 0
    entries = cache.entries()
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))
        print(f"{when}  {entry.side:<8} {_mebibytes(entry.bytes):>9}  {entry.path.name}  {entry.prompt}".rstrip())
    limit = _mebibytes(cache.limit_bytes)
    print(f"Kept in {cache.folder}: {_pictures(len(entries))} ({_mebibytes(cache.size())} of at most {limit}).")
    return 0


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _demo(options: argparse.Namespace) -> int:
    from dynfuse_world import demo

    return demo.run(options.out)


def _inspect(options: argparse.Namespace) -> int:
    from .inspection import inspect_files

    return inspect_files(options.files, sys.stdout, sys.stderr)


def _positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 768x512")
    size = int(width), int(height)
    if min(size) < 64 or size[0] % 8 or size[1] % 8:
        raise argparse.ArgumentTypeError(f"width and height must be multiples of 8 and at least 64, not {text}")
    return size


__all__ = ["main"]
