"""Validates the data of a pipeline file as a `PipelineSpec` before anything runs.

Checks names, types, references between steps, cycles and files. Errors name file and line, the value, what is allowed
and the nearest match. Executes nothing and opens no database.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.refusals import explain, nearest
from flows.spec.document import PipelineDocument
from flows.spec.head import EXPANDED, INHERITED, Head, PipelineSpec
from lora_engine.data.archives import is_archive, is_table
from lora_engine.documents import Document, Where
from lora_engine.errors import BaseModelError, NotDownloadedError
from lora_engine.families import Family, families
from lora_engine.files import is_present, is_present_file, is_present_folder
from tasks.errors import SpecError
from tasks.spec import REGISTERED, SAVED, STEP_NAME, ExternalKind, StepSpec
from tasks.step import STEPS, locate_base


class Bases:
    """Finds base models and autoencoders; each is looked for once, for all pipelines of a file.

    Args:
        download: False looks for them on this machine alone.
    """

    def __init__(self, *, download: bool = True) -> None:
        self._download = download
        self._found: dict[tuple[str, str], Any] = {}

    def find(self, field: str, name: str) -> Any:
        """Returns the base, or with the field `vae` the autoencoder, of a name or path.

        Raises:
            NotDownloadedError: It may be on the hub, where it is not looked for.
            BaseModelError: There is none.
        """
        from lora_engine.bases.hub import downloads
        from lora_engine.bases.source import resolve_base
        from lora_engine.bases.vae import resolve_vae

        if (field, name) not in self._found:
            try:
                with downloads(allowed=self._download):
                    self._found[field, name] = (resolve_vae if field == "vae" else resolve_base)(name)
            except BaseModelError as error:
                self._found[field, name] = error
        found = self._found[field, name]
        if isinstance(found, BaseModelError):
            raise found
        return found


def check_document(document: Document, *, check_bases: bool = True, bases: Bases | None = None) -> PipelineSpec:
    """Validates the data of a pipeline file.

    Args:
        document: The file. It need not exist; its folder is that of relative paths.
        check_bases: False does not look for the base models.
        bases: The base models that were found before.

    Raises:
        SpecError: It is not a valid pipeline.
    """
    for key in EXPANDED:
        if key in document.data:
            raise SpecError(f"{key!r} is not expanded", where=document.where((key,)), remedy="use `load_pipelines`")
    head = _validate(Head, document.data, (), document)
    folder, bases = document.path.resolve().parent, bases or Bases()
    used = _families(head, folder, bases) if check_bases else []
    steps = {name: _load_step(name, raw, head, used, document) for name, raw in head.steps.items()}
    steps |= dict(_saved_steps(steps, document))
    order = _order(steps, document)
    for name in order:
        _check_files(name, steps[name], folder, document)
        if check_bases:
            _check_base(name, steps[name], folder, document, bases)
    ordered = {name: steps[name] for name in order}
    source: Mapping[str, Any] = document.data
    cell: Mapping[str, Any] | None = None
    if isinstance(document, PipelineDocument):
        source, cell = document.to_record(), document.cell
    return PipelineSpec(
        head.name,
        head.base,
        head.seed,
        ordered,
        folder,
        source,
        head.concurrency,
        head.sweep,
        cell,
        head.retraining,
    )


def _families(head: Head, folder: Path, bases: Bases) -> list[Family]:
    """Returns the families of the bases in a pipeline; without those that are not found."""
    names = {head.base, *(raw["base"] for raw in head.steps.values() if isinstance(raw.get("base"), str))}
    used: list[Family] = []
    for base in sorted(names):
        with suppress(BaseModelError):  # `_check_base` raises it
            used.append(families[bases.find("base", locate_base(base, folder)).family])
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
        for field, target, kind in (*spec.references(), *spec.conditions()):
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
            state = f"is not a {kind}" if is_present(path) else "does not exist"
            raise SpecError(
                f"{name}.{field} is {written!r}, which {state}",
                where=document.where(("steps", name, field)),
                allowed=f"a {kind}, relative to {folder}",
            )


def _is_of_kind(path: Path, kind: ExternalKind) -> bool:
    if is_present_folder(path):
        return kind != "file"
    if not is_present_file(path) or kind == "folder":
        return False
    return kind == "file" or is_archive(path.name) or is_table(path.name)


def _check_base(name: str, spec: StepSpec, folder: Path, document: Document, bases: Bases) -> None:
    for field in ("base", "vae"):
        if (written := getattr(spec, field, None)) is not None:
            with _at_its_line(name, field, document):
                bases.find(field, locate_base(written, folder))


@contextmanager
def _at_its_line(name: str, field: str, document: Document) -> Iterator[None]:
    try:
        yield
    except NotDownloadedError:
        pass  # the run downloads it, and finds out whether it can be used
    except BaseModelError as error:
        location: Where = ("steps", name, field) if ("steps", name, field) in document.lines else (field,)
        raise SpecError(
            error.problem, where=document.where(location), allowed=error.allowed, remedy=error.remedy
        ) from error
