"""Waits for approvals with Prefect's own means: a suspended flow run with a form, which its page or a verb answers.

A suspended run has no process and holds no slot of its deployment. Answered, it starts again from the top: `retrain`
then reads the answer and does not run the pipeline again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from registry.entities import AdapterVersion

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.exceptions import Pause

_log = logging.getLogger(__name__)
RETRAIN = "retrain"
"""Name of the scheduled flow."""
AWAITING = "AwaitingApproval"


@dataclass(frozen=True)
class ApprovalRequest:
    """What a run waits for.

    Attributes:
        ref: `name@version` of the version.
        sha256: Digest of its adapter file.
        source: The alias that it must still have, such as staging.
        alias: The alias to promote it to.
        deadline: ISO time at which the request expires, with time zone.
        rest: `name@version` of versions that the run asks about afterwards.
        answered: ISO time of the answer; empty without one.
    """

    ref: str
    sha256: str
    source: str
    alias: str
    deadline: str
    rest: tuple[str, ...] = ()
    answered: str = ""

    @property
    def expired(self) -> bool:
        """Returns True if the deadline passed before the answer came; without one, by this machine's clock."""
        at = datetime.fromisoformat(self.answered) if self.answered else datetime.now(UTC)
        return at >= datetime.fromisoformat(self.deadline)

    def names(self, digest: str) -> bool:
        """Returns True if a digest, or at least 8 digits of it, is that of the version."""
        return len(digest) >= 8 and self.sha256.startswith(digest.lower())

    @property
    def message(self) -> str:
        """Returns the message of the waiting state."""
        until = f"{datetime.fromisoformat(self.deadline):%Y-%m-%d %H:%M %Z}"
        return f"{self.ref} (sha256 {self.sha256[:16]}) waits to become {self.alias} until {until}"


@dataclass(frozen=True)
class ApprovalAnswer:
    """The answer to a request.

    Attributes:
        decision: `approve` or `reject`.
        reason: The reason.
        actor: The user who decided.
        sha256: Digest, or at least 8 digits of it, of the version that the user decided about.
    """

    decision: Literal["approve", "reject"]
    reason: str
    actor: str
    sha256: str


def make_request(
    version: AdapterVersion, source: str, alias: str, hours: float, rest: Sequence[str] = ()
) -> ApprovalRequest:
    """Returns a request for the approval of a version, which expires after some hours."""
    deadline = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    return ApprovalRequest(version.ref, version.sha256, source, alias, deadline, tuple(rest))


def suspend_for_approval(request: ApprovalRequest, description: str = "") -> Pause:
    """Suspends the current flow run until it is answered; returns what the caller raises to end its process.

    As `prefect.flow_runs.suspend_flow_run`, but in a state of our own name and message, with the request kept beside
    the form. At the deadline a further run of the deployment ends this one, if no answer came.

    Args:
        request: What to ask.
        description: Markdown above the form.

    Raises:
        RuntimeError: The server does not allow it.
    """
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.exceptions import Abort
    from prefect.exceptions import Pause as Suspension
    from prefect.input.actions import create_flow_run_input
    from prefect.input.run_input import keyset_from_paused_state
    from prefect.states import Paused
    from prefect.utilities.engine import propose_state_sync

    context = FlowRunContext.get()
    assert context is not None
    run = context.flow_run
    assert run is not None
    key = f"{request.sha256[:16]}-{run.run_count}"
    state: Any = Paused(name=AWAITING, message=request.message, reschedule=True, pause_key=key)
    keyset = keyset_from_paused_state(state)
    state.state_details.run_input_keyset = keyset
    # The form first: the page offers it as soon as the run is suspended.
    form = _form(request.sha256, description or request.message)
    form.save(keyset, flow_run_id=run.id)
    create_flow_run_input(key=_request_key(keyset), value=asdict(request), flow_run_id=run.id)
    with get_client(sync_client=True) as client:
        try:
            paused = propose_state_sync(client=client, state=state, flow_run_id=run.id)
        except Abort as error:
            raise RuntimeError(f"the flow run cannot wait for an approval: {error}") from error
        if not paused.is_paused():
            raise RuntimeError(f"the flow run cannot wait for an approval: the server answered {paused.name}")
        _schedule_expiry(client, run, request)
    return Suspension(state=paused)


def read_answer() -> tuple[ApprovalRequest, ApprovalAnswer | None] | None:
    """Returns the last request of the current flow run with its answer; None if it never waited.

    The answer is None if the run was resumed without one, which Prefect's API refuses.
    """
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    with get_client(sync_client=True) as client:
        return read_answer_of(client, context.flow_run.id)


def can_wait() -> bool:
    """Returns True if the current flow run can be suspended: it is the run of a deployment."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def _form(digest: str, description: str) -> Any:
    """Returns the form that Prefect's page shows, with the text above it."""
    from prefect.input import RunInput
    from pydantic import Field

    class Approval(RunInput):
        """An approval."""

        decision: Literal["approve", "reject"] = Field(title="Decision")
        reason: str = Field(min_length=1, max_length=2000, title="Reason", description="Stored in the event log.")
        actor: str = Field(min_length=1, max_length=200, title="Your name", description="Stored in the event log.")
        sha256: str = Field(digest, min_length=8, max_length=64, title="sha256 of the version")

    Approval._description = description
    return Approval


def _request_key(keyset: Any) -> str:
    return f"{keyset['schema']}-request"


def read_request(run: FlowRun) -> ApprovalRequest | None:
    """Returns what a suspended run waits for; None if it waits for something else."""
    keyset = run.state.state_details.run_input_keyset if run.state is not None else None
    return _load_request(run.id, keyset) if keyset else None


def _load_request(run: UUID, keyset: Any) -> ApprovalRequest | None:
    value = _read_input(run, _request_key(keyset))
    return None if value is None else ApprovalRequest(**value | {"rest": tuple(value["rest"])})


def read_answer_of(client: SyncPrefectClient, run: UUID) -> tuple[ApprovalRequest, ApprovalAnswer | None] | None:
    """Returns the last request of a flow run with its answer; see `read_answer`."""
    states = sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)
    last = next((number for number in reversed(range(len(states))) if states[number].is_paused()), None)
    if last is None:
        return None
    keyset, later = states[last].state_details.run_input_keyset, states[last + 1 :]
    request = _load_request(run, keyset) if keyset else None
    if keyset is None or request is None:
        return None
    value = _read_input(run, keyset["response"])
    if value is None:
        return request, None
    answered = later[0].timestamp.isoformat() if later else ""
    return replace(request, answered=answered), ApprovalAnswer(**value)


def _read_input(run: UUID, key: str) -> Any:
    from prefect.input.actions import read_flow_run_input

    return read_flow_run_input(key, flow_run_id=run)


def _schedule_expiry(client: SyncPrefectClient, run: FlowRun, request: ApprovalRequest) -> None:
    """Schedules a run of the deployment at the deadline, which ends expired runs; a server has no such timer."""
    from prefect.states import Scheduled

    if run.deployment_id is not None:
        client.create_flow_run_from_deployment(
            run.deployment_id,
            state=Scheduled(scheduled_time=datetime.fromisoformat(request.deadline) + timedelta(seconds=1)),
            idempotency_key=f"expiry-{run.id}-{request.sha256[:16]}",
            tags=["approval-deadline"],
        )
