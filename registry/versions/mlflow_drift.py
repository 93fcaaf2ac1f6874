"""Compares MLflow with the registry's rows: finds what others changed in MLflow. Reads only.

`registry.versions.mlflow_sync` restores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select

from registry import queries
from registry.entities import AdapterVersion, Problem
from registry.home import Home
from registry.store.database import Database, sqlite_file
from registry.store.redaction import redact_values
from registry.store.tables import AliasRow, VersionRow
from registry.versions.mlflow_tables import NO_STAGE, PREFIX, TRAINING, MlflowTables, MlflowVersion, read_tables

RESTORE = "the next command that writes restores it; `loraline fsck --repair` restores it now"
_PARAMETER, _STATE = f"{PREFIX}param.", f"{PREFIX}state"
_TAG_LENGTH = 8000
_SHOWN = 64


@dataclass(frozen=True)
class Difference:
    """One difference between MLflow and the registry.

    Attributes:
        name: The adapter.
        what: The difference.
        version: Number of the version that differs; None for an alias.
        alias: The alias that differs; None for a version.
        is_lost: True if MLflow has lost the version or its run, which then have to be written again.
    """

    name: str
    what: str
    version: int | None = None
    alias: str | None = None
    is_lost: bool = False

    @property
    def problem(self) -> Problem:
        """Returns it as a problem of the home."""
        return Problem(self.what, f"MLflow's {self.name}@{self.alias or self.version}", RESTORE)


@dataclass(frozen=True)
class _Expected:
    """What MLflow should have: the synced versions, and each synced alias with its number (None: removed)."""

    versions: Sequence[AdapterVersion]
    aliases: Mapping[tuple[str, str], int | None]
    pending: frozenset[tuple[str, str]]


def find_drift(home: Home, database: Database, name: str | None = None) -> list[Difference]:
    """Returns how MLflow differs from the rows that were synced to it; takes milliseconds.

    Ignores what `is_synced` reports: rows that MLflow does not have yet, and a missing database.

    Args:
        home: The home.
        database: The registry's database.
        name: The adapter; None compares all.

    Raises:
        MlflowError: MLflow's database cannot be read.
    """
    file = sqlite_file(home.mlflow_url)
    if file is not None and not file.exists():
        return []
    expected = _read_expected(database, name)
    while expected.versions:
        differences = list(_compare(expected, read_tables(home.mlflow_url, name)))
        current = _read_expected(database, name) if differences else expected
        if current == expected:
            return differences
        expected = current  # another process changed the registry and MLflow between both reads
    return []


def expected_tags(version: AdapterVersion) -> dict[str, str]:
    """Returns the tags of a version's run; the model version has these and its state."""
    tags = {
        "version": version.ref,
        "sha256": version.sha256,
        "artifact": version.artifact.sha256,
        "report": version.report.sha256 if version.report else "",
        "run": version.run_id or "",
        "passed": {True: "yes", False: "no", None: "not evaluated"}[version.passed],
        "parents": ", ".join(version.parents),
        "title": str(version.card.get("title") or ""),
        "base": str(version.card.get("base") or "").rpartition("/")[2],
        "trigger": str(version.card.get("trigger") or ""),
        "license": str(version.card.get("license") or ""),
    }
    return {f"{PREFIX}{key}": redact_values(value)[:_TAG_LENGTH] for key, value in tags.items() if value}


def with_state(version: AdapterVersion) -> dict[str, str]:
    """Returns the tags of a model version."""
    return {**expected_tags(version), _STATE: version.state}


def own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags that `expected_tags` determines: not those of long parameters and of trainings."""
    others = (_PARAMETER, TRAINING)
    return {key: value for key, value in tags.items() if key.startswith(PREFIX) and not key.startswith(others)}


def _read_expected(database: Database, name: str | None) -> _Expected:
    with database.read() as session:
        versions = select(VersionRow).where(VersionRow.mirrored).order_by(VersionRow.name, VersionRow.version)
        aliases = select(AliasRow)
        if name is not None:
            versions, aliases = versions.where(VersionRow.name == name), aliases.where(AliasRow.name == name)
        # A damaged key has no counterpart in MLflow; `fsck` names it.
        rows = [row for row in session.scalars(aliases) if isinstance(row.name, str) and isinstance(row.alias, str)]
        synced = {(row.name, row.alias): row.version for row in rows if row.mirrored_seq >= row.seq}
        pending = frozenset((row.name, row.alias) for row in rows) - synced.keys()
        return _Expected(queries.entities(session, session.scalars(versions).all()), synced, pending)


def _compare(expected: _Expected, tables: MlflowTables) -> Iterator[Difference]:
    names = {version.name for version in expected.versions}
    for version in expected.versions:
        for what, is_lost in _compare_version(version, tables.versions.get((version.name, version.version))):
            yield Difference(version.name, what, version=version.version, is_lost=is_lost)
    actual = {key: number for key, number in tables.aliases.items() if key[0] in names}
    for name, alias in sorted((expected.aliases.keys() | actual.keys()) - expected.pending):
        wanted, number = expected.aliases.get((name, alias)), actual.get((name, alias))
        if wanted != number:
            yield Difference(name, f"points at {_number(number)} instead of {_number(wanted)}", alias=alias)


def _compare_version(version: AdapterVersion, entry: MlflowVersion | None) -> Iterator[tuple[str, bool]]:
    if entry is None:
        yield "MLflow does not have this version", True
        return
    if entry.run_id != version.mlflow_run_id or entry.run_stage is None:
        yield "MLflow does not have its run", True
        return
    if entry.run_stage != "active":
        yield "its run is deleted", False
    if entry.stage != NO_STAGE:
        yield f"has the stage {entry.stage!r}, which the registry does not use", False
    expected = expected_tags(version)
    for where, tags, wanted in (
        ("", own_tags(entry.tags), {**expected, _STATE: version.state}),
        (" of its run", own_tags(entry.run_tags), expected),
    ):
        for key in sorted(tags.keys() | wanted.keys()):
            if tags.get(key) != wanted.get(key):
                yield f"the tag {key!r}{where} is {_tag(tags.get(key))} instead of {_tag(wanted.get(key))}", False


def _number(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"


def _tag(value: str | None) -> str:
    return "missing" if value is None else repr(value[:_SHOWN])
