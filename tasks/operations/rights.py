"""Describes the rights of a version as plain values for display."""

from __future__ import annotations

from typing import Any

from registry.entities import AdapterVersion, now
from registry.policy.ancestry import trace
from registry.policy.consent import find_consent
from registry.policy.license_terms import LicenseTerms, allows_commercial, conflicts
from registry.policy.licenses import read_licenses
from registry.policy.revocations import revoked_ancestors, revoked_subjects
from registry.policy.terms import read_datasets, resolve_terms
from registry.versions.versions import Versions


def describe_rights(versions: Versions, version: AdapterVersion) -> dict[str, Any]:
    """Returns the license terms of a version with their sources, the consent of its images, and its revocations.

    Raises:
        PolicyError: The home's license table is invalid.
    """
    with versions.lineage.database.read() as session:
        ancestry = trace(session, version.artifact)
        revoked = revoked_ancestors(session, ancestry, revoked_subjects(session))
    datasets = read_datasets(versions.store, ancestry.datasets)
    table = read_licenses(versions.home.path)
    resolved = resolve_terms(ancestry, datasets, table)
    consent = find_consent(datasets, now().date())
    return {
        "terms": _describe(resolved.terms),
        "commercial": allows_commercial(resolved.terms) and not conflicts(resolved.terms),
        "conflicts": list(conflicts(resolved.terms)),
        "sources": [
            {"where": source.where, "what": source.what, "terms": _describe(source.terms)}
            for source in resolved.sources
        ],
        "table": {"version": table.version, "date": table.date.isoformat(), "note": table.note},
        "pictures": {
            "count": consent.pictures,
            "broken": list(consent.broken),
            "missing": list(consent.missing),
            # Generated images need not carry a sign of it.
            "signs_of_generation": consent.generated or "no evidence",
        },
        "revoked": list(revoked),
    }


def _describe(terms: LicenseTerms) -> dict[str, list[str]]:
    return {field: sorted(values) for field, values in vars(terms).items()}
