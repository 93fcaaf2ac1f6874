"""Reads from a Prefect server which flow runs wait: scheduled, late, paused for an approval, or without a worker."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_log = logging.getLogger(__name__)
_MOST_QUEUED = 200
_WAITING = ("SCHEDULED", "PENDING", "PAUSED")


@dataclass(frozen=True)
class QueuedRun:
    """A flow run that waits.

    Attributes:
        id: Its id in Prefect.
        name: Its name.
        deployment: Its deployment.
        state: Name of its state, such as `Scheduled`, `Late` or `AwaitingApproval`.
        message: Message of that state.
        due: Time at which it is to start, or was.
    """

    id: str
    name: str
    deployment: str
    state: str
    message: str
    due: datetime


def read_queued() -> list[QueuedRun] | None:
    """Returns the next waiting flow run of each deployment, and all that are late, pending or paused; by time.

    Returns:
        At most 200; None if `PREFECT_API_URL` names no server, or it does not answer, which is a warning.
    """
    if not os.environ.get("PREFECT_API_URL"):
        return None
    os.environ.setdefault("PREFECT_API_REQUEST_TIMEOUT", "10")
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    try:
        with get_client(sync_client=True) as client:
            waiting = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": [*_WAITING]}}}),
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=_MOST_QUEUED,
            )
            deployments = {run.deployment_id for run in waiting if run.deployment_id is not None}
            only = DeploymentFilter.model_validate({"id": {"any_": [*deployments]}})
            known = client.read_deployments(deployment_filter=only) if deployments else []
            names = {deployment.id: deployment.name for deployment in known}
    except (HTTPError, OSError, RuntimeError) as error:
        _log.warning("the server at PREFECT_API_URL does not say what is queued: %s", error)
        return None
    return list(_without_later_schedules(waiting, names))


def _without_later_schedules(waiting: list[Any], names: dict[Any, str]) -> list[QueuedRun]:
    queued, seen = [], set()
    for run in waiting:
        deployment, state = names.get(run.deployment_id, ""), run.state
        due = run.expected_start_time
        if state is None or due is None:
            continue
        if state.name == "Scheduled":
            if deployment in seen:  # Prefect schedules a hundred runs ahead
                continue
            seen.add(deployment)
        queued.append(QueuedRun(str(run.id), run.name, deployment, state.name, state.message or "", due))
    return queued
