"""Releases a staged version: promotes it if its policy allows it, checks it as a user would, and rolls it back.

All decisions are in the event log, so a run that died is continued by the next one, and nothing happens twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_engine.files import atomic_write, canonical_json
from registry import event_log, queries
from registry.entities import AdapterVersion, Event
from registry.errors import GoneVersion, MlflowError, PromotionError, Refused, RegistryError, UnknownVersion
from registry.home import Home
from registry.identity import Actor
from registry.policy.actors import establish_actor
from registry.policy.evaluate import evaluate_policy
from registry.policy.policy_file import read_policies
from registry.versions.promotion import promote, remove, rollback
from registry.versions.versions import Versions
from tasks.operations.promote import find_structure
from tasks.operations.release_check import ReleaseCheck, find_release_problems

_log = logging.getLogger(__name__)
_DECISION = "retraining"
"""Key of an event's details: `rejected` or `expired`."""
ReleaseState = Literal["Promoted", "Refused", "Rejected", "ApprovalExpired", "RolledBack", "CheckFailed"]


@dataclass(frozen=True)
class ReleaseOutcome:
    """What happened to a staged version.

    Attributes:
        state: The state; docs/scheduling.md explains each.
        message: The version and the reasons.
    """

    state: ReleaseState
    message: str

    @property
    def failed(self) -> bool:
        """Returns True for every state but `Promoted` and `Rejected`, which was a decision."""
        return self.state not in ("Promoted", "Rejected")


def find_obstacle(versions: Versions, version: AdapterVersion, alias: str) -> str:
    """Returns why a schedule must not release a version to an alias; empty if it may.

    A schedule moves an alias only forward, to a version that never had it and that nobody decided about.
    """
    with versions.lineage.database.read() as session:
        holder = queries.alias_target(session, version.name, alias)
        events = event_log.read_events(session, version.name, alias)
    if holder is not None and holder >= version.version:
        return f"{alias} has {version.name}@{holder}"
    for event in reversed(events):
        if event.action != "refuse" and event.after == version.version:
            return f"it had {alias} before (event {event.seq}); promote it by hand"
        if event.after == version.version and (decision := event.details.get(_DECISION)):
            return f"{decision} by {event.actor} (event {event.seq}); promote it by hand"
    return ""


def find_denial_of_move(versions: Versions, version: AdapterVersion, alias: str, actor: str | None) -> str:
    """Returns why a user may not decide about an alias; empty if the user may. None means this process's user."""
    user, policies = establish_actor(versions, actor), read_policies(versions.home.path)
    policy = policies.of(alias)
    if not policy.may_move(user):
        return f"{user} may not move this alias; {', '.join(policy.movers)} may"
    return policies.denial(user, "promote" if policy.protected else "stage", version.name, alias)


def log_decision(
    versions: Versions,
    version: AdapterVersion,
    alias: str,
    decision: Literal["rejected", "expired"],
    *,
    actor: str | None,
    reason: str,
) -> Event:
    """Logs that a version was rejected or that its approval expired; the alias stays."""
    user = establish_actor(versions, actor)
    with versions.lineage.database.write() as session:
        current = queries.alias_target(session, version.name, alias)
        details = {_DECISION: decision}
        return event_log.log_alias_event(
            session, version, alias, current, action="refuse", actor=user, reason=reason, details=details
        )


def promote_and_check(
    home: Home,
    version: AdapterVersion,
    alias: str,
    *,
    actor: str | None,
    reason: str,
    check: ReleaseCheck,
    roll_back: bool = True,
    source: str | None = None,
) -> ReleaseOutcome:
    """Promotes a version if its policy allows it, then checks it; rolls the alias back if the check fails.

    Args:
        home: The home with all state.
        version: The version.
        alias: The alias.
        actor: The user who decided, who must be allowed to move the alias; None means this process's user.
        reason: The reason; stored in the log.
        check: The check.
        roll_back: False leaves the alias where it is if the check fails.
        source: An alias that must still point at the version, such as staging; None requires none.
    """
    versions = Versions(home)
    try:
        user = establish_actor(versions, actor)
        pending = _pending(home, version, alias)
        structure = find_structure(versions, version)
        refusal = _refuse(versions, version, alias, user, structure)
        if refusal:
            return ReleaseOutcome("Refused", f"{version.ref} not {alias}: {refusal}")
        # Before the promotion: the next run checks the version if this process dies in between.
        atomic_write(pending, canonical_json({"name": version.name, "version": version.version, "alias": alias}))
        try:
            promote(
                versions,
                version.name,
                source or version.version,
                alias,
                reason=reason,
                actor=user,
                expected_source=version.version,
                structure=structure,
            )
        except MlflowError as error:  # promoted and logged; the next command syncs MLflow
            _log.warning("%s", error)
        except (PromotionError, GoneVersion) as error:
            pending.unlink(missing_ok=True)
            reasons = "; ".join(error.reasons) if isinstance(error, Refused) and error.reasons else error.problem
            return ReleaseOutcome("Refused", f"{version.ref} not {alias}: {reasons}")
        return _check(versions, version, alias, user, check, roll_back)
    finally:
        versions.close()


def finish_checks(home: Home, names: Sequence[str], *, check: ReleaseCheck, roll_back: bool) -> list[ReleaseOutcome]:
    """Checks versions whose promotion was recorded and whose check did not end, because the process died.

    Args:
        home: The home with all state.
        names: The adapters.
        check: The check.
        roll_back: False leaves the alias where it is if the check fails.
    """
    outcomes = []
    versions = Versions(home)
    try:
        for path in sorted(_folder(home).glob("*.json")):
            data = json.loads(path.read_bytes())
            if data["name"] not in names:
                continue
            version = versions.show(data["name"], data["version"])
            if data["alias"] in version.aliases:
                user = establish_actor(versions)
                outcomes.append(_check(versions, version, data["alias"], user, check, roll_back))
            path.unlink(missing_ok=True)
    finally:
        versions.close()
    return outcomes


def _refuse(versions: Versions, version: AdapterVersion, alias: str, actor: Actor, structure: Sequence[str]) -> str:
    """Returns the reasons of the policy; asking first keeps refusals of every tick out of the log."""
    decision = evaluate_policy(
        versions, version, alias, actor=actor, damage=versions.damage(version), structure=structure
    )
    return "" if decision.allowed else "; ".join(decision.reasons)


def _check(
    versions: Versions, version: AdapterVersion, alias: str, actor: Actor, check: ReleaseCheck, roll_back: bool
) -> ReleaseOutcome:
    problems = find_release_problems(versions.home, version, alias, check)
    outcome = ReleaseOutcome("Promoted", f"{version.ref} is {alias}")
    if problems:
        reason = "; ".join(problems)
        outcome = ReleaseOutcome("CheckFailed", f"{version.ref} is {alias}, but its check failed: {reason}")
        if roll_back:
            outcome = ReleaseOutcome(
                "RolledBack", f"{version.ref}: {reason}; {_roll_back(versions, version, alias, actor, reason)}"
            )
        _log.error("%s: %s", outcome.state, outcome.message)
    _pending(versions.home, version, alias).unlink(missing_ok=True)
    return outcome


def _roll_back(versions: Versions, version: AdapterVersion, alias: str, actor: Actor, reason: str) -> str:
    """Moves the alias back, or removes it where no earlier version may have it; returns where it is, in words."""
    why = f"the check of {version.ref} failed: {reason}"
    with suppress(UnknownVersion):
        if versions.show(version.name, alias).version != version.version:
            return f"{alias} was moved meanwhile"
    try:
        event = rollback(versions, version.name, alias, reason=why, actor=actor)
    except PromotionError as error:
        try:
            remove(versions, version.name, alias, reason=why, actor=actor, expect=version.version)
        except RegistryError as refusal:
            return f"{alias} stays, because it cannot be moved: {refusal.problem}"
        return f"{alias} was removed, because no earlier version may have it ({error.problem})"
    return f"{alias} is {version.name}@{event.after} again"


def _folder(home: Home) -> Path:
    return home.path / "checks"


def _pending(home: Home, version: AdapterVersion, alias: str) -> Path:
    return _folder(home) / f"{version.name}@{version.version}.{alias}.json"
