"""Runs pipelines with Prefect: one flow per run, one task per step, all state under the home.

Prefect executes, orders, retries and displays; it is neither the record nor the cache (docs/adr/0004). Importing this
module is cheap; importing Prefect itself takes seconds and happens inside the functions.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flows.telemetry import describe_span, is_traced, start_tracing
from lora_engine.errors import InterruptedRun
from lora_engine.lean import collection_paused
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from registry.store.redaction import SecretFreeErrors, redact, redact_values
from tasks.condition import explain_unmet, parse_condition, read_condition_report
from tasks.errors import NotStarted, PipelineFailed, SpecError, StepTimeout
from tasks.execution import execute
from tasks.imports import import_for
from tasks.job import Job, Outcome
from tasks.progress import StepEvent, publish
from tasks.relay import Relay, relayed
from tasks.resources import retries_of
from tasks.step import Inputs

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import Task
    from prefect.futures import PrefectFuture

    from flows.result import FinalState
    from flows.runners import StartedRunner

_Result = TypeVar("_Result")
FLOW = "loraline"
"""Name of the flow of every pipeline."""
CONDITION = "when"
"""Input of a step whose condition is about a report that its run makes."""
_NOT_STARTED = "not started, because an upstream step failed"
_PACKAGES = ("flows", "tasks", "registry", "lora_engine")


@dataclass(frozen=True)
class SkippedStep:
    """The result of a step that did not run: its condition was not met, or a step that it takes from was skipped.

    Attributes:
        name: The step's name.
        reason: Why it was skipped.
    """

    name: str
    reason: str


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
        token, relay = _current.set(lambda: run(*args)), _relay.set(runner.relay if runner is not None else None)
        try:
            with tags(*filter(None, [tag])):
                state = wrapped(return_state=True)
        finally:
            _current.reset(token)
            _relay.reset(relay)
        if not results:
            state.result()  # raises the function's error
        return results[0]

    return call


_current: ContextVar[Callable[[], Any]] = ContextVar("current")
_relay: ContextVar[Relay | None] = ContextVar("relay", default=None)


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
    loggers = [logging.getLogger(package) for package in _PACKAGES]
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


def submit_step(
    job: Job, inputs: Mapping[str, Sequence[Any]], home: Home, run_id: str, *, force: bool
) -> PrefectFuture[Outcome | SkippedStep]:
    """Submits a step as a Prefect task of the same name.

    Args:
        job: The step.
        inputs: Reference field -> artifacts, or futures of the steps that make them.
        home: The home with all state.
        run_id: The run that the execution belongs to.
        force: True runs it even if it is cached.
    """
    retries = retries_of(job.spec.retries)
    task = _task().with_options(
        name=job.name,
        task_run_name=job.name,
        retries=retries.count,
        retry_delay_seconds=retries.delay,
        retry_condition_fn=_is_no_stop if retries.any else _is_transient,
    )
    work = _Whole((job, home, _relay.get()))
    future: PrefectFuture[Outcome | SkippedStep] = task.submit(work, inputs, run_id, force)
    return future


def submit_work(name: str, work: Callable[[], _Result], prefix: str = "") -> PrefectFuture[_Result]:
    """Submits a function as a Prefect task of this name, to the task runner of the current flow.

    Args:
        name: The name.
        work: The function; a task runner with processes needs one that can be pickled.
        prefix: Goes before the names of steps in events from other processes, with a slash.
    """
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    declare = task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    relay = _relay.get()
    if relay is not None and prefix:
        relay = replace(relay, prefix=f"{prefix}/")
    future: PrefectFuture[_Result] = declare(_perform).submit(_Whole((work, relay)))
    return future


def wait_for_result(future: PrefectFuture[Any]) -> Any:
    """Waits for a task; returns its result or its error, such as `NotStarted` because of another one."""
    from prefect.exceptions import UpstreamTaskError

    try:
        future.wait()
        if future.state.is_pending():
            return NotStarted(_NOT_STARTED)
        result = future.result(raise_on_failure=False)
    except UpstreamTaskError:
        return NotStarted(_NOT_STARTED)
    except Exception as error:  # each task runner has its own for a worker that died
        return PipelineFailed(
            f"a worker ended ({type(error).__name__}: {error})",
            remedy="see whether the system killed it for its memory; run the same command to continue",
        )
    return result


@lru_cache(maxsize=1)
def _task() -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    return task(cache_policy=NO_CACHE, persist_result=False)(_execute)


class _Whole:
    """A value in which neither Prefect nor Dask looks for futures; they would visit and rebuild dataclasses."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _perform(work: _Whole) -> Any:
    function, relay = work.value
    with relayed(relay):
        return function()


def _execute(
    work: _Whole, inputs: Mapping[str, list[Outcome | SkippedStep | ArtifactRef]], run_id: str, force: bool
) -> Any:
    job, home, relay = work.value
    with relayed(relay):
        if relay is not None:  # the run imported them in its own process only
            import_for([job])
        return _execute_here(job, inputs, home, run_id, force)


def _execute_here(
    job: Job, inputs: Mapping[str, list[Outcome | SkippedStep | ArtifactRef]], home: Home, run_id: str, force: bool
) -> Any:
    from prefect.states import Completed

    reason = _why_skipped(job, inputs, home)
    if reason:
        publish(StepEvent(job.name, "skipped", text=reason))
        return Completed(name="Skipped", message=redact(reason), data=SkippedStep(job.name, reason))
    refs = {
        field: tuple(item.ref if isinstance(item, Outcome) else item for item in items)
        for field, items in inputs.items()
        if field != CONDITION
    }
    with _prefect_slot(job, home):
        outcome = execute(job, cast(Inputs, refs), home, run_id, force=force)
    describe_span(
        {
            "loraline.run": run_id,
            "loraline.step": job.name,
            "loraline.uses": job.kind.name,
            "loraline.cached": outcome.cached,
            "loraline.artifact": outcome.ref.sha256,
        }
    )
    return Completed(name="Cached", data=outcome) if outcome.cached else outcome


def _why_skipped(job: Job, inputs: Mapping[str, list[Outcome | SkippedStep | ArtifactRef]], home: Home) -> str:
    """Returns why a step does not run: an input was skipped, or its condition is not met; empty if it runs."""
    for item in (item for items in inputs.values() for item in items):
        if isinstance(item, SkippedStep):
            return f"takes from {item.name}, which is skipped"
    if CONDITION not in inputs or job.spec.when is None:
        return ""
    (report,) = inputs[CONDITION]
    ref = report.ref if isinstance(report, Outcome) else cast(ArtifactRef, report)
    return explain_unmet(parse_condition(job.spec.when), read_condition_report(open_store(home), ref))


@contextmanager
def _prefect_slot(job: Job, home: Home) -> Iterator[None]:
    """Holds a slot of the global concurrency limit that the home's settings name, for a step that uses a model."""
    name, resources = home.settings.concurrency_limit, job.spec.resources
    if name is None or not (job.base or job.models) or (resources and resources.device == "cpu"):
        yield
        return
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    publish(StepEvent(job.name, "waiting", text=f"waiting for the concurrency limit {name}"))
    try:
        with concurrency(name, strict=True):
            yield
    except ConcurrencySlotAcquisitionError as error:
        raise SpecError(
            f"concurrency_limit is {name!r}, which the Prefect server does not have or does not give",
            where=str(home.path / "loraline.yaml"),
            remedy=f"prefect gcl create {name} --limit 1; or remove the setting",
        ) from error


async def _is_transient(task: Task[..., Any], task_run: Any, state: Any) -> bool:
    """Returns True for a timeout, and for errors of a connection or a lock, which a retry may solve."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, ConnectionError | TimeoutError | StepTimeout)


async def _is_no_stop(task: Task[..., Any], task_run: Any, state: Any) -> bool:
    """Returns True for every error but a stop on request."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, InterruptedRun | KeyboardInterrupt)
