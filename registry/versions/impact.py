"""Reports the impact of a revocation, by a downstream walk. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.context import RegistryContext
from registry.entities import RESULT, AdapterVersion, RevocationKind
from registry.lineage.graph import NodeId, Subgraph
from registry.lineage.rows import read_artifacts
from registry.policy.ancestry import descendants
from registry.policy.rights import revoked_upstream
from registry.store.database import batched
from registry.store.tables import ContentRow, EventRow, ExecutionRow, RunRow
from registry.versions.projections import stack
from registry.versions.subjects import RevocationTarget, find_target

Recall = Literal["flag", "withdraw"]


@dataclass(frozen=True)
class ImpactReport:
    """The impact of a revocation.

    Args:
        subject: Digest of an image, a file or an artifact; id of a consent; `name@version`; or name of a base.
        kind: Its kind; `digest` if nothing has that digest, which is blocked from now on.
        pictures: Digests of the affected images.
        manifests: Digests of the affected datasets.
        runs: `id` and `name` of the runs that used them.
        versions: `name@version` of the affected versions.
        merges: The affected versions, and digests of other adapters, that were merged from an affected adapter.
        exports: Files written for other programs: `version`, and `files` or the digest of the `artifact`.
        results: Files that verbs made from what is affected: `verb` and `files`.
        aliases: `name@alias` -> the affected version that it points at.
        policy: The policy that was applied, or would be.
        taken_back: `name@alias` -> the version that the alias was rolled back to; None if it was removed.
        unreadable: Digests of datasets with the consent that cannot be read: the images that it covers are unknown.
        event: The event of the revocation; None for a dry run.
    """

    subject: str
    kind: RevocationKind
    pictures: tuple[str, ...]
    manifests: tuple[str, ...]
    runs: tuple[Mapping[str, str], ...]
    versions: tuple[str, ...]
    merges: tuple[str, ...]
    exports: tuple[Mapping[str, Any], ...]
    results: tuple[Mapping[str, Any], ...]
    aliases: Mapping[str, int]
    policy: Recall
    taken_back: Mapping[str, int | None]
    unreadable: tuple[str, ...] = ()
    event: int | None = None


def find_affected(
    session: Session, context: RegistryContext, text: str, policy: Recall
) -> tuple[ImpactReport, list[AdapterVersion], RevocationTarget]:
    """Returns the impact of a revocation, the affected versions, and what is revoked; changes nothing.

    Args:
        session: Reading or writing.
        context: The registry.
        text: What to revoke; see `find_target`.
        policy: The policy that would be applied.

    Raises:
        RightsError: Nothing matches, or several things do.
    """
    target = find_target(session, context, text)
    descent = descendants(session, [NodeId("artifact", digest) for digest in target.starts])
    registered = queries.find_versions(session, descent.ids("version"))
    affected = [version for version in registered if version.state != "DELETED"]
    taken_back = _fallbacks(session, context, affected) if policy == "withdraw" else {}
    report = ImpactReport(
        subject=target.id,
        kind=target.kind,
        pictures=target.pictures,
        manifests=tuple(sorted(read_artifacts(session, descent.ids("artifact"), kind="manifest"))),
        runs=_runs(session, descent, target.starts),
        versions=tuple(version.ref for version in affected),
        merges=_merges(session, descent, affected),
        exports=_exports(session, descent, affected),
        results=_results(session, descent),
        aliases={f"{version.name}@{alias}": version.version for version in affected for alias in version.aliases},
        policy=policy,
        taken_back=taken_back,
        unreadable=target.unreadable,
    )
    return report, affected, target


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


def _results(session: Session, descent: Subgraph) -> tuple[Mapping[str, Any], ...]:
    """Returns the files that verbs wrote outside of the store; exports are listed by their events."""
    outputs = read_artifacts(session, descent.ids("artifact"), kind=RESULT)
    query = select(ExecutionRow.uses, ExecutionRow.output).where(ExecutionRow.uses != "export")
    made = {output: verb for verb, output in batched(session, query, ExecutionRow.output, outputs)}
    files: dict[str, list[dict[str, str]]] = {digest: [] for digest in made}
    columns = select(ContentRow.artifact, ContentRow.path, ContentRow.sha256).order_by(ContentRow.path)
    for artifact, path, digest in batched(session, columns, ContentRow.artifact, made):
        files[artifact].append({"file": path, "sha256": digest})
    return tuple({"verb": made[digest], "files": files[digest]} for digest in sorted(made))


def _fallbacks(session: Session, context: RegistryContext, affected: Sequence[AdapterVersion]) -> dict[str, int | None]:
    """Returns for each alias of an affected version the last version that had it and may have it again, or None."""
    refs = {version.ref for version in affected}
    fallbacks: dict[str, int | None] = {}
    for version in affected:
        for alias in version.aliases:
            earlier = dict.fromkeys(reversed(stack(event_log.read_events(session, version.name, alias))))
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
