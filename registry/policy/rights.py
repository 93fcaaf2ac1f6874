"""Resolves the rights of a version: license terms, consent and revocations of everything that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from sqlalchemy.orm import Session

from registry.context import RegistryContext
from registry.entities import AdapterVersion, ArtifactRef, now
from registry.errors import PolicyError
from registry.policy.ancestry import trace
from registry.policy.consent import ConsentFindings, ConsentPolicy, Entry, find_consent, strictest
from registry.policy.license_terms import LicenseTerms, combine, unknown
from registry.policy.licenses import Licenses, read_licenses
from registry.policy.policy_file import read_policies
from registry.policy.revocations import active_revocations, describe_revoked, find_revoked
from registry.policy.terms import Source, read_datasets, resolve_terms, stated_rights


@dataclass(frozen=True)
class VersionRights:
    """The rights of a version.

    Args:
        terms: The license terms of everything upstream, combined.
        sources: The statements that the terms come from.
        consent: Consent statements about the images.
        consent_policy: What broken and missing statements do: the strictest of the home and of the ingest steps.
        revoked: Descriptions of everything revoked upstream.
        licenses: The license table that was applied.
    """

    terms: LicenseTerms
    sources: tuple[Source, ...]
    consent: ConsentFindings
    consent_policy: ConsentPolicy
    revoked: tuple[str, ...]
    licenses: Licenses


def resolve_rights(
    session: Session, context: RegistryContext, version: AdapterVersion, *, today: date | None = None
) -> VersionRights:
    """Returns the rights of a version; reads rows, and the manifests of the datasets that it was trained on.

    Args:
        session: Reading or writing; rows that it added are included.
        context: The registry.
        version: The version.
        today: Date to compare consents with; None means the current UTC date.

    Raises:
        PolicyError: The home's policy or license table is invalid.
    """
    ancestry, licenses = trace(session, version.artifact), read_licenses(context.home.path)
    datasets = read_datasets(context.store, ancestry.datasets)
    return VersionRights(
        *resolve_terms(ancestry, datasets, licenses),
        consent=find_consent(datasets, today or now().date(), ancestry.undocumented),
        consent_policy=strictest({read_policies(context.home.path).consent, *ancestry.consent_policies}),
        revoked=describe_revoked(find_revoked(session, ancestry)),
        licenses=licenses,
    )


def revoked_upstream(session: Session, version: AdapterVersion) -> tuple[str, ...]:
    """Returns descriptions of everything revoked upstream of a version, and of the version; reads rows only."""
    if not active_revocations(session):
        return ()
    return describe_revoked(find_revoked(session, trace(session, version.artifact)))


def terms_of(session: Session, context: RegistryContext, artifact: ArtifactRef) -> tuple[LicenseTerms, Licenses]:
    """Returns the license terms of everything that an artifact was made from, and the table that was applied.

    Raises:
        PolicyError: The home's license table is invalid.
    """
    ancestry, licenses = trace(session, artifact), read_licenses(context.home.path)
    return resolve_terms(ancestry, read_datasets(context.store, ancestry.datasets), licenses)[0], licenses


def inherited_license(
    context: RegistryContext,
    artifact: ArtifactRef,
    stated: str | None = None,
    *,
    datasets: dict[str, list[Entry]] | None = None,
) -> str | None:
    """Returns the licenses of everything that an artifact was made from, as one SPDX expression.

    None means that nothing upstream has a license. If the license table of the home is invalid, which `loraline rights`
    explains, the license is `NOASSERTION`.

    Args:
        context: The registry.
        artifact: The adapter's tree; must be recorded.
        stated: The license in the card of the file. It counts until the artifact is registered; then the cards of the
            versions do, in which an import may have replaced it.
        datasets: Digest of a dataset -> its `stated_rights`. Those of further datasets are read and added.
    """
    known = {} if datasets is None else datasets
    try:
        licenses = read_licenses(context.home.path)
        with context.lineage.database.read() as session:
            ancestry = trace(session, artifact)
        read = read_datasets(context.store, [ref for ref in ancestry.datasets if ref.sha256 not in known])
        known |= {ref.sha256: stated_rights(entries) for ref, entries in read.items() if entries is not None}
        rights = {ref: tuple(known[ref.sha256]) if ref.sha256 in known else None for ref in ancestry.datasets}
        terms = resolve_terms(ancestry, rights, licenses)[0]
    except PolicyError:
        return unknown("it").expression
    if stated and not any(version.artifact == artifact for version in ancestry.versions):
        terms = combine(terms, licenses.terms_of_license(stated, "it"))
    return terms.expression or None
