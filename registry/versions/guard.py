"""Guards every function that changes the registry: establishes the actor, asks the roles, and logs each refusal."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.context import RegistryContext
from registry.entities import AdapterVersion
from registry.errors import HomeError, IdentityError, Refused, VersionError
from registry.identity import LONGEST_NAME, Actor, os_user
from registry.policy.actors import establish_actor
from registry.policy.policy_file import read_policies
from registry.policy.roles import REQUIREMENTS, Operation
from registry.refs import can_exist, split_ref
from registry.store.tables import NameRow

_P = ParamSpec("_P")
_R = TypeVar("_R")
_logger = logging.getLogger(__name__)
_LONGEST_REASON = 4_000
"""Characters of the longest reason of a refusal that is logged."""
_ASK = "ask a user who has the role, or an administrator of policy.yaml (see docs/access.md)"


def guarded(operation: Operation, *, alias: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Guards a function `(context, name, ..., actor=None)` that changes the registry.

    Its `actor` becomes an established one. A role that is missing refuses the call, except for a move of an alias,
    whose policy gives that reason together with all others. Every `Refused` that the function raises is logged.
    A call with `dry_run=True` is not guarded.

    Args:
        operation: What the function does; see `REQUIREMENTS`.
        alias: The parameter that has the alias; empty for none.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            if values.get("dry_run"):
                return function(*args, **kwargs)
            context = cast("RegistryContext", next(iter(values.values())))
            target = {"name": str(values.get("name") or ""), "alias": str(values.get(alias) or "")}
            actor: Actor | None = None
            try:
                actor = establish_actor(context, values["actor"])
                require_role(context, operation, actor, **target)
                values["actor"] = actor
                return function(*bound.args, **bound.kwargs)
            except IdentityError as error:
                if actor is None:
                    _log_denial(context, operation, os_user(), error.problem, error.where, **target)
                raise
            except Refused as refusal:
                reasons = "; ".join(refusal.reasons)
                _log_denial(context, operation, actor or os_user(), reasons, refusal.where, **target)
                raise

        return call

    return decorate


def require_role(
    context: RegistryContext, operation: Operation, actor: Actor, *, name: str = "", alias: str = ""
) -> None:
    """Raises Refused if an actor has no role for an operation; does not log it. Asks nothing about a moved alias.

    Args:
        context: The registry.
        operation: The operation.
        actor: The user.
        name: The adapter; empty asks whether the actor may do it with any adapter.
        alias: The alias; empty for none.

    Raises:
        Refused: The actor may not do it.
        PolicyError: The home's policy cannot be used.
    """
    requirement = REQUIREMENTS[operation]
    if requirement == "move" or requirement == "none":  # noqa: PLR1714 (narrows the type)
        return
    denial = read_policies(context.home.path).denial(actor, requirement, name or None, alias)
    if denial:
        raise Refused(f"{operation} is not allowed", reasons=(denial,), where=name, remedy=_ASK)


def require_permission(
    context: RegistryContext, operation: Operation, *, name: str = "", actor: str | None = None
) -> Actor:
    """Returns the established actor if it may do an operation; logs a refusal.

    Raises:
        Refused: The actor may not do it.
        IdentityError: The actor cannot be established.
        PolicyError: The home's policy cannot be used.
    """

    def use(context: RegistryContext, name: str, *, actor: str | None) -> Actor:
        return cast("Actor", actor)

    return guarded(operation)(use)(context, name, actor=actor)


def log_refusal(
    session: Session,
    operation: Operation,
    actor: Actor,
    reason: str,
    *,
    version: AdapterVersion | None = None,
    name: str = "",
    alias: str = "",
) -> None:
    """Logs that an operation was refused, within a transaction; long reasons are cut.

    Args:
        session: In a writing transaction.
        operation: The refused operation.
        actor: The user.
        reason: Why.
        version: The version; None if there is none.
        name: The adapter, which may not exist.
        alias: The alias; empty for none.
    """
    cut = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
    details: dict[str, Any] = {"refused": operation}
    fields: dict[str, Any] = {"actor": Actor(actor[:LONGEST_NAME], actor.established, actor.facts), "reason": cut}
    if version is not None and alias:
        before = queries.alias_target(session, version.name, alias)
        event_log.log_alias_event(session, version, alias, before, action="refuse", details=details, **fields)
    else:
        details |= {"name": name[:64]} if name and version is None else {}
        event_log.log_event(session, "refuse", version=version, details=details, **fields)


def _log_denial(
    context: RegistryContext, operation: Operation, actor: Actor, reason: str, where: str, *, name: str, alias: str
) -> None:
    """Logs a refusal in a transaction of its own; a home that cannot be written only warns."""
    try:
        with context.lineage.database.write() as session:
            version = _find_version(session, where)
            log_refusal(session, operation, actor, reason, version=version, name=name, alias=alias)
    except HomeError as error:
        _logger.warning("a refusal could not be logged: %s", error)


def _find_version(session: Session, where: str) -> AdapterVersion | None:
    name, ref = split_ref(where)
    if "@" not in where or not can_exist(name, ref) or session.get(NameRow, name) is None:
        return None
    try:
        return queries.read_version(session, name, ref)
    except VersionError:
        return None
