"""Returns the text of the pipeline file that `loraline init --from` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.coming_from.options import TRAINERS
from flows.coming_from.parts import Folders, ImageFolder
from flows.coming_from.read import SettingsSource
from flows.coming_from.translation import Translation

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z][A-Za-z0-9_./-]*)*")
_RESERVED = {"true", "false", "null"}
_NAMES = {"ingest": "photos", "preprocess": "prepared", "caption": "captions"}


def write_text(translation: Translation, source: SettingsSource, folders: Folders, path: Path) -> str:
    """Returns the text of a pipeline file.

    Args:
        translation: The settings.
        source: The file that they are from.
        folders: The folders of images.
        path: The pipeline file; paths below its folder are relative to it.
    """
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
        *([f"vae: {_scalar(translation.get('file.vae'))}"] if translation.get("file.vae") else []),
        f"seed: {_scalar(translation.get('file.seed') or 0)}",
        "",
        "steps:",
    ]
    return "\n".join([*lines, *_steps(translation, folders, path)]) + "\n"


def _steps(translation: Translation, folders: Folders, path: Path) -> Iterator[str]:
    train = dict(translation.steps["train"])
    train.setdefault("method", "dreambooth" if "prior" in train or folders.classes else "finetune")
    if isinstance(train["method"], dict):
        train["method"].setdefault("name", "dreambooth" if "prior" in train or folders.classes else "finetune")
    if folders.classes:
        for mine in folders.classes:
            mine.translation.steps["preprocess"] = translation.steps["preprocess"]
        train["class_dataset"] = yield from _datasets(folders.classes, "class_", path)
        train.setdefault("prior", {})
    dataset = yield from _datasets(folders.images, "", path)
    yield from _step("adapter", "train", {"dataset": dataset, **train}, translation.origins)
    yield from _step("report", "evaluate", {"adapter": "adapter", "dataset": dataset}, {})
    yield from _step("release", "register", {"adapter": "adapter", "report": "report"}, {})
    dtype = translation.steps.get("convert", {})
    yield from _step(
        "exports", "convert", {"adapter": "adapter", "to": ["kohya", "diffusers"], **dtype}, translation.origins
    )


def _datasets(folders: Sequence[ImageFolder], prefix: str, path: Path) -> Generator[str, None, str]:
    """Yields the steps of all folders; returns the name of the step with their images."""
    entries: list[Any] = []
    for number, mine in enumerate(folders, 1):
        before, suffix = "", f"_{number}" if len(folders) > 1 else ""
        settings = {"ingest": {"images": _relative(mine.path, path.parent)}, "preprocess": {}, "caption": {}}
        for kind, name in _NAMES.items():
            inputs = {"dataset": before} if before else {}
            own = mine.translation.steps.get(kind, {})
            before = f"{prefix}{name}{suffix}"
            origins = mine.translation.origins if not prefix else {}
            yield from _step(before, kind, {**inputs, **settings[kind], **own}, origins)
        entries.append({"from": before, **mine.part} if mine.part else before)
    if len(folders) == 1:
        return before
    yield f"  {prefix}images:"
    yield "    uses: combine"
    yield "    datasets:"
    for entry in entries:
        yield f"      - {_scalar(entry)}"
    return f"{prefix}images"


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
