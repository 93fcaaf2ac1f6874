"""What a picture or a consent has reached: one walk down, and what is to be told of it. Changes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_file
from registry import queries
from registry.context import RegistryContext
from registry.entities import AdapterVersion, is_digest
from registry.errors import RightsError
from registry.lineage.record import artifact_ref
from registry.policy.ancestry import trace
from registry.policy.descent import Descent, descendants, holding
from registry.policy.revocations import revoked_ancestors, revoked_subjects
from registry.policy.terms import read_datasets
from registry.store.tables import ArtifactRow, EventRow, ExecutionRow, RunRow, SubjectRow
from registry.versions.promotion import stack

Recall = Literal["flag", "withdraw"]
PREFIX = 6
"""How many digits of a digest name it."""


@dataclass(frozen=True)
class ImpactReport:
    """What a picture or a consent has reached.

    Args:
        subject: Digest of the picture, or id of the consent.
        kind: `picture` or `consent`.
        pictures: Digests of the pictures that it is about.
        manifests: Digests of the datasets that hold them.
        runs: `id` and `name` of the runs that worked with them.
        versions: `name@version` of what was made from them.
        merges: Those of the versions, and digests of other adapters, that were merged from something reached.
        exports: What was written for other programs: `version`, and `files` or the digest of the `artifact`.
        aliases: `name@alias` -> the reached version that it points at.
        policy: What was done about it, or would be.
        taken_back: `name@alias` -> the version that the alias was taken back to, or None where it was removed.
        event: The event of the revocation; None where nothing was done.
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
    """What a picture or a consent has reached, and the reached versions themselves; changes nothing.

    Args:
        session: Reading or writing.
        opened: The registry.
        text: A picture file, the digest of one or its beginning, or the id of a consent.
        policy: What would be done about it.

    Raises:
        RightsError: Nothing, or more than one thing, goes by that name.
    """
    subject, kind = _resolve(session, text)
    manifests = [session.get_one(ArtifactRow, digest) for digest in holding(session, [subject])]
    pictures = {subject} if kind == "picture" else set()
    if kind == "consent":
        for entries in read_datasets(context.store, map(artifact_ref, manifests)).values():
            pictures |= {entry["sha256"] for entry in entries or () if entry.get("consent") == subject}
    # A consent reaches its pictures in every dataset, also in those that name another consent or none.
    starts = holding(session, {subject, *pictures})
    descent = descendants(session, starts)
    reached = sorted(
        (version for version in descent.versions if version.state != "DELETED"),
        key=lambda each: (each.name, each.version),
    )
    taken_back = _fallbacks(session, context, reached) if policy == "withdraw" else {}
    found = ImpactReport(
        subject=subject,
        kind=kind,
        pictures=tuple(sorted(pictures)),
        manifests=tuple(sorted({*starts, *_artifacts(descent, "manifest")})),
        runs=_runs(session, descent, starts),
        versions=tuple(version.ref for version in reached),
        merges=_merges(descent, reached),
        exports=_exports(session, descent, reached),
        aliases={f"{each.name}@{alias}": each.version for each in reached for alias in each.aliases},
        policy=policy,
        taken_back=taken_back,
    )
    return found, reached


def _resolve(session: Session, text: str) -> tuple[str, Literal["picture", "consent"]]:
    path = Path(text)
    if "\0" not in text and len(text) < 4096 and path.is_file():
        return sha256_file(path), "picture"
    kinds = ("picture", "consent")
    rows = session.execute(select(SubjectRow.kind).where(SubjectRow.subject == text, SubjectRow.kind.in_(kinds)))
    known = sorted(set(rows.scalars()))
    if known:
        return text, "consent" if known == ["consent"] else "picture"
    if is_digest(text):
        return text, "picture"
    if len(text) >= PREFIX:
        beginning = (SubjectRow.subject >= text, SubjectRow.subject < text + "\uffff", SubjectRow.kind == "picture")
        near = list(session.scalars(select(SubjectRow.subject).where(*beginning).distinct().limit(3)))
        if len(near) == 1:
            return near[0], "picture"
        if near:
            listed = ", ".join(digest[:16] for digest in near)
            raise RightsError(f"{text!r} is the beginning of several pictures: {listed}", remedy="give more digits")
    consents = session.scalars(select(SubjectRow.subject).where(SubjectRow.kind == "consent").distinct())
    close = difflib.get_close_matches(text, list(consents), n=3)
    raise RightsError(
        f"no picture and no consent is known by {text!r}",
        allowed="a picture file, its digest (or the first 6 digits), or the id of a consent",
        remedy=f"did you mean {', '.join(map(repr, close))}?" if close else "`loraline lineage NAME@REF` lists both",
    )


def _artifacts(descent: Descent, kind: str) -> list[str]:
    return [node.id for node in descent.nodes.values() if node.kind == "artifact" and node.label == kind]


def _runs(session: Session, descent: Descent, starts: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    ids = {node.detail["run"] for node in descent.nodes.values() if node.kind == "execution"}
    for start in starts:
        ids.update(session.scalars(select(ExecutionRow.run_id).where(ExecutionRow.output == start)))
    rows = [session.get_one(RunRow, run) for run in ids]
    return tuple({"id": row.id, "name": row.name} for row in sorted(rows, key=lambda row: (row.started_at, row.id)))


def _merges(descent: Descent, reached: Sequence[AdapterVersion]) -> tuple[str, ...]:
    steps = {node.id for node in descent.nodes.values() if node.kind == "execution" and node.detail["uses"] == "merge"}
    made = {edge.target.id for edge in descent.edges if edge.source.kind == "execution" and edge.source.id in steps}
    refs = {each.ref for each in reached}
    merged = {each.ref for each in reached if each.artifact.sha256 in made or refs.intersection(each.parents)}
    return (*sorted(merged), *sorted(made - {each.artifact.sha256 for each in reached}))


def _exports(session: Session, descent: Descent, reached: Sequence[AdapterVersion]) -> tuple[Mapping[str, Any], ...]:
    written: list[Mapping[str, Any]] = [{"artifact": digest} for digest in sorted(_artifacts(descent, "export"))]
    numbers: dict[str, set[int]] = {}
    for version in reached:
        numbers.setdefault(version.name, set()).add(version.version)
    for name, wanted in sorted(numbers.items()):
        query = select(EventRow).where(EventRow.name == name, EventRow.action == "export").order_by(EventRow.seq)
        written += [
            {"version": f"{name}@{row.after}", "event": row.seq, "files": row.details.get("files", [])}
            for row in session.scalars(query)
            if row.after in wanted
        ]
    return tuple(written)


def _fallbacks(session: Session, context: RegistryContext, reached: Sequence[AdapterVersion]) -> dict[str, int | None]:
    """Per alias of something reached: the last version that had it and can have it again, or None."""
    refs = {each.ref for each in reached}
    fallbacks: dict[str, int | None] = {}
    for version in reached:
        for alias in version.aliases:
            earlier = dict.fromkeys(reversed(stack(queries.read_events(session, version.name, alias))))
            candidates = (queries.read_version(session, version.name, number) for number in earlier)
            fit = (
                each.version
                for each in candidates
                if each.ref not in refs
                and each.state == "ACTIVE"
                and not revoked_in(session, each)
                and not context.damage(each)
            )
            fallbacks[f"{version.name}@{alias}"] = next(fit, None)
    return fallbacks


def revoked_in(session: Session, version: AdapterVersion) -> tuple[str, ...]:
    """In words, what of all that is revoked a version was made from."""
    revoked = revoked_subjects(session)
    return revoked_ancestors(session, trace(session, version.artifact), revoked) if revoked else ()
