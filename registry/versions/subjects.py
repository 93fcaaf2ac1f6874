"""Finds what a text names that can be revoked: an image, consent, version, artifact, file, base or unknown digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute, Session

from lora_engine.errors import did_you_mean
from lora_engine.files import sha256_file
from registry import queries
from registry.context import RegistryContext
from registry.entities import RevocationKind, is_digest
from registry.errors import RightsError, UnknownVersion
from registry.lineage.rows import artifact_ref, read_artifacts
from registry.lineage.walk import LEAST_DIGITS
from registry.policy.revocations import NOUNS, covers_base
from registry.policy.terms import read_datasets
from registry.refs import can_exist, is_unicode, split_ref
from registry.store.database import batched, begins_with
from registry.store.tables import (
    ArtifactRow,
    ContentDigestRow,
    ContentRow,
    ExecutionRow,
    NameRow,
    ParentRow,
    SubjectRow,
    VersionRow,
)

_ALLOWED = (
    "a file or its digest (or the first 6 digits), NAME@REF, the id of a consent, the digest of an artifact, or the "
    "name or fingerprint of a base"
)
_BASE = "base:"


@dataclass(frozen=True)
class RevocationTarget:
    """What a revocation is about, and where its downstream begins.

    Args:
        id: Digest, id, `name@version` or name.
        kind: Its kind; `digest` if nothing has that digest.
        starts: Digests of the artifacts that contain it, are it, or were made from it directly.
        pictures: Digests of the images that it covers.
        artifacts: The artifact of a version.
        bases: Names and fingerprints of a base.
        unreadable: Datasets with the consent whose manifests cannot be read, so the images that it covers are unknown.
    """

    id: str
    kind: RevocationKind
    starts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def find_target(session: Session, context: RegistryContext, text: str) -> RevocationTarget:
    """Returns what a text names; a complete digest that nothing has is a `digest`.

    Args:
        session: Reading or writing.
        context: The registry.
        text: A file, a digest or its first digits, `name@ref`, the id of a consent, or a base.

    Raises:
        RightsError: Nothing has that name, or several things do.
    """
    path = Path(text)
    if "\0" not in text and len(text) < 4096 and path.is_file():
        return _of_digest(session, sha256_file(path))
    if not is_unicode(text):
        raise RightsError(f"nothing matches {text!r}", remedy="check the name")
    subject = _of_version(session, text) or _of_consent(session, context, text)
    if subject is not None:
        return subject
    digest = text.removeprefix("sha256:").lower()
    if is_digest(digest):
        return _of_digest(session, digest)
    return _of_base(session, text) or _of_prefix(session, digest, text)


def _of_version(session: Session, text: str) -> RevocationTarget | None:
    name, ref = split_ref(text)
    if "@" not in text or not can_exist(name, ref) or session.get(NameRow, name) is None:
        return None
    try:
        version = queries.read_version(session, name, ref)
    except UnknownVersion as error:
        raise RightsError(error.problem, where=text, allowed=error.allowed, remedy="see `loraline list`") from error
    artifact = version.artifact.sha256
    return RevocationTarget(version.ref, "version", starts=(artifact,), artifacts=(artifact,))


def _of_consent(session: Session, context: RegistryContext, text: str) -> RevocationTarget | None:
    is_consent = (SubjectRow.subject == text, SubjectRow.kind == "consent")
    manifests = sorted(session.scalars(select(SubjectRow.artifact).where(*is_consent)))
    if not manifests:
        return None
    refs = [artifact_ref(session.get_one(ArtifactRow, digest)) for digest in manifests]
    images: set[str] = set()
    unreadable = []
    for ref, entries in read_datasets(context.store, refs).items():
        if entries is None:
            unreadable.append(ref.sha256)
        images |= {entry["sha256"] for entry in entries or () if entry.get("consent") == text}
    # The images of a consent are revoked in every dataset, also where it names another consent or none.
    starts = {*manifests, *_holders(session, images)}
    return RevocationTarget(
        text, "consent", starts=tuple(sorted(starts)), pictures=tuple(sorted(images)), unreadable=tuple(unreadable)
    )


def _of_digest(session: Session, digest: str) -> RevocationTarget:
    if session.scalar(select(SubjectRow.subject).where(SubjectRow.subject == digest, SubjectRow.kind == "picture")):
        return RevocationTarget(digest, "picture", starts=tuple(_holders(session, {digest})), pictures=(digest,))
    if session.get(ArtifactRow, digest) is not None:
        return RevocationTarget(digest, "artifact", starts=(digest,))
    holders = {
        *session.scalars(select(ContentRow.artifact).where(ContentRow.sha256 == digest)),
        *session.scalars(select(ContentDigestRow.artifact).where(ContentDigestRow.digest == digest)),
    }
    if holders:
        return RevocationTarget(digest, "file", starts=tuple(sorted(holders)))
    return _of_base(session, digest) or RevocationTarget(digest, "digest")


def _of_prefix(session: Session, prefix: str, text: str) -> RevocationTarget:
    matches: set[str] = set()
    if len(prefix) >= LEAST_DIGITS:
        columns: tuple[tuple[InstrumentedAttribute[str], Any], ...] = (
            (SubjectRow.subject, SubjectRow.kind == "picture"),
            (ArtifactRow.sha256, True),
            (ContentRow.sha256, True),
            (ContentDigestRow.digest, True),
        )
        for column, is_wanted in columns:
            in_range = select(column).where(begins_with(column, prefix), is_wanted).distinct()
            matches |= set(session.scalars(in_range.limit(3)))
    if len(matches) == 1:
        return _of_digest(session, matches.pop())
    if matches:
        kinds = {digest: _of_digest(session, digest).kind for digest in sorted(matches)}
        listed = ", ".join(f"{NOUNS.get(kind, kind)} {digest[:16]}" for digest, kind in kinds.items())
        raise RightsError(f"{text!r} matches several things: {listed}", remedy="give more digits")
    consents = session.scalars(select(SubjectRow.subject).where(SubjectRow.kind == "consent").distinct())
    bases = {name for name, _ in _recorded_bases(session)}
    raise RightsError(
        f"nothing matches {text!r}",
        allowed=_ALLOWED,
        remedy=did_you_mean(text, [*consents, *sorted(bases)], "see `loraline lineage NAME@REF`", most=3),
    )


def _of_base(session: Session, text: str) -> RevocationTarget | None:
    """Returns a base by its fingerprint or name. The name of a local folder is nothing but a way to its fingerprint."""
    recorded = _recorded_bases(session)
    pairs = {(name, fingerprint) for name, fingerprint in recorded if covers_base([text], name) or fingerprint == text}
    if not pairs:
        return None
    fingerprints = {fingerprint for _, fingerprint in pairs if fingerprint}
    is_name = text not in fingerprints
    is_local = is_name and "/" not in text and all(fingerprint for _, fingerprint in pairs)
    if is_local and len(fingerprints) > 1:
        raise RightsError(
            f"several bases are called {text!r}", allowed=", ".join(sorted(fingerprints)), remedy="give a fingerprint"
        )
    bases = {text} if not is_name or is_local else {text, *fingerprints}
    bases = fingerprints if is_local else bases
    starts = {artifact for base, artifacts in recorded.items() if _is_covered(base, bases) for artifact in artifacts}
    return RevocationTarget(text, "base", starts=tuple(sorted(starts)), bases=tuple(sorted(bases)))


def _is_covered(base: tuple[str, str | None], bases: set[str]) -> bool:
    return covers_base(bases, base[0]) or base[1] in bases


def _recorded_bases(session: Session) -> dict[tuple[str, str | None], set[str]]:
    """Returns name and fingerprint of each recorded base -> the artifacts that were made on it; reads all steps."""
    found: dict[tuple[str, str | None], set[str]] = {}
    for name, fingerprint, artifact in (*_bases_of_steps(session), *_bases_of_versions(session)):
        found.setdefault((name, fingerprint), set()).add(artifact)
    return found


def _bases_of_steps(session: Session) -> Iterator[tuple[str, str | None, str]]:
    columns = select(ExecutionRow.output, ExecutionRow.settings).where(ExecutionRow.status == "COMPLETED")
    rows = list(session.execute(columns))
    reports = read_artifacts(session, {output for output, _ in rows}, kind="report")
    for output, settings in rows:
        described = settings.get("base") or {}
        name = described.get("label") or (settings.get("settings") or {}).get("base")
        if name and output not in reports:
            yield str(name), described.get("fingerprint"), output


def _bases_of_versions(session: Session) -> Iterator[tuple[str, str | None, str]]:
    for artifact, card in session.execute(select(VersionRow.artifact, VersionRow.card)):
        if card.get("base"):
            yield str(card["base"]), card.get("base_fingerprint"), artifact
    parents = select(VersionRow.artifact, VersionRow.card, ParentRow.text).join(
        ParentRow, ParentRow.child == VersionRow.id
    )
    for artifact, card, text in session.execute(parents.where(ParentRow.text.startswith(_BASE))):
        name = text.removeprefix(_BASE).strip()
        yield name, card.get("base_fingerprint") if card.get("base") == name else None, artifact


def _holders(session: Session, images: Iterable[str]) -> list[str]:
    """Returns the sorted digests of the artifacts that contain one of the images."""
    query = select(SubjectRow.artifact).where(SubjectRow.kind == "picture")
    return sorted({artifact for (artifact,) in batched(session, query, SubjectRow.subject, images)})
