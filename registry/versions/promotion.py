"""Promotion: aliases that move by compare-and-set, each move with its event, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from sqlalchemy.orm import Session

from registry import queries
from registry.entities import Action, AdapterVersion, Decision, Event, check_alias
from registry.errors import PromotionError, Refused
from registry.identity import current_user
from registry.policy.alias_policy import AliasPolicy, PolicyFacts, decide
from registry.policy.evaluate import evaluate_policy, gather_policy_facts
from registry.policy.policy_file import read_policies
from registry.versions.versions import Versions

__all__ = ["history", "evaluate_policy", "promote", "read_log", "remove", "replay", "rollback"]


def promote(
    versions: Versions,
    name: str,
    ref: str | int,
    to: str,
    *,
    reason: str,
    actor: str | None = None,
    expected: int | Literal["now"] | None = "now",
    structure: Sequence[str] = (),
    override: bool = False,
) -> Event:
    """Points an alias at a version if its policy allows it and nobody moved it meanwhile.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        to: The alias.
        reason: Why; kept for good.
        actor: Who; this process's user by default.
        expected: The number that the alias points at, as the caller knows it (None: nothing); `now` reads it first.
        structure: What a reading of the adapter file found to be wrong; the registry knows no tensors.
        override: Sets reasons aside, where the policy lets it; they are kept in the event.

    Returns:
        The event; where the alias points at the version already, the event that made it so.

    Raises:
        Refused: With all reasons; the refusal is in the log.
        Conflict: The alias was moved by somebody else.
        GoneVersion: The version was withdrawn or deleted.
        PromotionError: No reason given.
        UnknownName: No such adapter.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    check_alias(to)
    reason, actor = require_reason(reason, f"{to!r} cannot move"), actor or current_user()
    with versions.lineage.database.read() as session:
        version = queries.read_version(session, name, ref)
        before = queries.alias_target(session, name, to) if expected == "now" else expected
        if before == version.version == queries.alias_target(session, name, to):
            return [event for event in queries.read_events(session, name, to) if event.action != "refuse"][-1]
        queries.require_active(session, name, version.version)
    decision = evaluate_policy(versions, version, to, actor=actor, damage=versions.damage(version), structure=structure)
    policy = read_policies(versions.home.path).of(to)
    action: Action = "promote"
    if not decision.allowed:
        if not override or decision.final or not policy.overridable:
            raise _refuse(versions, version, to, decision, actor, _remedy(override, decision, policy))
        action = "override"
    details = {"overridden": list(decision.reasons)} if action == "override" else None
    with versions.lineage.database.write() as session:
        _refuse_revoked(session, versions, version, to, actor)
        event = queries.move_alias(
            session, version, to, expected=before, action=action, actor=actor, reason=reason, details=details
        )
    versions.sync()
    return event


def rollback(
    versions: Versions,
    name: str,
    alias: str = "production",
    *,
    to: str | int | None = None,
    to_event: int | None = None,
    reason: str = "rollback",
    actor: str | None = None,
) -> Event:
    """Points an alias back at what it pointed at before, by the log; again, and it goes back one further.

    Args:
        versions: The registry.
        name: The adapter.
        alias: The alias; one that was removed comes back.
        to: An earlier version to go back to, instead of the one before.
        to_event: The number of an event: go back to what the alias pointed at right after it.
        reason: Why; kept for good.
        actor: Who; this process's user by default.

    Raises:
        PromotionError: There is nothing earlier, or `to` never had the alias.
        Refused: The earlier version is no longer whole, was withdrawn or comes from something revoked, or the actor may
            not move the alias.
        Conflict: The alias was moved by somebody else meanwhile.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, f"{alias!r} cannot move"), actor or current_user()
    with versions.lineage.database.read() as session:
        events = queries.read_events(session, name, alias)
        if not any(event.action != "refuse" for event in events):
            queries.read_version(session, name, alias)
        current = queries.alias_target(session, name, alias)
        had = stack(events)
        earlier = [number for number in (had if current is None else had[:-1]) if number != current]
        wanted = queries.find_row(session, name, to).version if to is not None else None
        if to_event is not None:
            wanted = _target_at(events, to_event, alias)
        if not earlier or (wanted is not None and wanted not in earlier):
            known = ", ".join(map(str, dict.fromkeys(earlier))) or "none; it has had one version only"
            raise PromotionError(
                f"{alias!r} cannot go back" + (f" to version {wanted}" if wanted else ""), where=name, allowed=known
            )
        target = queries.read_version(session, name, wanted or earlier[-1])
    # What it once had, it may have again; only what no override sets aside can have changed since.
    policy = AliasPolicy(movers=read_policies(versions.home.path).of(alias).movers)
    with versions.lineage.database.read() as session:
        facts = gather_policy_facts(session, versions, target, policy, actor=actor)
    decision = decide(target, policy, PolicyFacts(damage=versions.damage(target), revoked=facts.revoked, actor=actor))
    if decision.final:
        raise Refused(
            f"{alias!r} cannot go back",
            reasons=decision.final,
            where=target.ref,
            remedy="roll back further with `--to`",
        )
    with versions.lineage.database.write() as session:
        _refuse_revoked(session, versions, target, alias, actor)
        event = queries.move_alias(
            session, target, alias, expected=current, action="rollback", actor=actor, reason=reason
        )
    versions.sync()
    return event


def remove(versions: Versions, name: str, alias: str, *, reason: str, actor: str | None = None) -> Event:
    """Lets an alias point at nothing; `rollback` brings it back.

    Raises:
        Refused: The actor may not move the alias.
        Conflict: Somebody else moved it meanwhile.
        UnknownVersion: It points at nothing.
    """
    reason, actor = require_reason(reason, f"{alias!r} cannot be removed"), actor or current_user()
    with versions.lineage.database.read() as session:
        version = queries.read_version(session, name, check_alias(alias))
    policy = read_policies(versions.home.path).of(alias)
    if not policy.may_move(actor):
        why = f"{actor} may not move this alias; {', '.join(policy.movers)} may"
        raise _refuse(versions, version, alias, Decision(False, (why,), (why,)), actor, "ask one of them")
    with versions.lineage.database.write() as session:
        event = queries.clear_alias(session, version, alias, actor=actor, reason=reason)
    versions.sync()
    return event


def history(versions: Versions, name: str, alias: str | None = None) -> list[Event]:
    """The log of an adapter, or of one of its aliases, oldest first.

    Raises:
        UnknownName: No such adapter.
    """
    with versions.lineage.database.read() as session:
        queries.find_row(session, name, "latest")
        return queries.read_events(session, name, alias)


def read_log(versions: Versions) -> list[Event]:
    """The log of the whole registry, oldest first."""
    with versions.lineage.database.read() as session:
        return queries.read_events(session)


def replay(events: Iterable[Event]) -> dict[tuple[str, str], int]:
    """What the aliases must be by the log alone: (name, alias) -> number."""
    aliases: dict[tuple[str, str], int | None] = {}
    for event in sorted(events, key=lambda entry: entry.seq):
        if event.alias and event.action != "refuse":
            aliases[event.name, event.alias] = event.after
    return {key: number for key, number in aliases.items() if number is not None}


def stack(events: Iterable[Event]) -> list[int]:
    """The versions that one alias had, oldest first, without what was rolled back."""
    had: list[int] = []
    for event in events:
        if event.action == "refuse" or event.after is None:
            continue
        if event.action == "rollback" and event.after in had:
            last = len(had) - 1 - had[::-1].index(event.after)
            del had[last + 1 :]
        else:
            had.append(event.after)
    return had


def require_reason(reason: str, what: str) -> str:
    """The reason without blanks around it.

    Raises:
        PromotionError: There is none.
    """
    if not reason.strip():
        raise PromotionError(f"{what} without a reason", remedy="say why; it is kept in the log")
    return reason.strip()


def _refuse(
    versions: Versions, version: AdapterVersion, alias: str, decision: Decision, actor: str, remedy: str
) -> Refused:
    """Logs a refusal and gives the error."""
    with versions.lineage.database.write() as session:
        standing = queries.alias_target(session, version.name, alias)
        why = "; ".join(decision.reasons)
        queries.log_alias_event(session, version, alias, standing, action="refuse", actor=actor, reason=why)
    return Refused(f"it cannot become {alias!r}", reasons=decision.reasons, where=version.ref, remedy=remedy)


def _remedy(override: bool, decision: Decision, policy: AliasPolicy) -> str:
    if not override:
        return "mend all of it"
    if decision.final:
        return f"no override sets these aside: {'; '.join(decision.final)}"
    return "the policy of this alias lets nobody override it; mend all of it" if not policy.overridable else ""


def _refuse_revoked(session: Session, versions: Versions, version: AdapterVersion, alias: str, actor: str) -> None:
    """Looks once more, within the transaction: a revocation may have come between the decision and now."""
    revoked = gather_policy_facts(session, versions, version, AliasPolicy(), actor=actor).revoked
    if revoked:
        reasons = tuple(f"{what} was revoked" for what in revoked)
        raise Refused(f"it cannot become {alias!r}", reasons=reasons, where=version.ref)


def _target_at(events: Sequence[Event], seq: int, alias: str) -> int:
    known = [event.seq for event in events if event.action != "refuse"]
    pointed = [number for (_, of), number in replay(e for e in events if e.seq <= seq).items() if of == alias]
    if not known or seq > known[-1] or not pointed:
        raise PromotionError(
            f"{alias!r} pointed at nothing after event {seq}" if known and seq <= known[-1] else f"no event {seq} yet",
            allowed=", ".join(map(str, known[:-1])) or "none; nothing came before",
            remedy="`loraline log NAME` shows all events",
        )
    return pointed[0]
