"""Loads the pipelines of a file: merges overlays, applies overrides, expands references and matrix, and validates."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.refusals import nearest
from flows.spec.document import PipelineDocument, refuse_secrets
from flows.spec.head import Head, PipelineSpec
from flows.spec.matrix import MatrixCell, MatrixReader, describe_cell, find_axes
from flows.spec.overlays import read_overlays
from flows.spec.parameters import read_declared, resolve_parameters
from flows.spec.template import PipelineTemplate
from flows.spec.validate import Bases, check_document
from lora_engine.documents import Document, parse_value
from tasks.errors import SpecError

_NONE: Mapping[str, Any] = MappingProxyType({})
_NAMED = 5


def load_spec(path: Path, overrides: Iterable[str] = (), *, parameters: Mapping[str, Any] = _NONE) -> PipelineSpec:
    """Returns the pipeline of a file that has one; see `load_pipelines`.

    Raises:
        SpecError: The file has several.
    """
    return check_document(read_pipeline_file(path, overrides, parameters=parameters))


def load_pipelines(
    path: Path,
    overrides: Iterable[str] = (),
    *,
    parameters: Mapping[str, Any] = _NONE,
    names: Collection[str] = (),
    download: bool = True,
) -> tuple[PipelineSpec, ...]:
    """Reads and validates the pipelines of a file; one, or one per cell of the matrix.

    Args:
        path: A YAML or JSON file.
        overrides: Texts `a.b=value`; `adapter.rank=8` is short for `steps.adapter.rank=8`.
        parameters: Values of declared parameters; a text is parsed by the parameter's type.
        names: Names of the pipelines to load, with `*` and `?`; empty means all.
        download: False takes the names of models on the hub that are not on this machine as they are.

    Raises:
        SpecError: The file is not valid, or a name matches no pipeline.
    """
    bases = Bases(download=download)
    return tuple(
        _check_cell(document, bases) for document in _expand_file(read_unexpanded(path, overrides), parameters, names)
    )


def read_pipeline_file(
    path: Path, overrides: Iterable[str] = (), *, parameters: Mapping[str, Any] = _NONE, names: Collection[str] = ()
) -> PipelineDocument:
    """Reads and expands a pipeline file that has one pipeline, without validating it; see `load_pipelines`.

    Raises:
        SpecError: A file is no mapping, an override is not possible, a reference has no value, or there are several
            pipelines.
    """
    documents = _expand_file(read_unexpanded(path, overrides), parameters, names)
    if len(documents) > 1:
        found = [str(document.data.get("name")) for document in documents]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise SpecError(
            f"the file has {len(found)} pipelines: {', '.join(found[:_NAMED])}{more}",
            where=str(path),
            allowed="one pipeline",
            remedy=f"select one, such as --pipeline {found[0]}",
        )
    return documents[0]


def pipeline_names(
    path: Path, overrides: Iterable[str] = (), *, parameters: Mapping[str, Any] = _NONE
) -> tuple[str, ...]:
    """Returns the names of the pipelines of a file, without validating them; see `load_pipelines`."""
    documents = _expand_file(read_unexpanded(path, overrides), parameters, ())
    return tuple(str(document.data.get("name")) for document in documents)


def read_unexpanded(path: Path, overrides: Iterable[str] = ()) -> PipelineDocument:
    """Returns a file merged with those that it extends, with overrides; references are not resolved."""
    document = read_overlays(path)
    for override in overrides:
        _override(document, override)
    return document


def _check_cell(document: PipelineDocument, bases: Bases) -> PipelineSpec:
    try:
        return check_document(document, bases=bases)
    except SpecError as error:
        if document.cell is None:
            raise
        problem = f"{error.problem} (matrix: {describe_cell(document.cell)})"
        raise SpecError(problem, where=error.where, allowed=error.allowed, remedy=error.remedy) from error


def _expand_file(
    document: PipelineDocument, parameters: Mapping[str, Any], names: Collection[str]
) -> list[PipelineDocument]:
    declared = read_declared(document)
    has_matrix = "matrix" in document.data
    cells: list[MatrixCell]
    if has_matrix:
        axes = find_axes(document)
        references = resolve_parameters(document, declared, parameters, axes)
        cells = MatrixReader(document, declared, references).cells()
        from_file = {name for cell in cells for name in cell} - axes
        if given := sorted(from_file & parameters.keys()):
            resolve_parameters(document, declared, parameters, given)  # refuses it
    else:
        references, cells = resolve_parameters(document, declared, parameters), [{}]
    template = PipelineTemplate(document)
    template.check_size(len(cells))
    named = [(template.name(references.with_values(cell)), cell) for cell in cells]
    if has_matrix:
        _check_names(named, document)
    selected = [(name, cell) for name, cell in named if not names or any(fnmatchcase(name, other) for other in names)]
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            known = [name for name, _ in named]
            raise SpecError(f"no pipeline {pattern!r}", where="--pipeline", **nearest(pattern, known))
    return [template.expand(references.with_values(cell), cell if has_matrix else None) for _, cell in selected]


def _check_names(named: Iterable[tuple[str, MatrixCell]], document: PipelineDocument) -> None:
    cells: dict[str, MatrixCell] = {}
    for name, cell in named:
        if name in cells:
            differing = next((axis for axis in cell if cell[axis] != cells[name].get(axis)), next(iter(cell)))
            raise SpecError(
                f"two pipelines have the name {name!r}: {describe_cell(cells[name])}; and {describe_cell(cell)}",
                where=document.where(("name",)),
                remedy=f"write ${{{differing}}} into the name",
            )
        cells[name] = cell


def _override(document: PipelineDocument, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        # Without the rest, which may be a secret.
        key = re.match(r"[\w.-]*", override)[0]  # type: ignore[index]  # it matches every text
        raise SpecError(f"{key!r} has no key or no value", where="--set", allowed="KEY=VALUE, such as adapter.rank=8")
    value = parse_value(text, f"--set {path}", SpecError)
    refuse_secrets(Document(document.path, {keys[-1]: value}, {}), f"--set {path}")
    set_value(document, path, value, "--set")


def set_value(document: PipelineDocument, path: str, value: Any, where: str) -> None:
    """Sets a value in the data of a pipeline file.

    Args:
        document: The file; its data change.
        path: `a.b.c`; without a key of the file first, a path within its steps.
        value: The value; a path in it is relative to the file.
        where: Where the path is from, for errors.

    Raises:
        SpecError: A key before the last is not in the file.
    """
    keys = path.split(".")
    if keys[0] not in Head.model_fields:
        keys.insert(0, "steps")
    target: Any = document.data
    for key in keys[:-1]:
        if not isinstance(target, dict) or not isinstance(target.get(key), dict):
            known = target if isinstance(target, dict) else ()
            raise SpecError(f"{path!r}: unknown key {key!r}", where=where, **nearest(key, known))
        target = target[key]
    target[keys[-1]] = value
    document.files.pop(tuple(keys), None)
