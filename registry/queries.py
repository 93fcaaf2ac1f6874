"""Reads versions and aliases; each query runs within the caller's transaction."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

from sqlalchemy import case, func, select, tuple_
from sqlalchemy.orm import Session

from lora_engine.errors import did_you_mean
from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import AdapterVersion, ArtifactRef, VersionState
from registry.errors import UnknownName, UnknownVersion
from registry.lineage.graph import version_ids
from registry.lineage.rows import artifact_of, read_artifacts
from registry.refs import LATEST, can_exist, version_number
from registry.store.damaged import DamagedCell, as_tuple
from registry.store.database import batched
from registry.store.tables import AliasRow, NameRow, ParentRow, VersionRow

_logger = logging.getLogger(__name__)
_SHOWN = 64
"""Characters of an unknown name that a message shows."""


def find_row(session: Session, name: str, ref: str | int) -> VersionRow:
    """Returns the row of a version by its number, an alias, or `latest`.

    Raises:
        UnknownName: No adapter of that name; the message names the nearest matches.
        UnknownVersion: No such number or alias; the message lists the existing ones.
    """
    number = version_number(ref)
    if not can_exist(name, ref):
        raise _unknown(session, name, str(ref) if isinstance(ref, str) else "a number of over 18 digits")
    versions = select(VersionRow).where(VersionRow.name == name)
    text = str(ref)
    if text == LATEST:
        # A withdrawn or deleted version is not the latest unless no other version is left.
        active_first = (case((VersionRow.state == "ACTIVE", 0), else_=1), VersionRow.version.desc())
        row = session.scalars(versions.order_by(*active_first).limit(1)).first()
    elif number is not None:
        row = session.scalars(versions.where(VersionRow.version == number)).first()
    else:
        alias = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == text).scalar_subquery()
        row = session.scalars(versions.where(VersionRow.version == alias)).first()
    if row is None:
        raise _unknown(session, name, text)
    return row


def read_version(session: Session, name: str, ref: str | int) -> AdapterVersion:
    """Returns the version by its number, an alias, or `latest`; raises as `find_row` does."""
    return entities(session, [find_row(session, name, ref)])[0]


def read_versions(session: Session, name: str | None = None) -> list[AdapterVersion]:
    """Returns all versions of one name or of all names, ordered by name and number."""
    query = select(VersionRow).order_by(VersionRow.name, VersionRow.version)
    if name is not None and not can_exist(name):
        return []
    if name is not None:
        query = query.where(VersionRow.name == name)
    return entities(session, [row for row in session.scalars(query) if _has_ref(row)])


def read_aliased(session: Session, name: str | None = None) -> list[AdapterVersion]:
    """Returns the versions of one name, or of all names, that an alias points at, ordered by name and number."""
    targets = select(AliasRow.name, AliasRow.version).where(AliasRow.version.is_not(None))
    if name is not None:
        targets = targets.where(AliasRow.name == name)
    if not can_exist(name or "any"):
        return []
    query = select(VersionRow).where(tuple_(VersionRow.name, VersionRow.version).in_(targets))
    rows = session.scalars(query.order_by(VersionRow.name, VersionRow.version))
    return entities(session, [row for row in rows if _has_ref(row)])


def read_latest(session: Session, name: str | None = None) -> list[tuple[AdapterVersion, int]]:
    """Returns the latest active version of one name, or of all, with the number of its active versions; by name."""
    if not can_exist(name or "any"):
        return []
    latest = select(VersionRow.name, func.max(VersionRow.version).label("version"), func.count().label("active"))
    latest = latest.where(VersionRow.state == "ACTIVE").group_by(VersionRow.name)
    found = (latest if name is None else latest.where(VersionRow.name == name)).subquery()
    query = select(VersionRow, found.c.active).join(
        found, (VersionRow.name == found.c.name) & (VersionRow.version == found.c.version)
    )
    rows = {row.name: (row, active) for row, active in session.execute(query) if _has_ref(row)}
    versions = {version.name: version for version in entities(session, [row for row, _ in rows.values()])}
    return [(versions[adapter], rows[adapter][1]) for adapter in sorted(versions)]


def read_versions_of_runs(session: Session, runs: Iterable[str]) -> list[AdapterVersion]:
    """Returns the versions that runs registered, by the runs' ids, ordered by name and number."""
    rows = [row for (row,) in batched(session, select(VersionRow), VersionRow.run_id, runs) if _has_ref(row)]
    return entities(session, sorted(rows, key=lambda row: (row.name, row.version)))


def find_versions(session: Session, refs: Iterable[str]) -> list[AdapterVersion]:
    """Returns the versions by `name@version`, ordered by name and number; leaves out those that do not exist."""
    rows = [row for (row,) in batched(session, select(VersionRow), VersionRow.id, version_ids(session, refs))]
    return entities(session, sorted(rows, key=lambda row: (row.name, row.version)))


def find_identical(session: Session, name: str, artifact: ArtifactRef, report: ArtifactRef | None) -> VersionRow | None:
    """Returns the row of that name with the same artifact and report; None if there is none."""
    identity = identity_of(artifact, report)
    return session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.identity == identity)).first()


def identity_of(artifact: ArtifactRef, report: ArtifactRef | None) -> str:
    """Returns the digest of artifact and report; versions of a name with the same identity are the same version."""
    return sha256_bytes(canonical_json([artifact.sha256, report.sha256 if report else None]))


def alias_target(session: Session, name: str, alias: str) -> int | None:
    """Returns the number that an alias points at, or None."""
    return session.scalar(select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == alias))


def alias_table(session: Session) -> dict[tuple[str, str], int]:
    """Returns all aliases that point at a version: (name, alias) -> number."""
    rows = session.scalars(select(AliasRow).order_by(AliasRow.name, AliasRow.alias))
    # A damaged row is left out; the log has its target.
    intact = (row for row in rows if isinstance(row.name, str) and isinstance(row.alias, str))
    return {(row.name, row.alias): row.version for row in intact if isinstance(row.version, int)}


def entities(session: Session, rows: Sequence[VersionRow]) -> list[AdapterVersion]:
    """Returns the versions of rows with their artifacts, aliases and parents; uses a few queries for all rows."""
    digests = {digest for row in rows for digest in (row.artifact, row.report) if isinstance(digest, str)}
    artifacts = read_artifacts(session, digests)
    aliases: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    by_alias, names = select(AliasRow).order_by(AliasRow.alias), {row.name for row in rows}
    for (alias,) in batched(session, by_alias, AliasRow.name, names):
        if not isinstance(alias.version, DamagedCell) and isinstance(alias.alias, str):
            aliases[alias.name, alias.version].append(alias.alias)
    parents: dict[int, list[str]] = defaultdict(list)
    by_position = select(ParentRow).order_by(ParentRow.child, ParentRow.position)
    for (parent,) in batched(session, by_position, ParentRow.child, (row.id for row in rows)):
        parents[parent.child].append(parent.text)
    return [
        AdapterVersion(
            name=row.name,
            version=row.version,
            sha256=row.sha256,
            size=row.size,
            artifact=artifact_of(artifacts, row.artifact, "versions", row.id, "artifact"),
            adapter_path=row.adapter_path,
            report=artifact_of(artifacts, row.report, "versions", row.id, "report") if row.report is not None else None,
            aliases=tuple(aliases[row.name, row.version]),
            created_at=row.created_at,
            run_id=row.run_id,
            mlflow_run_id=row.mlflow_run_id,
            card=row.card,
            metrics=row.metrics,
            gates=as_tuple(row.gates),
            passed=row.passed,
            parents=tuple(parents[row.id]),
            params=row.params,
            state=cast("VersionState", row.state),
        )
        for row in rows
    ]


def _has_ref(row: VersionRow) -> bool:
    """Returns False, and logs it, if the number of a version is damaged: only `fsck` can name such a version."""
    damaged = [value for value in (row.name, row.version) if isinstance(value, DamagedCell)]
    for cell in damaged:
        _logger.warning("left out row %s of the table %s: its column %r is damaged", cell.row, cell.table, cell.column)
    return not damaged


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _unknown(session: Session, name: str, ref: str) -> UnknownName | UnknownVersion:
    names = list(session.scalars(select(NameRow.name).order_by(NameRow.name)))
    if name not in names:
        remedy = did_you_mean(name[:_SHOWN], names, "see `loraline list`", most=3)
        return UnknownName(f"no adapter {_short(name)} among {len(names)}", remedy=remedy)
    count = session.scalar(select(func.count()).where(VersionRow.name == name)) or 0
    table = alias_table(session)
    aliases = ", ".join(alias for owner, alias in table if owner == name) or "none"
    return UnknownVersion(
        f"no version {_short(ref)}", where=name, allowed=f"1 to {count}, 'latest', or one of the aliases: {aliases}"
    )
