"""Reports the impact of revoking an image or a consent, by a downstream walk. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.errors import did_you_mean
from lora_engine.files import sha256_file
from registry import queries
from registry.context import RegistryContext
from registry.entities import AdapterVersion, is_digest
from registry.errors import RightsError
from registry.lineage.graph import NodeId, Subgraph, downstream
from registry.lineage.rows import artifact_ref, read_artifacts
from registry.policy.ancestry import descendants
from registry.policy.rights import revoked_upstream
from registry.policy.terms import read_datasets
from registry.refs import is_unicode
from registry.store.database import batched
from registry.store.tables import ArtifactRow, EventRow, ExecutionRow, RunRow, SubjectRow
from registry.versions.promotion import stack

Recall = Literal["flag", "withdraw"]
PREFIX = 6
"""Minimum number of digits that identify a digest."""


@dataclass(frozen=True)
class ImpactReport:
    """The impact of revoking an image or a consent.

    Args:
        subject: Digest of the image, or id of the consent.
        kind: `picture` or `consent`.
        pictures: Digests of the affected images.
        manifests: Digests of the datasets that contain them.
        runs: `id` and `name` of the runs that used them.
        versions: `name@version` of the versions made from them.
        merges: The affected versions, and digests of other adapters, that were merged from an affected adapter.
        exports: Files written for other programs: `version`, and `files` or the digest of the `artifact`.
        aliases: `name@alias` -> the affected version that it points at.
        policy: The policy that was applied, or would be.
        taken_back: `name@alias` -> the version that the alias was rolled back to; None if it was removed.
        event: The event of the revocation; None for a dry run.
    """

    subject: str
    kind: Literal["picture", "consent"]
    pictures: tuple[str, ...]
    manifests: tuple[str, ...]
    runs: tuple[Mapping[str, str], ...]
    versions: tuple[str, ...]
    merges: tuple[str, ...]
    exports: tuple[Mapping[str, Any], ...]
    aliases: Mapping[str, int]
    policy: Recall
    taken_back: Mapping[str, int | None]
    event: int | None = None


def find_affected(
    session: Session, context: RegistryContext, text: str, policy: Recall
) -> tuple[ImpactReport, list[AdapterVersion]]:
    """Returns the impact of revoking an image or a consent, and the affected versions; changes nothing.

    Args:
        session: Reading or writing.
        context: The registry.
        text: An image file, the digest of one or its first digits, or the id of a consent.
        policy: The policy that would be applied.

    Raises:
        RightsError: No image or consent matches, or more than one.
    """
    subject, kind = _resolve(session, text)
    manifests = [session.get_one(ArtifactRow, digest) for digest in _holders(session, {subject})]
    images = {subject} if kind == "picture" else set()
    if kind == "consent":
        for entries in read_datasets(context.store, map(artifact_ref, manifests)).values():
            images |= {entry["sha256"] for entry in entries or () if entry.get("consent") == subject}
    # The images of a consent are revoked in every dataset, also where it names another consent or none.
    starts = _holders(session, {subject, *images})
    descent = descendants(session, [NodeId("artifact", digest) for digest in starts])
    registered = queries.find_versions(session, descent.ids("version"))
    affected = [version for version in registered if version.state != "DELETED"]
    taken_back = _fallbacks(session, context, affected) if policy == "withdraw" else {}
    report = ImpactReport(
        subject=subject,
        kind=kind,
        pictures=tuple(sorted(images)),
        manifests=tuple(sorted({*starts, *read_artifacts(session, descent.ids("artifact"), kind="manifest")})),
        runs=_runs(session, descent, starts),
        versions=tuple(version.ref for version in affected),
        merges=_merges(session, descent, affected),
        exports=_exports(session, descent, affected),
        aliases={f"{version.name}@{alias}": version.version for version in affected for alias in version.aliases},
        policy=policy,
        taken_back=taken_back,
    )
    return report, affected


def _resolve(session: Session, text: str) -> tuple[str, Literal["picture", "consent"]]:
    path = Path(text)
    if "\0" not in text and len(text) < 4096 and path.is_file():
        return sha256_file(path), "picture"
    if not is_unicode(text):
        raise RightsError(f"no image and no consent matches {text!r}", remedy="check the name")
    kinds = ("picture", "consent")
    rows = session.execute(select(SubjectRow.kind).where(SubjectRow.subject == text, SubjectRow.kind.in_(kinds)))
    matching_kinds = sorted(set(rows.scalars()))
    if matching_kinds:
        return text, "consent" if matching_kinds == ["consent"] else "picture"
    if is_digest(text):
        return text, "picture"
    if len(text) >= PREFIX:
        has_prefix = (SubjectRow.subject >= text, SubjectRow.subject < text + "\uffff", SubjectRow.kind == "picture")
        digests = list(session.scalars(select(SubjectRow.subject).where(*has_prefix).distinct().limit(3)))
        if len(digests) == 1:
            return digests[0], "picture"
        if digests:
            listed = ", ".join(digest[:16] for digest in digests)
            raise RightsError(f"{text!r} matches several images: {listed}", remedy="give more digits")
    consents = session.scalars(select(SubjectRow.subject).where(SubjectRow.kind == "consent").distinct())
    raise RightsError(
        f"no image and no consent matches {text!r}",
        allowed="an image file, its digest (or the first 6 digits), or the id of a consent",
        remedy=did_you_mean(text, consents, "see `loraline lineage NAME@REF` for both", most=3),
    )


def _holders(session: Session, subjects: set[str]) -> list[str]:
    """Returns the sorted digests of the artifacts that contain one of the subjects."""
    return sorted(downstream(session, (NodeId("subject", subject) for subject in subjects), "subject").ids("artifact"))


def _runs(session: Session, descent: Subgraph, starts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    steps = batched(session, select(ExecutionRow.run_id), ExecutionRow.id, descent.ids("execution"))
    makers = batched(session, select(ExecutionRow.run_id), ExecutionRow.output, starts)
    ids = {row[0] for row in (*steps, *makers)}
    rows = [row for (row,) in batched(session, select(RunRow), RunRow.id, ids)]
    return tuple({"id": row.id, "name": row.name} for row in sorted(rows, key=lambda row: (row.started_at, row.id)))


def _merges(session: Session, descent: Subgraph, affected: Sequence[AdapterVersion]) -> tuple[str, ...]:
    query = select(ExecutionRow.output).where(ExecutionRow.uses == "merge")
    outputs = {row[0] for row in batched(session, query, ExecutionRow.id, descent.ids("execution"))}
    refs = {version.ref for version in affected}
    merged = {
        version.ref for version in affected if version.artifact.sha256 in outputs or refs.intersection(version.parents)
    }
    return (*sorted(merged), *sorted(outputs - {version.artifact.sha256 for version in affected}))


def _exports(session: Session, descent: Subgraph, affected: Sequence[AdapterVersion]) -> tuple[Mapping[str, Any], ...]:
    exports: list[Mapping[str, Any]] = [
        {"artifact": digest} for digest in sorted(read_artifacts(session, descent.ids("artifact"), kind="export"))
    ]
    numbers: dict[str, set[int]] = {}
    for version in affected:
        numbers.setdefault(version.name, set()).add(version.version)
    for name, affected_numbers in sorted(numbers.items()):
        query = select(EventRow).where(EventRow.name == name, EventRow.action == "export").order_by(EventRow.seq)
        exports += [
            {"version": f"{name}@{row.after}", "event": row.seq, "files": row.details.get("files", [])}
            for row in session.scalars(query)
            if row.after in affected_numbers
        ]
    return tuple(exports)


def _fallbacks(session: Session, context: RegistryContext, affected: Sequence[AdapterVersion]) -> dict[str, int | None]:
    """Returns for each alias of an affected version the last version that had it and may have it again, or None."""
    refs = {version.ref for version in affected}
    fallbacks: dict[str, int | None] = {}
    for version in affected:
        for alias in version.aliases:
            earlier = dict.fromkeys(reversed(stack(queries.read_events(session, version.name, alias))))
            candidates = (queries.read_version(session, version.name, number) for number in earlier)
            usable = (
                candidate.version
                for candidate in candidates
                if candidate.ref not in refs
                and candidate.state == "ACTIVE"
                and not revoked_upstream(session, candidate)
                and not context.damage(candidate)
            )
            fallbacks[f"{version.name}@{alias}"] = next(usable, None)
    return fallbacks
