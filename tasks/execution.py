"""Runs a step: from the cache if a verified result is there, else for real, with one lineage record either way.

Here and nowhere else are artifacts fetched and stored; the steps themselves see folders.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_engine.compute import describe_compute
from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun
from lora_engine.files import sha256_bytes
from lora_engine.progress import Progress
from registry.entities import ArtifactRef, Execution, ExecutionStatus, Subject, now
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from tasks.environment import describe_environment
from tasks.exclusion import find_excluded, refuse_revoked, with_excluded
from tasks.key import cache_key, describe_base, digest_files
from tasks.progress import StepEvent, publish, stop_requested
from tasks.spec import StepSpec
from tasks.step import Context, Inputs, Job, Outcome

_log = logging.getLogger(__name__)


def find_hit(job: Job, spec: StepSpec, key: str, store: Store, lineage: Lineage) -> tuple[ArtifactRef | None, str]:
    """The verified result of an earlier execution of the same work, or why there is none."""
    ref = lineage.find_cached(key)
    if ref is None:
        return None, "no earlier result"
    # From here on a collection leaves it to whoever asked.
    store.renew(ref)
    problems = store.verify(ref)
    if problems:
        return None, f"the earlier result is damaged: {problems[0]}"
    if job.kind.holds is not None:
        home = Home(Path(job.home))
        # A folder of its own: a plan and a run may look at the same time, and a killed one leaves its folder behind.
        with tempfile.TemporaryDirectory(dir=home.work) as name:
            peek = Path(name) / "artifact"
            store.checkout(ref, peek)
            if not job.kind.holds(spec, home, peek):
                return None, "what it did has been changed since"
    return ref, "cached"


def execute(job: Job, inputs: Inputs) -> Outcome:
    """Runs one step, or finds that it need not run.

    A second run that wants the same work waits for the first one and then takes its result.

    Raises:
        EngineError, RegistryError, OSError: What the step raised; recorded in lineage before it is passed on.
    """
    home = Home.open(Path(job.home))
    store, lineage = open_store(home), Lineage(home.lineage_url)
    spec = job.load_spec()
    excluded = job.excluded
    if excluded is None:
        excluded = find_excluded(job.kind, spec, Path(job.folder), lineage)
    files = digest_files(spec, Path(job.folder))
    key = cache_key(job.kind, spec, Path(job.folder), inputs, with_excluded(files, excluded))
    execution = _describe(job, spec, key, inputs, files, excluded)
    try:
        _refuse_if_stopped(job.name)
        refuse_revoked(inputs, lineage, f"step {job.name!r}")
        with home.lock(key):
            hit, _ = (None, "") if job.force else find_hit(job, spec, key, store, lineage)
            if hit is None:
                publish(StepEvent(job.name, "started"))
                ref, compute = _work(job, spec, key, inputs, home, store, excluded)
                told = {**execution.environment, "compute": compute} if compute else execution.environment
                kept = {**execution.inputs, **_keep(spec, Path(job.folder), files, store)}
                _record(lineage, replace(execution, inputs=kept, environment=told), ref, store)
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
        failed = replace(execution, status=status, ended_at=now(), error=f"{type(error).__name__}: {error}")
        try:
            lineage.record(failed)
        except RegistryError as second:
            # On a full disk even the failure cannot be recorded; what matters is the first error.
            _log.warning("the failure of %s could not be recorded: %s", job.name, second)
        raise
    finally:
        lineage.close()


def _work(
    job: Job, spec: StepSpec, key: str, inputs: Inputs, home: Home, store: Store, excluded: tuple[str, ...]
) -> tuple[ArtifactRef, dict[str, Any]]:
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
        excluded=excluded,
        concurrency=job.concurrency,
    )
    job.kind.work(spec, context)
    return store.put(job.kind.gives, out), context.compute or describe_compute()


def _keep(spec: StepSpec, folder: Path, files: Mapping[str, str], store: Store) -> dict[str, ArtifactRef]:
    """The user's files that the store keeps, as artifacts; one that was changed while the step ran is not kept."""
    kept = {}
    for field, path in spec.kept_files().items():
        content = (folder / path).read_bytes()
        if sha256_bytes(content) == files[field]:
            kept[field] = store.put_files("file", {f"{field}{Path(path).suffix}": content})
    return kept


def _progress(name: str) -> Progress:
    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        _refuse_if_stopped(name)
        publish(StepEvent(name, "progress", done, total, values))

    return report


def _refuse_if_stopped(name: str) -> None:
    if stop_requested():
        raise InterruptedRun("stopped as asked", where=f"step {name!r}", remedy="run the same command to continue")


def _describe(
    job: Job, spec: StepSpec, key: str, inputs: Inputs, files: Mapping[str, str], excluded: tuple[str, ...]
) -> Execution:
    own, folder = spec.own_settings(), Path(job.folder)
    base = own.get("base")
    settings: dict[str, Any] = {"settings": own, "files": dict(files)}
    settings |= {"base": describe_base(base, folder)} if base else {}
    settings |= {"excluded": list(excluded)} if excluded else {}
    single = {field: refs[0] for field, refs in inputs.items() if len(refs) == 1}
    several = {f"{field}.{i}": ref for field, refs in inputs.items() if len(refs) > 1 for i, ref in enumerate(refs)}
    return Execution(
        id=uuid4().hex,
        run_id=job.run_id,
        step=job.name,
        uses=job.uses,
        revision=str(job.kind.revision),
        key=key,
        settings=settings,
        inputs=single | several,
        status="FAILED",
        environment=describe_environment(),
        seed=getattr(spec, "seed", None),
    )


def _record(lineage: Lineage, execution: Execution, ref: ArtifactRef, store: Store) -> None:
    subjects: list[Subject] = []
    if ref.kind == "manifest":
        subjects = list(_subjects(Manifest.model_validate_json(store.read(ref, "manifest.json"))))
    done = replace(execution, status="COMPLETED", output=ref, ended_at=now())
    lineage.record(done, contents=store.files(ref), subjects=subjects)


def _subjects(manifest: Manifest) -> Iterator[Subject]:
    """The pictures, captions and consents of a dataset."""
    for picture in manifest.pictures:
        yield Subject(picture.sha256, "picture", f"picture {picture.source}")
        if picture.caption:
            yield Subject(sha256_bytes(picture.caption.encode()), "caption", f"caption {picture.caption[:80]!r}")
        if picture.consent:
            yield Subject(picture.consent, "consent", f"consent {picture.consent}")
