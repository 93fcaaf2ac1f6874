"""Reads the license table: `licenses.yaml` beside this file, the families' bases, the home's additions.

Not legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_engine.documents import Document, read_document
from lora_engine.families import families
from registry.errors import PolicyError
from registry.policy.expressions import evaluate_expression, normalize_expression
from registry.policy.license_terms import TAINTS, LicenseTerms, unknown

CONSENT_TO_TRAIN = "LicenseRef-Consent-Train-Only"
"""Id of the terms of images whose owners consent to training only, in expressions and documents."""
_NAME = "licenses.yaml"
_SHIPPED = Path(__file__).with_name(_NAME)
_NO_STATEMENT = frozenset({"", "noassertion", "none", "unknown", "other"})
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+:_/-]{0,99}$")]


class License(BaseModel):
    """Summary of one license.

    Attributes:
        id: SPDX identifier, or `LicenseRef-...`.
        name: Display name.
        url: URL of the license text.
        sha256: Digest of that text; None means unknown.
        aliases: Other spellings.
        permissions: Allowed uses.
        obligations: Required actions.
        restrictions: Forbidden uses.
        share_alike: Derived works must have the same terms.
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
    def _check_taints(self) -> License:
        for restriction, permission in TAINTS.items():
            if restriction in self.restrictions and permission in self.permissions:
                raise ValueError(f"{self.id} allows {permission} and is {restriction}; leave one out")
        return self

    @property
    def terms(self) -> LicenseTerms:
        """The terms of the license."""
        return LicenseTerms(
            frozenset(self.permissions),
            frozenset(self.obligations),
            frozenset(self.restrictions),
            frozenset({self.id}),
            frozenset({self.id} if self.share_alike else ()),
        )


class BaseLicense(BaseModel):
    """The bases that carry a license, by hub id of any revision, published name (`sd15`, ...) or fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: Word
    hub: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    fingerprints: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


class Licenses(BaseModel):
    """A table of licenses.

    Attributes:
        version: Version of the content.
        date: Date of the last review.
        note: Disclaimer.
        licenses: The licenses.
        bases: The license of each base.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    date: date
    note: str = "not legal advice"
    licenses: tuple[License, ...] = ()
    bases: tuple[BaseLicense, ...] = ()

    def find(self, text: str | None) -> License | None:
        """Returns the license with that id or alias, case-insensitively; None if the table has none.

        Of SPDX's `ID+`, "or any later version", it returns the license `ID`.
        """
        stated = (text or "").strip().lower()
        for name in dict.fromkeys((stated, stated.removesuffix("+"))):
            for entry in reversed(self.licenses):
                if name in {entry.id.lower(), *(alias.lower() for alias in entry.aliases)}:
                    return entry
        return None

    def normalize(self, text: str) -> str | None:
        """Returns the id of a license, or an SPDX expression of ids; None if its terms are unknown."""
        entry = self.find(text)
        if entry is not None:
            return entry.id
        if self.terms_of_license(text, "it").unknown:
            return None
        return normalize_expression(text, lambda name: known.id if (known := self.find(name)) else name)

    def terms_of_license(self, text: str | None, owner: str) -> LicenseTerms:
        """Returns the terms of a license by its identifier or alias, or of an SPDX expression of several.

        Args:
            text: Identifier, alias or expression.
            owner: Name of what carries the license, for the reason of a refusal.
        """
        entry = self.find(text)
        if entry is not None:
            return entry.terms
        stated = (text or "").strip()
        terms = evaluate_expression(stated, lambda name: self.terms_of_license(name, owner))
        if terms is not None:
            return terms
        return unknown(owner if stated.lower() in _NO_STATEMENT else f"{owner} ({stated[:80]!r} is not in the table)")

    def terms_of_base(self, name: str, fingerprint: str | None = None) -> LicenseTerms:
        """Returns the terms of a base by its fingerprint, else by its hub id or published name, else unknown terms.

        A published name counts only without a fingerprint: with one, it is the name of a local folder, which anyone
        chooses.
        """
        base = f"base {name!r}" + (f" with fingerprint {fingerprint}" if fingerprint else "")
        for entry in reversed(self.bases):
            if fingerprint in entry.fingerprints:
                return self.terms_of_license(entry.license, base)
        published = name.partition("@")[0].lower()
        if fingerprint and "/" not in published:
            return unknown(base)
        for entry in reversed(self.bases):
            if published in {*(hub.lower() for hub in entry.hub), *entry.families}:
                return self.terms_of_license(entry.license, base)
        return unknown(base)

    def updated(self, changes: Licenses) -> Licenses:
        """Returns this table with the entries of another one, which replace licenses of the same id or alias."""
        own = tuple(map(self._with_current_id, changes.licenses))
        replaced = {entry.id for entry in own}
        licenses = tuple(entry for entry in self.licenses if entry.id not in replaced)
        return changes.model_copy(update={"licenses": licenses + own, "bases": self.bases + changes.bases})

    def _with_current_id(self, entry: License) -> License:
        """Returns an entry whose id is an alias here, such as an id of an earlier release, with the id of today."""
        known = next((known for known in self.licenses if entry.id in known.aliases), None)
        if known is None:
            return entry
        return entry.model_copy(update={"id": known.id, "aliases": tuple({*entry.aliases, *known.aliases})})


def read_licenses(home: Path | None = None) -> Licenses:
    """Returns the shipped table, updated with the home's own if it has one.

    Raises:
        PolicyError: A table is not YAML, has the wrong form, or names a license that neither table has.
    """
    shipped = _shipped()
    own = home / _NAME if home is not None else None
    if own is None or not own.is_file():
        return shipped
    table = shipped.updated(_read(own))
    _check(table, own)
    return table


@lru_cache(maxsize=1)
def _shipped() -> Licenses:
    table = _read(_SHIPPED)
    published = tuple(
        BaseLicense(license=license_id, hub=names)
        for family in families.values()
        for license_id, names in family.licenses.items()
    )
    table = table.model_copy(update={"bases": published + table.bases})
    _check(table, _SHIPPED)
    return table


def _read(path: Path) -> Licenses:
    document = read_document(path, PolicyError, allowed="date, licenses, bases", optional=True)
    try:
        return Licenses.model_validate(document.data)
    except ValidationError as error:
        raise PolicyError(
            describe_problems(error, document),
            where=document.where(error.errors()[0]["loc"]),
            remedy=f"use the form of the shipped {_NAME} (see docs/rights.md)",
        ) from error


def describe_problems(error: ValidationError, document: Document, parent: tuple[str, ...] = ()) -> str:
    """Returns the problems of a validation, each with its key; those after the first with line and column."""
    errors = error.errors(include_url=False)
    listed = [f"{'.'.join(map(str, (*parent, *entry['loc']))) or 'the file'}: {entry['msg']}" for entry in errors[:4]]
    for index, entry in enumerate(errors[1:4], start=1):
        place = document.where((*parent, *entry["loc"])).removeprefix(f"{document.path}:")
        listed[index] += f" (line {place})"
    rest = [f"and {len(errors) - 4} more"] if len(errors) > 4 else []
    return "; ".join(listed + rest)


def _check(table: Licenses, path: Path) -> None:
    _refuse_duplicates(
        (name.lower() for entry in table.licenses for name in {entry.id.lower(), *map(str.lower, entry.aliases)}), path
    )
    missing = sorted({entry.license for entry in table.bases if table.find(entry.license) is None})
    if missing:
        raise PolicyError(
            f"bases name {missing[0]!r}, and no license has that id",
            where=str(path),
            allowed=", ".join(entry.id for entry in table.licenses),
        )


def _refuse_duplicates(names: Iterable[str], path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PolicyError(
                f"two licenses have the name {name!r}", where=str(path), remedy="remove one of the aliases"
            )
        seen.add(name)
