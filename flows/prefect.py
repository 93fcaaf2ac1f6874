"""What Loraline asks of Prefect: one flow around a run, one task around each step, everything under the home.

Prefect executes, orders, retries and shows; it is not the record and not the cache (see docs/adr/0004). Importing this
module is cheap; importing Prefect itself takes seconds and happens inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from registry.entities import ArtifactRef
from registry.home import Home
from tasks.execution import execute
from tasks.job import Job, Outcome

if TYPE_CHECKING:
    from prefect import Task
    from prefect.futures import PrefectFuture

Result = TypeVar("Result")


def configure_prefect(home: Home) -> None:
    """Points Prefect at the home, before its first import; what the environment already says wins.

    Without a server (`PREFECT_API_URL`), the run gets one of its own: see `flows.server`.
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


def run_as_flow(name: str, function: Callable[..., Result]) -> Callable[..., Result]:
    """The function as a Prefect flow, whose runs carry the pipeline's name."""
    from prefect import flow

    wrapped: Any = flow(name="loraline", flow_run_name=name, validate_parameters=False, persist_result=False)(function)
    return wrapped  # type: ignore[no-any-return]


def submit_step(
    job: Job, inputs: Mapping[str, Sequence[Any]], home: Home, run_id: str, *, force: bool
) -> PrefectFuture[Outcome]:
    """Submits a step as a Prefect task of its own name.

    Args:
        job: The step.
        inputs: Reference field -> artifacts, and futures of the steps that will make them.
        home: Where all state lives.
        run_id: The run that it is recorded under.
        force: True runs it even if there is an earlier result.
    """
    from prefect.utilities.annotations import quote

    named = _task().with_options(name=job.name, task_run_name=job.name)
    future: PrefectFuture[Outcome] = named.submit(quote(job), inputs, quote(home), run_id, force)
    return future


@lru_cache(maxsize=1)
def _task() -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    declare = task(
        cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=1, retry_condition_fn=_passes
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


async def _passes(task: Task[..., Any], task_run: Any, state: Any) -> bool:
    """Only what may pass by itself is tried again: a connection or a lock, never a wrong setting."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, ConnectionError | TimeoutError)
