"""Applies the answer to a request for approval, if it still holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from flows.approval import RETRAIN, ApprovalAnswer, ApprovalRequest
from flows.crashed import mark_crashed, tag_of
from flows.retraining import RetrainingSettings
from flows.spec import PipelineSpec
from registry.entities import AdapterVersion, RunStatus
from registry.errors import UnknownName, UnknownVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.refs import split_ref
from registry.versions.versions import Versions
from tasks.operations.release import (
    ReleaseOutcome,
    find_denial_of_move,
    find_obstacle,
    log_decision,
    promote_and_check,
)
from tasks.operations.release_check import ReleaseCheck


@contextmanager
def watched_decision(spec: PipelineSpec, home: Home) -> Iterator[None]:
    """Records a decision as a run of the home, so a later run marks its flow run as Crashed if this process dies."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    with closing(Lineage(home.lineage_url)) as lineage:
        run = lineage.start_run(spec.name, spec.source)
        status: RunStatus = "FAILED"
        try:
            if context is not None and context.flow_run is not None:
                with get_client(sync_client=True) as client:
                    client.update_flow_run(context.flow_run.id, tags=[*context.flow_run.tags, tag_of(run.id)])
            yield
            status = "COMPLETED"
        finally:
            lineage.finish_run(run.id, status)


def mark_lost_answers(home: Home) -> None:
    """Marks runs of `retrain` whose process died while it applied an answer as Crashed."""
    with closing(Lineage(home.lineage_url)) as lineage:
        lineage.find_dead_runs()
        mark_crashed({run.id: run.status for run in lineage.runs()}, RETRAIN)


def check_of(settings: RetrainingSettings) -> ReleaseCheck:
    """Returns the check that a file asks for."""
    return ReleaseCheck(**settings.check.model_dump())


def apply_answer(
    home: Home, settings: RetrainingSettings, request: ApprovalRequest, answer: ApprovalAnswer | None
) -> ReleaseOutcome:
    """Promotes or rejects the version as the answer says, or refuses an answer that does not hold any more."""
    with closing(Versions(home)) as versions:
        version = find_version_of(versions, request.ref)
        refusal = find_answer_obstacle(versions, version, request, answer)
        if version is None or refusal:
            return ReleaseOutcome("Refused", f"{request.ref} not {request.alias}: {refusal}")
        if request.expired:
            return expire_request(versions, version, request)
        if answer is None:
            return ReleaseOutcome(
                "Refused", f"{request.ref} not {request.alias}: the run was resumed without an answer"
            )
        denial = find_denial_of_move(versions, version, request.alias, answer.actor)
        if denial:
            return ReleaseOutcome("Refused", f"{request.ref} not {request.alias}: {denial}")
        if answer.decision == "reject":
            log_decision(versions, version, request.alias, "rejected", actor=answer.actor, reason=answer.reason)
            return ReleaseOutcome("Rejected", f"{version.ref} not {request.alias}: {answer.actor}: {answer.reason}")
    return promote_and_check(
        home,
        version,
        request.alias,
        actor=answer.actor,
        reason=answer.reason,
        check=check_of(settings),
        roll_back=settings.rollback,
        source=request.source,
    )


def find_answer_obstacle(
    versions: Versions, version: AdapterVersion | None, request: ApprovalRequest, answer: ApprovalAnswer | None
) -> str:
    """Returns why an answer does not hold any more; empty if it does."""
    if version is None:
        return "it does not exist any more"
    if version.sha256 != request.sha256:
        return f"it has sha256 {version.sha256[:16]} now, not {request.sha256[:16]}"
    if request.source not in version.aliases:
        holder = find_version_of(versions, f"{version.name}@{request.source}")
        now = f"{holder.ref} has it" if holder is not None else "no version has it"
        return f"it moved: it is not {request.source} any more, {now}"
    if answer is not None and not request.names(answer.sha256):
        return f"the approval is for sha256 {answer.sha256[:16]}, this is {request.sha256[:16]}"
    obstacle = find_obstacle(versions, version, request.alias)
    if obstacle:
        return obstacle
    return ""


def expire_request(versions: Versions, version: AdapterVersion, request: ApprovalRequest) -> ReleaseOutcome:
    """Logs that a request expired; its version is released by hand alone from then on."""
    reason = f"no approval until {request.deadline}"
    log_decision(versions, version, request.alias, "expired", actor=None, reason=reason)
    return ReleaseOutcome("ApprovalExpired", f"{version.ref} not {request.alias}: {reason}")


def find_version_of(versions: Versions, ref: str) -> AdapterVersion | None:
    """Returns a version; None if the home does not have it."""
    try:
        return versions.show(*split_ref(ref))
    except (UnknownName, UnknownVersion):
        return None
