"""What is revoked now, as promotion, training and recall ask. Reads only; `registry.versions.revocation` writes."""

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
    """One revocation that stands.

    Args:
        subject: Digest of the picture, or id of the consent.
        kind: `picture` or `consent`.
        seq: The event.
        pictures: Digests of the pictures that it is about, which other datasets may hold without that consent.
    """

    subject: str
    kind: str
    seq: int
    pictures: tuple[str, ...]


def active_revocations(session: Session) -> tuple[Revocation, ...]:
    """All revocations that were not lifted, in the order of the log."""
    query = select(RevocationRow.subject, EventRow.seq, EventRow.details)
    rows = session.execute(query.join(EventRow, EventRow.seq == RevocationRow.seq).order_by(EventRow.seq))
    return tuple(_revocation(subject, seq, details) for subject, seq, details in rows)


def revoked_subjects(session: Session) -> dict[str, str]:
    """Digests of pictures and ids of consents that may not be used any more -> in words, what was revoked."""
    words: dict[str, str] = {}
    for each in active_revocations(session):
        named = f"picture {each.subject[:12]}" if each.kind == "picture" else f"consent {each.subject!r}"
        words[each.subject] = named
        for picture in each.pictures:
            words.setdefault(picture, f"{named} (picture {picture[:12]})" if each.kind == "consent" else named)
    return words


def read_revoked(lineage: Lineage) -> dict[str, str]:
    """`revoked_subjects` in a session of its own."""
    with lineage.database.read() as session:
        return revoked_subjects(session)


def revoked_ancestors(session: Session, ancestry: Ancestry, revoked: Mapping[str, str]) -> tuple[str, ...]:
    """In words, what of the revoked is among the pictures and consents that something was made from."""
    if not revoked:
        return ()
    found = held_subjects(session, revoked, ancestry.manifests)
    return tuple(sorted({revoked[subject] for subject in found}))


def _revocation(subject: str, seq: int, details: Mapping[str, Any]) -> Revocation:
    return Revocation(
        subject,
        str(details.get("kind", "picture")),
        seq,
        tuple(details.get("pictures", ())),
    )
