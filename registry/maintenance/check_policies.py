"""Checks that aliases meet their policies and that logged signatures exist. Part of `registry.maintenance.fsck`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sqlalchemy.orm import Session

from registry import event_log
from registry.context import RegistryContext
from registry.documents.signing import signed_heads
from registry.documents.storage import SIGNATURE, read_records
from registry.entities import AdapterVersion, Problem
from registry.errors import PolicyError, RegistryError
from registry.maintenance.check_chain import KnownHead
from registry.policy.conditions import find_lockouts, read_alias_states

_MEET = "resolve the reason, move the alias to another version, or `loraline promote --override` to accept it"
_MOVERS = "correct `policy.yaml` (see docs/rights.md), or trust a key"
_SIGNATURE = "find out who removed it; sign again, or restore the database from a backup"


def check_policies(context: RegistryContext, session: Session) -> Iterator[Problem]:
    """Checks that the version of each alias meets the alias's policy now, and that each policy can be met."""
    try:
        for state in read_alias_states(context, session):
            for reason in state.reasons:
                problem = f"version {state.version} does not meet the policy: {reason}"
                yield Problem(problem, f"{state.name}@{state.alias}", _MEET, "warning")
        for alias, problem in find_lockouts(context, session):
            yield Problem(problem, f"policy of {alias}", _MOVERS, "warning")
    except PolicyError as error:
        yield Problem(error.problem, error.where, error.remedy)


def check_signatures(session: Session, versions: Iterable[AdapterVersion]) -> Iterator[Problem]:
    """Checks that each version has the signatures that were logged last."""
    last = {(e.name, e.after): e for e in event_log.read_events(session) if e.action == "sign"}
    for version in versions:
        event = last.get((version.name, version.version))
        if event is None or version.state == "DELETED":
            continue
        ref = read_records(session, version).get(SIGNATURE)
        if ref is None:
            problem = f"its signature is gone: event {event.seq} logged one of {event.actor}"
            yield Problem(problem, version.ref, _SIGNATURE)
        elif ref.sha256 != event.details.get("bundle"):
            yield Problem(f"its signature is not the one that event {event.seq} logged", version.ref, _SIGNATURE)


def signature_heads(context: RegistryContext, versions: Iterable[AdapterVersion]) -> Iterator[KnownHead]:
    """Yields the heads of the log that signatures cover; other checks report damaged signatures."""
    for version in versions:
        try:
            heads = signed_heads(context, version)
        except (RegistryError, ValueError, KeyError, TypeError):
            continue
        yield from (KnownHead(head, f"signature of {version.ref}") for head in heads)
