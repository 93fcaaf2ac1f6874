"""Reads the active revocations, for promotion, training and impact reports. `registry.versions.revocation` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.lineage.record import Lineage
from registry.store.database import batched, batches
from registry.store.tables import EventRow, RevocationRow, SubjectRow


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
    """Returns digest of a revoked image or id of a revoked consent -> description of all its revocations."""
    descriptions: dict[str, list[str]] = defaultdict(list)
    for revocation in active_revocations(session):
        subject = revocation.subject
        name = f"image {subject[:12]}" if revocation.kind == "picture" else f"consent {subject!r}"
        descriptions[subject].append(name)
        for image in {*revocation.pictures} - {subject}:
            descriptions[image].append(f"{name} (image {image[:12]})" if revocation.kind == "consent" else name)
    return {subject: " and ".join(names) for subject, names in descriptions.items()}


def read_revoked(lineage: Lineage) -> dict[str, str]:
    """Returns `revoked_subjects` from a new session."""
    with lineage.database.read() as session:
        return revoked_subjects(session)


def revoked_in(session: Session, datasets: Iterable[str]) -> tuple[str, ...]:
    """Returns sorted descriptions of the revoked images and consents that the datasets, given by digest, contain."""
    revoked, digests = revoked_subjects(session), list(datasets)
    query = select(SubjectRow.subject).distinct()
    return tuple(
        sorted(
            {
                revoked[subject]
                for subjects in batches(revoked)
                for (subject,) in batched(
                    session, query.where(SubjectRow.subject.in_(subjects)), SubjectRow.artifact, digests
                )
            }
        )
    )


def _revocation(subject: str, seq: int, details: Mapping[str, Any]) -> Revocation:
    return Revocation(
        subject,
        str(details.get("kind", "picture")),
        seq,
        tuple(details.get("pictures", ())),
    )
