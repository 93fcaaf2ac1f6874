"""Runs pipelines with Prefect: one flow per run, one task per step, all state under the home.

Prefect executes, orders, retries and displays; it is neither the record nor the cache (docs/adr/0004). Importing this
module is cheap; importing Prefect itself takes seconds and happens inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from lora_engine.lean import collection_paused
from registry.entities import ArtifactRef
from registry.home import Home
from tasks.execution import execute
from tasks.job import Job, Outcome

if TYPE_CHECKING:
    from prefect import Task
    from prefect.futures import PrefectFuture

_Result = TypeVar("_Result")


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
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def run_as_flow(name: str, function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Wraps a function as a Prefect flow whose runs have the pipeline's name."""
    with collection_paused():
        from prefect import flow

    wrapped: Any = flow(name="loraline", flow_run_name=name, validate_parameters=False, persist_result=False)(function)
    return wrapped  # type: ignore[no-any-return]


def submit_step(
    job: Job, inputs: Mapping[str, Sequence[Any]], home: Home, run_id: str, *, force: bool
) -> PrefectFuture[Outcome]:
    """Submits a step as a Prefect task of the same name.

    Args:
        job: The step.
        inputs: Reference field -> artifacts, or futures of the steps that make them.
        home: The home with all state.
        run_id: The run that the execution belongs to.
        force: True runs it even if it is cached.
    """
    from prefect.utilities.annotations import quote

    task = _task().with_options(name=job.name, task_run_name=job.name)
    future: PrefectFuture[Outcome] = task.submit(quote(job), inputs, quote(home), run_id, force)
    return future


@lru_cache(maxsize=1)
def _task() -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    declare = task(
        cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=1, retry_condition_fn=_is_transient
    )
    return declare(_execute)


def _execute(job: Job, inputs: Mapping[str, list[Outcome | ArtifactRef]], home: Home, run_id: str, force: bool) -> Any:
    from prefect.states import Completed

    refs = {
        field: tuple(item.ref if isinstance(item, Outcome) else item for item in items)
        for field, items in inputs.items()
    }
    outcome = execute(job, refs, home, run_id, force=force)
    return Completed(name="Cached", data=outcome) if outcome.cached else outcome


async def _is_transient(task: Task[..., Any], task_run: Any, state: Any) -> bool:
    """Returns True for errors of a connection or a lock, which a retry may solve."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, ConnectionError | TimeoutError)
