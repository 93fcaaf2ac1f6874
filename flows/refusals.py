"""Explains why a pipeline file is refused: file and line, the value, what is allowed, and the nearest match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from flows.coming_from.options import find_option
from lora_engine.documents import Document, Where
from lora_engine.errors import did_you_mean
from tasks.errors import SpecError


def explain(error: ValidationError, model: type[BaseModel], parent: Where, document: Document) -> SpecError:
    """Returns the refusal of the first problem that a validation found.

    Args:
        error: The problems.
        model: The class that was validated.
        parent: Location of its data in the file.
        document: The file.
    """
    # An unknown key is usually the misspelling of a missing one.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    location: Where = (*parent, *first["loc"])
    key = str(location[-1]) if location else ""
    label = ".".join(str(part) for part in (location[1:] if location[:1] == ("steps",) else location)) or "the file"
    more = f" (and {len(problems) - 1} more below)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, first["loc"][:-1])
        fix = nearest(key, fields)
        if (option := find_option(key)) is not None:
            fix["remedy"] = option.hint(model.model_fields["uses"].default if "uses" in model.model_fields else "file")
        return SpecError(f"unknown key {label!r}{more}", where=document.where(location), **fix)
    if first["type"] == "union_tag_invalid":
        known = re.findall(r"'([^']*)'", first["ctx"]["expected_tags"])
        tag = first["ctx"]["tag"]
        return SpecError(f"{label} is {tag!r}{more}", where=document.where(location), **nearest(tag, known))
    if first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].strip("'")
        return SpecError(f"{label}.{tag} is missing{more}", where=document.where(location), remedy=f"add {tag}: ...")
    if first["type"] == "missing":
        return SpecError(f"{label!r} is missing{more}", where=document.where(location), remedy=f"add {key}: ...")
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not first["loc"]:
        return SpecError(f"{label}: {problem}{more}", where=document.where(location))
    return SpecError(
        f"{label} is {first['input']!r}{more}", where=document.where(location), allowed=problem[0].lower() + problem[1:]
    )


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """Returns the keys at a location inside a model; in a union, those of the member that the location names."""
    models = [model]
    for part in location:
        nested = [inner for outer in models if part in outer.model_fields for inner in _models_in(outer, str(part))]
        members = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        models = nested or members or models
    return {field for candidate in models for field in candidate.model_fields if field != "uses"}


def _models_in(model: type[BaseModel], field: str) -> Iterator[type[BaseModel]]:
    hints: list[Any] = [model.model_fields[field].annotation]
    while hints:
        hint = hints.pop()
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            yield hint
        hints += get_args(hint)


def nearest(word: str, known: Iterable[str]) -> dict[str, str]:
    """Returns `allowed` and `remedy` of a refusal: the known names, and the nearest of them."""
    names = sorted(known)
    return {"allowed": ", ".join(names) or "none", "remedy": did_you_mean(word, names)}
