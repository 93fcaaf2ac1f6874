"""Finds the flow runs that wait for an approval, answers them, and continues those that were answered."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.approval import AWAITING, RETRAIN, ApprovalAnswer, ApprovalRequest, read_answer_of, read_request
from registry.errors import PromotionError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

_LATEST: Any = {"sort": "START_TIME_DESC", "limit": 200}
_REQUEUE = timedelta(seconds=15)


@dataclass(frozen=True)
class WaitingRun:
    """A flow run that waits for an approval.

    Attributes:
        id: The flow run.
        name: Its name.
        request: What it waits for.
    """

    id: UUID
    name: str
    request: ApprovalRequest


def find_waiting_runs() -> list[WaitingRun]:
    """Returns the runs of `retrain` that wait for an approval, newest first."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(**_filters({"state": {"name": {"any_": [AWAITING]}}}), **_LATEST)
        waiting = []
        for run in runs:
            request = read_request(run)
            if request is not None:
                waiting.append(WaitingRun(run.id, run.name, request))
        return waiting


def answer_request(run: WaitingRun, answer: ApprovalAnswer) -> None:
    """Answers a waiting run and resumes it, as the form on Prefect's page does.

    Raises:
        PromotionError: The server refused it, because the run does not wait any more.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        result = client.resume_flow_run(run.id, run_input=asdict(answer))
    if result.status.value != "ACCEPT":
        reason = getattr(result.details, "reason", "") or result.status.value
        raise PromotionError(
            f"the run {run.name!r} took no answer: {reason}",
            where=run.request.ref,
            remedy="see its state on Prefect's page; `loraline promote` needs no run",
        )


def end_run(run: UUID, name: str, message: str, *, failed: bool) -> None:
    """Ends a waiting run in a state of that name."""
    from prefect.client.orchestration import get_client
    from prefect.states import Completed, Failed

    state: Any = Failed(name=name, message=message) if failed else Completed(name=name, message=message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state, force=True)


def find_answered_runs() -> list[WaitingRun]:
    """Returns the runs of `retrain` that were answered and whose answer is not applied yet."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    own = context.flow_run.id if context is not None and context.flow_run is not None else None
    states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLED"]}}
    with get_client(sync_client=True) as client:
        # A run that was suspended has started before; new ones have no start time.
        runs = client.read_flow_runs(**_filters({"state": states, "start_time": {"is_null_": False}}), **_LATEST)
        answered = []
        for run in runs:
            found = read_answer_of(client, run.id) if run.id != own and not _is_cancelled_by_user(run) else None
            if found is not None and found[1] is not None:
                answered.append(WaitingRun(run.id, run.name, found[0]))
        return answered


def requeue_answered() -> list[UUID]:
    """Schedules answered runs again that the deployment's limit cancelled, because another run was executing.

    Returns:
        The flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    requeued = []
    with get_client(sync_client=True) as client:
        for answered in find_answered_runs():
            state = client.read_flow_run(answered.id).state
            if state is not None and state.is_cancelled():
                message = "answered; another run was executing"
                due: Any = Scheduled(scheduled_time=datetime.now(UTC) + _REQUEUE, message=message)
                client.set_flow_run_state(answered.id, due, force=True)
                requeued.append(answered.id)
    return requeued


def _is_cancelled_by_user(run: FlowRun) -> bool:
    state = run.state
    return state is not None and state.is_cancelled() and "concurrency limit" not in (state.message or "")


def _filters(runs: dict[str, Any]) -> dict[str, Any]:
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

    return {
        "flow_filter": FlowFilter.model_validate({"name": {"any_": [RETRAIN]}}),
        "flow_run_filter": FlowRunFilter.model_validate(runs),
    }
