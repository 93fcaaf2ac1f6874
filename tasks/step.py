"""`step`: what declares a function as a step of the line, and what such a function is given.

How a step is run (cache, verification, lineage) is in `tasks.execution`; how it becomes a Prefect task, in
`flows.prefect`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.progress import Progress
from lora_engine.registries import Registry
from registry.entities import ArtifactRef
from registry.home import Home
from tasks.digests import PathDigest
from tasks.spec import StepSpec


@dataclass(frozen=True)
class Context:
    """What a step works with.

    Args:
        name: The step's name in the pipeline.
        home: Where all state lives.
        run_id: The pipeline run that this execution belongs to.
        folder_of_spec: What relative paths in the pipeline file start from.
        refs: Per reference field, the artifacts that came in.
        inputs: Per reference field, the same as folders: verified copies that the step may read at will.
        files: Per path field, the user's file or folder.
        out: The empty folder to fill; all of it becomes the step's artifact.
        work: A folder that outlives this try: whatever a later try of the very same work can use.
        progress: Takes (done, total, figures); raises `InterruptedRun` once a stop was requested.
        excluded: Digests of pictures and ids of consents among the user's files that were revoked: to be left out.
        compute: Where a step that computes in another process tells what it computed with; for lineage.
        concurrency: How many trainings may use one device at the same time; None takes the default of the device.
    """

    name: str
    home: Home
    run_id: str
    folder_of_spec: Path
    refs: Mapping[str, tuple[ArtifactRef, ...]]
    inputs: Mapping[str, tuple[Path, ...]]
    files: Mapping[str, Path]
    out: Path
    work: Path
    progress: Progress
    excluded: tuple[str, ...] = ()
    compute: dict[str, Any] = field(default_factory=dict)
    concurrency: int | None = None

    def folder(self, field: str) -> Path:
        """The folder of a reference that must be there."""
        return self.inputs[field][0]

    def optional(self, field: str) -> Path | None:
        """The folder of a reference that may be left out."""
        folders = self.inputs.get(field, ())
        return folders[0] if folders else None

    def base(self, base: str) -> str:
        """A base as the pipeline file names it, as the engine finds it."""
        return locate_base(base, self.folder_of_spec)


Work = Callable[[Any, Context], None]
IsStillValid = Callable[[Home, bytes], bool]
FindExcluded = Callable[[Any, Path, Mapping[str, PathDigest], Collection[str]], Collection[str]]
Imports = Callable[[Any, Path], Iterable[str]]


def always(*modules: str) -> Imports:
    """Returns the declaration of a step that imports the same modules whatever its settings are."""
    return lambda spec, folder: modules


@dataclass(frozen=True)
class StepKind:
    """One entry of `STEPS`.

    Args:
        name: What a pipeline writes behind `uses:`.
        spec: Its spec.
        gives: The kind of artifact that it gives.
        revision: Raised by hand whenever the same inputs would now give something else.
        work: The function itself.
        summary: The file of the artifact that plans and summaries show; read while the artifact is verified.
        is_still_valid: For a step that also changes something outside its artifact: takes (home, content of the
            summary file) and returns False if that change is gone. A cached result counts only if it returns True.
        excludes: For a step that reads what can be revoked: takes (spec, folder of the pipeline file, digests of the
            user's files, everything revoked) and returns what of it is among the files. It enters the cache key.
        imports: Takes (spec, folder of the pipeline file) and returns the names of the modules that the step imports
            while it works; they are imported before any step starts, see `tasks.imports`.
    """

    name: str
    spec: type[StepSpec]
    produces: str
    revision: int
    work: Work
    summary: str | None = None
    is_still_valid: IsStillValid | None = None
    find_excluded: FindExcluded | None = None
    imports: Imports | None = None


STEPS: Registry[StepKind] = Registry("step")


def step(
    spec: type[StepSpec],
    *,
    produces: str,
    revision: int,
    summary: str | None = None,
    is_still_valid: IsStillValid | None = None,
    find_excluded: FindExcluded | None = None,
    imports: Imports | None = None,
) -> Callable[[Work], Work]:
    """Registers the decorated function as the step that `spec` describes (see `StepKind`)."""

    def register(work: Work) -> Work:
        name = spec.model_fields["uses"].default
        STEPS.add(name, StepKind(name, spec, produces, revision, work, summary, is_still_valid, find_excluded, imports))
        return work

    return register


Inputs = Mapping[str, tuple[ArtifactRef, ...]]


def locate_base(base: str, folder: Path) -> str:
    """A base as written in a pipeline file: a path is relative to that file, everything else is a name."""
    beside = folder / base
    return str(beside) if beside.exists() else base
