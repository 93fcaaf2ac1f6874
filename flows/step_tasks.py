"""Submits steps and other work as Prefect tasks, and waits for them.

Importing this module is cheap; importing Prefect itself takes seconds and happens inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flows.telemetry import describe_span
from lora_engine.errors import InterruptedRun
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from registry.store.redaction import redact
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
    from prefect import Task
    from prefect.futures import PrefectFuture

_Result = TypeVar("_Result")
CONDITION = "when"
"""Input of a step whose condition is about a report that its run makes."""
_NOT_STARTED = "not started, because an upstream step failed"

relay_of_flow: ContextVar[Relay | None] = ContextVar("relay", default=None)
"""The channel to the workers of the current flow; None for those in threads."""


@dataclass(frozen=True)
class SkippedStep:
    """The result of a step that did not run: its condition was not met, or a step that it takes from was skipped.

    Attributes:
        name: The step's name.
        reason: Why it was skipped.
    """

    name: str
    reason: str


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
    work = _Whole((job, home, relay_of_flow.get()))
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
    relay = relay_of_flow.get()
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
