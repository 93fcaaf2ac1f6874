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
Holds = Callable[[Any, Home, Path], bool]
Excludes = Callable[[Any, Path, Collection[str]], Collection[str]]
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
        holds: For a step that also changes something outside its artifact: whether that change still stands
            (spec, home, the artifact's folder). A cached result counts only where it does.
        excludes: For a step that takes in what can be revoked: what of the revoked is among the user's files (spec,
            folder of the pipeline file, all that is revoked). It becomes part of the name of the work.
        imports: The names of the modules that the step imports while it works (spec, folder of the pipeline file): they
            are imported before any step starts, see `tasks.imports`.
    """

    name: str
    spec: type[StepSpec]
    gives: str
    revision: int
    work: Work
    holds: Holds | None = None
    excludes: Excludes | None = None
    imports: Imports | None = None


STEPS: Registry[StepKind] = Registry("step")


def step(
    spec: type[StepSpec],
    *,
    gives: str,
    revision: int,
    holds: Holds | None = None,
    excludes: Excludes | None = None,
    imports: Imports | None = None,
) -> Callable[[Work], Work]:
    """Registers the decorated function as the step that `spec` describes (see `StepKind`)."""

    def register(work: Work) -> Work:
        name = spec.model_fields["uses"].default
        STEPS.add(name, StepKind(name, spec, gives, revision, work, holds, excludes, imports))
        return work

    return register


@dataclass(frozen=True)
class Job:
    """One step of one run, ready to execute once its inputs are known. Plain data: it may cross processes.

    `excluded` is what a repetition leaves out as revoked, as it was then; None asks the home what is revoked now.
    `concurrency` is how many trainings may use one device at the same time; it is not part of the cache key.
    """

    name: str
    uses: str
    spec: dict[str, Any]
    folder: str
    home: str
    run_id: str
    force: bool = False
    excluded: tuple[str, ...] | None = None
    concurrency: int | None = None

    @property
    def kind(self) -> StepKind:
        """The step's entry in `STEPS`."""
        return STEPS[self.uses]

    def load_spec(self) -> StepSpec:
        """The spec as its own class."""
        return self.kind.spec.model_validate(self.spec)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: with which artifact, and whether it had to work for it."""

    ref: ArtifactRef
    cached: bool


Inputs = Mapping[str, tuple[ArtifactRef, ...]]


def locate_base(base: str, folder: Path) -> str:
    """A base as written in a pipeline file: a path is relative to that file, everything else is a name."""
    beside = folder / base
    return str(beside) if beside.exists() else base
