"""Runs a pipeline, from a validated spec to a registered adapter.

From `loraline run` to an optimizer step:

1. `flows.cli.pipeline.run` reads the pipeline file (`flows.spec.load_spec`) and calls `run_pipeline`.
2. `flows.plan.plan_pipeline` reads the user's files and every earlier result once, and finds the steps to run.
3. `run_steps` submits those steps as Prefect tasks, each with the futures of its upstream steps.
4. `tasks.execution.execute` checks out a step's inputs, calls the step and records it in lineage.
5. `tasks.steps.train.train` starts `lora_engine.training.spawn.train_in_child`; the child calls `training.run.train`.
6. `training.fitting` prepares base, adapter and data; `training.loop.fit` is the only loop.
7. `tasks.steps.register.register` gives the adapter a version; `flows.registered` reads its current state.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, NoReturn

from flows.crashed import mark_crashed, tag_of
from flows.plan import Plan, PlannedStep, plan_pipeline
from flows.prefect import FLOW, current_flow_run, publish_table, run_as_flow
from flows.registered import read_registered
from flows.result import PipelineResult, final_state, tabulate, tabulate_failure
from flows.runners import RunnerSettings, read_runner, runners, started_runner
from flows.selection import ALL_STEPS, Selection
from flows.server import prefect_server
from flows.spec import PipelineSpec
from flows.step_tasks import CONDITION, SkippedStep, submit_step, wait_for_result
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.compute import fitting_threads, threads
from lora_engine.errors import EngineError, InterruptedRun
from registry.entities import RunStatus
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.live_run import end_dead_trainings
from tasks.adoption import record_adoption
from tasks.errors import NotStarted, PipelineFailed
from tasks.execution import record_hit
from tasks.imports import import_for
from tasks.job import Outcome
from tasks.operations.access import require_training
from tasks.progress import StepEvent, publish
from tasks.run_entry import recording
from tasks.step import locate_base
from tasks.steps.register import Register

_log = logging.getLogger(__name__)


def run_pipeline(
    spec: PipelineSpec,
    home: Home,
    *,
    force: Collection[str] = (),
    selection: Selection = ALL_STEPS,
    runner: RunnerSettings | None = None,
) -> PipelineResult:
    """Runs every step that is not cached, independent ones concurrently; cached results are verified.

    Args:
        spec: The pipeline.
        home: The home with all state.
        force: Names of steps to run even if they are cached.
        selection: The steps of a partial run.
        runner: The task runner of the steps; None takes that of the home.

    Raises:
        EngineError, RegistryError, OSError: The first failure, once all steps that do not depend on it have finished.
    """
    settings = runner or read_runner(home)
    plan = plan_pipeline(spec, home, force=force, selection=selection)
    for step in plan.steps:
        _log.info("step %s: %s", step.name, step.reason)
    outer = current_flow_run()  # of `retrain`, whose run shows the table
    if not any(step.runs for step in plan.steps):
        result = _collect(plan, plan.hits, home)
        if outer is not None:
            publish_table(plan.name, tabulate(result, home))
        return result

    require_training(home, _names_to_register(plan))

    def run_and_publish(run_id: str) -> PipelineResult:
        with closing(Lineage(home.lineage_url)) as lineage:
            mark_crashed({run.id: run.status for run in lineage.runs()}, FLOW)
        outcomes, errors = run_steps(plan.steps, home, run_id)
        if errors:
            reasons = {step.name: step.reason for step in plan.steps}
            try:
                publish_table(plan.name, tabulate_failure(reasons, plan.hits | outcomes, errors, plan.skipped), outer)
            finally:  # also if the server is gone
                raise_first(errors)
        result = _collect(plan, plan.hits | outcomes, home)
        publish_table(plan.name, tabulate(result, home), outer)
        return result

    with prefect_server(), _recorded_run(plan, home) as run_id, threads(fitting_threads(bases_of([spec]))):
        # Here, because Prefect's server starts meanwhile, and because torch reads `threads` at its import.
        if not runners[settings.type].isolated:
            import_for(step.job for step in plan.steps if step.runs)
        with started_runner(settings, home) as started:
            return run_as_flow(plan.name, run_and_publish, final_state, tag=tag_of(run_id), runner=started)(run_id)


def adopt_results(spec: PipelineSpec, home: Home) -> Plan:
    """Adopts every result that a step with the same revision recorded under another cache key; executes nothing.

    Returns:
        The plan; its steps with both an adoption and an outcome were adopted.

    Raises:
        RegistryError: The home cannot be read or written.
    """
    plan = plan_pipeline(spec, home, adopt=True, download=False)
    if any(step.adoption for step in plan.steps):
        with _recorded_run(plan, home):
            pass
    return plan


def _collect(plan: Plan, outcomes: Mapping[str, Outcome | SkippedStep], home: Home) -> PipelineResult:
    done = {step.name: outcome for step in plan.steps if isinstance(outcome := outcomes.get(step.name), Outcome)}
    skipped = {name: item.reason for name, item in outcomes.items() if isinstance(item, SkippedStep)}
    changed = {step.name: step.reason for step in plan.steps if step.name in done and not done[step.name].cached}
    return PipelineResult(done, changed, read_registered(plan, done, home), plan.skipped | skipped)


def run_steps(
    steps: Sequence[PlannedStep], home: Home, run_id: str
) -> tuple[dict[str, Outcome | SkippedStep], dict[str, BaseException]]:
    """Submits each step that is not cached, with the futures of its upstream steps, and waits for all.

    Returns:
        The results by step, and by the other steps why they failed or did not start.
    """
    futures: dict[str, Any] = {}
    for step in steps:
        if step.runs:
            inputs = {
                field: [futures[source] if isinstance(source, str) else source for source in sources]
                for field, sources in step.sources.items()
            }
            if step.condition is not None:
                inputs[CONDITION] = [futures[step.condition]]
            futures[step.name] = submit_step(step.job, inputs, home, run_id, force=step.force)
    results = {name: wait_for_result(future) for name, future in futures.items()}
    errors = {name: result for name, result in results.items() if isinstance(result, BaseException)}
    return {name: result for name, result in results.items() if name not in errors}, errors


def raise_first(errors: Mapping[str, BaseException]) -> NoReturn:
    """Raises the first error of a step, not that of a step which another kept from starting.

    Raises:
        EngineError, RegistryError, OSError: The error; another error is the cause of a `PipelineFailed`.
    """
    name, error = min(errors.items(), key=lambda item: isinstance(item[1], NotStarted))
    if isinstance(error, EngineError | RegistryError | OSError):
        raise error
    raise PipelineFailed(f"{type(error).__name__}: {error}", where=f"step {name!r}") from error


@contextmanager
def _recorded_run(plan: Plan, home: Home) -> Iterator[str]:
    """Records a run, its cached and adopted steps and its status; first marks runs without a process as CRASHED."""
    lineage = Lineage(home.lineage_url)
    status: RunStatus = "FAILED"
    try:
        lineage.find_dead_runs()
        end_dead_trainings(home, lineage)
        partial = {"partial": plan.selection.to_json()} if plan.selection.is_partial else {}
        run = lineage.start_run(plan.name, {**plan.source, **partial})
        try:
            with recording(home, run.id, {step.name: step.job.kind.name for step in plan.steps}):
                for name, reason in plan.skipped.items():
                    publish(StepEvent(name, "skipped", text=reason))
                for step in plan.steps:
                    if step.outcome is not None and step.adoption is not None:
                        record_adoption(step.job, step.inputs, step.adoption, lineage, run.id)
                    elif step.outcome is not None:
                        record_hit(step.job, step.inputs, step.outcome, lineage, run.id)
                yield run.id
            status = "COMPLETED"
        except (InterruptedRun, KeyboardInterrupt):
            status = "INTERRUPTED"
            raise
        finally:
            lineage.finish_run(run.id, status)
    finally:
        lineage.close()


def _names_to_register(plan: Plan) -> set[str]:
    """Returns the names under which the steps that are not cached register adapters."""
    specs = (step.job.spec for step in plan.steps if not step.cached)
    return {spec.name for spec in specs if isinstance(spec, Register)}


def bases_of(specs: Iterable[PipelineSpec]) -> list[BaseSource]:
    """Returns the base models that the steps of pipelines use."""
    bases = {
        (base, spec.folder) for spec in specs for step in spec.steps.values() if (base := getattr(step, "base", None))
    }
    return [resolve_base(base) for base in sorted(locate_base(base, folder) for base, folder in bases)]
