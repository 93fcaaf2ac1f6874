"""The table of licences: `licenses.yaml` beside this file, and what a home adds to it. No legal advice."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.errors import PolicyError
from registry.policy.license_terms import TAINTS, LicenseTerms, unknown

NAME = "licenses.yaml"
_SHIPPED = Path(__file__).with_name(NAME)
_NO_STATEMENT = frozenset({"", "noassertion", "none", "unknown", "other"})
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+:_/-]{0,99}$")]


class License(BaseModel):
    """One licence, summarised.

    Attributes:
        id: SPDX's identifier, or `LicenseRef-...`.
        name: For people.
        url: Where its text is.
        sha256: Digest of that text; None where it was not at hand.
        aliases: Other spellings.
        permissions: What is allowed at all.
        obligations: What has to be done for it.
        restrictions: What is forbidden.
        share_alike: Whether what is made from it has to come under the same terms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Word
    name: str = ""
    url: str = ""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    aliases: tuple[Word, ...] = ()
    permissions: tuple[Literal["commercial", "redistribute", "derivatives", "train-from-outputs"], ...]
    obligations: tuple[Word, ...] = ()
    restrictions: tuple[Word, ...] = ()
    share_alike: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> License:
        for restriction, permission in TAINTS.items():
            if restriction in self.restrictions and permission in self.permissions:
                raise ValueError(f"{self.id} allows {permission} and is {restriction}; leave one out")
        return self

    @property
    def terms(self) -> LicenseTerms:
        """The licence as a point of the lattice."""
        return LicenseTerms(
            frozenset(self.permissions),
            frozenset(self.obligations),
            frozenset(self.restrictions),
            frozenset({self.id}),
            frozenset({self.id} if self.share_alike else ()),
        )


class BaseLicense(BaseModel):
    """Which bases carry a licence: by hub id of any revision, by family (`sd15`, ...), by fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: Word
    hub: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    fingerprints: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


class Licenses(BaseModel):
    """A table of licences.

    Attributes:
        version: Of its content.
        date: When it was last looked over.
        note: What it is not.
        licenses: The licences.
        bases: Which base carries which.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    date: date
    note: str = "not legal advice"
    licenses: tuple[License, ...] = ()
    bases: tuple[BaseLicense, ...] = ()

    def find(self, text: str | None) -> License | None:
        """The licence of that id or alias, in any case; None for what is not in the table."""
        wanted = (text or "").strip().lower()
        for entry in reversed(self.licenses):
            if wanted in {entry.id.lower(), *(alias.lower() for alias in entry.aliases)}:
                return entry
        return None

    def terms_of_license(self, text: str | None, what: str) -> LicenseTerms:
        """The terms of a licence as it was written down.

        Args:
            text: Identifier or alias.
            what: What carries it, for the reason of a refusal.
        """
        found = self.find(text)
        if found is not None:
            return found.terms
        stated = (text or "").strip()
        return unknown(what if stated.lower() in _NO_STATEMENT else f"{what} ({stated[:80]!r} is not in the table)")

    def terms_of_base(self, name: str, fingerprint: str | None = None) -> LicenseTerms:
        """The terms of a base by its fingerprint, else by its hub id or family; unknown where it is in neither."""
        hub = name.partition("@")[0].lower()
        for by in ("fingerprint", "name"):
            for entry in reversed(self.bases):
                named = hub in {*(each.lower() for each in entry.hub), *entry.families}
                if fingerprint in entry.fingerprints if by == "fingerprint" else named:
                    return self.terms_of_license(entry.license, f"base {name!r}")
        return unknown(f"base {name!r}" + (f" with fingerprint {fingerprint}" if fingerprint else ""))

    def joined(self, more: Licenses) -> Licenses:
        """Both tables; where they differ, the other one counts."""
        replaced = {entry.id for entry in more.licenses}
        kept = tuple(entry for entry in self.licenses if entry.id not in replaced)
        return more.model_copy(update={"licenses": kept + more.licenses, "bases": self.bases + more.bases})


def read_licenses(home: Path | None = None) -> Licenses:
    """The table that is shipped, joined with the home's own if there is one.

    Raises:
        PolicyError: A table is no YAML, holds something else, or names a licence that neither has.
    """
    shipped = _shipped()
    own = home / NAME if home is not None else None
    if own is None or not own.is_file():
        return shipped
    joined = shipped.joined(_read(own))
    _check(joined, own)
    return joined


@lru_cache(maxsize=1)
def _shipped() -> Licenses:
    table = _read(_SHIPPED)
    _check(table, _SHIPPED)
    return table


def _read(path: Path) -> Licenses:
    remedy = f"write it in the form of {NAME} as it is shipped (see docs/rights.md)"
    try:
        return Licenses.model_validate(yaml.safe_load(path.read_bytes()) or {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"is no YAML ({error})", where=str(path), remedy=remedy) from error
    except ValidationError as error:
        raise PolicyError(with_context(error), where=str(path), remedy=remedy) from error


def with_context(error: ValidationError) -> str:
    """The problems of a validation, each with its place."""
    found = error.errors(include_url=False)
    listed = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in found[:4]]
    more = [f"and {len(found) - 4} more"] if len(found) > 4 else []
    return "; ".join(listed + more)


def _check(table: Licenses, path: Path) -> None:
    _refuse_twins(
        (name.lower() for each in table.licenses for name in {each.id.lower(), *map(str.lower, each.aliases)}), path
    )
    missing = sorted({entry.license for entry in table.bases if table.find(entry.license) is None})
    if missing:
        raise PolicyError(
            f"bases name {missing[0]!r}, and no licence has that id",
            where=str(path),
            allowed=", ".join(entry.id for entry in table.licenses),
        )


def _refuse_twins(names: Iterable[str], path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PolicyError(f"two licences go by {name!r}", where=str(path), remedy="leave one of the aliases out")
        seen.add(name)
