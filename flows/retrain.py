"""Defines the scheduled flow `retrain`: if anything changed since the last run, trains, compares, stages and releases.

Deployed by `prefect.yaml`. Imported by workers and tests only, because it imports Prefect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.approval import ApprovalAnswer, ApprovalRequest, read_answer
from flows.crashed import requeue_crashed
from flows.decisions import mark_lost_answers, watched_decision
from flows.events import sending_events
from flows.pipeline import run_pipeline
from flows.prefect import logs_of_flow_run, publish_markdown, to_prefect
from flows.releasing import continue_release, describe_changes, release_versions
from flows.result import FinalState, PipelineResult, final_state
from flows.spec import PipelineSpec, load_pipelines, load_spec
from flows.telemetry import start_tracing
from flows.waiting_runs import requeue_answered
from flows.warm_start import warm_started
from lora_engine.lean import optional_hidden
from registry.home import Home
from registry.store.redaction import SecretFreeErrors
from tasks.progress import stopping_on_sigterm

_log = logging.getLogger("flows.retrain")  # a worker loads this file under another module name
start_tracing()  # before the span of the flow run starts


@dataclass(frozen=True)
class Retraining:
    """Result of a scheduled run.

    Args:
        changed: Name of each step that ran -> why; empty if every step was cached.
        versions: `name@version` of each new version.
        staged: The new versions that got the requested alias.
        compared: Per version and metric: the value in production (None if there is none) and the new value.
    """

    changed: dict[str, str]
    versions: list[str]
    staged: list[str]
    compared: dict[str, dict[str, tuple[float | None, float | None]]]


@flow(name="retrain", validate_parameters=False)
def retrain(
    spec: str, home: str = ".loraline", pipeline: str | None = None, parameters: Mapping[str, str] | None = None
) -> Any:
    """Runs a pipeline if any of its inputs changed, and releases its version as the file's `retraining` says.

    Args:
        spec: Path of the pipeline file.
        home: Path of the home.
        pipeline: Name of the pipeline, if the file expands to several.
        parameters: Values of the file's parameters.

    The flow run ends in a state that docs/scheduling.md lists, with a table artifact and our log records. A run that
    was suspended for an approval starts here again and does not repeat the pipeline.

    Returns:
        A `Retraining` as a dict; None for a run that was suspended.

    Raises:
        prefect.exceptions.FailedRun: A version failed its gates, was refused or rolled back; has the state's message.
        prefect.exceptions.Pause: The run waits for an approval.
    """
    opened = Home.open(Path(home))
    with optional_hidden(), stopping_on_sigterm(), SecretFreeErrors(), logs_of_flow_run(), sending_events(opened.path):
        loaded = _load(Path(spec), pipeline, parameters or {})
        waited = read_answer()
        if waited is not None:
            return _finish(loaded, opened, *waited)
        try:
            return _tick(loaded, opened)
        finally:
            requeue_answered()  # those that the deployment's limit cancelled because of this run


def _tick(spec: PipelineSpec, home: Home) -> Any:
    requeue_crashed("retrain")
    mark_lost_answers(home)
    result = run_pipeline(warm_started(spec, home), home)
    state = final_state(result)
    for name, reasons in result.refusals.items():
        _log.warning("step %s: the alias was refused: %s", name, "; ".join(reasons))
    changes = describe_changes(home, result, spec.retraining.alias)
    if changes:
        publish_markdown(spec.name, "changes", changes)
    state = release_versions(spec, home, result, state)
    _log.log(logging.ERROR if state.failed else logging.INFO, "%s: %s", state.name, state.message)
    return to_prefect(state, asdict(_summarize(result)))


def _finish(spec: PipelineSpec, home: Home, request: ApprovalRequest, answer: ApprovalAnswer | None) -> Any:
    """Continues a run that was suspended: applies the answer."""
    with watched_decision(spec, home):
        state: FinalState = continue_release(spec, home, request, answer)
    _log.log(logging.ERROR if state.failed else logging.INFO, "%s: %s", state.name, state.message)
    return to_prefect(state)


def _load(path: Path, pipeline: str | None, parameters: Mapping[str, str]) -> PipelineSpec:
    """Reads the pipeline file, and selects one of its pipelines by name."""
    if pipeline is None:
        return load_spec(path, parameters=parameters)
    (selected,) = load_pipelines(path, parameters=parameters, names=[pipeline])
    return selected


def _summarize(result: PipelineResult) -> Retraining:
    new = {registered.version.ref: registered for registered in result.new_versions}
    staged = [ref for ref, registered in new.items() if registered.has_alias]
    compared = {ref: dict(registered.compared) for ref, registered in new.items()}
    return Retraining(dict(result.changed), list(new), staged, compared)
