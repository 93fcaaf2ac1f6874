"""Actors, roles and endorsements for the command line and for runs. See `registry.policy.actors`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from registry.context import RegistryContext
from registry.home import Home
from registry.identity import Actor
from registry.policy.actors import establish_actor, read_home_id
from registry.policy.policy_file import read_policies
from registry.versions.guard import require_permission


@dataclass(frozen=True)
class ActorReport:
    """The current actor, and what it may do.

    Args:
        actor: The actor.
        accepted: True if policy.yaml accepts actors that were established so.
        roles: Names of the actor's roles; empty if it has none.
        has_roles: False if policy.yaml has no roles: every accepted actor may do everything.
    """

    actor: Actor
    accepted: bool
    roles: tuple[str, ...]
    has_roles: bool


def describe_actor(home: Home) -> ActorReport:
    """Returns the current actor, how it was established, and its roles in a home.

    Raises:
        IdentityError: A token or a signed value is not valid.
        PolicyError: The home's policy cannot be used.
    """
    with closing(RegistryContext(home)) as context:
        actor = establish_actor(context)
    policies = read_policies(home.path)
    accepted = actor.established in policies.identity.accept
    roles = tuple(name for name, role in policies.roles.items() if role.has_member(actor)) if accepted else ()
    return ActorReport(actor, accepted, roles, bool(policies.roles))


def sign_for_actor(home: Home, name: str, key: Path, passphrase: bytes | None, seconds: float) -> str:
    """Returns a value of LORALINE_SIGNED_ACTOR that establishes an actor in a home; see `sign_actor`.

    Raises:
        SignatureError: The key cannot be used.
        IdentityError: The home does not let the key sign for this actor.
    """
    from registry.policy.tokens import sign_actor

    policy = read_policies(home.path).identity
    with closing(RegistryContext(home)) as context, context.lineage.database.write() as session:
        home_id = read_home_id(session)
    return sign_actor(home, policy, home_id, name, key, passphrase, seconds)


def require_training(home: Home, names: Iterable[str]) -> None:
    """Raises Refused if the user may not register under one of the names; a run asks before it starts.

    Raises:
        Refused: The user has no role that may; logged.
        IdentityError: The user cannot be established.
        PolicyError: The home's policy cannot be used.
    """
    wanted = sorted(set(names))
    if not wanted:
        return
    with closing(RegistryContext(home)) as context:
        for name in wanted:
            require_permission(context, "register", name=name)
