"""The policies of a home: `policy.yaml` there, over one of the presets. Reading only; `policy` decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.entities import check_alias
from registry.errors import PolicyError, VersionError
from registry.policy.alias_policy import PRESETS, AliasPolicy
from registry.policy.licenses import with_context

NAME = "policy.yaml"


class _Written(BaseModel):
    """The file: a preset, what is set otherwise alias by alias, and what a recall does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["default", "strict"] = "default"
    aliases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    recall: Literal["flag", "withdraw"] = "flag"


class Policies(BaseModel):
    """The policies of a home.

    Attributes:
        aliases: What each alias asks for.
        recall: What happens to versions that a revocation reaches, where nobody says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: dict[str, AliasPolicy] = Field(default_factory=lambda: dict(PRESETS["default"]))
    recall: Literal["flag", "withdraw"] = "flag"

    def of(self, alias: str) -> AliasPolicy:
        """The policy of an alias; one that is not named asks for nothing more than all do."""
        return self.aliases.get(alias, _PLAIN)


_PLAIN = AliasPolicy()


def read_policies(home: Path) -> Policies:
    """The policies of a home: those of its file over the preset that it names; the default preset without a file.

    Raises:
        PolicyError: The file is no YAML or says something that no policy knows; all of it at once.
    """
    path = home / NAME
    remedy = "mend or remove the file (see docs/rights.md)"
    try:
        written = _Written.model_validate(yaml.safe_load(path.read_bytes()) or {})
    except FileNotFoundError:
        return Policies()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"is no YAML ({error})", where=str(path), remedy=remedy) from error
    except ValidationError as error:
        raise PolicyError(
            with_context(error), where=str(path), allowed="policy, aliases, recall", remedy=remedy
        ) from error
    aliases = dict(PRESETS[written.policy])
    problems = []
    for alias, changes in written.aliases.items():
        try:
            base = aliases.get(check_alias(alias), _PLAIN).model_dump()
            # Strict, but for YAML's lists: `needs_gate: "no"` must not come to mean yes.
            listed = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
            aliases[alias] = AliasPolicy.model_validate(base | listed, strict=True)
        except ValidationError as error:
            problems.append(f"aliases.{alias}: {with_context(error)}")
        except VersionError as error:
            problems.append(str(error))
    if problems:
        allowed = ", ".join(AliasPolicy.model_fields)
        raise PolicyError("; ".join(problems), where=str(path), allowed=allowed, remedy=remedy)
    return Policies(aliases=aliases, recall=written.recall)
