"""Reads the policies of a home: its `policy.yaml` over one of the presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.documents import read_document
from registry.errors import PolicyError, VersionError
from registry.policy.alias_policy import PRESETS, AliasPolicy
from registry.policy.consent import ConsentPolicy
from registry.policy.identity_policy import IdentityPolicy
from registry.policy.licenses import describe_problems
from registry.policy.roles import Permission, Role, find_denial
from registry.refs import check_alias

_NAME = "policy.yaml"
_KEYS = "policy, aliases, consent, recall, similar, similarity, identity, roles"
_COPIED = {"consent", "recall", "similar", "similarity", "identity", "roles"}


class _PolicyFile(BaseModel):
    """The file: a preset, changes by alias, effects of consent, revocations and similar content, identity and roles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["default", "strict"] = "default"
    aliases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    consent: ConsentPolicy | None = None
    recall: Literal["flag", "withdraw"] = "flag"
    similar: Literal["warn", "refuse", "ignore"] = "warn"
    similarity: float = Field(default=0.7, ge=0.5, le=1.0)
    identity: IdentityPolicy = IdentityPolicy()
    roles: dict[str, Role] = Field(default_factory=dict)


class Policies(BaseModel):
    """The policies of a home.

    Attributes:
        aliases: The policy of each alias.
        consent: What broken and missing statements about images do to training and to every alias; None leaves it to
            the ingest steps, and is `warn` if they set none.
        recall: Default action for versions that a revocation affects.
        similar: Action of an import if the content of the file resembles that of a registered adapter.
        similarity: Absolute cosine from which contents are similar, 0.5 to 1; unrelated ones stay below 0.5.
        identity: Which actors count.
        roles: What users may do, by the name of the role; without any, every user may do everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: dict[str, AliasPolicy] = Field(default_factory=lambda: dict(PRESETS["default"]))
    consent: ConsentPolicy | None = None
    recall: Literal["flag", "withdraw"] = "flag"
    similar: Literal["warn", "refuse", "ignore"] = "warn"
    similarity: float = Field(default=0.7, ge=0.5, le=1.0)
    identity: IdentityPolicy = IdentityPolicy()
    roles: dict[str, Role] = Field(default_factory=dict)

    def of(self, alias: str) -> AliasPolicy:
        """Returns the policy of an alias; an alias without one has only the common requirements."""
        return self.aliases.get(alias, _PLAIN)

    def permission_to_move(self, alias: str) -> Permission:
        """Returns the permission that moving an alias requires."""
        return "promote" if self.of(alias).protected else "stage"

    def denial(self, actor: str, permission: Permission, name: str | None = None, alias: str = "") -> str:
        """Returns why an actor may not do something; empty if the actor may. See `registry.policy.roles`."""
        return find_denial(self.roles, self.identity, actor, permission, name=name, alias=alias)

    @property
    def logs_registrations(self) -> bool:
        """Returns True if roles, approvals or votes need to know who registered a version."""
        by_votes = any(policy.votes is not None and policy.votes.by_others for policy in self.aliases.values())
        return bool(self.roles) or by_votes or any(policy.needs_approvals for policy in self.aliases.values())


_PLAIN = AliasPolicy()


def read_policies(home: Path) -> Policies:
    """Returns the policies of a home: its file over the preset that it names, or the default preset without a file.

    Raises:
        PolicyError: The file is not YAML or has unknown or invalid keys; lists all of them.
    """
    path = home / _NAME
    remedy = "fix or remove the file (see docs/rights.md)"
    document = read_document(path, PolicyError, allowed=_KEYS, optional=True)
    try:
        file = _PolicyFile.model_validate(document.data)
    except ValidationError as error:
        raise PolicyError(
            describe_problems(error, document),
            where=document.where(error.errors()[0]["loc"]),
            allowed=_KEYS,
            remedy=remedy,
        ) from error
    aliases = dict(PRESETS[file.policy])
    problems, places = [], []
    for alias, changes in file.aliases.items():
        try:
            base = aliases.get(check_alias(alias), _PLAIN).model_dump()
            # Strict except for YAML lists: `needs_gate: "no"` must not parse as true.
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
            aliases[alias] = AliasPolicy.model_validate(base | values, strict=True)
        except ValidationError as error:
            problems.append(describe_problems(error, document, ("aliases", alias)))
            places.append(document.where(("aliases", alias, *error.errors()[0]["loc"])))
        except VersionError as error:
            problems.append(str(error))
            places.append(document.where(("aliases", alias)))
    if problems:
        allowed = ", ".join(AliasPolicy.model_fields)
        raise PolicyError("; ".join(problems), where=places[0], allowed=allowed, remedy=remedy)
    return Policies(aliases=aliases, **file.model_dump(include=_COPIED))
