"""Checks invariants after a fault with plain SQL and plain files, without the code under test.

I1 the database is intact. I2 every visible version has the bytes of its digest. I3 the log replays to the aliases.
I4 nothing was written outside the home. I5 the canary file is unchanged. I6 every checkpoint has the bytes of its
digest. Results promised before the fault still exist.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from registry.home import Home
from registry.maintenance.fsck import fsck
from tests.faults.training import state_violations


def violations(home: Path, promised: Iterable[str] = ()) -> list[str]:
    """Returns the violated invariants; empty if all hold.

    Args:
        home: The folder of the home, in a folder with no other entry but `canary`.
        promised: Lines that a process reported after a call returned: `put DIGEST`, `registered NAME VERSION DIGEST`,
            `moved NAME ALIAS SEQ`, `trained NAME STEPS DIGEST`.
    """
    violated = [f"I4: {path} appeared" for path in home.parent.iterdir() if path.name not in {home.name, "canary"}]
    if (home.parent / "canary").read_bytes() != b"alive":
        violated.append("I5: the canary file changed")
    promised = list(promised)
    violated += state_violations(home, promised)
    database = home / "lineage.db"
    if not database.exists():
        return [*violated, *(f"lost: {line}" for line in promised)]
    with closing(sqlite3.connect(database)) as connection:
        answer = connection.execute("PRAGMA integrity_check").fetchall()
        if answer != [("ok",)]:
            return [*violated, f"I1: {answer}"]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "events" not in tables:
            return [*violated, *(f"lost: {line}" for line in promised)]
        violated += _check_versions(connection, home)
        violated += _check_aliases(connection)
        violated += _check_promises(connection, home, promised)
    violated += [f"fsck: {entry}" for entry in fsck(Home(home), mlflow=False) if entry.severity == "damage"]
    return violated


def _check_versions(connection: sqlite3.Connection, home: Path) -> Iterable[str]:
    rows = connection.execute("SELECT name, version, sha256, artifact, adapter_path FROM versions").fetchall()
    for name, version, digest, artifact, path in rows:
        listing = _blob(home, artifact)
        if hashlib.sha256(listing).hexdigest() != artifact:
            yield f"I2: the list of files of {name}@{version} is damaged"
            continue
        actual = json.loads(listing)["files"][path]["sha256"]
        if actual != digest or hashlib.sha256(_blob(home, digest)).hexdigest() != digest:
            yield f"I2: {name}@{version} does not have the bytes of {digest}"
    numbers: dict[str, list[int]] = {}
    for name, version, *_ in sorted(rows):
        numbers.setdefault(name, []).append(version)
    yield from (
        f"I2: the numbers of {name} are {sequence}"
        for name, sequence in numbers.items()
        if sequence != [*range(1, len(sequence) + 1)]
    )


def _check_aliases(connection: sqlite3.Connection) -> Iterable[str]:
    replayed: dict[tuple[str, str], int | None] = {}
    moves = "SELECT name, alias, after FROM events WHERE alias IS NOT NULL AND action <> 'refuse' ORDER BY seq"
    for name, alias, after in connection.execute(moves):
        replayed[name, alias] = after
    table = {
        (name, alias): number for name, alias, number in connection.execute("SELECT name, alias, version FROM aliases")
    }
    if replayed != table:
        yield f"I3: the log replays to {replayed}, the table has {table}"
    sequence = [seq for (seq,) in connection.execute("SELECT seq FROM events ORDER BY seq")]
    if sequence != [*range(1, len(sequence) + 1)]:
        yield f"I3: the log has gaps: {sequence[-5:]}"


def _check_promises(connection: sqlite3.Connection, home: Path, promised: Iterable[str]) -> Iterable[str]:
    for line in promised:
        action, *words = line.split()
        if action == "put" and hashlib.sha256(_blob(home, words[0])).hexdigest() != words[0]:
            yield f"lost: {line}"
        elif action == "registered":
            query = "SELECT sha256 FROM versions WHERE name = ? AND version = ?"
            if connection.execute(query, words[:2]).fetchone() != (words[2],):
                yield f"lost: {line}"
        elif action == "moved":
            query = "SELECT name, alias FROM events WHERE seq = ?"
            if connection.execute(query, words[2:]).fetchone() != tuple(words[:2]):
                yield f"lost: {line}"


def _blob(home: Path, digest: str) -> bytes:
    path = home / "store" / "blobs" / digest[:2] / digest
    return path.read_bytes() if path.is_file() else b""
