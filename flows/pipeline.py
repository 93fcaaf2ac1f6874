"""`run_pipeline`: the main path, from a checked spec to a registered adapter."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flows.errors import PipelineFailed
from flows.prefect import run_as_flow, step_task
from flows.spec import REGISTERED, PipelineSpec
from lora_engine.errors import EngineError, InterruptedRun
from registry.entities import RunStatus
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage import Lineage
from registry.store import Store
from tasks.step import Job, Outcome


@dataclass(frozen=True)
class PipelineResult:
    """What a run gave.

    Args:
        run_id: The run, for `loraline lineage`.
        outcomes: Per step, its artifact and whether it was there already.
        versions: What each `register` step says of its version: the content of `version.json`.
    """

    run_id: str
    outcomes: Mapping[str, Outcome]
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
    with _recorded_run(spec, home) as run_id:
        submit = run_as_flow(spec.name, submit_steps)
        outcomes: dict[str, Outcome] = submit(spec, home, run_id, force)
    return PipelineResult(run_id, outcomes, _read_versions(spec, outcomes, Store(home.store)))


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
    results = {name: future.result(raise_on_failure=False) for name, future in futures.items()}
    # A step that failed comes before those that could not start because of it.
    for result in results.values():
        if isinstance(result, EngineError | RegistryError | OSError):
            raise result
    for name, result in results.items():
        if isinstance(result, BaseException):
            raise PipelineFailed(f"{type(result).__name__}: {result}", where=f"step {name!r}") from result
    return results


def make_job(spec: PipelineSpec, name: str, home: Home, run_id: str, *, force: bool) -> Job:
    """One step of the spec as plain data."""
    step = spec.steps[name]
    return Job(name, step.uses, step.model_dump(mode="json"), str(spec.folder), str(home.path), run_id, force)


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


def registered_adapter(target: str, home: Home) -> Outcome:
    """The adapter that `name@version` or `name@alias` stands for, as if a step had given it."""
    match = REGISTERED.fullmatch(target)
    if match is None:
        raise PipelineFailed(f"{target!r} is neither a step nor name@version")
    from registry.versions import Versions

    return Outcome(Versions(home).get(match["name"], match["ref"]).artifact, cached=True)


def _read_versions(spec: PipelineSpec, outcomes: Mapping[str, Outcome], store: Store) -> dict[str, dict[str, Any]]:
    return {
        name: json.loads(store.read(outcomes[name].ref, "version.json"))
        for name, step in spec.steps.items()
        if step.uses == "register"
    }
