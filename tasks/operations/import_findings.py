"""Judges an import by what the file was made from: license, revocations, similar content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from registry import event_log
from registry.entities import ArtifactRef
from registry.errors import Refused, RightsError
from registry.lineage.graph import NodeId
from registry.lineage.rows import read_artifacts
from registry.policy.actors import establish_actor
from registry.policy.ancestry import descendants, trace
from registry.policy.license_terms import LicenseTerms, combine, forbidden_uses
from registry.policy.licenses import Licenses, read_licenses
from registry.policy.policy_file import read_policies
from registry.policy.revocations import describe_revoked, find_blocks, find_revoked
from registry.policy.rights import terms_of
from registry.versions.versions import Versions
from tasks.content import ContentSources, find_sources
from tasks.operations.import_request import ImportRequest

if TYPE_CHECKING:
    from lora_engine.formats import Card
    from lora_engine.formats.content import AdapterContent


@dataclass(frozen=True)
class ImportFindings:
    """What is known about a file to import.

    Args:
        sources: What it was made from.
        similar: Names of registered adapters of similar content -> similarity.
        warnings: What the file states otherwise than the user.
        overridden: Reasons against the import that the user overrode.
    """

    sources: ContentSources
    similar: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    def parents_of(self, session: Session, artifact: ArtifactRef) -> tuple[str, ...]:
        """Returns the parents as texts, without the artifact itself and what was made from it."""
        own = {artifact.sha256}
        if self.sources.parents.keys() - own:
            own |= set(descendants(session, [NodeId("artifact", artifact.sha256)]).ids("artifact"))
        known = (text for digest, text in self.sources.parents.items() if digest not in own)
        return tuple(sorted({*known, *self.sources.claims}))

    def details(self, parents: Iterable[str]) -> dict[str, Any]:
        """Returns what the event of the import says about them; empty entries are left out."""
        entries: dict[str, Any] = {
            "parents": list(parents),
            "similar": {name: round(value, 4) for name, value in self.similar.items()},
            "warnings": list(self.warnings),
            "overridden": list(self.overridden),
        }
        return {name: value for name, value in entries.items() if value}


def judge_import(
    versions: Versions,
    request: ImportRequest,
    files: Mapping[str, str],
    content: AdapterContent,
    header: Mapping[str, Any],
    card: Card,
) -> ImportFindings:
    """Finds what a file was made from, and refuses it if its license is looser, or if something is revoked.

    Args:
        versions: The registry.
        request: The user's statements.
        files: Path -> digest of the original files.
        content: Their content.
        header: The card in the header of the file.
        card: The card of the new version.

    Raises:
        RightsError: The file, or something that it was made from, is revoked.
        Refused: The license is looser than the inherited terms, or the policy refuses similar content; logged.
        PolicyError: The home's policy or table of licenses is invalid.
    """
    policies, licenses = read_policies(versions.home.path), read_licenses(versions.home.path)
    least = None if policies.similar == "ignore" else policies.similarity
    sources = find_sources(versions, files, [content], header.get("recipe") or {}, least_similarity=least)
    stated = combine(
        licenses.terms_of_license(request.license, "it"), licenses.terms_of_base(card.base, card.base_fingerprint)
    )
    with versions.lineage.database.read() as session:
        refs = read_artifacts(session, sources.parents)
        _refuse_revoked(session, refs, {*files.values(), *content.digests}, next(iter(files)))
        inherited = {digest: terms_of(session, versions, ref)[0] for digest, ref in refs.items()}
    reasons = [
        f"it was made from {sources.parents[digest]}, under {terms.expression or 'no license'}, which {loosened}"
        for digest, terms in sorted(inherited.items(), key=lambda item: sources.parents[item[0]])
        if (loosened := _looser(stated, terms))
    ]
    similar = sources.similar or {}
    if policies.similar == "refuse":
        reasons += [f"its content resembles {name} (similarity {value:.2f})" for name, value in similar.items()]
    if reasons and not request.override:
        _log_refusal(versions, request, files, reasons)
        raise Refused(
            f"the license {request.license} is not accepted for this file" if inherited else "it is not imported",
            reasons=tuple(reasons),
            where=next(iter(files)),
            remedy="give a license that is as strict, or override with --override --reason TEXT",
        )
    warnings = tuple(_warnings(licenses, stated, header.get("license"), sources))
    return ImportFindings(sources, similar, warnings, tuple(reasons))


def _refuse_revoked(session: Session, refs: Mapping[str, ArtifactRef], digests: set[str], where: str) -> None:
    revoked = {block.name for block in find_blocks(session, digests)}
    for ref in refs.values():
        revoked |= set(describe_revoked(find_revoked(session, trace(session, ref))))
    if revoked:
        raise RightsError(
            f"it is, or was made from, what was revoked: {', '.join(sorted(revoked))}",
            where=where,
            remedy="do not use the file; `loraline lift` undoes a revocation",
        )


def _looser(stated: LicenseTerms, inherited: LicenseTerms) -> str:
    """Returns what inherited terms forbid or require beyond the stated ones; empty if the stated ones are as strict."""
    if not stated.permissions:
        return ""
    if inherited.unknown:
        return "is not known"
    both = combine(stated, inherited)
    forbidden = [use for use in forbidden_uses(both) if use not in forbidden_uses(stated)]
    required = [*sorted(both.obligations - stated.obligations), *sorted(both.share_alike - stated.share_alike)]
    parts = [
        f"does not allow {', '.join(forbidden)}" if forbidden else "",
        f"requires {', '.join(required)}" if required else "",
    ]
    return " and ".join(filter(None, parts))


def _warnings(licenses: Licenses, stated: LicenseTerms, in_header: object, sources: ContentSources) -> Iterator[str]:
    if isinstance(in_header, str) and in_header:
        terms = licenses.terms_of_license(in_header, "its header")
        loosened = "" if terms.unknown else _looser(stated, terms)
        if loosened:
            yield f"the header states {in_header[:80]!r}, which {loosened}"
    for claim in sources.claims:
        yield f"the header names the parent {claim!r}, which is unknown here"


def _log_refusal(versions: Versions, request: ImportRequest, files: Mapping[str, str], reasons: Iterable[str]) -> None:
    details = {"name": request.name, "license": request.license, "files": dict(files)}
    actor = establish_actor(versions)
    with versions.lineage.database.write() as session:
        event_log.log_event(
            session,
            "refuse",
            actor=actor,
            reason="; ".join(reasons),
            subject=next(iter(files.values())),
            details=details,
        )
