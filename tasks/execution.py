"""Executes a step, or takes its verified result from the cache; records either in lineage.

Only this module moves artifacts between the store and the folders that steps read and write.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_engine.compute import describe_compute
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, InterruptedRun
from lora_engine.files import sha256_bytes
from lora_engine.progress import Progress
from registry.entities import ArtifactRef, Execution, ExecutionStatus, Subject, now
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from registry.store.redaction import redact, redact_error
from tasks.consent import check_datasets
from tasks.devices import work_on_device
from tasks.environment import describe_environment
from tasks.exclusion import refuse_revoked, refuse_revoked_base
from tasks.job import Job, Outcome
from tasks.progress import StepEvent, publish, stop_requested
from tasks.resources import NO_RESOURCES
from tasks.step import Context, Inputs
from tasks.timeout import work_within
from tasks.warnings import collecting, with_warnings

_log = logging.getLogger(__name__)


NO_RESULT = "no earlier result"
"""The reason of `find_hit` if no execution with the key completed yet."""


def find_hit(
    job: Job, inputs: Inputs, home: Home, store: Store, lineage: Lineage, verified: set[str] | None = None
) -> tuple[Outcome | None, str]:
    """Returns the verified cached result of a step, or None and the reason.

    Reads every byte of the artifact, and restarts its grace period for garbage collection if the home is writable.
    Skips blobs whose digests are in `verified`, and adds to it those that are intact.
    """
    ref, earlier = lineage.find_cached(job.key(inputs)), job.earlier_key(inputs)
    if ref is None and earlier is not None:
        ref = lineage.find_cached(earlier)
    if ref is None:
        return None, NO_RESULT
    return verify_result(job, ref, home, store, verified)


def verify_result(
    job: Job, ref: ArtifactRef, home: Home, store: Store, verified: set[str] | None = None
) -> tuple[Outcome | None, str]:
    """Returns an earlier result of a job if it is intact and valid, else None and the reason; see `find_hit`."""
    problems, summary = store.inspect(ref, job.kind.summary, touch=not home.read_only, known=verified)
    if problems:
        return None, f"the cached result is damaged: {problems[0].what}"
    hit = Outcome(ref, cached=True, summary=summary or b"")
    if job.kind.is_still_valid is not None and not job.kind.is_still_valid(home, hit.summary):
        return None, "what it relied on in the registry changed"
    return hit, "cached"


def execute(job: Job, inputs: Inputs, home: Home, run_id: str, *, force: bool = False, live: bool = True) -> Outcome:
    """Executes a step unless it is cached.

    A run that needs a step which another run executes waits and takes its result.

    Args:
        job: The step.
        inputs: Reference field -> artifacts.
        home: The home with all state.
        run_id: The run that this execution belongs to.
        force: True executes it even if it is cached.
        live: True shows a training in MLflow while it runs.

    Raises:
        EngineError, RegistryError, OSError: The step's error, once it is recorded in lineage.
    """
    store, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        job = job.refreshed(lineage).with_input_kinds(inputs, lineage)
        execution = describe_execution(job, inputs, run_id)
        with collecting(job.name) as warnings:
            try:
                _refuse_if_stopped(job.name)
                refuse_revoked(inputs, lineage, f"step {job.name!r}")
                refuse_revoked_base(job.base, lineage, f"step {job.name!r}")
                if job.kind.produces == "adapter":
                    datasets = [ref for refs in inputs.values() for ref in refs if ref.kind == "manifest"]
                    check_datasets(home, store, lineage, datasets, f"step {job.name!r}")
                with home.lock(execution.key):
                    hit = None if force else find_hit(job, inputs, home, store, lineage)[0]
                    if hit is None:
                        return _run(job, inputs, home, store, lineage, execution, warnings, force=force, live=live)
                _record_hit(job, hit, execution, lineage)
            except BaseException as error:
                redact_error(error)  # Prefect stores its text
                environment = with_warnings(execution.environment, warnings)
                _record_failure(job, error, replace(execution, environment=environment), lineage)
                raise
        return hit
    finally:
        lineage.close()


def record_hit(job: Job, inputs: Inputs, hit: Outcome, lineage: Lineage, run_id: str) -> None:
    """Records and publishes that a run takes a step's result from the cache."""
    _record_hit(job, hit, describe_execution(job, inputs, run_id), lineage)


def _run(
    job: Job,
    inputs: Inputs,
    home: Home,
    store: Store,
    lineage: Lineage,
    execution: Execution,
    warnings: list[str],
    *,
    force: bool,
    live: bool,
) -> Outcome:
    publish(StepEvent(job.name, "started"))
    start = time.monotonic()
    outcome, compute = _work(job, inputs, home, store, execution, force=force, live=live)
    user_files = _store_files(job, store)
    if not job.files_are_current():
        raise DataError(
            "the files that it reads changed while it ran",
            where=f"step {job.name!r}",
            remedy="run the same command again and do not change the files meanwhile",
        )
    environment = {**execution.environment, **({"compute": compute} if compute else {})}
    environment = with_warnings(environment, warnings)
    execution = replace(execution, inputs={**execution.inputs, **user_files}, environment=environment)
    _record(lineage, execution, outcome.ref, store)
    shutil.rmtree(home.work / execution.key, ignore_errors=True)
    publish(StepEvent(job.name, "completed"))
    seconds = time.monotonic() - start
    _log.info("step %s: completed in %.1f s: %s %s", job.name, seconds, outcome.ref.kind, outcome.ref.sha256)
    return outcome


def _record_hit(job: Job, hit: Outcome, execution: Execution, lineage: Lineage) -> None:
    lineage.log_execution(replace(execution, status="CACHED", output=hit.ref, ended_at=now()))
    publish(StepEvent(job.name, "cached"))


def _record_failure(job: Job, error: BaseException, execution: Execution, lineage: Lineage) -> None:
    interrupted = isinstance(error, InterruptedRun | KeyboardInterrupt)
    status: ExecutionStatus = "INTERRUPTED" if interrupted else "FAILED"
    publish(StepEvent(job.name, "failed", text=redact(str(error))))
    try:
        lineage.log_execution(
            replace(execution, status=status, ended_at=now(), error=f"{type(error).__name__}: {error}")
        )
    except RegistryError as second:
        # Expected on a full disk; the first error is the one to report.
        _log.warning("cannot record the failure of step %r: %s", job.name, second)


def _work(
    job: Job, inputs: Inputs, home: Home, store: Store, execution: Execution, *, force: bool, live: bool
) -> tuple[Outcome, dict[str, Any]]:
    work = home.work / execution.key
    # Remove partial results of an earlier attempt; the step's own folder `kept` remains.
    out, inputs_folder = work / "out", work / "inputs"
    for folder in (out, inputs_folder):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    (work / "kept").mkdir(exist_ok=True)
    folders: dict[str, tuple[Path, ...]] = {}
    for field, refs in inputs.items():
        folders[field] = tuple(inputs_folder / field / str(position) for position in range(len(refs)))
        for ref, folder in zip(refs, folders[field], strict=True):
            store.checkout(ref, folder)
    context = Context(
        name=job.name,
        home=home,
        run_id=execution.run_id,
        folder_of_spec=job.folder,
        refs=inputs,
        inputs=folders,
        files={field: job.folder / path for field, path, _ in job.spec.externals()},
        out=out,
        work=work / "kept",
        progress=_progress(job.name),
        excluded=job.excluded,
        concurrency=job.concurrency,
        key=execution.key,
        origin=job.origin(inputs),
        force=force,
        live=live,
        absent=job.absent,
        resources=job.spec.resources or NO_RESOURCES,
    )
    if job.spec.timeout is None:
        work_on_device(job, context)
    else:
        work_within(job, context, job.spec.timeout)
    summary = (out / job.kind.summary).read_bytes() if job.kind.summary else b""
    return Outcome(
        store.put(job.kind.produces, out), cached=False, summary=summary
    ), context.compute or describe_compute()


def _store_files(job: Job, store: Store) -> dict[str, ArtifactRef]:
    """Stores the user's files that the step declares as `kept`; returns their artifacts."""
    return {
        field: store.put_files("file", {f"{field}{Path(path).suffix}": (job.folder / path).read_bytes()})
        for field, path in job.spec.kept_files().items()
    }


def _progress(name: str) -> Progress:
    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        _refuse_if_stopped(name)
        publish(StepEvent(name, "progress", done, total, values))

    return report


def _refuse_if_stopped(name: str) -> None:
    if stop_requested():
        raise InterruptedRun("stopped on request", where=f"step {name!r}", remedy="run the same command to continue")


def describe_execution(job: Job, inputs: Inputs, run_id: str) -> Execution:
    """Returns the record of an execution that has not succeeded yet: a new id, the key, the settings, the inputs."""
    single = {field: refs[0] for field, refs in inputs.items() if len(refs) == 1}
    several = {f"{field}.{i}": ref for field, refs in inputs.items() if len(refs) > 1 for i, ref in enumerate(refs)}
    return Execution(
        id=uuid4().hex,
        run_id=run_id,
        step=job.name,
        uses=job.kind.name,
        revision=str(job.revision),
        key=job.key(inputs),
        settings=job.recorded_settings,
        inputs=single | several,
        status="FAILED",
        environment=describe_environment(),
        seed=getattr(job.spec, "seed", None),
    )


def _record(lineage: Lineage, execution: Execution, ref: ArtifactRef, store: Store) -> None:
    subjects: list[Subject] = []
    if ref.kind == "manifest":
        subjects = list(subjects_of(Manifest.model_validate_json(store.read(ref, "manifest.json"))))
    execution = replace(execution, status="COMPLETED", output=ref, ended_at=now())
    lineage.log_execution(execution, contents=store.files(ref), subjects=subjects)


def subjects_of(manifest: Manifest) -> Iterator[Subject]:
    """Yields the images, captions and consents of a dataset."""
    for image in manifest.pictures:
        yield Subject(image.sha256, "picture", f"picture {image.source}")
        for caption in filter(None, image.captions):
            yield Subject(sha256_bytes(caption.encode()), "caption", f"caption {caption[:80]!r}")
        if image.consent:
            yield Subject(image.consent, "consent", f"consent {image.consent}")
