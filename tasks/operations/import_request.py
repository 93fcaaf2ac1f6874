"""Defines what a user states about an adapter file to import, and checks its license."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry.home import Home
from registry.policy.license_terms import NO_ASSERTION
from registry.policy.licenses import read_licenses
from tasks.errors import SpecError


@dataclass(frozen=True)
class ImportRequest:
    """The user's statements about a file to import.

    Args:
        name: The name to register.
        base: Its base: a published architecture, or a name for `resolve_base`.
        license: An identifier or alias of the license table, or `NOASSERTION`.
        trigger: The trigger word; None keeps that of the file.
        alias: The alias to request; None requests none.
        override: True imports although the license is looser than what the file was made from allows, or although the
            content resembles a registered one; the inherited terms still hold.
        reason: Why; required by `override`, and stored in the log.
        recommended: Weights that the card recommends, as in a tag after the name; None keeps those of the file.
    """

    name: str
    base: str
    license: str
    trigger: str | None = None
    alias: str | None = None
    override: bool = False
    reason: str = ""
    recommended: str | None = None

    @property
    def statements(self) -> dict[str, Any]:
        """The statements about the file, without how they were accepted."""
        stated = {name: getattr(self, name) for name in ("name", "base", "license", "trigger", "alias")}
        return stated | ({"recommended": self.recommended} if self.recommended else {})


def check_license(home: Home, license: str) -> str:  # noqa: A002 (the name of the field)
    """Returns the identifier of a license in the table, an SPDX expression of such identifiers, or `NOASSERTION`.

    Raises:
        SpecError: A license is neither in the table nor `NOASSERTION`.
    """
    if license == NO_ASSERTION:
        return license
    table = read_licenses(home.path)
    known = table.normalize(license)
    if known is None:
        raise SpecError(
            f"the license {license[:80]!r} is not in the table",
            where="--license",
            allowed=f"{', '.join(entry.id for entry in table.licenses)}; several with AND, OR, WITH and parentheses",
            remedy=f"add it to {home.path / 'licenses.yaml'}, or use {NO_ASSERTION}, which keeps it from production",
        )
    return known
