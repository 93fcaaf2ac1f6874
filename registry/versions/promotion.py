"""Promotes and rolls back: moves aliases by compare-and-set, and logs an event for each move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy.orm import Session

from registry import changes, event_log, queries
from registry.entities import Action, AdapterVersion, Decision, Event
from registry.errors import PromotionError, Refused
from registry.policy.actors import establish_actor
from registry.policy.alias_policy import AliasPolicy
from registry.policy.approvals import find_unapproved
from registry.policy.conditions import without_overridden
from registry.policy.evaluate import evaluate_policy
from registry.policy.policy_file import Policies, read_policies
from registry.policy.rights import revoked_upstream
from registry.policy.votes import find_unvoted
from registry.refs import check_alias
from registry.versions.expected_version import require_expected
from registry.versions.guard import guarded
from registry.versions.projections import find_overridden, replay, stack
from registry.versions.versions import Versions


@guarded("promote", alias="to")
def promote(
    versions: Versions,
    name: str,
    ref: str | int,
    to: str,
    *,
    reason: str,
    actor: str | None = None,
    expected: int | Literal["now"] | None = "now",
    expected_source: int | str | None = None,
    structure: Sequence[str] = (),
    override: bool = False,
) -> Event:
    """Moves an alias to a version if the alias's policy allows it and no other process moved it meanwhile.

    Nor may `ref` have moved: the version that the policy allowed is the one that gets the alias.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        to: The alias.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        expected: The number that the caller expects the alias to point at (None: nothing); `now` reads it first.
        expected_source: Number or digest of the version that `ref` must be; see `require_expected`. None: any.
        structure: Problems found in the adapter file's tensors, which the registry cannot read.
        override: True overrides the policy's reasons where the policy permits it; the event records them.

    Returns:
        The event; if the alias already points at the version, and its policy allows that now, the event that moved it
        there.

    Raises:
        Refused: The policy does not allow it; carries all reasons, and the refusal is logged.
        Conflict: Another process moved the alias, or `ref` is not the expected version.
        GoneVersion: The version was withdrawn or deleted.
        PromotionError: The reason is empty, or `expected_source` is neither a number nor a digest.
        UnknownName: No such adapter.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    check_alias(to)
    reason, actor = require_reason(reason, f"{to!r} cannot move"), establish_actor(versions, actor)
    with versions.lineage.database.read() as session:
        version = queries.read_version(session, name, ref)
        require_expected(session, version, ref, expected_source)
        before = queries.alias_target(session, name, to) if expected == "now" else expected
        earlier = event_log.read_events(session, name, to, after=version.version)
        events = [event for event in earlier if event.action != "refuse"]
        is_current = before == version.version == queries.alias_target(session, name, to)
        if not is_current:
            changes.require_active(session, name, version.version)
    damage = versions.damage(version)
    decision = evaluate_policy(
        versions, version, to, actor=actor, damage=damage, structure=structure, approvals=not is_current
    )
    overridden = decision.reasons  # an override of new reasons keeps the earlier ones
    if is_current:
        decision = without_overridden(decision, find_overridden(events, version.version))
        if decision.allowed:
            versions.sync()
            return events[-1]
    policies = read_policies(versions.home.path)
    action = _require_allowed(decision, policies.of(to), version, to, override=override)
    details = {"overridden": list(overridden)} if action == "override" else {}
    details |= {"warnings": list(decision.warnings)} if decision.warnings else {}
    with versions.lineage.database.write() as session:
        require_expected(session, queries.read_version(session, name, ref), ref, version.version)
        _refuse_revoked(session, version, to)
        _refuse_unapproved(session, policies, version, to, actor)
        if not is_current:
            _refuse_unvoted(session, policies, version, to, overridden)
        event = changes.move_alias(
            session, version, to, expected=before, action=action, actor=actor, reason=reason, details=details
        )
    versions.sync()
    return event


@guarded("rollback", alias="alias")
def rollback(
    versions: Versions,
    name: str,
    alias: str = "production",
    *,
    to: str | int | None = None,
    to_event: int | None = None,
    reason: str = "rollback",
    actor: str | None = None,
    expected: int | Literal["now"] | None = "now",
) -> Event:
    """Moves an alias back to its previous version by the log; a second call moves it one version further back.

    Args:
        versions: The registry.
        name: The adapter.
        alias: The alias; a removed alias is restored. The version had it before and needs no new approvals.
        to: An earlier version that had the alias; None means the previous one.
        to_event: Number of an event; selects the version that the alias pointed at after it.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        expected: The number that the caller expects the alias to point at; see `promote`.

    Raises:
        PromotionError: No earlier version had the alias, or `to` never had it.
        Refused: The earlier version does not meet the alias's policy any more, or the actor may not move the alias.
        Conflict: Another process moved the alias meanwhile.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, f"{alias!r} cannot move"), establish_actor(versions, actor)
    with versions.lineage.database.read() as session:
        events = event_log.read_events(session, name, alias)
        if not any(event.action != "refuse" for event in events):
            queries.read_version(session, name, alias)
        current = queries.alias_target(session, name, alias)
        requested = queries.find_row(session, name, to).version if to is not None else None
        if to_event is not None:
            requested = _target_at(events, to_event, alias)
        target = queries.read_version(session, name, _find_earlier(events, current, requested, name, alias))
    # What was overridden when the version had the alias does not count again.
    damage = versions.damage(target)
    decision = evaluate_policy(versions, target, alias, actor=actor, damage=damage, approvals=False)
    decision = without_overridden(decision, find_overridden(events, target.version))
    if not decision.allowed:
        raise Refused(
            f"{alias!r} cannot be rolled back",
            reasons=decision.reasons,
            where=target.ref,
            remedy="roll back further with `--to`, or override the reasons with `loraline promote --override`",
        )
    with versions.lineage.database.write() as session:
        _refuse_revoked(session, target, alias)
        event = changes.move_alias(
            session,
            target,
            alias,
            expected=current if expected == "now" else expected,
            action="rollback",
            actor=actor,
            reason=reason,
            details={"warnings": list(decision.warnings)} if decision.warnings else None,
        )
    versions.sync()
    return event


@guarded("remove", alias="alias")
def remove(
    versions: Versions,
    name: str,
    alias: str,
    *,
    reason: str,
    actor: str | None = None,
    expect: int | str | None = None,
) -> Event:
    """Removes an alias; `rollback` restores it.

    Args:
        versions: The registry.
        name: The adapter.
        alias: The alias.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        expect: Number or digest of the version that the alias must point at; see `require_expected`. None: any.

    Raises:
        Refused: The actor may not move the alias.
        Conflict: Another process moved it meanwhile, or it does not point at the expected version.
        UnknownVersion: It points at nothing.
    """
    reason, actor = require_reason(reason, f"{alias!r} cannot be removed"), establish_actor(versions, actor)
    with versions.lineage.database.read() as session:
        version = queries.read_version(session, name, check_alias(alias))
        require_expected(session, version, alias, expect)
    policy = read_policies(versions.home.path).of(alias)
    if not policy.may_move(actor):
        refusal = f"{actor} may not move this alias; {', '.join(policy.movers)} may"
        raise Refused(
            f"{alias!r} cannot be removed", reasons=(refusal,), where=version.ref, remedy="ask one of these users"
        )
    with versions.lineage.database.write() as session:
        event = changes.clear_alias(session, version, alias, actor=actor, reason=reason)
    versions.sync()
    return event


def history(versions: Versions, name: str, alias: str | None = None) -> list[Event]:
    """Returns the events of an adapter, or of one of its aliases, oldest first.

    Raises:
        UnknownName: No such adapter.
    """
    versions.report_drift(name)
    with versions.lineage.database.read() as session:
        queries.find_row(session, name, "latest")
        return event_log.read_events(session, name, alias)


def read_log(versions: Versions) -> list[Event]:
    """Returns all events of the registry, oldest first."""
    with versions.lineage.database.read() as session:
        return event_log.read_events(session)


def require_reason(reason: str, problem: str) -> str:
    """Returns the reason without surrounding whitespace.

    Raises:
        PromotionError: It is empty.
    """
    if not reason.strip():
        raise PromotionError(f"{problem} without a reason", remedy="give a reason; the log stores it")
    return reason.strip()


def _require_allowed(
    decision: Decision, policy: AliasPolicy, version: AdapterVersion, alias: str, *, override: bool
) -> Action:
    """Returns `promote`, or `override` for a refusal that the user overrides; raises Refused for any other."""
    if decision.allowed:
        return "promote"
    if not override or decision.final or not policy.overridable:
        remedy = _remedy(override, decision, policy)
        raise Refused(f"it cannot become {alias!r}", reasons=decision.reasons, where=version.ref, remedy=remedy)
    return "override"


def _remedy(override: bool, decision: Decision, policy: AliasPolicy) -> str:
    if not override:
        return "resolve every reason above"
    if decision.final:
        return f"resolve these reasons, which cannot be overridden: {'; '.join(decision.final)}"
    return "resolve every reason above; the policy of this alias allows no override" if not policy.overridable else ""


def _refuse_unapproved(session: Session, policies: Policies, version: AdapterVersion, alias: str, actor: str) -> None:
    """Raises Refused if an endorsement was withdrawn since the policy decided; runs in the writing transaction."""
    reasons = find_unapproved(session, policies, version, alias, actor)
    if reasons:
        raise Refused(f"it cannot become {alias!r}", reasons=reasons, where=version.ref)


def _refuse_unvoted(
    session: Session, policies: Policies, version: AdapterVersion, alias: str, overridden: Sequence[str]
) -> None:
    """Raises Refused if votes or another alias changed since the policy decided; runs in the writing transaction."""
    reasons = tuple(reason for reason in find_unvoted(session, policies, version, alias) if reason not in overridden)
    if reasons:
        raise Refused(f"it cannot become {alias!r}", reasons=reasons, where=version.ref)


def _refuse_revoked(session: Session, version: AdapterVersion, alias: str) -> None:
    """Raises Refused if a subject was revoked since the policy decided; runs in the writing transaction."""
    revoked = revoked_upstream(session, version)
    if revoked:
        reasons = tuple(f"{subject} was revoked" for subject in revoked)
        raise Refused(f"it cannot become {alias!r}", reasons=reasons, where=version.ref)


def _find_earlier(events: Sequence[Event], current: int | None, requested: int | None, name: str, alias: str) -> int:
    """Returns the requested version, or the latest before the current one, if the alias pointed at it before."""
    numbers = stack(events)
    earlier = [number for number in (numbers if current is None else numbers[:-1]) if number != current]
    if not earlier or (requested is not None and requested not in earlier):
        allowed = ", ".join(map(str, dict.fromkeys(earlier))) or "none; it has had one version only"
        raise PromotionError(
            f"{alias!r} cannot be rolled back" + (f" to version {requested}" if requested else ""),
            where=name,
            allowed=allowed,
        )
    return requested or earlier[-1]


def _target_at(events: Sequence[Event], seq: int, alias: str) -> int:
    moves = [event.seq for event in events if event.action != "refuse"]
    targets = [number for (_, of), number in replay(e for e in events if e.seq <= seq).items() if of == alias]
    if not moves or seq > moves[-1] or not targets:
        raise PromotionError(
            f"{alias!r} pointed at nothing after event {seq}" if moves and seq <= moves[-1] else f"no event {seq} yet",
            allowed=", ".join(map(str, moves[:-1])) or "none; this is the first event",
            remedy="see `loraline log NAME` for all events",
        )
    return targets[0]
