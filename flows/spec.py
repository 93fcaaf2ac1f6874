"""Loads a pipeline file as a `PipelineSpec` and validates all of it before anything runs.

Checks names, types, references between steps, cycles and files. Errors name file and line, the value, what is allowed
and the nearest match. Executes nothing and opens no database.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.refusals import explain, nearest
from flows.retraining import RetrainingSettings
from lora_engine.data.archives import is_archive, is_table
from lora_engine.documents import Document, Where, parse_value, read_document
from lora_engine.errors import BaseModelError
from lora_engine.families import Family, families
from tasks.errors import SpecError
from tasks.spec import REGISTERED, SAVED, STEP_NAME, ExternalKind, StepSpec
from tasks.step import STEPS, locate_base
from tasks.sweep.spec import SweepSettings

INHERITED = ("base", "vae", "seed", "name")
"""Top-level keys that are the defaults of the steps' keys of the same name."""


class Head(BaseModel):
    """A Loraline pipeline.

    Attributes:
        name: Name of the pipeline, and default name of adapters that it registers.
        base: Default base model of the steps: tiny, a hub id with @revision, a diffusers folder or a checkpoint file.
        vae: Another autoencoder for the base in the steps that use one: a folder or a hub id.
        seed: Default seed of the steps.
        description: Text for readers.
        concurrency: Maximum trainings per device at the same time; the default depends on the device.
        sweep: A search over settings of the steps, for `loraline sweep`.
        retraining: What scheduled runs do with a new version, and what its training starts from.
        steps: The steps by name; each is validated by its own class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    base: str = "tiny"
    vae: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    description: str = ""
    concurrency: int | None = Field(None, ge=1, le=1024)
    sweep: SweepSettings | None = None
    retraining: RetrainingSettings = RetrainingSettings()
    steps: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class PipelineSpec:
    """A valid pipeline.

    Args:
        name: Its name; the default name of adapters that `register` registers.
        base: Default base model of the steps.
        seed: Default seed of the steps.
        steps: The steps by name, each after its upstream steps.
        folder: The folder that relative paths in the file start from.
        source: Data of the pipeline file, with overrides applied; recorded in lineage.
        concurrency: Maximum trainings per device at the same time; None means the default of the device.
        sweep: The search over settings that the file declares; None without one.
        retraining: The settings of scheduled retraining.
    """

    name: str
    base: str
    seed: int
    steps: Mapping[str, StepSpec]
    folder: Path
    source: Mapping[str, Any]
    concurrency: int | None = None
    sweep: SweepSettings | None = None
    retraining: RetrainingSettings = RetrainingSettings()


def load_spec(path: Path, overrides: Iterable[str] = ()) -> PipelineSpec:
    """Reads and validates a pipeline file; see `read_pipeline_file`."""
    return check_document(read_pipeline_file(path, overrides))


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


def check_document(document: Document, *, check_bases: bool = True) -> PipelineSpec:
    """Validates the data of a pipeline file.

    Args:
        document: The file. It need not exist; its folder is that of relative paths.
        check_bases: False does not look for the base models.

    Raises:
        SpecError: It is not a valid pipeline.
    """
    head = _validate(Head, document.data, (), document)
    folder = document.path.resolve().parent
    used = _families(head, folder) if check_bases else []
    steps = {name: _load_step(name, raw, head, used, document) for name, raw in head.steps.items()}
    steps |= dict(_saved_steps(steps, document))
    order = _order(steps, document)
    for name in order:
        _check_files(name, steps[name], folder, document)
        if check_bases:
            _check_base(name, steps[name], folder, document)
    ordered = {name: steps[name] for name in order}
    return PipelineSpec(
        head.name, head.base, head.seed, ordered, folder, document.data, head.concurrency, head.sweep, head.retraining
    )


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


def _families(head: Head, folder: Path) -> list[Family]:
    """Returns the families of the bases in a pipeline; without those that are not found."""
    from lora_engine.bases.source import resolve_base

    bases = {head.base, *(raw["base"] for raw in head.steps.values() if isinstance(raw.get("base"), str))}
    used: list[Family] = []
    for base in sorted(bases):
        with suppress(BaseModelError):  # `_check_base` raises it
            used.append(families[resolve_base(locate_base(base, folder)).family])
    return used


def _load_step(name: str, raw: dict[str, Any], head: Head, used: Collection[Family], document: Document) -> StepSpec:
    parent: Where = ("steps", name)
    if not STEP_NAME.fullmatch(name):
        raise SpecError(f"step name {name!r}", where=document.where(parent), allowed="letters, digits, - and _")
    uses = raw.get("uses")
    if not isinstance(uses, str) or uses not in STEPS:
        problem = f"step {name!r} uses {uses!r}" if "uses" in raw else f"step {name!r} lacks the key `uses`"
        raise SpecError(problem, where=document.where((*parent, "uses")), **nearest(str(uses), STEPS))
    kind = STEPS[uses].spec
    inherited = {field: getattr(head, field) for field in INHERITED if field in kind.model_fields}
    inherited |= kind.family_defaults(used)
    spec: StepSpec = _validate(kind, inherited | raw, parent, document)
    return spec


def _saved_steps(steps: Mapping[str, StepSpec], document: Document) -> Iterator[tuple[str, StepSpec]]:
    """Yields a step `saved` for each reference `STEP@step-N` to a step of the file."""
    for name, spec in steps.items():
        for field, target, _ in spec.references():
            match = SAVED.fullmatch(target)
            if match is None or match["step"] not in steps:
                continue
            at, training = int(match["at"]), steps[match["step"]]
            every, total = (getattr(training, key, 0) for key in ("save_every", "total_steps"))
            if every == 0 or (isinstance(every, int) and (at % every or at > total)):
                allowed = f"multiples of save_every {every} up to {total}" if every else ""
                raise SpecError(
                    f"{name}.{field} is {target!r}, but {match['step']!r} saves no adapter at step {at}",
                    where=document.where(("steps", name, field)),
                    allowed=allowed,
                    remedy="" if every else f"set save_every in a train step, such as save_every: {at}",
                )
            yield target, STEPS["saved"].spec.model_validate({"uses": "saved", "adapter": match["step"], "at": at})


def _validate(model: type[Any], data: Mapping[str, Any], parent: Where, document: Document) -> Any:
    try:
        # Strict mode refuses "8" for 8; JSON mode accepts lists for tuples.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise explain(error, model, parent, document) from None


def _order(steps: Mapping[str, StepSpec], document: Document) -> list[str]:
    graph: dict[str, set[str]] = {name: set() for name in steps}
    for name, spec in steps.items():
        for field, target, kind in spec.references():
            where = document.where(("steps", name, field))
            if REGISTERED.fullmatch(target) and target not in steps:
                if kind != "adapter":
                    raise SpecError(
                        f"{name}.{field} is {target!r}, a registered adapter",
                        where=where,
                        allowed=f"a step that produces a {kind}",
                    )
                continue
            if target not in steps:
                candidates = [other for other, step in steps.items() if STEPS[step.uses].produces == kind]
                raise SpecError(
                    f"{name}.{field} is {target!r}, which names no step", where=where, **nearest(target, candidates)
                )
            produces = STEPS[steps[target].uses].produces
            if produces != kind:
                raise SpecError(
                    f"{name}.{field} is {target!r}, a step that produces a {produces}",
                    where=where,
                    allowed=f"a step that produces a {kind}",
                )
            graph[name].add(target)
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise SpecError(
            f"the steps form a cycle: {cycle}",
            where=document.where(("steps", error.args[1][0])),
            remedy="remove one of the references",
        ) from None


def _check_files(name: str, spec: StepSpec, folder: Path, document: Document) -> None:
    for field, written, kind in spec.externals():
        path = folder / written
        if not _is_of_kind(path, kind):
            state = f"is not a {kind}" if path.exists() else "does not exist"
            raise SpecError(
                f"{name}.{field} is {written!r}, which {state}",
                where=document.where(("steps", name, field)),
                allowed=f"a {kind}, relative to {folder}",
            )


def _is_of_kind(path: Path, kind: ExternalKind) -> bool:
    if path.is_dir():
        return kind != "file"
    if not path.is_file() or kind == "folder":
        return False
    return kind == "file" or is_archive(path.name) or is_table(path.name)


def _check_base(name: str, spec: StepSpec, folder: Path, document: Document) -> None:
    from lora_engine.bases.source import resolve_base
    from lora_engine.bases.vae import resolve_vae

    finders: dict[str, Callable[[str], object]] = {"base": resolve_base, "vae": resolve_vae}
    for field, resolve in finders.items():
        if (written := getattr(spec, field, None)) is not None:
            with _at_its_line(name, field, document):
                resolve(locate_base(written, folder))


@contextmanager
def _at_its_line(name: str, field: str, document: Document) -> Iterator[None]:
    try:
        yield
    except BaseModelError as error:
        location: Where = ("steps", name, field) if ("steps", name, field) in document.lines else (field,)
        raise SpecError(
            error.problem, where=document.where(location), allowed=error.allowed, remedy=error.remedy
        ) from error
