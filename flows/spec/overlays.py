"""Reads a pipeline file together with the files that it extends, merged into one document."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.spec.document import PipelineDocument, refuse_secrets
from lora_engine.documents import Where, read_document
from lora_engine.files import is_present, is_present_file
from tasks.errors import SpecError
from tasks.spec import External, Input, is_path, marked_fields
from tasks.step import STEPS

_MAX_DEPTH = 16
_MAX_FILES = 64
_ALLOWED = "a mapping with name, base, seed and steps"


def read_overlays(path: Path) -> PipelineDocument:
    """Reads a pipeline file and those that it extends; each file is read once.

    Mappings are merged, lists and other values replaced, and a key that an overlay sets to null is removed. Of several
    extended files, a later one takes precedence; the extending file takes precedence over all.

    Raises:
        SpecError: A file is missing or no mapping, has a secret in plain text, or the files form a cycle.
    """
    return _Reader().read(path, ())


@dataclass
class _Reader:
    merged: dict[Path, PipelineDocument] = field(default_factory=dict)

    def read(self, path: Path, chain: tuple[Path, ...]) -> PipelineDocument:
        """Returns a file merged with those that it extends; `chain` are the files that extend it."""
        resolved = path.resolve()
        if resolved in self.merged:
            return self.merged[resolved]
        plain = read_document(path, SpecError, allowed=_ALLOWED)
        refuse_secrets(plain)
        document = PipelineDocument(path, plain.data, plain.lines)
        _declare(document.data)
        bases = _extended(document)
        document.data.pop("extends", None)
        result: PipelineDocument | None = None
        for location, base in bases:
            where = document.where(location)
            self._check(base, (*chain, path), where)
            read = self.read(base, (*chain, path))
            result = read if result is None else _merge_documents(result, read, path)
        result = document if result is None else _merge_documents(result, document, path)
        if len(self.merged) >= _MAX_FILES:
            raise SpecError("the file extends too many files", where=str(path), allowed=f"at most {_MAX_FILES}")
        self.merged[resolved] = result
        return result

    def _check(self, base: Path, chain: tuple[Path, ...], where: str) -> None:
        resolved = [path.resolve() for path in chain]
        if base.resolve() in resolved:
            cycle = [*chain[resolved.index(base.resolve()) :], base]
            names = " -> ".join(path.name for path in cycle)
            raise SpecError(f"the files extend each other: {names}", where=where, remedy="remove one `extends`")
        if len(chain) >= _MAX_DEPTH:
            raise SpecError("the chain of extended files is too long", where=where, allowed=f"at most {_MAX_DEPTH}")
        if not is_present_file(base):
            raise SpecError(f"extends {str(base)!r}, which is no file", where=where, allowed="a pipeline file")


def _extended(document: PipelineDocument) -> list[tuple[Where, Path]]:
    """Returns the files that a file extends, with the locations of their names."""
    value = document.data.get("extends")
    names: Sequence[tuple[Where, Any]] = [(("extends",), value)]
    if value is None:
        return []
    if isinstance(value, list):
        names = [(("extends", index), name) for index, name in enumerate(value)] or [(("extends",), [])]
    for location, name in names:
        if not isinstance(name, str) or not name or "\0" in name or "://" in name or "${" in name:
            raise SpecError(
                f"extends {name!r}",
                where=document.where(location),
                allowed="the path of a pipeline file, or a list of paths, relative to this file",
            )
    return [(location, _tidy(document.path.parent / name)) for location, name in names]


def _tidy(path: Path) -> Path:
    """Returns a path without `..`, unless a symbolic link makes that another file."""
    tidy = Path(os.path.normpath(path))
    return tidy if tidy.resolve() == path.resolve() else path


def _declare(data: dict[str, Any]) -> None:
    """Writes each parameter in the long form, so that an overlay can set a default of a declared parameter."""
    parameters = data.get("parameters")
    if isinstance(parameters, dict):
        for name, value in parameters.items():
            if value is not None and not isinstance(value, dict):
                parameters[name] = {"default": value}


def _merge_documents(base: PipelineDocument, over: PipelineDocument, path: Path) -> PipelineDocument:
    """Returns the document of `path` that has the data of `base` with those of `over` merged into them."""
    replaced: set[Where] = set()
    data = _merge(base.data, over.data, (), replaced)
    lines: dict[Where, tuple[int, int]] = {}
    files: dict[Where, Path] = {}
    for document in (base, over):
        for location, line in document.lines.items():
            if document is base and any(location[:size] in replaced for size in range(1, len(location) + 1)):
                continue
            lines[location] = line
            file = document.files.get(location, document.path)
            files.pop(location, None)
            if file != path:
                files[location] = file
    return PipelineDocument(path, data, lines, files)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], location: Where, replaced: set[Where]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        place = (*location, key)
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value, place, replaced)
            continue
        if key in merged:
            replaced.add(place)
        if value is None and key in merged:
            del merged[key]
        else:
            merged[key] = value
    return merged


@dataclass
class Relocation:
    """Makes paths that are written in other files relative to the folder of the document."""

    document: PipelineDocument
    _folders: dict[Path, Path] = field(default_factory=dict)

    def apply(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the expanded data of the document with relocated paths."""
        moved = dict(data)
        if not self.document.files:
            return moved
        self._move_models(moved, ())
        if isinstance(steps := moved.get("steps"), Mapping):
            moved["steps"] = {name: self._move_step(name, raw) for name, raw in steps.items()}
        return moved

    def _move_step(self, name: str, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not isinstance(raw.get("uses"), str) or raw["uses"] not in STEPS:
            return raw
        step, spec = dict(raw), STEPS[raw["uses"]].spec
        self._move_models(step, ("steps", name))
        keys = [key for key, _ in marked_fields(spec, External)]
        inputs = [key for key, marker in marked_fields(spec, Input) if marker.or_file]
        keys += [key for key in inputs if isinstance(step.get(key), str) and is_path(step[key])]
        for key in keys:
            if (source := self._other_folder(step.get(key), ("steps", name, key))) is not None:
                step[key] = self._relative(source, step[key])
        return step

    def _move_models(self, data: dict[str, Any], parent: Where) -> None:
        """Moves a base and an autoencoder if they are paths, as `locate_base` decides it."""
        for key in ("base", "vae"):
            source = self._other_folder(data.get(key), (*parent, key))
            if source is not None and is_present(source / data[key]):
                data[key] = self._relative(source, data[key])

    def _other_folder(self, value: Any, location: Where) -> Path | None:
        """Returns the folder of the other file in which a text is written; None if it is written in the document."""
        file = self.document.file_of(location)
        if not isinstance(value, str) or not value or "\0" in value or file == self.document.path:
            return None
        source = self._folder(file)
        return None if source == self._folder(self.document.path) else source

    def _folder(self, file: Path) -> Path:
        if file not in self._folders:
            self._folders[file] = file.resolve().parent
        return self._folders[file]

    def _relative(self, source: Path, written: str) -> str:
        if Path(written).is_absolute():
            return written
        return Path(os.path.relpath(source / written, self._folder(self.document.path))).as_posix()
