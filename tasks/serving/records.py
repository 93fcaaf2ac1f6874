"""`JobRecords`: the accepted jobs of a server on disk, so that a killed server draws them after its restart."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora_engine.files import canonical_json
from registry.entities import now
from registry.errors import HomeError, database_error
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import Failure, Job, JobState

_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key TEXT,
    fingerprint TEXT NOT NULL,
    request TEXT NOT NULL,
    adapters TEXT NOT NULL,
    created TEXT NOT NULL,
    state TEXT NOT NULL,
    ended TEXT,
    failure TEXT,
    size INTEGER NOT NULL,
    UNIQUE (tenant, key)
);
CREATE INDEX jobs_ended ON jobs (ended);
"""
_INSERT = """
INSERT INTO jobs (id, tenant, key, fingerprint, request, adapters, created, state, size)
VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', 0)
"""
_REQUESTS = TypeAdapter(DrawRequest)


class JobRecords:
    """The jobs in a SQLite file; may be used by several threads.

    A job that was added is on the disk. Its state is `queued` until it ended: a server that is killed has no running
    jobs.

    Args:
        path: The file; created if it is missing.

    Raises:
        HomeError: The file cannot be used, or a newer release wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable_errors():
            # Autocommit: each method is one statement.
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=20)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._open_schema()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def add(self, job: Job, fingerprint: str, key: str | None) -> None:
        """Adds a queued job; when this returns, it is on the disk.

        Raises:
            HomeError: It could not be written, for instance `DiskFull`.
        """
        values = _REQUESTS.dump_python(job.request, mode="json")
        row = (job.id, job.tenant, key, fingerprint, _json(values), _json(list(job.adapters)), job.created.isoformat())
        self._write(_INSERT, row)

    def end(self, job: Job) -> None:
        """Stores the final state of a job.

        Raises:
            HomeError: It could not be written.
        """
        failure = None if job.failure is None else _json(asdict(job.failure))
        ended = (job.ended or now()).isoformat()
        row = (job.state.value, ended, failure, job.size, job.id)
        self._write("UPDATE jobs SET state = ?, ended = ?, failure = ?, size = ? WHERE id = ?", row)

    def find(self, job_id: str) -> Job | None:
        """Returns a job by its identifier, or None."""
        rows = self._read("SELECT * FROM jobs WHERE id = ?", (job_id,))
        return _job(rows[0]) if rows else None

    def find_key(self, tenant: str, key: str) -> tuple[str, str] | None:
        """Returns identifier and fingerprint of the job with a tenant's idempotency key, or None."""
        rows = self._read("SELECT id, fingerprint FROM jobs WHERE tenant = ? AND key = ?", (tenant, key))
        return (rows[0][0], rows[0][1]) if rows else None

    def latest(self, tenant: str | None, limit: int) -> list[Job]:
        """Returns the latest jobs of a tenant, or of all, in the order of their acceptance."""
        query = "SELECT * FROM jobs WHERE ? IS NULL OR tenant = ? ORDER BY seq DESC LIMIT ?"
        return [_job(row) for row in self._read(query, (tenant, tenant, limit))][::-1]

    def unfinished(self) -> list[Job]:
        """Returns the jobs that have not ended, in the order of their acceptance."""
        return [_job(row) for row in self._read("SELECT * FROM jobs WHERE ended IS NULL ORDER BY seq", ())]

    def expired(self, hours: float) -> list[str]:
        """Returns the jobs that ended longer ago than some hours."""
        before = (now() - timedelta(hours=hours)).isoformat()
        return [row[0] for row in self._read("SELECT id FROM jobs WHERE ended < ?", (before,))]

    def sizes(self) -> list[tuple[str, int]]:
        """Returns the jobs with images, oldest first, and the size of their images in bytes."""
        return [(row[0], row[1]) for row in self._read("SELECT id, size FROM jobs WHERE size > 0 ORDER BY seq", ())]

    def drop_images(self, job_id: str) -> None:
        """Stores that the images of a job were deleted."""
        self._write("UPDATE jobs SET size = 0 WHERE id = ?", (job_id,))

    def delete(self, job_id: str) -> None:
        """Deletes a job."""
        self._write("DELETE FROM jobs WHERE id = ?", (job_id,))

    def inputs(self) -> set[str]:
        """Returns the names of the input images of jobs that have not ended."""
        return {path.name for job in self.unfinished() for path in (job.request.image, job.request.mask) if path}

    def _open_schema(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise HomeError(
                f"a newer release wrote the jobs (version {version})", where=str(self._path), remedy="use that release"
            )
        if version == 0:
            self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._lock, self._readable_errors():
            self._connection.execute(statement, values)

    def _read(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        with self._lock, self._readable_errors():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            readable = database_error(str(error), str(self._path))
            if readable is None:
                raise
            raise readable from error


def _json(value: Any) -> str:
    return canonical_json(value).decode()


def _job(row: sqlite3.Row) -> Job:
    request = _REQUESTS.validate_json(row["request"])
    failure = None if row["failure"] is None else Failure.from_json(json.loads(row["failure"]))
    job = Job(
        row["id"],
        row["tenant"],
        request,
        JobState(row["state"]),
        tuple(json.loads(row["adapters"])),
        datetime.fromisoformat(row["created"]),
        steps=request.steps,
        ended=None if row["ended"] is None else datetime.fromisoformat(row["ended"]),
        error=None if failure is None else failure.message,
        failure=failure,
        size=row["size"],
    )
    return replace(job, step=job.steps) if job.state is JobState.COMPLETED else job
