"""Roles: which users may train, stage, promote, endorse, revoke and administer which adapters. Pure.

`REQUIREMENTS` has an entry for every event of the log and for each operation of maintenance.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.entities import Action, EventType
from registry.identity import Actor
from registry.policy.identity_policy import IdentityPolicy

Permission = Literal["train", "stage", "promote", "endorse", "vote", "revoke", "administer"]
"""`train` registers versions, `stage` moves aliases that are not protected, `promote` moves protected ones, `endorse`
approves a version for an alias, `vote` prepares comparisons and votes in them, `revoke` withdraws, deletes, revokes
and removes aliases, `administer` restores, lifts, repairs and collects garbage."""
Operation = Action | EventType | Literal["gc", "repair"]
Requirement = Permission | Literal["move", "none"]
"""`move` is `promote` for a protected alias and `stage` for another one."""

REQUIREMENTS: Mapping[Operation, Requirement] = {
    "register": "train",
    "import": "train",
    "stage": "move",
    "promote": "move",
    "override": "move",
    "rollback": "move",
    "endorse": "endorse",
    "compare": "vote",
    "vote": "vote",
    "remove": "revoke",
    "withdraw": "revoke",
    "delete": "revoke",
    "revoke": "revoke",
    "restore": "administer",
    "lift": "administer",
    "gc": "administer",
    "repair": "administer",
    "flag": "none",  # follows a revocation
    "refuse": "none",
    "export": "none",  # only reads the version
    "recall": "none",  # follows a withdrawal or a move of an alias
    "sign": "none",  # the private key is the permission
    "link": "none",  # a migration
}
"""Event or operation -> the permission that it requires."""

_Pattern = Annotated[str, Field(min_length=1, max_length=1_000)]
_Patterns = Annotated[tuple[_Pattern, ...], Field(min_length=1, max_length=1_000)]
_SHOWN = 4


class Role(BaseModel):
    """What some users may do. All patterns are those of shells, and match the whole name, case included.

    Attributes:
        may: Permissions.
        members: Users: names or patterns such as `*@lab`.
        adapters: Names of adapters, or patterns.
        aliases: Aliases, or patterns, to which `stage`, `promote`, `endorse` and the removal of an alias are limited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    may: Annotated[tuple[Permission, ...], Field(min_length=1)]
    members: _Patterns
    adapters: _Patterns = ("*",)
    aliases: _Patterns = ("*",)

    def has_member(self, actor: str) -> bool:
        """Returns True if the role is one of the actor's."""
        return matches_any(actor, self.members)

    def grants(self, actor: str, permission: Permission, name: str | None, alias: str) -> bool:
        """Returns True if the role lets the actor do it.

        Args:
            actor: The user.
            permission: The permission.
            name: The adapter; None asks for any adapter.
            alias: The alias; empty for none.
        """
        return (
            permission in self.may
            and self.has_member(actor)
            and (name is None or matches_any(name, self.adapters))
            and (not alias or matches_any(alias, self.aliases))
        )


def find_denial(
    roles: Mapping[str, Role],
    identity: IdentityPolicy,
    actor: str,
    permission: Permission,
    *,
    name: str | None = None,
    alias: str = "",
) -> str:
    """Returns why an actor may not do something; empty if the actor may.

    Args:
        roles: Roles by name; without any, every user has every permission.
        identity: Which ways to establish an actor count.
        actor: The user; text that is not an `Actor` is a declared name.
        permission: The permission.
        name: The adapter; None asks for any adapter.
        alias: The alias; empty for none.
    """
    established = actor.established if isinstance(actor, Actor) else "declared"
    if established not in identity.accept:
        return (
            f"{actor} is {_WORDS[established]}, and policy.yaml accepts only actors by {', '.join(identity.accept)} "
            f"(identity.accept)"
        )
    if not roles or any(role.grants(actor, permission, name, alias) for role in roles.values()):
        return ""
    target = f"{name or 'adapters'}@{alias}" if alias else name or "any adapter"
    return f"{actor} has no role that may {permission} {target}; {_describe_holders(roles, permission)}"


def matches_any(text: str, patterns: Sequence[str]) -> bool:
    """Returns True if a pattern matches the whole text, case included."""
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


_WORDS = {
    "declared": "a declared name",
    "os": "a user of the operating system",
    "oidc": "known by a token",
    "signed": "known by a signed value",
    "token": "known by a token of a server",
}


def _describe_holders(roles: Mapping[str, Role], permission: Permission) -> str:
    holders = [
        f"{label} ({', '.join(role.members[:_SHOWN])}{', ...' if len(role.members) > _SHOWN else ''})"
        for label, role in roles.items()
        if permission in role.may
    ]
    return f"roles that may: {', '.join(holders[:_SHOWN])}" if holders else "no role may"
