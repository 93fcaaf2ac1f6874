"""Approves or rejects a version for which a scheduled run waits, as a user: for the verb and for the studio page."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Literal

from flows.approval import ApprovalAnswer
from registry.entities import AdapterVersion
from registry.errors import PromotionError, Refused
from registry.home import Home

if TYPE_CHECKING:
    from flows.waiting_runs import WaitingRun
    from registry.versions.versions import Versions


def decide_waiting(
    home: Home,
    ref: str,
    decision: Literal["approve", "reject"],
    reason: str,
    *,
    expect: str | None = None,
    actor: str | None = None,
) -> tuple[AdapterVersion, WaitingRun, ApprovalAnswer]:
    """Answers the run that waits for a version; the run then promotes it, or ends.

    Args:
        home: The home.
        ref: `name@version` or `name@alias`; a name means staging.
        decision: The decision.
        reason: The reason; stored in the log.
        expect: Number or digest of the version that `ref` must be; None accepts any.
        actor: The user; None means this process's user.

    Returns:
        The version, the run, and the answer.

    Raises:
        SpecError: No Prefect server is configured.
        PromotionError: The reason is empty, or no run waits for this version.
        Refused: The user may not move the alias; the run would refuse the answer too, later.
        Conflict: `ref` is not the expected version.
    """
    from flows.waiting_runs import answer_request
    from registry.versions.promotion import require_reason
    from registry.versions.versions import Versions

    reason = require_reason(reason, f"{ref!r} cannot be decided")
    with closing(Versions(home)) as versions:
        version = _find_version(versions, ref, expect)
        run = _find_waiting(home, version)
        user = _require_mover(versions, version, run.request.alias, actor)
    answer = ApprovalAnswer(decision, reason, user, version.sha256)
    answer_request(run, answer)
    return version, run, answer


def list_waiting(home: Home) -> list[WaitingRun] | None:
    """Returns the runs that wait for an approval, newest first; None if no Prefect server is configured."""
    from flows.prefect import configure_prefect
    from flows.waiting_runs import find_waiting_runs

    configure_prefect(home)
    return find_waiting_runs() if _has_server() else None


def _find_version(versions: Versions, ref: str, expect: str | None) -> AdapterVersion:
    from registry.versions.expected_version import require_expected
    from tasks.operations.promote import find_version

    version = find_version(versions, ref if "@" in ref else f"{ref}@staging")
    with versions.lineage.database.read() as session:
        require_expected(session, version, ref.partition("@")[2] or "staging", expect)
    return version


def _find_waiting(home: Home, version: AdapterVersion) -> WaitingRun:
    from tasks.errors import SpecError

    remedy = f'loraline promote {version.ref} --to production --reason "..." needs no run'
    waiting = list_waiting(home)
    if waiting is None:
        raise SpecError(
            "no Prefect server is configured", where="PREFECT_API_URL", remedy=f"set PREFECT_API_URL; or: {remedy}"
        )
    for run in waiting:
        if (run.request.ref, run.request.sha256) == (version.ref, version.sha256):
            return run
    others = [run.request.ref for run in waiting if run.request.ref.startswith(f"{version.name}@")]
    raise PromotionError(
        f"no run waits for {version.ref}", where="approve", allowed=", ".join(others) or "none waits", remedy=remedy
    )


def _has_server() -> bool:
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def _require_mover(versions: Versions, version: AdapterVersion, alias: str, actor: str | None) -> str:
    """Returns the user, if the user may move the alias."""
    from registry.policy.actors import establish_actor
    from tasks.operations.release import find_denial_of_move

    user = establish_actor(versions, actor)
    denial = find_denial_of_move(versions, version, alias, user)
    if denial:
        raise Refused(f"{alias!r} cannot be decided about", reasons=(denial,), where=alias, remedy="ask a user who may")
    return str(user)
