"""Describes the rights of a version as plain values for display."""

from __future__ import annotations

from typing import Any

from registry.entities import AdapterVersion
from registry.policy.license_terms import LicenseTerms, allows_commercial, conflicts
from registry.policy.rights import resolve_rights
from registry.versions.versions import Versions


def describe_rights(versions: Versions, version: AdapterVersion) -> dict[str, Any]:
    """Returns the license terms of a version with their sources, the consent of its images, and its revocations.

    Raises:
        PolicyError: The home's license table is invalid.
    """
    with versions.lineage.database.read() as session:
        rights = resolve_rights(session, versions, version)
    table, consent = rights.licenses, rights.consent
    return {
        "terms": _describe(rights.terms),
        "commercial": allows_commercial(rights.terms) and not conflicts(rights.terms),
        "conflicts": list(conflicts(rights.terms)),
        "sources": [
            {"where": source.where, "what": source.what, "terms": _describe(source.terms)} for source in rights.sources
        ],
        "table": {"version": table.version, "date": table.date.isoformat(), "note": table.note},
        "pictures": {
            "count": consent.pictures,
            "broken": list(consent.broken),
            "missing": list(consent.missing),
            "policy": rights.consent_policy,
            # Generated images need not carry a sign of it.
            "signs_of_generation": consent.generated or "no evidence",
        },
        "revoked": list(rights.revoked),
    }


def _describe(terms: LicenseTerms) -> dict[str, list[str]]:
    return {field: sorted(values) for field, values in vars(terms).items()}
