"""Makes functions pipeline steps with `step`, and defines their `Context`.

`tasks.execution` executes steps (cache, verification, lineage). `flows.prefect` wraps them as Prefect tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.bases.source import BaseSource
from lora_engine.files import is_present
from lora_engine.progress import Progress
from lora_engine.registries import Registry
from registry.entities import ArtifactRef
from registry.home import Home
from tasks.digests import PathDigest
from tasks.progress import stop_requested
from tasks.resources import NO_RESOURCES, Resources
from tasks.spec import StepSpec


@dataclass(frozen=True)
class Context:
    """Inputs and output folder of a step.

    Args:
        name: The step's name in the pipeline.
        home: The home with all state.
        run_id: The pipeline run that this execution belongs to.
        folder_of_spec: The folder that relative paths in the pipeline file start from.
        refs: Reference field -> input artifacts.
        inputs: Reference field -> the same artifacts as folders; verified copies.
        files: Path field -> the user's file or folder.
        out: The empty output folder; all of it becomes the step's artifact.
        work: A folder that later attempts with the same cache key find again, for checkpoints.
        progress: Takes (done, total, metrics); raises `InterruptedRun` once a stop was requested.
        excluded: Digests of revoked images and ids of revoked consents in the user's files, to exclude.
        compute: Filled by a step that computes in another process, with that process's device; for lineage.
        concurrency: Maximum trainings per device at the same time; None means the default of the device.
        live: True shows a training in MLflow while it runs.
        stop: Returns True once the step must stop; polled by steps that stop themselves.
        key: Cache key of the execution.
        origin: Digest of everything that the result depends on except the settings.
        force: True if the step runs although its result is cached.
        absent: Registered version that the spec names -> why it is not there.
        resources: The device that the step uses, and how much of it.
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
    key: str = ""
    live: bool = True
    stop: Callable[[], bool] = stop_requested
    origin: str = ""
    force: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = NO_RESOURCES

    def folder(self, field: str) -> Path:
        """Returns the folder of a required reference."""
        return self.inputs[field][0]

    def optional(self, field: str) -> Path | None:
        """Returns the folder of an optional reference; None if it is not set."""
        folders = self.inputs.get(field, ())
        return folders[0] if folders else None

    def base(self, base: str) -> str:
        """Returns the engine's name or path of a base that the pipeline file names."""
        return locate_base(base, self.folder_of_spec)


Work = Callable[[Any, Context], None]
IsStillValid = Callable[[Home, bytes], bool]
FindExcluded = Callable[[Any, Path, Mapping[str, PathDigest], Collection[str]], Collection[str]]
Revisions = Callable[[Any, Mapping[str, PathDigest]], int]
DescribeProgress = Callable[[Any, str, Home, str | None], str]
DescribeCost = Callable[[Any], str]
Imports = Callable[[Any, Path], Iterable[str]]
Entries = Callable[[Any], Iterable[tuple[Registry[Any], str]]]
FindModels = Callable[[Any, Path, BaseSource | None], Mapping[str, Mapping[str, str]]]


def always(*modules: str) -> Imports:
    """Returns an `Imports` that declares the same modules for all settings."""
    return lambda spec, folder: modules


@dataclass(frozen=True)
class StepKind:
    """One entry of `STEPS`.

    Args:
        name: The value of `uses:` in a pipeline.
        spec: Its spec class.
        produces: The kind of its output artifact.
        revision: Part of the cache key; raise it whenever the same inputs give another result.
        work: The function.
        describe_progress: Takes (spec, digest of everything else that it depends on, home, key of its last execution);
            returns what a run would continue or lose of earlier ones, for plans. None means nothing.
        describe_cost: Takes the spec; returns work that a run adds by itself, for plans. None means nothing.
        revisions: Takes (spec, digests of the user's files); returns its revision, after a change that gives some of
            them alone another result. None means `revision` for all.
        summary: File of the artifact that plans and summaries show; read while the artifact is verified. None means
            no summary.
        is_still_valid: Takes (home, content of the summary file); returns False if a side effect of the step was
            undone, or if what it read of the registry changed, which invalidates a cached result. None means neither.
        find_excluded: Takes (spec, folder of the pipeline file, digests of the user's files, everything revoked);
            returns the revoked subjects in these files, which enter the cache key. None means none.
        imports: Takes (spec, folder of the pipeline file); returns names of modules to import before any step starts,
            see `tasks.imports`. None means none.
        entries: Takes the spec; returns the registry entries that the step uses, as (registry, name). Those of plug-ins
            enter the cache key and lineage. None means none.
        models: Takes (spec, folder of the pipeline file, its base); returns role -> `name` as written, `label`,
            `fingerprint`, and `revision` or `path`, of the models that the step uses beside its base. Fingerprints
            enter the cache key, all of it enters lineage. None means none.
        stops: True if the work polls `Context.stop` and then saves its progress; other steps with a `timeout` run in a
            child process.
        takes_device: True if the work takes its device by itself; `tasks.devices` takes it for other steps.
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
    entries: Entries | None = None
    stops: bool = False
    describe_progress: DescribeProgress | None = None
    revisions: Revisions | None = None
    models: FindModels | None = None
    describe_cost: DescribeCost | None = None
    takes_device: bool = False

    def revision_of(self, spec: StepSpec, files: Mapping[str, PathDigest]) -> int:
        """Returns the revision for a spec and the digests of the user's files."""
        return self.revision if self.revisions is None else self.revisions(spec, files)


STEPS: Registry[StepKind] = Registry("step", entry=StepKind, source="tasks.steps", group="loraline.steps")


def step(
    spec: type[StepSpec],
    *,
    produces: str,
    revision: int,
    summary: str | None = None,
    is_still_valid: IsStillValid | None = None,
    find_excluded: FindExcluded | None = None,
    imports: Imports | None = None,
    entries: Entries | None = None,
    stops: bool = False,
    describe_progress: DescribeProgress | None = None,
    revisions: Revisions | None = None,
    models: FindModels | None = None,
    describe_cost: DescribeCost | None = None,
    takes_device: bool = False,
) -> Callable[[Work], StepKind]:
    """Returns a decorator that makes a function a step (arguments: see `StepKind`)."""

    def declare(work: Work) -> StepKind:
        name = spec.model_fields["uses"].default
        return StepKind(
            name,
            spec,
            produces,
            revision,
            work,
            summary,
            is_still_valid,
            find_excluded,
            imports,
            entries,
            stops,
            describe_progress,
            revisions,
            models,
            describe_cost,
            takes_device,
        )

    return declare


Inputs = Mapping[str, tuple[ArtifactRef, ...]]


def locate_base(base: str, folder: Path) -> str:
    """Resolves a base as written in a pipeline file: a path relative to that file if it exists, else a name."""
    path = folder / base
    return str(path) if is_present(path) else base
