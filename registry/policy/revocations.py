"""Reads the active revocations, for promotion, training and impact reports. `registry.versions.revocation` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import RevocationKind
from registry.lineage.record import Lineage
from registry.policy.ancestry import Ancestry
from registry.store.database import batched, batches
from registry.store.tables import ContentDigestRow, ContentRow, EventRow, RevocationRow, SubjectRow

NOUNS: Mapping[str, str] = {"picture": "image"}
"""Kind -> its name in messages, if it is another one."""
_OF_IMAGES = ("picture", "consent", "digest")
_OF_CONTENT = ("file", "digest")


@dataclass(frozen=True)
class Revocation:
    """One active revocation.

    Args:
        subject: Digest of an image, a file or an artifact; id of a consent; `name@version`; or name of a base.
        kind: The kind of subject.
        seq: Number of the event.
        policy: `flag` or `withdraw`: what it does to versions, also to those that are registered later.
        pictures: Digests of the images that it covers; other datasets may contain them without that consent.
        artifacts: Digests of the artifacts of a version.
        bases: Names and fingerprints of a base.
    """

    subject: str
    kind: RevocationKind
    seq: int
    policy: str = "flag"
    pictures: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The description of the subject."""
        if self.kind in ("consent", "base"):
            return f"{self.kind} {self.subject!r}"
        return f"{NOUNS.get(self.kind, self.kind)} {self.subject if self.kind == 'version' else self.subject[:12]}"


def active_revocations(session: Session) -> tuple[Revocation, ...]:
    """Returns all revocations that were not lifted, in log order."""
    query = select(RevocationRow.kind, RevocationRow.subject, EventRow.seq, EventRow.details)
    rows = session.execute(query.join(EventRow, EventRow.seq == RevocationRow.seq).order_by(EventRow.seq))
    return tuple(_revocation(*row) for row in rows)


def revoked_subjects(session: Session) -> dict[str, str]:
    """Returns digest of a revoked image or id of a revoked consent -> description of all its revocations."""
    descriptions: dict[str, list[str]] = defaultdict(list)
    for revocation in active_revocations(session):
        for _, subject, description in _subjects_of(revocation):
            descriptions[subject].append(description)
    return {subject: " and ".join(names) for subject, names in descriptions.items()}


def read_revoked(lineage: Lineage) -> dict[str, str]:
    """Returns `revoked_subjects` from a new session."""
    with lineage.database.read() as session:
        return revoked_subjects(session)


def revoked_in(session: Session, datasets: Iterable[str]) -> tuple[str, ...]:
    """Returns sorted descriptions of the revoked images and consents that the datasets, given by digest, contain."""
    revocations = active_revocations(session)
    return tuple(sorted({text for found in _in_datasets(session, revocations, datasets).values() for text in found}))


def find_revoked(session: Session, ancestry: Ancestry) -> dict[Revocation, tuple[str, ...]]:
    """Returns the active revocations of anything upstream, in log order, each with descriptions of what it revoked.

    Args:
        session: Reading or writing.
        ancestry: What a version was made from.
    """
    revocations = active_revocations(session)
    if not revocations:
        return {}
    artifacts = set(ancestry.graph.ids("artifact"))
    in_datasets = _in_datasets(session, revocations, ancestry.manifests)
    contents = _contents_of(session, revocations, artifacts)
    bases = {name.lower() for name in ancestry.bases}
    found: dict[Revocation, tuple[str, ...]] = {}
    for revocation in revocations:
        names = set(in_datasets.get(revocation, ()))
        is_hit = (
            not artifacts.isdisjoint(revocation.artifacts)
            or (revocation.kind in ("artifact", "digest") and revocation.subject in artifacts)
            or (revocation.kind in _OF_CONTENT and revocation.subject in contents)
            or any(covers_base(revocation.bases, name) for name in bases)
        )
        if is_hit:
            names.add(revocation.name)
        if names:
            found[revocation] = tuple(sorted(names))
    return found


def describe_revoked(found: Mapping[Revocation, Iterable[str]]) -> tuple[str, ...]:
    """Returns the sorted descriptions in the result of `find_revoked`."""
    return tuple(sorted({name for names in found.values() for name in names}))


def find_blocks(session: Session, digests: Iterable[str]) -> tuple[Revocation, ...]:
    """Returns the active revocations of files, artifacts and unknown digests that have one of the digests."""
    wanted = set(digests)
    return tuple(
        revocation
        for revocation in active_revocations(session)
        if revocation.kind in ("file", "artifact", "digest") and revocation.subject in wanted
    )


def covers_base(revoked: Iterable[str], name: str) -> bool:
    """Returns True if a name or fingerprint of a base is revoked; one without a revision covers all its revisions."""
    names, lowered = {entry.lower() for entry in revoked}, name.lower()
    return lowered in names or lowered.partition("@")[0] in names


def _subjects_of(revocation: Revocation) -> list[tuple[str, str, str]]:
    """Returns kind, id and description of the subjects of datasets that a revocation covers."""
    if revocation.kind not in _OF_IMAGES:
        return []
    name = revocation.name
    own = "consent" if revocation.kind == "consent" else "picture"
    covered = sorted({*revocation.pictures} - {revocation.subject})
    suffix = " (image {})" if revocation.kind == "consent" else ""
    images = [("picture", image, name + suffix.format(image[:12])) for image in covered]
    return [(own, revocation.subject, name), *images]


def _in_datasets(
    session: Session, revocations: Iterable[Revocation], datasets: Iterable[str]
) -> dict[Revocation, set[str]]:
    wanted: dict[tuple[str, str], list[tuple[Revocation, str]]] = defaultdict(list)
    for revocation in revocations:
        for kind, subject, description in _subjects_of(revocation):
            wanted[kind, subject].append((revocation, description))
    found: dict[Revocation, set[str]] = defaultdict(set)
    digests, query = list(datasets), select(SubjectRow.kind, SubjectRow.subject).distinct()
    for subjects in batches({subject for _, subject in wanted}):
        rows = batched(session, query.where(SubjectRow.subject.in_(subjects)), SubjectRow.artifact, digests)
        for kind, subject in rows:
            for revocation, description in wanted.get((kind, subject), ()):
                found[revocation].add(description)
    return found


def _contents_of(session: Session, revocations: Iterable[Revocation], artifacts: set[str]) -> set[str]:
    """Returns the revoked digests that are those of a file in the artifacts, or of what an adapter in them does."""
    digests = [revocation.subject for revocation in revocations if revocation.kind in _OF_CONTENT]
    rows = [
        *batched(session, select(ContentRow.sha256, ContentRow.artifact), ContentRow.sha256, digests),
        *batched(session, select(ContentDigestRow.digest, ContentDigestRow.artifact), ContentDigestRow.digest, digests),
    ]
    return {digest for digest, artifact in rows if artifact in artifacts}


def _revocation(kind: str, subject: str, seq: int, details: Mapping[str, Any]) -> Revocation:
    return Revocation(
        subject,
        cast("RevocationKind", kind),
        seq,
        str(details.get("policy", "flag")),
        *(tuple(details.get(name, ())) for name in ("pictures", "artifacts", "bases")),
    )
