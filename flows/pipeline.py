"""`run_pipeline`: the main path, from a checked spec to a registered adapter."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flows.errors import PipelineFailed
from flows.plan import make_job, plan_pipeline, registered_adapter
from flows.prefect import run_as_flow, step_task
from flows.server import prefect_server
from flows.spec import PipelineSpec
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.compute import fitting_threads, threads
from lora_engine.errors import EngineError, InterruptedRun
from registry.entities import RunStatus
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from tasks.imports import import_for
from tasks.step import Outcome, locate_base


@dataclass(frozen=True)
class PipelineResult:
    """What a run gave.

    Args:
        outcomes: Per step, its artifact and whether it was there already.
        changed: Per step that had to run, why; empty when nothing had changed, and then nothing was started either.
        versions: What each `register` step says of its version: the content of `version.json`.
    """

    outcomes: Mapping[str, Outcome]
    changed: Mapping[str, str]
    versions: Mapping[str, dict[str, Any]]

    @property
    def refusals(self) -> dict[str, list[str]]:
        """Per `register` step whose alias was refused by the gates: the reasons."""
        return {name: version["refused"] for name, version in self.versions.items() if version["refused"]}


def run_pipeline(spec: PipelineSpec, home: Home, *, force: Collection[str] = ()) -> PipelineResult:
    """Runs every step that has to run, independent ones at the same time, and believes no result unverified.

    Args:
        spec: The pipeline.
        home: Where all state lives.
        force: Names of steps to run even if their results are there.

    Raises:
        EngineError, RegistryError, OSError: The first failure, after the steps that do not depend on it have finished.
    """
    planned = plan_pipeline(spec, home, force=force)
    outcomes = {step.name: Outcome(step.ref, cached=True) for step in planned if step.ref is not None}
    if len(outcomes) < len(planned):
        with prefect_server(), _recorded_run(spec, home) as run_id, threads(fitting_threads(_bases(spec))):
            # While Prefect's server starts, and within `threads`, which torch reads when it is imported.
            import_for((spec.steps[step.name] for step in planned if step.ref is None), spec.folder)
            outcomes = run_as_flow(spec.name, submit_steps)(spec, home, run_id, force)
    changed = {step.name: step.reason for step in planned if not outcomes[step.name].cached}
    return PipelineResult(outcomes, changed, _read_versions(spec, outcomes, open_store(home)))


def submit_steps(spec: PipelineSpec, home: Home, run_id: str, force: Collection[str]) -> dict[str, Outcome]:
    """Submits each step with the futures of those that it takes from, and waits for all."""
    futures: dict[str, Any] = {}
    for name, step in spec.steps.items():
        inputs: dict[str, list[Any]] = {}
        for field, target, _ in step.references():
            source = futures[target] if target in futures else registered_adapter(target, home)
            inputs.setdefault(field, []).append(source)
        job = make_job(spec, name, home, run_id, force=name in force)
        futures[name] = step_task(name).submit(job, inputs)
    results = {name: _wait(future) for name, future in futures.items()}
    failures = {name: result for name, result in results.items() if isinstance(result, BaseException)}
    # What failed by itself comes before what could not start because of it.
    for name, error in sorted(failures.items(), key=lambda item: isinstance(item[1], PipelineFailed)):
        if isinstance(error, EngineError | RegistryError | OSError):
            raise error
        raise PipelineFailed(f"{type(error).__name__}: {error}", where=f"step {name!r}") from error
    return results


def _wait(future: Any) -> Any:
    """What the step gave, or the error that it ended with."""
    future.wait()
    if future.state.is_pending():
        return PipelineFailed("not started, because a step that it takes from failed")
    return future.result(raise_on_failure=False)


@contextmanager
def _recorded_run(spec: PipelineSpec, home: Home) -> Iterator[str]:
    """Records that a run began and how it ended; runs that died without a word are marked first."""
    lineage = Lineage(home.lineage_url)
    status: RunStatus = "FAILED"
    try:
        lineage.find_dead_runs()
        run = lineage.start_run(spec.name, spec.source)
        try:
            yield run.id
            status = "COMPLETED"
        except (InterruptedRun, KeyboardInterrupt):
            status = "INTERRUPTED"
            raise
        finally:
            lineage.finish_run(run.id, status)
    finally:
        lineage.close()


def _bases(spec: PipelineSpec) -> list[BaseSource]:
    named = {base for step in spec.steps.values() if (base := getattr(step, "base", None))}
    return [resolve_base(locate_base(base, spec.folder)) for base in sorted(named)]


def _read_versions(spec: PipelineSpec, outcomes: Mapping[str, Outcome], store: Store) -> dict[str, dict[str, Any]]:
    return {
        name: json.loads(store.read(outcomes[name].ref, "version.json"))
        for name, step in spec.steps.items()
        if step.uses == "register"
    }
