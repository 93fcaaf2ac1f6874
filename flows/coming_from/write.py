"""Writes the pipeline file of `loraline init --from`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.coming_from.finish import finish
from flows.coming_from.images import Folders, find_images
from flows.coming_from.options import TRAINERS
from flows.coming_from.read import Setting, SettingsSource, read_source
from flows.coming_from.translate import translate
from flows.coming_from.translation import Translation
from flows.spec import check_document
from lora_engine.bases.defaults import training_defaults
from lora_engine.bases.source import TINY, split_hub_id
from lora_engine.documents import read_document
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write
from tasks.errors import SpecError

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z][A-Za-z0-9_./-]*)*")
_RESERVED = {"true", "false", "null"}
_ORDER = ("ingest", "preprocess", "caption", "train")
_NAMES = {"ingest": "photos", "preprocess": "prepared", "caption": "captions", "train": "adapter"}
_CLASS = {"ingest": "class_photos", "preprocess": "class_prepared", "caption": "class_captions"}


@dataclass(frozen=True)
class Converted:
    """A written pipeline file.

    Attributes:
        path: The file.
        trainer: Name of the trainer whose settings were read.
        dropped: (option, value, reason) of what was not carried over.
        images: The folder of images.
    """

    path: Path
    trainer: str
    dropped: tuple[tuple[str, Any, str], ...]
    images: Path


def convert_settings(
    folder: Path, source: Path, *, dataset: Path | None = None, base: str | None = None, images: Path | None = None
) -> Converted:
    """Writes `pipeline.yaml` with the settings of another trainer's file.

    Args:
        folder: The folder of the pipeline file; created.
        source: The file; see `read_source`.
        dataset: The dataset file of sd-scripts.
        base: The base; None takes the one of the settings.
        images: The folder of images; None takes the one of the settings, or `folder / "images"` if that does not exist.

    Raises:
        SpecError: The file cannot be read, a setting is not valid, or another pipeline file exists. Nothing is written.
    """
    read = read_source(source, dataset)
    if images is not None and not images.is_dir():
        raise SpecError(f"{str(images)!r} is not a folder", where="--images", remedy="give the folder with the images")
    translation = translate(read)
    folders = find_images(read, translation, images)
    _set_base(translation, read, base)
    finish(translation, read.trainer, folders.count)
    path = folder / "pipeline.yaml"
    text = _text(translation, read, folders, path)
    if path.exists() and path.read_text() != text:
        raise SpecError("the file exists with different content", where=str(path), remedy="choose another folder")
    images = folders.images or folder / "images"
    _check(text, path, read, folders.images is None)
    images.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
    return Converted(path, TRAINERS[read.trainer], tuple(translation.dropped), images)


def _set_base(translation: Translation, source: SettingsSource, base: str | None) -> None:
    named = next(
        (
            s
            for s in source.settings
            if s.name in ("pretrained_model_name_or_path", "model.name_or_path", "base_model_name")
        ),
        Setting("base", "", str(source.path)),
    )
    base = base or translation.get("file.base")
    if not base:
        raise SpecError("the file names no base model", where=str(source.path), remedy="give it with --base")
    try:
        if base != TINY and split_hub_id(base) is None:
            base = str((source.path.parent / Path(base).expanduser()).resolve())
        defaults = training_defaults(base)
    except (OSError, RuntimeError) as error:  # a name that is too long, or of an unknown user
        raise SpecError(f"the base is {base[:100]!r}", where=named.where, remedy="give it with --base") from error
    except BaseModelError as error:
        raise SpecError(
            error.problem, where=named.where, allowed=error.allowed, remedy="give it with --base"
        ) from error
    translation.set("file.base", base, named.name)
    if translation.get("preprocess.resolution") is None:
        translation.set("preprocess.resolution", defaults.resolution, defaults.reasons.get("resolution", "of the base"))
    if translation.get("preprocess.crop") is None:
        translation.set("preprocess.crop", "center", "part of an image that is kept")


def _check(text: str, path: Path, source: SettingsSource, needs_images: bool) -> None:
    """Validates the text as the pipeline file, before anything is written."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "pipeline.yaml"
        file.write_text(text)
        try:
            document = read_document(file, SpecError, allowed="a mapping")
            if needs_images:
                (Path(name) / "images").mkdir()  # the real folder is created afterwards
            check_document(replace(document, path=file if needs_images else path), check_bases=False)
        except SpecError as error:
            raise SpecError(
                f"{error.problem} in the pipeline that it gives",
                where=str(source.path),
                allowed=error.allowed,
                remedy=error.remedy or "correct the value",
            ) from None


def _text(translation: Translation, source: SettingsSource, folders: Folders, path: Path) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", str(translation.get("file.name") or "adapter").lower()).strip("-._")[:63]
    lines = [
        f"# From {json.dumps(source.path.name, ensure_ascii=False)}, settings of {TRAINERS[source.trainer]}. "
        "`loraline plan` shows what a run would do.",
    ]
    if translation.dropped:
        lines.append("# Not carried over:")
        lines += [f"#   {_short(option)}: {_short(value)} ({reason})" for option, value, reason in translation.dropped]
    lines += [
        f"name: {_scalar(name or 'adapter')}",
        f"base: {_scalar(translation.get('file.base'))}",
        f"seed: {_scalar(translation.get('file.seed') or 0)}",
        "",
        "steps:",
    ]
    return "\n".join([*lines, *_steps(translation, folders, path)]) + "\n"


def _steps(translation: Translation, folders: Folders, path: Path) -> Iterator[str]:
    settings = {kind: dict(translation.steps.get(kind, {})) for kind in _ORDER}
    settings["ingest"] = {"images": _relative(folders.images, path.parent), **settings["ingest"]}
    if folders.classes is not None:
        train = settings["train"]
        train["class_dataset"] = "class_captions"
        train.setdefault("prior", {})
        classes = {
            "ingest": {"images": _relative(folders.classes, path.parent)},
            "preprocess": settings["preprocess"],
            "caption": {"template": folders.class_words} if folders.class_words else {},
        }
        if settings["ingest"].get("repeats") == "folders":
            classes["ingest"]["repeats"] = "folders"
        yield from _chain(classes, _CLASS, {})
    settings["train"].setdefault("method", "dreambooth" if "prior" in settings["train"] else "finetune")
    method = settings["train"]["method"]
    if isinstance(method, dict):
        method.setdefault("name", "dreambooth" if "prior" in settings["train"] else "finetune")
    yield from _chain(settings, _NAMES, translation.origins)
    yield from _step("report", "evaluate", {"adapter": "adapter", "dataset": "captions"}, {})
    yield from _step("release", "register", {"adapter": "adapter", "report": "report"}, {})
    dtype = translation.steps.get("convert", {})
    yield from _step(
        "exports", "convert", {"adapter": "adapter", "to": ["kohya", "diffusers"], **dtype}, translation.origins
    )


def _chain(settings: dict[str, dict[str, Any]], names: dict[str, str], origins: dict[str, str]) -> Iterator[str]:
    before = ""
    for kind, name in names.items():
        inputs = {"dataset": before} if before else {}
        yield from _step(name, kind, inputs | settings[kind], origins)
        before = name


def _step(name: str, kind: str, settings: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    yield f"  {name}:"
    yield f"    uses: {kind}"
    for key, value in settings.items():
        text = f"    {key}: {_scalar(value)}"
        path = f"{kind}.{key}"
        named = [origin for name, origin in origins.items() if name == path or name.startswith(f"{path}.")]
        yield f"{text.ljust(39)} # {_short(', '.join(dict.fromkeys(named)))}" if named else text


def _scalar(value: Any) -> str:
    """Returns a value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(str(key))}: {_scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(inner) for inner in value) + "]"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value not in _RESERVED
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= 100 else f"{text[:100]}..."


def _relative(images: Path | None, folder: Path) -> str:
    if images is None:
        return "images/"
    path, parent = images.resolve(), folder.resolve()
    return f"{path.relative_to(parent)}/" if path.is_relative_to(parent) else str(path)
