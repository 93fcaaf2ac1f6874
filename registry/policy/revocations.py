"""Reads the active revocations, for promotion, training and impact reports. `registry.versions.revocation` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.lineage.record import Lineage
from registry.policy.ancestry import Ancestry, held_subjects
from registry.store.tables import EventRow, RevocationRow


@dataclass(frozen=True)
class Revocation:
    """One active revocation.

    Args:
        subject: Digest of the image, or id of the consent.
        kind: `picture` or `consent`.
        seq: Number of the event.
        pictures: Digests of the images that it covers; other datasets may contain them without that consent.
    """

    subject: str
    kind: str
    seq: int
    pictures: tuple[str, ...]


def active_revocations(session: Session) -> tuple[Revocation, ...]:
    """Returns all revocations that were not lifted, in log order."""
    query = select(RevocationRow.subject, EventRow.seq, EventRow.details)
    rows = session.execute(query.join(EventRow, EventRow.seq == RevocationRow.seq).order_by(EventRow.seq))
    return tuple(_revocation(subject, seq, details) for subject, seq, details in rows)


def revoked_subjects(session: Session) -> dict[str, str]:
    """Returns digest of a revoked image or id of a revoked consent -> description of the revocation."""
    descriptions: dict[str, str] = {}
    for revocation in active_revocations(session):
        subject = revocation.subject
        name = f"image {subject[:12]}" if revocation.kind == "picture" else f"consent {subject!r}"
        descriptions[subject] = name
        for image in revocation.pictures:
            descriptions.setdefault(image, f"{name} (image {image[:12]})" if revocation.kind == "consent" else name)
    return descriptions


def read_revoked(lineage: Lineage) -> dict[str, str]:
    """Returns `revoked_subjects` from a new session."""
    with lineage.database.read() as session:
        return revoked_subjects(session)


def revoked_ancestors(session: Session, ancestry: Ancestry, revoked: Mapping[str, str]) -> tuple[str, ...]:
    """Returns descriptions of the revoked images and consents in the upstream datasets."""
    if not revoked:
        return ()
    subjects = held_subjects(session, revoked, ancestry.manifests)
    return tuple(sorted({revoked[subject] for subject in subjects}))


def _revocation(subject: str, seq: int, details: Mapping[str, Any]) -> Revocation:
    return Revocation(
        subject,
        str(details.get("kind", "picture")),
        seq,
        tuple(details.get("pictures", ())),
    )
