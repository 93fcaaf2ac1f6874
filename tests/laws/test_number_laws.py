"""Laws of the numbers in settings: each whole number has a bound, and each other number is finite.

A number from a file becomes work: a loop, a list, a tensor. The specs are found by their base class, so a new one is
tested by being defined.
"""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from lora_engine.merging.methods import METHODS
from lora_engine.training.specs.lengths import Interval, Length, Steps, Warmup
from tasks.step import STEPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("flows", "tasks", "lora_engine", "registry")


def specs() -> list[type[BaseModel]]:
    """Returns every spec of the packages; imports the modules that define one."""
    assert all(registry[name] for registry in (STEPS, METHODS) for name in registry)
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            file = ROOT / f"{module.name.replace('.', '/')}.py"
            if file.is_file() and "pydantic" in file.read_text() and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found, queue = set(), [BaseModel]
    while queue:
        for spec in queue.pop().__subclasses__():
            queue.append(spec)
            if spec.__module__.partition(".")[0] in PACKAGES:
                found.add(spec)
    return sorted(found, key=lambda spec: f"{spec.__module__}.{spec.__qualname__}")


def numbers(annotation: Any, metadata: list[Any]) -> Iterator[tuple[type, list[Any]]]:
    """Yields the numbers in an annotation, each with its constraints."""
    if typing.get_origin(annotation) is Annotated:
        inner, *more = typing.get_args(annotation)
        yield from numbers(inner, [*metadata, *more])
    elif annotation in (int, float):
        yield annotation, list(flat(metadata))
    elif typing.get_origin(annotation) is not Literal:
        # `int | None` with constraints of the field keeps them; the items of a list have their own.
        is_union = type(None) in typing.get_args(annotation)
        for part in typing.get_args(annotation):
            yield from numbers(part, metadata if is_union else [])


def flat(metadata: list[Any]) -> Iterator[Any]:
    for entry in metadata:
        if hasattr(entry, "metadata"):
            yield from flat(entry.metadata)
        elif isinstance(entry, annotated_types.GroupedMetadata):
            yield from entry
        else:
            yield entry


def unbounded(spec: type[BaseModel]) -> list[str]:
    """Returns the fields with a whole number without an upper bound, or another number that may be infinite."""
    found = []
    for name, field in spec.model_fields.items():
        for kind, constraints in numbers(field.annotation, list(field.metadata)):
            has_most = any(isinstance(entry, annotated_types.Le | annotated_types.Lt | Length) for entry in constraints)
            has_least = any(isinstance(entry, annotated_types.Ge | annotated_types.Gt) for entry in constraints)
            is_finite = any(getattr(entry, "allow_inf_nan", None) is False for entry in constraints)
            if not (has_most if kind is int else is_finite or (has_most and has_least)):
                found.append(name)
    return found


SPECS = specs()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_number_of_a_spec_is_bounded(spec: type[BaseModel]) -> None:
    assert unbounded(spec) == []


def test_the_specs_of_all_packages_are_found() -> None:
    names = {spec.__name__ for spec in SPECS}
    assert {"Train", "TrainSettings", "Ties", "Lokr", "Card", "Head", "Licenses", "BackupManifest"} <= names


@pytest.mark.parametrize("unit", [Steps, Interval, Warmup])
def test_a_length_is_bounded(unit: Any) -> None:
    adapter = TypeAdapter(unit)
    assert adapter.validate_python(10_000_000) == 10_000_000
    for large in (10_000_001, "99999999 epochs"):
        with pytest.raises(ValidationError):
            adapter.validate_python(large)


def test_a_number_without_a_bound_is_found() -> None:
    """Negative control."""

    class Loose(BaseModel):
        count: int = Field(ge=1)
        maybe: int | None = Field(default=None, ge=0)
        counts: dict[str, int] = {}
        share: float = Field(default=0.0, ge=0.0)
        bounded: int = Field(default=1, le=9)
        pairs: tuple[Annotated[int, Field(le=4)], ...] = ()
        flag: bool = True

    assert unbounded(Loose) == ["count", "maybe", "counts", "share"]
