"""Finds images whose consent expired or whose owners opted out since they were used, and revokes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import queries
from registry.context import RegistryContext
from registry.entities import now
from registry.lineage.graph import NodeId
from registry.lineage.rows import artifact_ref
from registry.policy.ancestry import descendants
from registry.policy.consent import Entry, find_broken, has_statement
from registry.policy.revocations import revoked_subjects
from registry.policy.terms import read_datasets
from registry.store.database import batched
from registry.store.tables import ArtifactRow, ExecutionRow, SubjectRow
from registry.versions.impact import ImpactReport, Recall
from registry.versions.revocation import revoke
from registry.versions.versions import Versions


@dataclass(frozen=True)
class LapsedImage:
    """An image that may not be used any more, by the newest statement about it.

    Args:
        sha256: Its digest.
        source: Its name in the user's folder.
        reasons: Why it may not be used.
    """

    sha256: str
    source: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class LapsedReport:
    """The images that may not be used any more and are not revoked yet.

    Args:
        images: The images, by digest.
        versions: `name@version` of what was made from them.
        aliases: `name@alias` -> the version among these that it points at.
        unreadable: Digests of datasets that cannot be read: their statements are unknown.
        recalled: The impact of each revocation; empty if nothing was revoked.
    """

    images: tuple[LapsedImage, ...]
    versions: tuple[str, ...]
    aliases: Mapping[str, int]
    unreadable: tuple[str, ...] = ()
    recalled: tuple[ImpactReport, ...] = ()


def find_lapsed(
    session: Session, context: RegistryContext, stated: Mapping[str, Entry], today: date | None = None
) -> LapsedReport:
    """Returns the images in datasets of the home that may not be used any more, and what was made from them.

    The newest statement about an image counts: a consent that was renewed in a later dataset lapses nowhere.

    Args:
        session: Reading or writing.
        context: The registry.
        stated: Digest of an image -> statement that is newer than those of all datasets, as in a manifest.
        today: Date to compare `expires` with; None means the current UTC date.
    """
    newest, unreadable = _newest_statements(session, context)
    newest |= {digest: {**entry, "sha256": digest} for digest, entry in stated.items() if has_statement(entry)}
    revoked, day = revoked_subjects(session), today or now().date()
    images = []
    for digest, entry in sorted(newest.items()):
        reasons = tuple(find_broken(entry, day))
        if reasons and digest not in revoked and entry.get("consent") not in revoked:
            images.append(LapsedImage(digest, str(entry.get("source") or digest[:12]), reasons))
    query = select(SubjectRow.subject, SubjectRow.artifact).where(SubjectRow.kind == "picture")
    holders = list(batched(session, query, SubjectRow.subject, [image.sha256 for image in images]))
    used = {digest for digest, _ in holders}
    descent = descendants(session, {NodeId("artifact", artifact) for _, artifact in holders})
    found = queries.find_versions(session, descent.ids("version"))
    found = [version for version in found if version.state != "DELETED"]
    return LapsedReport(
        tuple(image for image in images if image.sha256 in used),
        tuple(version.ref for version in found),
        {f"{version.name}@{alias}": version.version for version in found for alias in version.aliases},
        unreadable,
    )


def recall_lapsed(
    versions: Versions,
    stated: Mapping[str, Entry],
    *,
    reason: str,
    policy: Recall | None = None,
    dry_run: bool = False,
) -> LapsedReport:
    """Revokes every image that may not be used any more; see `find_lapsed` and `revoke`.

    Args:
        versions: The registry.
        stated: Newer statements, by digest.
        reason: The reason; the log adds that of the image.
        policy: `flag` or `withdraw`; None means the home's policy.
        dry_run: True changes nothing.

    Raises:
        Refused: The actor may not move an alias that has to be rolled back; images before it are revoked.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    with versions.lineage.database.read() as session:
        report = find_lapsed(session, versions, stated)
    if dry_run:
        return report
    recalled = tuple(
        revoke(versions, image.sha256, reason=f"{reason} ({'; '.join(image.reasons)})", policy=policy)
        for image in report.images
    )
    return LapsedReport(**{**vars(report), "recalled": recalled})


def _newest_statements(session: Session, context: RegistryContext) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Returns digest of an image -> the newest statement about it, and the datasets that cannot be read."""
    last = func.max(ExecutionRow.started_at)
    query = (
        select(ArtifactRow, last)
        .join(ExecutionRow, ExecutionRow.output == ArtifactRow.sha256)
        .where(ArtifactRow.kind == "manifest")
        .group_by(ArtifactRow.sha256)
        .order_by(last, ArtifactRow.sha256)
    )
    refs = [artifact_ref(row) for row, _ in session.execute(query)]
    newest: dict[str, Entry] = {}
    unreadable = []
    for ref, entries in read_datasets(context.store, refs).items():
        if entries is None:
            unreadable.append(ref.sha256)
        newest |= {entry["sha256"]: entry for entry in entries or () if has_statement(entry)}
    return newest, tuple(unreadable)
