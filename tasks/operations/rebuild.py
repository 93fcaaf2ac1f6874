"""Executes the rebuild of recorded steps, in a separate workspace.

Does not read the user's folders or pipeline file, and writes nothing outside the workspace.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_engine.compute import threads
from registry.entities import ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from tasks.execution import execute
from tasks.job import Job, prepare_job
from tasks.operations.rebuild_plan import RebuildPlan, RebuildStep
from tasks.operations.upstream import FILE


def rebuild(plan: RebuildPlan, store: Store, home: Home, run: tuple[str, Mapping[str, Any]]) -> dict[str, Execution]:
    """Executes the steps of a plan in the workspace; returns the executions by step.

    Args:
        plan: The plan.
        store: The user's store; reused artifacts are copied from it, verified.
        home: The workspace.
        run: Name and spec of the run, for the workspace's lineage.

    Raises:
        EngineError, RegistryError, OSError: The error of a step.
    """
    target, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        for ref, _ in plan.reused.values():
            _copy(ref, store, target, home)
        run_id = lineage.start_run(*run).id
        rebuilt: dict[str, ArtifactRef] = {}
        for step in plan.steps:
            inputs: dict[str, tuple[ArtifactRef, ...]] = {}
            for role, ref in step.recorded.inputs.items():
                if ref.kind != FILE:
                    name = role.partition(".")[0]
                    inputs[name] = (*inputs.get(name, ()), rebuilt.get(ref.sha256, ref))
            with threads(recorded_threads(step.recorded)):
                outcome = execute(_job(step, target, home), inputs, home, run_id, live=False)
            if step.recorded.output is not None:
                rebuilt[step.recorded.output.sha256] = outcome.ref
        lineage.finish_run(run_id, "COMPLETED")
        return {execution.step: execution for execution in lineage.executions(run_id)}
    finally:
        lineage.close()


def recorded_threads(step: Execution) -> int | None:
    """Returns the number of threads that a step computed with; None if it is unknown."""
    count = str(step.environment.get("compute", {}).get("threads") or step.environment.get("threads") or "")
    return int(count) if count.isdecimal() and int(count) else None


def _copy(ref: ArtifactRef, source: Store, target: Store, home: Home) -> None:
    with tempfile.TemporaryDirectory(dir=home.work) as name:
        folder = Path(name) / "artifact"
        source.checkout(ref, folder)
        target.put(ref.kind, folder)


def _job(step: RebuildStep, store: Store, home: Home) -> Job:
    folder = home.path / "files" / step.name
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, str] = {}
    for role, source in step.files.items():
        if isinstance(source, ArtifactRef):
            (name,) = store.files(source)
            store.checkout_file(source, name, folder / name)
            paths[role] = name
        else:
            paths[role] = str(source)
    job = prepare_job(step.name, step.spec.model_copy(update=paths), folder)
    # Exclude what was excluded then, whatever is revoked now.
    recorded = step.recorded.settings
    return replace(job, excluded=tuple(recorded.get("excluded", ())), absent=recorded.get("absent", {}))
