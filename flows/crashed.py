"""Marks flow runs in Prefect whose process is gone as Crashed, and queues crashed ones again.

Prefect would show them as Running forever.

A flow run has the id of the home's run as a tag. Runs of other homes, and runs that the home does not know, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from registry.entities import RunStatus

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

_PREFIX = "loraline-run:"
_MESSAGE = "The process of this run is gone."
REQUEUE = "retrain-again"
"""The automation of `deploy/requeue.yaml` that queues crashed retrainings again."""
MOST_STARTS = 3
"""Times that a run may have run before it is queued again; the automation has the same limit."""
_AGAIN = "Its process was gone; queued again by another run."
_RECENT, _PAUSE = timedelta(days=1), timedelta(minutes=1)


def tag_of(run_id: str) -> str:
    """Returns the tag of the flow run that belongs to a run of a home."""
    return f"{_PREFIX}{run_id}"


def mark_crashed(statuses: Mapping[str, RunStatus], flow: str) -> list[UUID]:
    """Marks unfinished flow runs of ended runs as Crashed, with their tasks and the flow run that started them.

    Args:
        statuses: Run of the home -> its status; those of dead processes are CRASHED already.
        flow: Name of the flow.

    Returns:
        The marked flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

    with get_client(sync_client=True) as client:
        unfinished = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": [flow]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}),
        )
        marked = []
        for flow_run in unfinished:
            runs = {tag.removeprefix(_PREFIX) for tag in flow_run.tags if tag.startswith(_PREFIX)} & statuses.keys()
            if runs and all(statuses[run] != "RUNNING" for run in runs):
                marked += _mark_with_parents(client, flow_run)
        return marked


def requeue_crashed(flow: str) -> list[UUID]:
    """Queues crashed runs again whose event the automation `REQUEUE` missed; does nothing without that automation.

    Prefect drops an event if its database is locked for too long. A run of the last day counts that crashed a minute
    ago or earlier, has a deployment, and ran at most three times.

    Args:
        flow: Name of the flow.

    Returns:
        The queued flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import AwaitingRetry

    with get_client(sync_client=True) as client:
        if not any(automation.enabled for automation in client.read_automations_by_name(REQUEUE)):
            return []
        now = datetime.now(UTC)
        runs = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": [flow]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["CRASHED"]}}}),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
        lost = [
            run.id
            for run in runs
            if run.deployment_id is not None
            and run.run_count <= MOST_STARTS
            and run.state is not None
            and now - _RECENT < run.state.timestamp < now - _PAUSE
        ]
        for run_id in lost:
            client.set_flow_run_state(run_id, AwaitingRetry(message=_AGAIN))
        return lost


def _mark_with_parents(client: SyncPrefectClient, flow_run: Any) -> list[UUID]:
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}}),
        task_run_filter=TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}),
    )
    for task_run in tasks:
        client.set_task_run_state(task_run.id, Crashed(message=_MESSAGE), force=True)
    client.set_flow_run_state(flow_run.id, Crashed(message=_MESSAGE), force=True)
    if flow_run.parent_task_run_id is None:
        return [flow_run.id]
    parent = client.read_task_run(flow_run.parent_task_run_id).flow_run_id
    outer = client.read_flow_run(parent) if parent is not None else None
    is_dead = outer is not None and _is_attempt_of(outer.state, flow_run.state)
    return [flow_run.id, *(_mark_with_parents(client, outer) if is_dead else [])]


def _is_attempt_of(outer: State | None, inner: State | None) -> bool:
    """Returns True if the outer run is running since before the inner one, not queued or running again since then.

    A suspended run has no process that could have died.
    """
    return outer is not None and inner is not None and outer.is_running() and outer.timestamp <= inner.timestamp
