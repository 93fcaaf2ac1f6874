"""Runs pipelines with Prefect: one flow per run, one task per step (`flows.step_tasks`), all state under the home.

Prefect executes, orders, retries and displays; it is neither the record nor the cache (docs/adr/0004). Importing this
module is cheap; importing Prefect itself takes seconds and happens inside the functions.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from flows.step_tasks import relay_of_flow
from flows.telemetry import is_traced, start_tracing
from lora_engine.lean import collection_paused
from registry.home import Home
from registry.store.redaction import SecretFreeErrors, redact, redact_values
from tasks.warnings import LOGGED_PACKAGES

if TYPE_CHECKING:
    from uuid import UUID

    from flows.result import FinalState
    from flows.runners import StartedRunner

_Result = TypeVar("_Result")
FLOW = "loraline"
"""Name of the flow of every pipeline."""


def configure_prefect(home: Home) -> None:
    """Points Prefect at the home, before its first import; variables that are set already win.

    Without a server (`PREFECT_API_URL`), the run starts its own: see `flows.server`.
    """
    settings = {
        "PREFECT_HOME": str(home.prefect),
        # The first request waits for a server that is still starting.
        "PREFECT_API_REQUEST_TIMEOUT": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if is_traced():
        settings["PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY"] = "true"  # spans of flow and task runs
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def run_as_flow(
    name: str,
    function: Callable[..., _Result],
    describe: Callable[[_Result], FinalState] | None = None,
    *,
    tag: str = "",
    runner: StartedRunner | None = None,
) -> Callable[..., _Result]:
    """Wraps a function as a Prefect flow whose runs have the pipeline's name.

    Args:
        name: The pipeline's name.
        function: The function. The wrapper returns its result, and raises its errors, whatever the run's state.
        describe: Gives the final state of the flow run by the result; None lets Prefect choose it.
        tag: A tag of the flow run and its task runs; empty for none.
        runner: Executes the tasks; None means threads.
    """
    with collection_paused():
        from prefect import flow, tags

    start_tracing()
    results: list[_Result] = []

    def run(*args: Any) -> Any:
        with SecretFreeErrors():
            results.append(function(*args))
        return None if describe is None else to_prefect(describe(results[0]))

    executes = runner.prefect if runner is not None else None
    wrapped: Any = flow(
        name=FLOW, flow_run_name=name, validate_parameters=False, persist_result=False, task_runner=executes
    )(_run_current)

    def call(*args: Any) -> _Result:
        results.clear()
        token, relay = _current.set(lambda: run(*args)), relay_of_flow.set(runner.relay if runner is not None else None)
        try:
            with tags(*filter(None, [tag])), _heartbeats_if_configured():
                state = wrapped(return_state=True)
        finally:
            _current.reset(token)
            relay_of_flow.reset(relay)
        if not results:
            state.result()  # raises the function's error
        return results[0]

    return call


@contextmanager
def _heartbeats_if_configured() -> Iterator[None]:
    """Turns heartbeats of flow runs off unless `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` is set.

    At the end of a flow run, Prefect waits up to a second for the thread that sends them. Only the automation in
    `deploy/requeue.yaml`, which needs that variable, reads them; `flows.crashed` finds dead processes without them.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

    configured = "heartbeat_frequency" in get_current_settings().flows.model_fields_set
    with nullcontext() if configured else temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


_current: ContextVar[Callable[[], Any]] = ContextVar("current")


def _run_current() -> Any:
    """Calls the function of the flow; a name in this module, because workers get a copy of the flow."""
    return _current.get()()


def to_prefect(state: FinalState, data: Any = None) -> Any:
    """Returns Prefect's state of type FAILED or COMPLETED; FAILED states have no data."""
    from prefect.states import Completed, Failed

    message = redact(state.message)
    if state.failed:
        return Failed(name=state.name, message=message)
    return Completed(name=state.name, message=message, data=data)


def current_flow_run() -> UUID | None:
    """Returns the id of the Prefect flow run that the caller runs in; None outside a flow."""
    module = sys.modules.get("prefect.context")
    context = module.FlowRunContext.get() if module is not None else None
    return context.flow_run.id if context is not None and context.flow_run is not None else None


def publish_table(name: str, rows: list[dict[str, str]], flow_run: UUID | None = None) -> None:
    """Creates a table artifact of a flow run; its key is the pipeline's name in lower case with dashes.

    Args:
        name: The pipeline's name.
        rows: The rows.
        flow_run: The flow run; None means the current one.
    """
    from prefect.artifacts import TableArtifact

    key = _artifact_key(name)
    description = f"Steps of the pipeline `{name}`, and metrics against production."
    TableArtifact(key=key, description=description, table=redact_values(rows), flow_run_id=flow_run).create()


def publish_markdown(name: str, suffix: str, text: str) -> None:
    """Creates a Markdown artifact of the current flow run; its key is the pipeline's name and a suffix."""
    from prefect.artifacts import MarkdownArtifact

    MarkdownArtifact(key=f"{_artifact_key(name)}-{suffix}", markdown=redact(text)).create()


def _artifact_key(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "pipeline"


@contextmanager
def logs_of_flow_run() -> Iterator[None]:
    """Sends our log records of level INFO or higher, also those of steps, to the logs of the current flow run."""
    from prefect.logging.handlers import APILogHandler
    from prefect.runtime import flow_run

    run_id = flow_run.get_id()

    def assign(record: logging.LogRecord) -> bool:
        # Steps run in threads and in a subflow, whose logs Prefect's UI shows on another page.
        record.flow_run_id = run_id
        record.msg, record.args = redact(record.getMessage()), ()
        return True

    handler = APILogHandler()
    handler.addFilter(assign)
    loggers = [logging.getLogger(package) for package in LOGGED_PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
