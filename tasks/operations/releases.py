"""Reviews and carries out releases in two steps: what was reviewed is what is done, or it is refused.

A review reads the state and every reason against the action. Carrying it out compares the state again: an alias that
moved meanwhile, or a version that got an alias, is a conflict.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.entities import AdapterVersion, Event
from registry.errors import Conflict, PromotionError
from registry.home import Home
from registry.policy.actors import establish_actor
from registry.policy.conditions import AliasState, without_overridden
from registry.policy.evaluate import evaluate_policy
from registry.policy.policy_file import read_policies
from registry.refs import check_alias
from registry.versions.deletion import withdraw
from registry.versions.endorsement import endorse
from registry.versions.projections import find_overridden, stack
from registry.versions.promotion import remove, rollback
from registry.versions.versions import Versions
from tasks.operations.promote import promote_version
from tasks.operations.status import read_aliases

ReleaseAction = Literal["promote", "rollback", "endorse", "withdraw", "unalias"]
"""Named like the verbs that do the same."""


@dataclass(frozen=True)
class ReleaseReview:
    """An action, and the state for which it was reviewed.

    Attributes:
        action: The action.
        name: The adapter.
        version: Number of the version that is promoted, rolled back to, endorsed or withdrawn.
        sha256: Digest of its adapter file.
        alias: The alias; empty for `withdraw`.
        current: Number that the alias points at; None for nothing.
        aliases: The aliases of the version.
        reasons: All reasons against it, as far as they are known before; carrying it out may find more.
        warnings: What does not prevent it.
        actor: The user who reviewed it.
    """

    action: ReleaseAction
    name: str
    version: int
    sha256: str
    alias: str
    current: int | None
    aliases: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    actor: str

    @property
    def summary(self) -> str:
        """Returns what would be done, as one line."""
        ref, now = f"{self.name}@{self.version}", "nothing" if self.current is None else f"{self.name}@{self.current}"
        if self.action == "endorse":
            return f"endorse {ref} for {self.alias}, which is {now}"
        if self.action == "withdraw":
            taken = f"; it loses {', '.join(self.aliases)}" if self.aliases else ""
            return f"withdraw {ref}{taken}"
        if self.action == "unalias":
            return f"remove the alias {self.alias}, which is {now}"
        return f"move {self.alias} from {now} to {ref}"


def review_release(
    home: Home, action: ReleaseAction, name: str, ref: str, alias: str, *, actor: str | None = None
) -> ReleaseReview:
    """Reads the state that an action is about, and every reason against it that is known before.

    Args:
        home: The home.
        action: The action.
        name: The adapter.
        ref: Number or alias of the version; `rollback` and `unalias` find theirs.
        alias: The alias; `withdraw` needs none.
        actor: The user; None means this process's user.

    Raises:
        PromotionError: No earlier version had the alias.
        VersionError: There is no such adapter, version or alias.
        IdentityError: The user cannot be established.
    """
    with closing(Versions(home)) as versions:
        user = establish_actor(versions, actor)
        if action != "withdraw":
            check_alias(alias)
        with versions.lineage.database.read() as session:
            current = None if action == "withdraw" else queries.alias_target(session, name, alias)
            version = queries.read_version(session, name, _target(session, action, name, ref, alias, current))
        reasons, warnings = _judge(versions, action, version, alias, user)
        facts = (version.sha256, "" if action == "withdraw" else alias, current, version.aliases)
        return ReleaseReview(action, name, version.version, *facts, reasons, warnings, str(user))


def carry_out(home: Home, review: ReleaseReview, reason: str, *, actor: str | None = None) -> Event:
    """Does what was reviewed.

    Args:
        home: The home.
        review: The review.
        reason: The reason; stored in the log.
        actor: The user, who must be the one who reviewed it; None means this process's user.

    Raises:
        Refused: It is not allowed; has all reasons, and is logged.
        Conflict: The alias moved since the review, or another user reviewed it.
        PromotionError: The reason is empty.
    """
    with closing(Versions(home)) as versions:
        user = establish_actor(versions, actor)
        if str(user) != review.actor:
            raise Conflict(f"{review.actor} reviewed this, not {user}", remedy="review it again")
        if review.action == "promote":
            return promote_version(
                home,
                f"{review.name}@{review.version}",
                review.alias,
                reason,
                expect=review.sha256,
                expected=review.current,
                actor=user,
            )[1]
        if review.action == "rollback":
            _require_unchanged(versions, review)
            return rollback(
                versions,
                review.name,
                review.alias,
                to=review.version,
                expected=review.current,
                reason=reason,
                actor=user,
            )
        if review.action == "unalias":
            return remove(versions, review.name, review.alias, expect=review.version, reason=reason, actor=user)
        _require_unchanged(versions, review)
        if review.action == "endorse":
            return endorse(
                versions, review.name, review.version, review.alias, expect=review.sha256, reason=reason, actor=user
            )
        return withdraw(versions, review.name, review.version, expect=review.sha256, reason=reason, actor=user)


def read_releases(home: Home, name: str | None = None) -> list[AliasState]:
    """Returns the aliases of all adapters or of one: since when, by whom, why, and whether their policy is met."""
    return read_aliases(home, name)[0]


def read_release_events(home: Home, name: str, limit: int = 50) -> list[Event]:
    """Returns the latest events of an adapter that are about aliases and states, newest first; without votes."""
    with closing(Versions(home)) as versions, versions.lineage.database.read() as session:
        events = event_log.read_events(session, name)
    return [event for event in reversed(events) if event.action not in {"vote", "compare", "export"}][:limit]


def _target(session: Session, action: ReleaseAction, name: str, ref: str, alias: str, current: int | None) -> str | int:
    """Returns the number or the alias of the version that an action is about."""
    if action == "rollback":
        return _earlier(session, name, alias, current)
    return alias if action == "unalias" else ref


def _earlier(session: Session, name: str, alias: str, current: int | None) -> int:
    numbers = [number for number in stack(event_log.read_events(session, name, alias)) if number != current]
    if not numbers:
        raise PromotionError(
            f"{alias!r} cannot be rolled back", where=name, allowed="none; it has had one version only"
        )
    return numbers[-1]


def _judge(
    versions: Versions, action: ReleaseAction, version: AdapterVersion, alias: str, user: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the reasons against an action, and warnings."""
    policies = read_policies(versions.home.path)
    if action in {"promote", "rollback"}:
        again = action == "rollback" or alias in version.aliases
        decision = evaluate_policy(versions, version, alias, actor=user, approvals=not again)
        if again:
            with versions.lineage.database.read() as session:
                events = event_log.read_events(session, version.name, alias, after=version.version)
            decision = without_overridden(decision, find_overridden(events, version.version))
        return decision.reasons, decision.warnings
    permission: Literal["endorse", "revoke"] = "endorse" if action == "endorse" else "revoke"
    denial = policies.denial(user, permission, version.name, alias if action != "withdraw" else "")
    reasons = [denial] if denial else []
    if action == "withdraw":
        protected = [taken for taken in version.aliases if policies.of(taken).protected]
        reasons += [f"the alias {taken!r}, which is protected, points at it" for taken in protected]
    if version.state != "ACTIVE":
        reasons.append(f"it was {version.state.lower()}")
    return tuple(reasons), ()


def _require_unchanged(versions: Versions, review: ReleaseReview) -> None:
    """Raises Conflict if the version's aliases, or the target of the alias, changed since the review."""
    version = versions.show(review.name, review.version)
    with versions.lineage.database.read() as session:
        current = queries.alias_target(session, review.name, review.alias) if review.alias else None
    if version.aliases != review.aliases or current != review.current:
        aliases = ", ".join(version.aliases) or "none"
        raise Conflict(
            f"the aliases changed since the review; those of the version are now: {aliases}",
            where=version.ref,
            remedy="review it again",
        )
