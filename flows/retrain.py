"""Defines the scheduled flow `retrain`: if anything changed since the last run, trains, compares and stages.

Deployed by `prefect.yaml`. Imported by workers and tests only, because it imports Prefect.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.crashed import requeue_crashed
from flows.pipeline import run_pipeline
from flows.prefect import logs_of_flow_run, to_prefect
from flows.result import PipelineResult, final_state
from flows.spec import load_spec
from flows.telemetry import start_tracing
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
def retrain(spec: str, home: str = ".loraline") -> Any:
    """Runs a pipeline if any of its inputs changed.

    Args:
        spec: Path of the pipeline file.
        home: Path of the home.

    The flow run ends in the state of `flows.result.final_state`, with one table artifact and our log records.

    Returns:
        A `Retraining` as a dict.

    Raises:
        prefect.exceptions.FailedRun: A new version failed its gates or was refused its alias; has the state's message.
    """
    opened = Home.open(Path(home))
    with optional_hidden(), stopping_on_sigterm(), SecretFreeErrors(), logs_of_flow_run():
        requeue_crashed("retrain")
        result = run_pipeline(load_spec(Path(spec)), opened)
        state = final_state(result)
        _log.log(logging.ERROR if state.failed else logging.INFO, "%s: %s", state.name, state.message)
        for name, reasons in result.refusals.items():
            _log.warning("step %s: the alias was refused: %s", name, "; ".join(reasons))
    return to_prefect(state, asdict(_summarize(result)))


def _summarize(result: PipelineResult) -> Retraining:
    new = {registered.version.ref: registered for registered in result.new_versions}
    staged = [ref for ref, registered in new.items() if registered.has_alias]
    compared = {ref: dict(registered.compared) for ref, registered in new.items()}
    return Retraining(dict(result.changed), list(new), staged, compared)
