"""Releases what a scheduled run staged, as the section `retraining` of its pipeline file says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing

from flows.approval import (
    ApprovalAnswer,
    ApprovalRequest,
    can_wait,
    make_request,
    suspend_for_approval,
)
from flows.decisions import apply_answer, check_of, expire_request, find_answer_obstacle, find_version_of
from flows.result import FinalState, PipelineResult
from flows.spec import PipelineSpec
from flows.waiting_runs import end_run, find_answered_runs, find_waiting_runs
from registry.entities import AdapterVersion
from registry.errors import RegistryError
from registry.home import Home
from registry.refs import split_ref
from registry.versions.versions import Versions
from tasks.operations.changes_since import changes_since_production
from tasks.operations.release import (
    ReleaseOutcome,
    find_obstacle,
    finish_checks,
    promote_and_check,
)

_log = logging.getLogger(__name__)
_SEVERITY = ("Promoted", "Rejected", "ApprovalExpired", "Refused", "CheckFailed", "RolledBack")


def release_versions(spec: PipelineSpec, home: Home, result: PipelineResult, state: FinalState) -> FinalState:
    """Releases every staged version of a run that may be released, new or staged by an earlier run.

    Args:
        spec: The pipeline.
        home: The home with all state.
        result: The result of the pipeline.
        state: The state of the run so far.

    Returns:
        The state in which the run ends.

    Raises:
        prefect.exceptions.Pause: The run waits for an approval now.
    """
    settings = spec.retraining
    names = sorted({registered.version.name for registered in result.versions.values()})
    outcomes = finish_checks(home, names, check=check_of(settings), roll_back=settings.rollback)
    _end_overdue(home, names)
    if settings.release == "none":
        return _combine(state, outcomes)
    staged = _find_staged(home, result, settings.alias)
    if settings.release == "automatic":
        new = {registered.version.ref for registered in result.new_versions}
        for version, source in staged:
            outcome = promote_and_check(
                home,
                version,
                settings.alias,
                actor=None,
                reason=f"retrain: automatic release of {spec.name}",
                check=check_of(settings),
                roll_back=settings.rollback,
                source=source,
            )
            if outcome.state == "Refused" and version.ref not in new:
                # As it was refused before: an unchanged run does not fail for it again.
                state = FinalState(state.name, f"{state.message}; {outcome.message}", state.failed)
            else:
                outcomes.append(outcome)
        return _combine(state, outcomes)
    return _ask(spec, home, staged, _combine(state, outcomes))


def continue_release(
    spec: PipelineSpec, home: Home, request: ApprovalRequest, answer: ApprovalAnswer | None
) -> FinalState:
    """Applies the answer to a request, then asks about the next version of the run.

    Returns:
        The state in which the run ends.

    Raises:
        prefect.exceptions.Pause: The run waits for the next approval.
    """
    settings = spec.retraining
    outcome = apply_answer(home, settings, request, answer)
    state = FinalState(outcome.state, outcome.message, outcome.failed)
    with closing(Versions(home)) as versions:
        rest = [version for ref in request.rest if (version := find_version_of(versions, ref)) is not None]
        staged = [(version, request.source) for version in rest if _may_ask(versions, version, request)]
    return _ask(spec, home, staged, state) if staged else state


def describe_changes(home: Home, result: PipelineResult, alias: str) -> str:
    """Returns what changed from production to each new version, as Markdown; empty without a version in production."""
    texts = []
    for registered in result.new_versions:
        version = registered.version
        if version.state != "ACTIVE":
            continue
        changes = changes_since_production(home, version.name, version.version, alias=alias)
        if changes.production not in (None, version.ref):
            texts.append(changes.to_markdown())
    return "\n\n".join(texts)


def _ask(spec: PipelineSpec, home: Home, staged: Sequence[tuple[AdapterVersion, str]], state: FinalState) -> FinalState:
    """Suspends the run for the first version that no other run asks about; returns the state if there is none."""
    if not staged or state.failed:  # the next run asks, so this one can say what failed
        return state
    if not can_wait():
        return FinalState(state.name, f"{state.message}; asks nobody, because no deployment runs it", state.failed)
    pending = {run.request.ref for run in (*find_waiting_runs(), *find_answered_runs())}
    asked = [version.ref for version, _ in staged if version.ref in pending]
    open_questions = [(version, source) for version, source in staged if version.ref not in asked]
    if not open_questions:
        return FinalState(state.name, f"{state.message}; {', '.join(asked)} waits for an approval", state.failed)
    version, source = open_questions[0]
    settings = spec.retraining
    rest = [other.ref for other, _ in open_questions[1:]]
    request = make_request(version, source, settings.alias, settings.approval_timeout, rest)
    _log.info("%s: %s", "AwaitingApproval", request.message)
    raise suspend_for_approval(request, _describe(home, version, request))


def _end_overdue(home: Home, names: Sequence[str]) -> None:
    """Ends waiting runs of these adapters whose deadline passed, or whose version moved."""
    with closing(Versions(home)) as versions:
        for run in find_waiting_runs():
            version = find_version_of(versions, run.request.ref) if split_ref(run.request.ref)[0] in names else None
            if version is None or version.sha256 != run.request.sha256:
                continue  # of another home
            if run.request.expired:
                outcome = expire_request(versions, version, run.request)
            elif refusal := find_answer_obstacle(versions, version, run.request, None):
                outcome = ReleaseOutcome("Refused", f"{version.ref} not {run.request.alias}: {refusal}")
            else:
                continue
            end_run(run.id, outcome.state, outcome.message, failed=outcome.failed)


def _find_staged(home: Home, result: PipelineResult, alias: str) -> list[tuple[AdapterVersion, str]]:
    """Returns the versions of a run that have their alias and may be released, each with that alias."""
    staged = []
    with closing(Versions(home)) as versions:
        for registered in result.versions.values():
            source = registered.alias
            if source is None or source == alias or not registered.has_alias or registered.gone:
                continue
            obstacle = find_obstacle(versions, registered.version, alias)
            if obstacle:
                _log.info("%s is not released: %s", registered.version.ref, obstacle)
            else:
                staged.append((registered.version, source))
    return staged


def _may_ask(versions: Versions, version: AdapterVersion, request: ApprovalRequest) -> bool:
    return request.source in version.aliases and not find_obstacle(versions, version, request.alias)


def _combine(state: FinalState, outcomes: Sequence[ReleaseOutcome]) -> FinalState:
    """Returns the state of the gravest outcome, with all messages; a run whose gates failed keeps its state."""
    if not outcomes:
        return state
    messages = "; ".join(outcome.message for outcome in outcomes)
    if state.failed:
        return FinalState(state.name, f"{state.message}; {messages}", failed=True)
    gravest = max(outcomes, key=lambda outcome: _SEVERITY.index(outcome.state))
    return FinalState(gravest.state, messages, gravest.failed)


def _describe(home: Home, version: AdapterVersion, request: ApprovalRequest) -> str:
    """Returns the text above the form: what changed since production."""
    try:
        changes = changes_since_production(home, version.name, version.version, alias=request.alias)
    except RegistryError as error:
        return f"{request.message}\n\nIts changes cannot be read: {error.problem}"
    return f"{request.message}\n\n{changes.to_markdown()}"
