"""A plan: a TOML file that says what is compared with what, on which pairs, and how pictures are made and scored.

docs/evaluation.md has every key. All that is wrong with a plan is told at once, before anything is made.
"""

from __future__ import annotations

import difflib
import itertools
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from ..printable import shown
from ..reasons import first_line
from ..settings import LORA_FIELDS, PRESET, FuseSettings, SettingsError
from .folder import EvaluationError, is_name
from .metrics import EncoderNames, known_metrics, metric_class
from .metrics.encoders import ENCODERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LORA_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WHICH_LORAS = ("both", "subject", "style", "none")
MERGED = "merged"
"""Which LoRAs a method uses that has one file for each pair."""
SIDES = ("subject", "style")
_TABLES = ("make", "subjects", "styles", "methods", "encoders")
_TOP = ("title", "base", "out", "pairs", "prompts", "metrics", *_TABLES)
_MAKE = (
    *("model", "config", "device", "dtype", "taesd", "batch", "webuis", "checkpoint", "scheduler"),
    *("sampler", "steps", "cfg_scale", "size", "seeds", "negative_prompt"),
)
_OF_DIFFUSERS = ("model", "config", "device", "dtype", "taesd")
_OF_WEBUIS = ("webuis", "checkpoint", "scheduler")
_SIDE = ("lora", "weight", "words", "alone", "references")
_ENCODERS = (*ENCODERS, "folder", "download", "device")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Side:
    """A subject or a style.

    loras: paths as the plan names them; a WebUI knows them by their names. words: what stands for it in a prompt. alone: prompt of the
    guidance's reference, empty for the settings' default. references: pictures of it, for the metrics and the study.
    """

    name: str
    loras: tuple[Path, ...]
    weight: float | str = 1.0
    words: str = ""
    alone: str = ""
    references: tuple[Path, ...] = ()

    @property
    def lora_names(self) -> tuple[str, ...]:
        """As a WebUI and the infotext have them: files' names without their endings."""
        return tuple(lora.stem if lora.suffix in LORA_SUFFIXES else lora.name for lora in self.loras)


@dataclass(frozen=True)
class PlannedPair:
    subject: Side
    style: Side
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.subject.name}+{self.style.name}"


@dataclass(frozen=True)
class PlannedMethod:
    """loras: one of WHICH_LORAS, or MERGED. values: keys of FuseSettings, and "preset". files: a merged file's path, in which {subject} and
    {style} stand for the pair's.
    """

    name: str
    loras: str
    values: Mapping[str, Any]
    files: str = ""

    def of(self, pair: PlannedPair) -> PlannedPair:
        """The pair with the LoRAs that this method uses in the subject's place: a merged file instead of the subject's own."""
        if not self.files:
            return pair
        path = self.files.replace("{subject}", pair.subject.name).replace("{style}", pair.style.name)
        return replace(pair, subject=replace(pair.subject, loras=(Path(path),), weight=1.0))

    @property
    def settings(self) -> FuseSettings:
        """Without a pair's LoRAs. Raises SettingsError."""
        return FuseSettings.from_mapping(self._values({}))

    def settings_for(self, pair: PlannedPair) -> FuseSettings:
        """With a pair's LoRAs, their weights unless the method has its own, and their references' prompts. Raises SettingsError."""
        pair = self.of(pair)
        own = {"subject": list(pair.subject.lora_names), "style": list(pair.style.lora_names)}
        own |= {"subject_weight": pair.subject.weight, "style_weight": pair.style.weight}  # type: ignore[dict-item]
        own |= {"subject_prompt": pair.subject.alone, "style_prompt": pair.style.alone}  # type: ignore[dict-item]
        return FuseSettings.from_mapping(self._values(own))

    def _values(self, own: Mapping[str, Any]) -> dict[str, Any]:
        # What one LoRA alone makes, without the contrast and the choices that the default method has.
        alone = {} if self.loras == "both" or {"method", PRESET} & self.values.keys() else {"method": "direct"}
        used = {"both": SIDES, MERGED: ("subject",)}.get(self.loras, (self.loras,))
        unused = {f"{side}_weight": 0.0 for side in SIDES if side not in used}
        return {**own, **alone, **self.values, **unused}


@dataclass(frozen=True)
class Making:
    """How pictures are made: by `model`, or by the WebUIs at these addresses.

    sampler: of diffusers or of the WebUI, empty for the model's own. size: (width, height), None for the model's own. batch: pictures made
    at once by diffusers.
    """

    steps: int
    seeds: tuple[int, ...]
    model: Path | None = None
    config: Path | None = None
    device: str | None = None
    dtype: str | None = None
    taesd: Path | None = None
    batch: int = 1
    webuis: tuple[str, ...] = ()
    checkpoint: str = ""
    scheduler: str = ""
    sampler: str = ""
    cfg_scale: float | None = None
    size: tuple[int, int] | None = None
    negative_prompt: str = ""

    def record(self) -> dict[str, Any]:
        """What a picture depends on, for evaluation.json."""
        model = self.model.name if self.model else self.checkpoint
        size = f"{self.size[0]}x{self.size[1]}" if self.size else ""
        return {
            "by": "WebUI" if self.webuis else "diffusers",
            **{"model": model, "sampler": self.sampler, "scheduler": self.scheduler, "steps": self.steps},
            **{"cfg_scale": self.cfg_scale, "size": size, "negative_prompt": self.negative_prompt},
        }


@dataclass(frozen=True)
class Plan:
    """text: of the file itself. name: of the file, without its ending."""

    name: str
    title: str
    out: Path
    make: Making
    pairs: tuple[PlannedPair, ...]
    methods: tuple[PlannedMethod, ...]
    metrics: tuple[str, ...]
    encoders: EncoderNames
    text: str

    @property
    def count(self) -> int:
        """How many pictures it asks for."""
        return sum(len(pair.prompts) for pair in self.pairs) * len(self.methods) * len(self.make.seeds)


def read_plan(path: Path, out: Path | None = None) -> Plan:
    """out: in place of the plan's. Raises EvaluationError with everything that is wrong, a sentence and a line each."""
    content, texts, problems = _content(path)
    reading = _Reading(problems)
    plan = reading.plan(path.stem, content, out, "\n".join(texts))
    if reading.problems:
        raise EvaluationError("\n".join(dict.fromkeys(reading.problems)))
    assert plan is not None
    return plan


def _content(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """The plan's tables with those of the files that it stands on, paths resolved; the files' texts; what is wrong."""
    seen: list[Path] = []

    def load(file: Path) -> tuple[dict[str, Any], list[str], list[str]]:
        try:
            text = file.read_text("utf-8")
            own = tomllib.loads(text)
        except FileNotFoundError:
            return {}, [], [f"There is no plan {file}."]
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            return {}, [], [f"{file} cannot be read as a plan: {first_line(error)}."]
        if file.resolve() in seen:
            return {}, [], [f"{file} stands on itself."]
        seen.append(file.resolve())
        problems = [f"{file.name}: {problem}" for problem in _wrong_tables(own)]
        if problems:
            return {}, [], problems
        _resolve(own, file.parent)
        merged: dict[str, Any] = {}
        texts: list[str] = []
        for other in [own["base"]] if isinstance(own.get("base"), str) else own.get("base", []):
            below, below_texts, below_problems = load(file.parent / other)
            merged, texts, problems = _over(merged, below), [*texts, *below_texts], [*problems, *below_problems]
        return _over(merged, own), [*texts, text], problems

    return load(path)


def _wrong_tables(content: Mapping[str, Any]) -> Iterable[str]:
    yield from _unknown(content, _TOP)
    for name in _TABLES:
        if not isinstance(content.get(name, {}), Mapping):
            yield f"{name} must be a table, [{name}]."
    base = content.get("base", [])
    if not isinstance(base, str) and not (isinstance(base, list) and all(isinstance(item, str) for item in base)):
        yield "base must be the name of a file, or a list of names."


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    tables = {name: {**below.get(name, {}), **above.get(name, {})} for name in _TABLES if name in below or name in above}
    return {**below, **above, **tables}


def _resolve(content: dict[str, Any], folder: Path) -> None:
    """Paths are relative to the file that names them."""

    def at(value: Any) -> Any:
        return str(folder / Path(value).expanduser()) if isinstance(value, str) and value else value

    if "out" in content:
        content["out"] = at(content["out"])
    for key in ("model", "config", "taesd"):
        if key in (make := content.get("make", {})):
            make[key] = at(make[key])
    for table in (content.get("subjects", {}), content.get("styles", {})):
        for side in table.values():
            for key in ("lora", "references"):
                if isinstance(side, dict) and key in side:
                    side[key] = [at(value) for value in side[key]] if isinstance(side[key], list) else at(side[key])
    for method in content.get("methods", {}).values():
        if isinstance(method, dict) and MERGED in method:
            method[MERGED] = at(method[MERGED])
    for key, value in (encoders := content.get("encoders", {})).items():
        if isinstance(value, str) and (key == "folder" or (folder / Path(value).expanduser()).exists()):
            encoders[key] = at(value)


def _unknown(table: Mapping[str, Any], known: Iterable[str], where: str = "") -> list[str]:
    known = list(known)
    sentences = []
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
            sentences.append(f"{where}unknown key {shown(key)}; {hint}")
    return sentences


class _Reading:
    """Reads a plan and gathers what is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)

    def plan(self, name: str, content: Mapping[str, Any], out: Path | None, text: str) -> Plan | None:
        if not content and self.problems:
            return None
        make = self._make(content.get("make", {}))
        by_webui = make is not None and bool(make.webuis)
        sides = {
            side: {key: self._side(f"{side}s.{key}", key, table, by_webui) for key, table in content.get(f"{side}s", {}).items()}
            for side in SIDES
        }
        for side in SIDES:
            if not sides[side]:
                self.problems.append(f"The plan has no {side}: [{side}s.NAME] with lora = FILE is missing.")
        pairs = self._pairs(content, sides)
        methods = [self._method(key, table) for key, table in content.get("methods", {}).items()]
        if not methods:
            self.problems.append("The plan has no method: [methods.NAME] is missing.")
        self._unique("methods", content.get("methods", {}))
        for which in SIDES:
            self._unique(f"{which}s", content.get(f"{which}s", {}))
        for pair, method in itertools.product(pairs, methods):
            if method is not None and pair.subject.loras and pair.style.loras:
                self._settings(pair, method)
                self._merged_file(pair, method, by_webui)
        metrics = self._metrics(content.get("metrics", []), pairs)
        encoders = self._encoders(content.get("encoders", {}))
        where = out or (Path(content["out"]) if self._is_text(content, "out", "") else Path("out/evaluation"))
        title = content["title"] if self._is_text(content, "title", "") else name
        if not is_name(name):
            self.problems.append(
                f"The plan's name {shown(name)} cannot be a file's name everywhere: use letters, digits, spaces and -+=.,()."
            )
        if self.problems or make is None:
            return None
        return Plan(name, title, where, make, tuple(pairs), tuple(m for m in methods if m), tuple(metrics), encoders, text)

    def _make(self, table: Mapping[str, Any]) -> Making | None:
        before = len(self.problems)
        self.problems += _unknown(table, _MAKE, "make: ")
        values: dict[str, Any] = {}
        for key in ("checkpoint", "scheduler", "sampler", "negative_prompt"):
            if self._is_text(table, key, "make: "):
                values[key] = table[key]
        for key in ("device", "dtype"):
            if self._is_text(table, key, "make: "):
                values[key] = table[key] or None
        if values.get("dtype") not in (None, *_DTYPES):
            self.problems.append(f"make: dtype must be one of {', '.join(_DTYPES)}, not {shown(values['dtype'])}.")
        for key in ("model", "config", "taesd"):
            if self._is_text(table, key, "make: ") and table[key]:
                values[key] = Path(table[key])
                if not values[key].exists():
                    self.problems.append(f"make: {key}: there is no {values[key]}.")
        for key, default in (("steps", None), ("batch", 1)):
            number = table.get(key, default)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                self.problems.append(f"make: {key} must be a whole number from 1, not {shown(number)}.")
            else:
                values[key] = number
        scale = table.get("cfg_scale")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < 1e6):
            self.problems.append(f"make: cfg_scale must be a number from 0, not {shown(scale)}.")
        values["cfg_scale"] = None if scale is None else float(scale) if isinstance(scale, (int, float)) else None
        values["size"] = self._size(table.get("size"))
        values["seeds"] = self._seeds(table.get("seeds"))
        addresses = table.get("webuis", [])
        addresses = [addresses] if isinstance(addresses, str) else addresses
        if not isinstance(addresses, list) or not all(_is_address(address) for address in addresses):
            self.problems.append(f"make: webuis must be a list of addresses such as http://127.0.0.1:7860, not {shown(addresses)}.")
        else:
            values["webuis"] = tuple(dict.fromkeys(address.rstrip("/") for address in addresses))
        if bool(table.get("model")) == bool(addresses):
            self.problems.append("make: either model (a diffusers folder or a checkpoint) or webuis (addresses) must be given.")
        for key in _OF_WEBUIS if table.get("model") else _OF_DIFFUSERS:
            if key in table and not (table.get("model") and addresses):
                self.problems.append(f"make: {key} is for {'webuis' if key in _OF_WEBUIS else 'a model'}, which the plan does not have.")
        return None if len(self.problems) > before else Making(**values)

    def _size(self, value: Any) -> tuple[int, int] | None:
        if value is None:
            return None
        width, _, height = value.partition("x") if isinstance(value, str) else ("", "", "")
        if not (width.isdecimal() and height.isdecimal()) or min(int(width), int(height)) < 64 or int(width) % 8 or int(height) % 8:
            self.problems.append(f'make: size must be text such as "1024x768", in multiples of 8 from 64, not {shown(value)}.')
            return None
        return int(width), int(height)

    def _seeds(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            first, _, last = value.partition("-")
            if first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2**32 and int(last) - int(first) < 100_000:
                return tuple(range(int(first), int(last) + 1))
        whole = isinstance(value, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in value)
        if not whole or not value or len(set(value)) < len(value):
            self.problems.append(f'make: seeds must be different whole numbers, [1, 2, 3] or "0-9", not {shown(value)}.')
            return ()
        return tuple(value)

    def _side(self, where: str, name: str, table: Any, by_webui: bool) -> Side:
        if not isinstance(table, Mapping):
            self.problems.append(f"{where} must be a table, [{where}].")
            return Side(name, ())
        self.problems += _unknown(table, _SIDE, f"{where}: ")
        if not is_name(name) or "+" in name:
            self.problems.append(f"{where}: the name cannot be a folder's everywhere: use letters, digits, spaces and -=.,().")
        files = [table["lora"]] if isinstance(table.get("lora"), str) else table.get("lora", [])
        if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
            self.problems.append(f"{where}: lora must be a file, or a list of files, not {shown(table.get('lora'))}.")
            files = []
        loras = tuple(map(Path, files))
        if not by_webui:
            self.problems += [f"{where}: {reason}." for lora in loras if (reason := _no_lora(lora))]
        words = {key: table[key] for key in ("words", "alone") if self._is_text(table, key, f"{where}: ")}
        references = self._references(where, table.get("references", []))
        weight = table.get("weight", 1.0)
        try:
            FuseSettings.from_mapping({"subject": [lora.stem for lora in loras], "subject_weight": weight})
        except SettingsError as error:
            self.problems.append(f"{where}: {str(error).replace('subject_weight', 'weight')}.")
            weight = 1.0
        return Side(name, loras, weight, words.get("words", name), words.get("alone", ""), references)

    def _references(self, where: str, value: Any) -> tuple[Path, ...]:
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            self.problems.append(f"{where}: references must be pictures, folders or patterns such as dog/*.jpg, not {shown(value)}.")
            return ()
        found: dict[Path, None] = {}
        for entry in entries:
            path = Path(entry)
            if path.is_dir():
                files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURE_SUFFIXES]
            elif "*" in path.name or "?" in path.name:
                files = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
            else:
                files = [path] if path.is_file() else []
            if not files:
                self.problems.append(f"{where}: there is no reference picture {entry}.")
            for file in files:
                if reason := _no_picture(file):
                    self.problems.append(f"{where}: {file} is no picture ({reason}).")
                found[file] = None
        return tuple(found)

    def _pairs(self, content: Mapping[str, Any], sides: Mapping[str, Mapping[str, Side]]) -> list[PlannedPair]:
        prompts = content.get("prompts", ["{subject} in {style} style"])
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            self.problems.append(f"prompts must be a list of texts with {{subject}} and {{style}} in them, not {shown(prompts)}.")
            return []
        every = list(itertools.product(sides["subject"], sides["style"]))
        value = content.get("pairs", "all")
        wanted: list[tuple[str, str]] = []
        if value == "all":
            wanted = every
        elif isinstance(value, Mapping) and set(value) <= {"draw", "seed"} and all(type(number) is int for number in value.values()):
            count = value.get("draw", 0)
            if not 1 <= count <= len(every):
                self.problems.append(f"pairs: {count} pairs cannot be drawn of {len(every)}.")
            else:
                drawn = set(random.Random(value.get("seed", 0)).sample(every, count))
                wanted = [pair for pair in every if pair in drawn]
        elif isinstance(value, list) and value and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            for subject, style in value:
                for side, name in (("subject", subject), ("style", style)):
                    if name not in sides[side]:
                        self.problems.append(f"pairs: {shown(name)} is no {side}; there are {', '.join(sides[side])}.")
            wanted = [(subject, style) for subject, style in value if subject in sides["subject"] and style in sides["style"]]
        else:
            self.problems.append(f'pairs must be "all", {{ draw = 30, seed = 0 }} or a list of [subject, style], not {shown(value)}.')
        return [
            PlannedPair(one, other, tuple(text.replace("{subject}", one.words).replace("{style}", other.words) for text in prompts))
            for one, other in ((sides["subject"][subject], sides["style"][style]) for subject, style in dict.fromkeys(wanted))
        ]

    def _method(self, name: str, table: Any) -> PlannedMethod | None:
        where = f"methods.{name}: "
        if not isinstance(table, Mapping):
            self.problems.append(f"methods.{name} must be a table, [methods.{name}].")
            return None
        if not is_name(name):
            self.problems.append(f"{where}the name cannot be a folder's everywhere: use letters, digits, spaces and -+=.,().")
        values = {key: value for key, value in table.items() if key not in ("loras", MERGED)}
        which, files = table.get("loras", "both"), ""
        if MERGED in table:
            which, files = MERGED, table[MERGED]
            if not isinstance(files, str) or not all(place in files for place in ("{subject}", "{style}")) or "loras" in table:
                self.problems.append(
                    f"{where}merged must be a file's name with {{subject}} and {{style}} in it, without loras, not {shown(files)}."
                )
                files = ""
        elif which not in WHICH_LORAS:
            self.problems.append(f"{where}loras must be one of {', '.join(WHICH_LORAS)}, not {shown(which)}.")
            which = "both"
        for key in LORA_FIELDS:
            if values.pop(key, None) is not None:
                self.problems.append(f"{where}{key} comes from the pairs and cannot be set here.")
        for key in ("subject_image", "style_image"):
            if values.pop(key, None) is not None:
                self.problems.append(f"{where}{key} cannot be set in a plan: the guidance makes its references.")
        method = PlannedMethod(name, which, values, files)
        try:
            method.settings  # noqa: B018
        except SettingsError as error:
            self.problems.append(f"{where}{error}.")
            return None
        return method

    def _settings(self, pair: PlannedPair, method: PlannedMethod) -> None:
        try:
            method.settings_for(pair)
        except SettingsError as error:
            self.problems.append(f"methods.{method.name}, {pair.name}: {error}.")

    def _merged_file(self, pair: PlannedPair, method: PlannedMethod, by_webui: bool) -> None:
        if method.files and not by_webui and (reason := _no_lora(method.of(pair).subject.loras[0])):
            self.problems.append(f"methods.{method.name}, {pair.name}: {reason}.")

    def _metrics(self, value: Any, pairs: Sequence[PlannedPair]) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problems.append(f"metrics must be a list of {', '.join(known_metrics())}, not {shown(value)}.")
            return []
        for name in value:
            try:
                metric = metric_class(name)
            except EvaluationError as error:
                self.problems.append(str(error))
                continue
            for side in metric.needs_references:
                without = {getattr(pair, side).name for pair in pairs if not getattr(pair, side).references}
                self.problems += [f"{side}s.{one}: there are no references, which the metric {name} needs." for one in sorted(without)]
        return list(dict.fromkeys(value))

    def _encoders(self, table: Mapping[str, Any]) -> EncoderNames:
        self.problems += _unknown(table, _ENCODERS, "encoders: ")
        for key in (*ENCODERS, "folder", "device"):
            self._is_text(table, key, "encoders: ")
        if not isinstance(table.get("download", True), bool):
            self.problems.append(f"encoders: download must be true or false, not {shown(table['download'])}.")
        names = {key: table[key] for key in ENCODERS if isinstance(table.get(key), str)}
        folder = table.get("folder")
        where = Path(folder) if isinstance(folder, str) and folder else None
        return EncoderNames(names, where, bool(table.get("download", True)), str(table.get("device", "")))

    def _is_text(self, table: Mapping[str, Any], key: str, where: str) -> bool:
        if key in table and not isinstance(table[key], str):
            self.problems.append(f"{where}{key} must be text, not {shown(table[key])}.")
        return isinstance(table.get(key), str)

    def _unique(self, what: str, names: Iterable[str]) -> None:
        seen: dict[str, str] = {}
        for name in names:
            if (other := seen.setdefault(name.casefold(), name)) != name:
                self.problems.append(f"{what}: {other} and {name} would be one folder on some systems; rename one.")


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://")) and len(value) > len("https://")


def _no_lora(path: Path) -> str:
    """At a glance: what is inside is found out when it is used."""
    if not path.is_file():
        return f"there is no LoRA file {path}"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):  # type: ignore[attr-defined]
                return ""
        except Exception as error:  # a damaged file makes its reader fail in any way
            return f"{path} is damaged or no LoRA file ({first_line(error)})"
    return ""


def _no_picture(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # a damaged picture raises whatever its bytes happen to mean
        return first_line(error)
    return ""


__all__ = ["MERGED", "EncoderNames", "Making", "Plan", "PlannedMethod", "PlannedPair", "Side", "read_plan"]
