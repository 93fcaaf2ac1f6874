"""Reads the settings files of other trainers as flat lists of options. Runs nothing that is in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.coming_from.options import TRAINERS
from lora_engine.documents import Document, Where, decode, read_document, read_toml
from tasks.errors import SpecError

_MAX_BYTES = 1_000_000
_MAX_WORDS = 20_000
_KNOWN = (
    "a config.toml of sd-scripts, a YAML or JSON file of ai-toolkit, a JSON file of OneTrainer or of kohya's GUI, or a "
    "shell script that starts a training script of diffusers or sd-scripts"
)
_SCRIPT = re.compile(r"([\w-]+)\.py")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """One option as a file has it.

    Attributes:
        name: Its name, or its path inside a file of ai-toolkit or OneTrainer.
        value: The value; text for a command line, and True for an option without a value.
        where: File, line and column.
    """

    name: str
    value: Any
    where: str


@dataclass(frozen=True)
class SettingsSource:
    """The settings of another trainer.

    Attributes:
        path: The file.
        trainer: A key of `TRAINERS`.
        script: Name of the training script that a command line starts; empty for others.
        settings: The options in the order of the file, without those of subsets.
        subsets: The folders of images with their options; empty if the file has none of its own.
    """

    path: Path
    trainer: str
    script: str
    settings: tuple[Setting, ...]
    subsets: tuple[tuple[Setting, ...], ...] = ()


def read_source(path: Path, dataset: Path | None = None) -> SettingsSource:
    """Reads a file of another trainer.

    Args:
        path: See `_KNOWN`; recognized by suffix and content.
        dataset: The dataset file of sd-scripts, if it is another file; None takes the one that `dataset_config` names
            and that exists beside `path`.

    Raises:
        SpecError: The file cannot be read, or is of no known trainer.
    """
    suffix = path.suffix.lower()
    if suffix == ".toml":
        document = read_toml(path, SpecError)
        source = SettingsSource(path, "sd", "", tuple(_flat(document, sections=True)), _subsets(document))
    elif suffix in (".yaml", ".yml", ".json"):
        source = _from_document(read_document(path, SpecError, allowed=_KNOWN))
    else:
        source = _from_script(path)
    named = next((setting for setting in source.settings if setting.name == "dataset_config"), None)
    if dataset is None and named is not None and named.value and isinstance(named.value, str):
        dataset = _find_beside(path, named)
    if dataset is None:
        return source
    if source.trainer != "sd":
        raise SpecError(
            f"a dataset file belongs to sd-scripts, and {path.name!r} is of {TRAINERS[source.trainer]}",
            where=str(dataset),
            remedy="leave --dataset out",
        )
    return SettingsSource(path, "sd", source.script, source.settings, _subsets(_read_dataset(dataset)))


def _find_beside(path: Path, named: Setting) -> Path:
    """Returns the dataset file that a setting names: its path, or its name beside the file."""
    with suppress(OSError):  # a name that is too long
        for candidate in (path.parent / named.value, path.parent / Path(named.value).name):
            if candidate.is_file():
                return candidate
    raise SpecError(
        f"{named.name} is {named.value[:200]!r}, which does not exist",
        where=named.where,
        remedy="give the file with --dataset",
    )


def _read_dataset(path: Path) -> Document:
    document = (
        read_document(path, SpecError, allowed="a mapping with datasets")
        if path.suffix.lower() == ".json"
        else read_toml(path, SpecError)
    )
    if not _subsets(document):
        raise SpecError("has no [[datasets.subsets]] with image_dir", where=str(path), remedy="give the dataset file")
    return document


def _from_document(document: Document) -> SettingsSource:
    data = document.data
    processes = data["config"].get("process") if isinstance(data.get("config"), dict) else None
    if isinstance(processes, list) and processes and isinstance(processes[0], dict):
        if len(processes) > 1:
            raise SpecError(
                f"has {len(processes)} processes",
                where=document.where(("config", "process", 1)),
                allowed="one process",
                remedy="write one file for each",
            )
        settings = [setting for setting in _flat(document) if setting.name == "name"]
        base: Where = ("config", "process", 0)
        process = {key: value for key, value in processes[0].items() if key != "datasets"}
        settings += _nested(process, document, base)
        if isinstance(data["config"].get("name"), str):
            settings.append(Setting("name", data["config"]["name"], document.where(("config", "name"))))
        subsets = _ai_toolkit_datasets(processes[0].get("datasets"), document, (*base, "datasets"))
        return SettingsSource(document.path, "aitk", "", tuple(settings), subsets)
    if "pretrained_model_name_or_path" in data or "LoRA_type" in data:
        return SettingsSource(document.path, "sd", "", tuple(_flat(document)), _subsets(document))
    if "base_model_name" in data or "training_method" in data:
        nested = {key: value for key, value in data.items() if key != "concepts"}
        subsets = _concepts(data.get("concepts"), document)
        return SettingsSource(document.path, "ot", "", tuple(_nested(nested, document, ())), subsets)
    raise SpecError("the file is of no known trainer", where=str(document.path), allowed=_KNOWN)


def _flat(document: Document, sections: bool = False) -> Iterator[Setting]:
    """Yields the options of the outermost mapping, and of its sections, whose names sd-scripts ignores."""
    for key, value in document.data.items():
        if sections and isinstance(value, dict) and key != "general":
            for name, inner in value.items():
                yield Setting(name, inner, document.where((key, name)))
        elif not isinstance(value, dict) and key != "datasets":
            yield Setting(key, value, document.where((key,)))


def _nested(data: Mapping[str, Any], document: Document, location: Where, prefix: str = "") -> list[Setting]:
    settings: list[Setting] = []
    for key, value in data.items():
        if isinstance(value, dict):
            settings += _nested(value, document, (*location, key), f"{prefix}{key}.")
        else:
            settings.append(Setting(f"{prefix}{key}", value, document.where((*location, key))))
    return settings


def _subsets(document: Document) -> tuple[tuple[Setting, ...], ...]:
    """Returns the subsets of a dataset file of sd-scripts; their own options win over shared ones."""
    general = document.data.get("general")
    shared = general if isinstance(general, dict) else {}
    found: list[tuple[Setting, ...]] = []
    datasets = document.data.get("datasets")
    for number, dataset in enumerate(datasets if isinstance(datasets, list) else ()):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for index, subset in enumerate(subsets if isinstance(subsets, list) else ()):
            if not isinstance(subset, dict):
                continue
            options = {**shared, **{key: value for key, value in dataset.items() if key != "subsets"}, **subset}
            where: Where = ("datasets", number, "subsets", index)
            found.append(tuple(Setting(key, value, document.where((*where, key))) for key, value in options.items()))
    return tuple(found)


def _ai_toolkit_datasets(value: Any, document: Document, location: Where) -> tuple[tuple[Setting, ...], ...]:
    datasets = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return tuple(
        tuple(_nested(entry, document, (*location, number), "datasets.")) for number, entry in enumerate(datasets)
    )


def _concepts(value: Any, document: Document) -> tuple[tuple[Setting, ...], ...]:
    concepts = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return tuple(
        tuple(_nested(entry, document, ("concepts", number), "concepts.")) for number, entry in enumerate(concepts)
    )


def read_bytes(path: Path, allowed: str = "") -> bytes:
    """Returns the bytes of a file of settings.

    Args:
        path: The file.
        allowed: The files that can be read, for the error.

    Raises:
        SpecError: It cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        raise SpecError(f"cannot read the file: {problem.strerror}", where=str(path), allowed=allowed) from problem
    if len(content) > _MAX_BYTES:
        raise SpecError("the file is too large", where=str(path), allowed=f"at most {_MAX_BYTES} bytes")
    return content


def _from_script(path: Path) -> SettingsSource:
    text = decode(read_bytes(path, _KNOWN), str(path), SpecError, "save the file as UTF-8").replace("\r\n", "\n")
    variables = _Variables()
    for line, command in _commands(text):
        where = f"{path}:{line}"
        words = _split(command, where)
        script = next((name for word in words if (name := _script_of(word))), None)
        if script is None:
            for word in words:
                if (match := _ASSIGNMENT.fullmatch(word)) is not None:
                    variables.values[match[1]] = variables.expand(match[2], where)
            continue
        start = next(number for number, word in enumerate(words) if _script_of(word)) + 1
        settings = tuple(_arguments([variables.expand(word, where) for word in words[start:]], where))
        trainer = "sd" if script.endswith("train_network") else "diffusers"
        return SettingsSource(path, trainer, script, settings)
    raise SpecError("the file starts no training script", where=str(path), allowed=_KNOWN)


def _split(command: str, where: str) -> list[str]:
    """Returns the words of a command without a leading `export`."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as problem:
        raise SpecError(f"not a shell command: {problem}", where=where, remedy="close the quote") from None
    if len(words) > _MAX_WORDS:
        raise SpecError(f"a command of {len(words)} words", where=where, allowed=f"at most {_MAX_WORDS}")
    return words[1:] if words[:1] == ["export"] else words


def _script_of(word: str) -> str:
    """Returns the name of the training script that a word is, without its suffix; empty if it is none."""
    match = _SCRIPT.fullmatch(word.rpartition("/")[2])
    return match[1] if match is not None and "train" in match[1] else ""


def _commands(text: str) -> Iterator[tuple[int, str]]:
    """Yields the number of the first line and the text of each command; a backslash continues a line."""
    start, parts = 0, list[str]()
    for number, line in enumerate(text.split("\n"), 1):
        start = start or number
        stripped = line.rstrip()
        if stripped.endswith("\\"):
            parts.append(stripped[:-1])
            continue
        yield start, " ".join([*parts, line])
        start, parts = 0, []
    if parts:
        yield start, " ".join(parts)


@dataclass
class _Variables:
    """The variables of a script, and the characters that were put in their places, of which a file has a bound.

    Attributes:
        values: Name -> value.
        length: Characters so far.
    """

    values: dict[str, str] = field(default_factory=dict)
    length: int = 0

    def expand(self, word: str, where: str) -> str:
        """Returns a word with the values of its variables."""
        if "$(" in word or "`" in word:
            raise SpecError(
                f"{word!r} would run a command", where=where, allowed="plain values", remedy="write the value itself"
            )
        parts: list[str] = []
        end = 0
        for match in _VARIABLE.finditer(word):
            name = match[1] or match[2]
            if name not in self.values:
                raise SpecError(
                    f"the variable {name!r} has no value in the file", where=where, remedy=f"add {name}=... before it"
                )
            parts += [word[end : match.start()], self.values[name]]
            end = match.end()
            self.length += len(self.values[name])
            if self.length > _MAX_BYTES:
                allowed = f"at most {_MAX_BYTES} characters in a file"
                raise SpecError("the values of its variables are too long", where=where, allowed=allowed)
        return "".join([*parts, word[end:]])


def _arguments(words: list[str], where: str) -> Iterator[Setting]:
    values: list[str] = []
    name = ""
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield Setting(name, values[0] if len(values) == 1 else values or True, where)
        name, equals, value = word[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
