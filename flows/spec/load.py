"""Loads a pipeline file: reads it, applies overrides, and validates all of it before anything runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.refusals import nearest
from flows.spec.head import Head, PipelineSpec
from flows.spec.validate import check_document
from lora_engine.documents import Document, parse_value, read_document
from tasks.errors import SpecError


def load_spec(
    path: Path, overrides: Iterable[str] = (), *, parameters: Mapping[str, str] = MappingProxyType({})
) -> PipelineSpec:
    """Returns the pipeline of a file that has one; see `load_pipelines`."""
    pipelines = load_pipelines(path, overrides, parameters=parameters)
    if len(pipelines) > 1:
        names = ", ".join(pipeline.name for pipeline in pipelines)
        raise SpecError(f"the file has {len(pipelines)} pipelines", where=str(path), allowed=f"one of {names}")
    return pipelines[0]


def load_pipelines(
    path: Path,
    overrides: Iterable[str] = (),
    *,
    parameters: Mapping[str, str] = MappingProxyType({}),
    names: Collection[str] = (),
) -> tuple[PipelineSpec, ...]:
    """Reads and validates the pipelines of a file.

    Args:
        path: The file.
        overrides: See `read_pipeline_file`.
        parameters: Values of the declared parameters.
        names: Names of the pipelines to load, with wildcards; empty means all.

    Raises:
        SpecError: The file is not valid, or a name matches no pipeline.
    """
    del parameters
    pipelines = (check_document(read_pipeline_file(path, overrides)),)
    return tuple(spec for spec in pipelines if not names or any(fnmatchcase(spec.name, name) for name in names))


def read_pipeline_file(path: Path, overrides: Iterable[str] = ()) -> Document:
    """Reads a pipeline file without validating it.

    Args:
        path: A YAML or JSON file.
        overrides: Texts `a.b=value`; `adapter.rank=8` is short for `steps.adapter.rank=8`.

    Raises:
        SpecError: The file is no mapping, or an override is not possible.
    """
    document = read_document(path, SpecError, allowed="a mapping with name, base, seed and steps")
    for override in overrides:
        _override(document, override)
    return document


def _override(document: Document, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        # Without the rest, which may be a secret.
        key = re.match(r"[\w.-]*", override)[0]  # type: ignore[index]  # it matches every text
        raise SpecError(f"{key!r} has no key or no value", where="--set", allowed="KEY=VALUE, such as adapter.rank=8")
    set_value(document, path, parse_value(text, f"--set {path}", SpecError), "--set")


def set_value(document: Document, path: str, value: Any, where: str) -> None:
    """Sets a value in the data of a pipeline file.

    Args:
        document: The file; its data change.
        path: `a.b.c`; without a key of the file first, a path within its steps.
        value: The value.
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
