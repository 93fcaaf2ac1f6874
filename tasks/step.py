"""`step`: what turns a function into a step of the line.

A step is a Prefect task with a digest for a cache key, outputs that are verified before they are believed, retries for
what passes, and one lineage record per execution. Here and nowhere else are artifacts fetched and stored; the tasks
themselves see folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.progress import Progress
from lora_engine.registries import Registry
from registry.entities import ArtifactRef, Execution, ExecutionStatus, now
from registry.home import Home
from registry.lineage import Lineage
from registry.store import Store
from tasks.environment import describe_environment
from tasks.progress import StepEvent, publish, stop_requested
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
    """

    name: str
    spec: type[StepSpec]
    gives: str
    revision: int
    work: Work
    holds: Holds | None = None


STEPS: Registry[StepKind] = Registry("step")


def step(spec: type[StepSpec], *, gives: str, revision: int, holds: Holds | None = None) -> Callable[[Work], Work]:
    """Registers the decorated function as the step that `spec` describes (see `StepKind`)."""

    def register(work: Work) -> Work:
        name = spec.model_fields["uses"].default
        STEPS.add(name, StepKind(name, spec, gives, revision, work, holds))
        return work

    return register


@dataclass(frozen=True)
class Job:
    """One step of one run, ready to execute once its inputs are known. Plain data: it may cross processes."""

    name: str
    uses: str
    spec: dict[str, Any]
    folder: str
    home: str
    run_id: str
    force: bool = False

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


def cache_key(kind: StepKind, spec: StepSpec, folder: Path, inputs: Inputs) -> str:
    """The name of the work: equal keys mean equal results.

    Made of the step's name and revision, its own settings, the digests of its inputs, the content of the user's files
    and the fingerprint of the base; not of names, paths or times.
    """
    own = spec.own_settings()
    base = own.pop("base", None)
    parts = {
        "step": kind.name,
        "revision": kind.revision,
        "settings": own,
        "inputs": {field: [ref.sha256 for ref in refs] for field, refs in inputs.items() if refs},
        "files": {field: digest_path(folder / path) for field, path, _ in spec.externals()},
        "base": base_fingerprint(base, folder) if base is not None else None,
    }
    return sha256_bytes(canonical_json(parts))


def digest_path(path: Path) -> str:
    """The digest of a file's bytes, or of all names and bytes below a folder."""
    if not path.is_dir():
        return sha256_file(path)
    entries = {
        item.relative_to(path).as_posix(): f"-> {os.readlink(item)}" if item.is_symlink() else sha256_file(item)
        for item in sorted(path.rglob("*"))
        if item.is_symlink() or item.is_file()
    }
    return sha256_bytes(canonical_json(entries))


@lru_cache(maxsize=8)
def base_fingerprint(base: str, folder: Path) -> str:
    """The digest of a base model's weights and configuration; read once per process."""
    from lora_engine.bases.source import resolve_base

    return resolve_base(locate_base(base, folder)).fingerprint()


def locate_base(base: str, folder: Path) -> str:
    """A base as written in a pipeline file: a path is relative to that file, everything else is a name."""
    beside = folder / base
    return str(beside) if beside.exists() else base


def find_hit(job: Job, spec: StepSpec, key: str, store: Store, lineage: Lineage) -> tuple[ArtifactRef | None, str]:
    """The verified result of an earlier execution of the same work, or why there is none."""
    ref = lineage.find_cached(key)
    if ref is None:
        return None, "no earlier result"
    problems = store.verify(ref)
    if problems:
        return None, f"the earlier result is damaged: {problems[0]}"
    if job.kind.holds is not None:
        peek = Home(Path(job.home)).work / f"{key}.peek"
        store.checkout(ref, peek)
        try:
            if not job.kind.holds(spec, Home(Path(job.home)), peek):
                return None, "what it did has been changed since"
        finally:
            shutil.rmtree(peek, ignore_errors=True)
    return ref, "cached"


def execute(job: Job, inputs: Inputs) -> Outcome:
    """Runs one step, or finds that it need not run.

    A second run that wants the same work waits for the first one and then takes its result.

    Raises:
        EngineError, RegistryError, OSError: What the step raised; recorded in lineage before it is passed on.
    """
    home = Home.open(Path(job.home))
    store, lineage = Store(home.store), Lineage(home.lineage_url)
    spec = job.load_spec()
    key = cache_key(job.kind, spec, Path(job.folder), inputs)
    execution = _describe(job, spec, key, inputs)
    try:
        with home.lock(key):
            hit, _ = (None, "") if job.force else find_hit(job, spec, key, store, lineage)
            if hit is None:
                publish(StepEvent(job.name, "started"))
                ref = _work(job, spec, key, inputs, home, store)
                _record(lineage, execution, ref, store)
                shutil.rmtree(home.work / key, ignore_errors=True)
                publish(StepEvent(job.name, "completed"))
                return Outcome(ref, cached=False)
        lineage.record(replace(execution, status="CACHED", output=hit, ended_at=now()))
        publish(StepEvent(job.name, "cached"))
        return Outcome(hit, cached=True)
    except BaseException as error:
        interrupted = isinstance(error, InterruptedRun | KeyboardInterrupt)
        status: ExecutionStatus = "INTERRUPTED" if interrupted else "FAILED"
        publish(StepEvent(job.name, "failed", text=str(error)))
        lineage.record(replace(execution, status=status, ended_at=now(), error=f"{type(error).__name__}: {error}"))
        raise
    finally:
        lineage.close()


def _work(job: Job, spec: StepSpec, key: str, inputs: Inputs, home: Home, store: Store) -> ArtifactRef:
    work = home.work / key
    # What an earlier try left unfinished is of no use, but for the folder that the step itself kept for this.
    out, taken = work / "out", work / "inputs"
    for folder in (out, taken):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    (work / "kept").mkdir(exist_ok=True)
    folders: dict[str, tuple[Path, ...]] = {}
    for field, refs in inputs.items():
        folders[field] = tuple(taken / field / str(position) for position in range(len(refs)))
        for ref, folder in zip(refs, folders[field], strict=True):
            store.checkout(ref, folder)
    base = Path(job.folder)
    context = Context(
        name=job.name,
        home=home,
        run_id=job.run_id,
        folder_of_spec=base,
        refs=inputs,
        inputs=folders,
        files={field: base / path for field, path, _ in spec.externals()},
        out=out,
        work=work / "kept",
        progress=_progress(job.name),
    )
    job.kind.work(spec, context)
    return store.put(job.kind.gives, out)


def _progress(name: str) -> Progress:
    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        if stop_requested():
            raise InterruptedRun("stopped as asked", where=f"step {name!r}", remedy="run the same command to continue")
        publish(StepEvent(name, "progress", done, total, values))

    return report


def _describe(job: Job, spec: StepSpec, key: str, inputs: Inputs) -> Execution:
    folder = Path(job.folder)
    single = {field: refs[0] for field, refs in inputs.items() if len(refs) == 1}
    several = {f"{field}.{i}": ref for field, refs in inputs.items() if len(refs) > 1 for i, ref in enumerate(refs)}
    return Execution(
        id=uuid4().hex,
        run_id=job.run_id,
        step=job.name,
        uses=job.uses,
        revision=str(job.kind.revision),
        key=key,
        settings={
            "settings": spec.own_settings(),
            "files": {field: digest_path(folder / path) for field, path, _ in spec.externals()},
        },
        inputs=single | several,
        status="FAILED",
        environment=describe_environment(),
        seed=getattr(spec, "seed", None),
    )


def _record(lineage: Lineage, execution: Execution, ref: ArtifactRef, store: Store) -> None:
    subjects: dict[str, str] = {}
    if ref.kind == "manifest":
        manifest = Manifest.model_validate_json(store.read(ref, "manifest.json"))
        subjects = {picture.sha256: f"picture {picture.source}" for picture in manifest.pictures}
    done = replace(execution, status="COMPLETED", output=ref, ended_at=now())
    lineage.record(done, contents=store.files(ref), subjects=subjects)
